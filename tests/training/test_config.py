import json
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from metroem.data.dataset import Split
from metroem.imaging.mask_rules import MaskRule, MaskRules
from metroem.specs.augmentations import KnownWarp, Photometric, RandomFlip
from metroem.specs.losses import LossSpec
from metroem.specs.modules import ModuleSpec
from metroem.specs.schedule import MODES, Phase, load_schedule, parse_schedule
from metroem.training.checkpoint import RunFolder
from metroem.training.config import StageConfig, describe_differences

PHASE = Phase(0.001, 2, 5.0)


def config_of(*phases, **options):
    values = {
        "module": ModuleSpec(0, 1, "x", Path()),
        "phases": phases,
        "split": Split([], []),
        "run": RunFolder(Path()),
        "checkpoint_name": "ck",
        "device": torch.device("cpu"),
        "seed": 0,
        "batch_size": None,
        "num_workers": 0,
        "precision": "fp32",
    }
    return StageConfig(**{**values, **options})


def test_an_update_has_the_pairs_of_all_its_batches():
    phase = replace(PHASE, batch_size=3, accumulate=4)
    config = config_of(phase)
    assert config.batch_of(phase) == 3 and config.pairs_of_update(phase) == 12


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "custom"])
def test_phases_are_written_as_the_json_that_they_are_read_from(mode):
    for phases in load_schedule(mode, None).phases.values():
        entries = json.loads(json.dumps([phase.to_json() for phase in phases]))
        # A schedule says null by leaving a key out.
        known = [
            {key: value for key, value in entry.items() if value is not None}
            for entry in entries
        ]
        assert parse_schedule({"0": known}, "it").phases[0] == phases


def test_a_phase_that_uses_all_kinds_of_keys_comes_back():
    rules = MaskRules(
        src=(
            MaskRule("src_zeros", None, "between", 0.0, (-1.0, 1.0), 0.1, ((2, 0.5),)),
        )
    )
    phase = replace(
        PHASE,
        losses=(LossSpec("known_warp"), LossSpec("metric", levels=(0, 2), weight=0.5)),
        similarity_rules=rules,
        augmentations=(RandomFlip(), KnownWarp(peak_px=4), Photometric(blur=2.0)),
    )
    entry = {k: v for k, v in phase.to_json().items() if v is not None}
    assert parse_schedule({"0": [entry]}, "it").phases[0] == (phase,)


def differences(before, now):
    return describe_differences(before.fingerprint(), now.fingerprint())


def test_a_fingerprint_is_json_and_equal_to_itself():
    found = config_of(PHASE).fingerprint()
    assert json.loads(json.dumps(found)) == found
    assert describe_differences(found, found) == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": 0.002}, "lr of phase 2 was 0.001, is 0.002"),
        ({"ema": 0.5}, "ema of phase 2 was not given, is 0.5"),
        ({"accumulate": 3}, "accumulate of phase 2 was 1, is 3"),
        (
            {"losses": (LossSpec("known_warp", weight=2.0),)},
            'loss_spec 0 type of phase 2 was "plain", is "known_warp"; '
            "loss_spec 0 weight of phase 2 was 1.0, is 2.0",
        ),
        (
            {"augmentations": (RandomFlip(0.25),)},
            "augmentations 0 prob of phase 2 was 0.5, is 0.25",
        ),
        ({"augmentations": ()}, "augmentations of phase 2 was [{"),
    ],
)
def test_a_difference_of_schedules_is_named_by_its_key(change, said):
    phase = replace(PHASE, augmentations=(RandomFlip(),))
    found = differences(
        config_of(PHASE, phase), config_of(PHASE, replace(phase, **change))
    )
    assert found.startswith(said)


def test_other_differences_are_named_by_their_flag_or_in_words():
    config = config_of(PHASE)
    assert differences(config, config_of(PHASE, PHASE)) == (
        "the schedule had 1 phases, has 2"
    )
    found = differences(config, config_of(PHASE, seed=1, precision="bf16"))
    assert found == '--seed was 0, is 1; --precision was "fp32", is "bf16"'
    before = {**config.fingerprint(), "training pairs": ["a", "b"], "images": ["1"]}
    after = {**before, "training pairs": ["b", "c", "d"], "images": ["2"]}
    assert describe_differences(before, after) == (
        "the pairs to train on are not the same (1 are gone, such as a and 2 are new, "
        "such as c); the images of the pairs are not the same"
    )
    assert "their order" in describe_differences(
        before, {**before, "training pairs": ["b", "a"]}
    )
