import json
import logging
from pathlib import Path

import pytest

from metroem.errors import UsageError
from metroem.masks import SIMILARITY_RULES, MaskRule
from metroem.specs.augmentations import RandomTranspose, RandomWarp
from metroem.specs.schedule import (
    LossSpec,
    load_schedule,
    parse_schedule,
)

PHASE = {"lr": 1e-3, "num_epochs": 5, "smoothness": 10}


def test_the_stock_schedules_are_those_of_the_original():
    scratch = load_schedule("scratch", None)
    assert sorted(scratch.phases) == [3, 4, 5, 6, 7]
    plain, metric = scratch.for_mip(5)
    assert (plain.loss.type, plain.num_epochs, plain.lr) == ("plain", 100, 3e-5)
    assert (metric.loss.type, metric.num_epochs, metric.smoothness) == (
        "metric",
        4000,
        25,
    )
    assert metric.loss.pre_align_weight == 0.8
    (finetune,) = load_schedule("finetune", None).for_mip(7)
    assert finetune.lr == 5e-6
    (warp,) = [a for a in finetune.augmentations if isinstance(a, RandomWarp)]
    assert warp.prob == 0.8 and warp.max_disp == 12


def test_a_mip_without_an_entry_takes_the_nearest_and_says_so(caplog):
    schedule = parse_schedule({"3": [PHASE], "6": [{**PHASE, "lr": 1}]}, "mine.json")
    with caplog.at_level(logging.INFO, "metroem"):
        assert schedule.for_mip(0) == schedule.phases[3]
        assert schedule.for_mip(9) == schedule.phases[6]
    assert "mine.json has no entry for mip 9: using that of mip 6" in caplog.text


def test_max_epochs_caps_each_phase():
    schedule = parse_schedule({"3": [PHASE, {**PHASE, "num_epochs": 1}]}, "")
    assert [p.num_epochs for p in schedule.for_mip(3, max_epochs=2)] == [2, 1]


def test_every_key_of_the_original_is_read(tmp_path):
    rule = {
        "name": "src",
        "fm": 0,
        "binarization": {"strat": "between", "range": [-1, 2]},
        "mask_value": 1e-5,
        "coarsen_ranges": [[1, 0.0], [3, 0.5]],
    }
    phase = PHASE | {
        "num_samples": 7,
        "print_every": 3,
        "loss_spec": {
            "type": "metric",
            "params": {
                "levels": [0, 1],
                "pre_align_sample": 32,
                "pre_align_weight": 0.9,
                "norm_embeddings": False,
                "sm_div": True,
                "train_thru": False,
                "pure_emb": True,
            },
        },
        "mse_keys_to_apply": {"src": [rule], "tgt": []},
        "sm_keys_to_apply": {"src": [rule]},
        "augmentations": [
            {"type": "random_transpose", "prob": 0.3},
            {
                "type": "warp",
                "prob": 0.5,
                "difficulty": 3,
                "min_disp": -4,
                "max_disp": 4,
                "randomize_d": True,
                "random_epicenters": False,
            },
        ],
    }
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"2": [phase]}))

    (found,) = load_schedule("custom", path).for_mip(2)

    assert found.loss == LossSpec("metric", (0, 1), 32, 0.9, False, True, False, True)
    assert found.loss.embedding_levels == (0, 1)
    mask = MaskRule("src", 0, "between", 0.0, (-1, 2), 1e-5, ((1, 0.0), (3, 0.5)))
    assert found.similarity_rules.src == (mask,) and not found.similarity_rules.tgt
    assert found.smoothness_rules.src == (mask,)
    assert found.augmentations == (
        RandomTranspose(0.3),
        RandomWarp(0.5, 3, -4, 4, True, False),
    )
    assert (found.num_samples, found.print_every) == (7, 3)


def test_masks_not_given_are_those_of_the_finetuner():
    (phase,) = parse_schedule({"1": [PHASE]}, "").for_mip(1)
    assert phase.similarity_rules == SIMILARITY_RULES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1}, "unknown key .*learning_rate"),
        ({"lr": None}, "lr is None"),
        ({"num_epochs": 0}, "num_epochs is 0"),
        ({"num_epochs": 2.5}, "num_epochs is 2.5"),
        ({"smoothness": -1}, "smoothness is -1"),
        ({"loss_spec": {"type": "magic"}}, "'magic': expected plain or metric"),
        ({"loss_spec": {"type": "metric", "params": {"level": 0}}}, "unknown key"),
        ({"augmentations": [{"type": "noise"}]}, "type must be one of"),
        ({"augmentations": [{"type": "warp", "disp": 1}]}, "unknown key .*disp"),
        ({"mse_keys_to_apply": {"src": [{"name": "x"}]}}, "mask of 'x'"),
        ({"sm_keys_to_apply": {"both": []}}, "unknown key .*both"),
        ({"mse_keys_to_apply": {"src": [{"name": "src", "size": 1}]}}, "unknown key"),
    ],
)
def test_a_mistake_is_named_with_its_place(change, message):
    with pytest.raises(UsageError, match=f"mine: mip 4, phase 1.*{message}"):
        parse_schedule({"4": [PHASE, PHASE | change]}, "mine")


@pytest.mark.parametrize("tree", [[], {}, {"three": [PHASE]}, {"3": []}, {"3": PHASE}])
def test_what_is_no_schedule_is_refused(tree):
    with pytest.raises(UsageError):
        parse_schedule(tree, "mine")


def test_a_missing_number_is_named():
    with pytest.raises(UsageError, match="'lr'.* missing"):
        parse_schedule({"3": [{"num_epochs": 1, "smoothness": 1}]}, "mine")


def test_a_path_belongs_to_custom_and_only_to_it(tmp_path):
    with pytest.raises(UsageError, match="--train_mode custom"):
        load_schedule("scratch", tmp_path / "s.json")
    with pytest.raises(UsageError, match="--train_mode custom"):
        load_schedule("custom", None)
    with pytest.raises(UsageError, match="no such file"):
        load_schedule("custom", Path("nowhere.json"))
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(UsageError, match="not JSON"):
        load_schedule("custom", tmp_path / "s.json")
