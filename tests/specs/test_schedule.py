import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest

from metroem.errors import UsageError
from metroem.imaging.mask_rules import SIMILARITY_RULES, MaskRule
from metroem.specs.augmentations import KnownWarp, RandomTranspose, RandomWarp
from metroem.specs.losses import LossSpec
from metroem.specs.schedule import MODES, Phase, load_schedule, parse_schedule

PHASE = {"lr": 1e-3, "num_epochs": 5, "smoothness": 10}


@pytest.mark.parametrize("mode", ["scratch", "aligned", "quick", "finetune"])
@pytest.mark.parametrize("mip", [0, 2, 5])
def test_our_schedules_know_the_truth_at_every_mip(mode, mip):
    for phase in load_schedule(mode, None).for_mip(mip):
        assert "known_warp" in [loss.type for loss in phase.losses]
        assert phase.known_warp is not None
        assert phase.known_warp.aligned == (mode == "aligned")


def test_the_quick_schedule_shows_one_section_first_and_has_few_updates():
    schedule = load_schedule("quick", None)
    for mip in (1, 2, 3):
        first, second = schedule.phases[mip]
        assert first.known_warp is not None and first.known_warp.same == 1
        samples = [p.num_epochs * (p.num_samples or 0) for p in (first, second)]
        assert samples == [360, 600]
    (fine,) = schedule.phases[0]
    assert (fine.num_epochs, fine.num_samples, fine.batch_size) == (1, 160, 4)


def test_every_mode_but_custom_has_a_schedule():
    for mode in MODES[:-1]:
        assert load_schedule(mode, None).phases
    assert MODES[-1] == "custom"


def test_a_mip_without_an_entry_takes_the_nearest_and_says_so(caplog):
    schedule = parse_schedule({"3": [PHASE], "6": [{**PHASE, "lr": 1}]}, "mine.json")
    with caplog.at_level(logging.INFO, "metroem"):
        assert schedule.for_mip(0) == schedule.phases[3]
        assert schedule.for_mip(9) == schedule.phases[6]
    assert "mine.json has no entry for mip 9: using the entry of mip 6" in caplog.text


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

    assert found.losses == (
        LossSpec("metric", (0, 1), 32, 0.9, False, True, False, True),
    )
    assert found.embedding_levels == (0, 1)
    mask = MaskRule("src", 0, "between", 0.0, (-1, 2), 1e-5, ((1, 0.0), (3, 0.5)))
    assert found.similarity_rules.src == (mask,) and not found.similarity_rules.tgt
    assert found.smoothness_rules.src == (mask,)
    assert found.augmentations == (
        RandomTranspose(0.3),
        RandomWarp(0.5, 3, -4, 4, True, False),
    )
    assert (found.num_samples, found.print_every) == (7, 3)


KNOWN = {"loss_spec": {"type": "known_warp"}, "augmentations": [{"type": "known_warp"}]}


def parsed(**change):
    (phase,) = parse_schedule({"1": [PHASE | change]}, "").for_mip(1)
    return phase


def test_every_key_of_ours_is_read():
    phase = parsed(
        crop_size=96,
        batch_size=4,
        lr_schedule="cosine",
        warmup_steps=0,
        max_grad_norm=0.5,
        loss_spec=[
            {"type": "known_warp"},
            {"type": "metric", "weight": 2, "params": {"levels": [2, 0]}},
            {"type": "metric", "params": {"levels": [1, 0]}},
        ],
        augmentations=[{"type": "random_flip"}, {"type": "known_warp", "tear": 0}],
    )
    assert (phase.crop_size, phase.batch_size, phase.max_grad_norm) == (96, 4, 0.5)
    assert (phase.lr_schedule, phase.warmup_steps) == ("cosine", 0)
    assert [loss.weight for loss in phase.losses] == [1, 2, 1]
    assert phase.embedding_levels == (0, 1, 2)
    assert phase.known_warp == KnownWarp(tear=0)


def test_what_is_not_given_has_the_values_of_the_original():
    phase = parsed()
    assert phase.losses == (LossSpec("plain"),) and phase.known_warp is None
    assert phase.embedding_levels == ()
    assert phase.batch_size is None and phase.max_grad_norm is None
    assert [phase.rate(step, 7) for step in (0, 3, 6)] == [PHASE["lr"]] * 3


def rates(num_steps, **options):
    phase = Phase(lr=2.0, num_epochs=1, smoothness=0, **options)
    return [phase.rate(step, num_steps) for step in range(num_steps)]


def test_the_rate_rises_to_its_value_over_the_warmup():
    assert rates(6, warmup_steps=3) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_the_rate_falls_as_a_cosine_to_a_hundredth():
    found = rates(4, lr_schedule="cosine")
    falls = [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    assert found == pytest.approx([2 * (0.01 + 0.99 * fall) for fall in falls])
    assert rates(10_000, lr_schedule="cosine")[-1] == pytest.approx(0.02, rel=1e-3)


def test_a_cosine_rises_first_where_there_is_a_warmup():
    plain, warm = (rates(8, lr_schedule="cosine", warmup_steps=n) for n in (0, 1))
    assert warm == pytest.approx([plain[0] / 2, *plain[1:]])


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
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": True}, "lr is True"),
        ({"max_grad_norm": -1}, "max_grad_norm is -1"),
        ({"max_grad_norm": "1"}, "max_grad_norm is '1'"),
        ({"warmup_steps": -1}, "warmup_steps is -1: .*whole number >= 0"),
        ({"warmup_steps": 1.5}, "warmup_steps is 1.5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_samples": True}, "num_samples is True"),
        ({"lr_schedule": "linear"}, "lr_schedule is 'linear': expected one of"),
        ({"loss_spec": []}, "expected at least one loss"),
        ({"loss_spec": {"type": "magic"}}, "'magic': expected one of"),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_spec": KNOWN["loss_spec"]}, "need each other"),
        ({"augmentations": KNOWN["augmentations"]}, "need each other"),
        (
            {**KNOWN, "augmentations": 2 * KNOWN["augmentations"]},
            "known_warp comes once.*after it came .*KnownWarp",
        ),
        *(
            (
                {**KNOWN, "augmentations": [{"type": "known_warp"}, {"type": kind}]},
                f"after all that .* after it came .*{name}",
            )
            for kind, name in (
                ("random_flip", "RandomFlip"),
                ("random_transpose", "RandomTranspose"),
                ("random_src_tgt_swap", "RandomSrcTgtSwap"),
                ("warp", "RandomWarp"),
            )
        ),
    ],
)
def test_a_truth_is_given_once_and_not_spoiled(change, message):
    with pytest.raises(UsageError, match=f"mine: mip 4, phase 0.*{message}"):
        parse_schedule({"4": [PHASE | change]}, "mine")


@pytest.mark.parametrize("kind", ["photometric", "stain", "missing", "fold"])
def test_what_changes_greys_alone_may_follow_a_known_warp(kind):
    augmentations = [{"type": "random_flip"}, {"type": "known_warp"}, {"type": kind}]
    assert len(parsed(**KNOWN | {"augmentations": augmentations}).augmentations) == 3


@pytest.mark.parametrize("tree", [[], {}, {"three": [PHASE]}, {"3": []}, {"3": PHASE}])
def test_what_is_no_schedule_is_refused(tree):
    with pytest.raises(UsageError):
        parse_schedule(tree, "mine")


def test_a_missing_number_is_named():
    with pytest.raises(UsageError, match="lr is missing: expected a number >= 0"):
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


@pytest.mark.parametrize("mode", MODES[:-1])
def test_a_phase_gives_back_json_that_it_is_read_from(mode):
    for phases in load_schedule(mode, None).phases.values():
        trees = json.loads(json.dumps([phase.to_json() for phase in phases]))
        assert [phase.to_json() for phase in phases] == trees
        assert parse_schedule({"1": trees}, "").phases[1] == phases


def test_json_of_a_phase_has_each_key_with_its_default():
    tree = parsed(loss_spec={"type": "distil"}).to_json()
    assert tree.items() >= {"lr": 1e-3, "crop_size": 1024, "ema": None}.items()
    distil = {"type": "distil", "weight": 1.0, "params": {"iterations": 50}}
    assert tree["loss_spec"] == [distil]
    rule = tree["sm_keys_to_apply"]["src"][0]
    assert rule["name"] == "src_zeros" and rule["mask_value"] == 1e-5
    assert rule["binarization"] == {"strat": "eq", "value": 0.0, "range": [0.0, 0.0]}
    assert rule["coarsen_ranges"] == [[1, 0.0]]


def test_a_schedule_is_read_without_torch():
    code = "import sys, metroem.specs.schedule as s; s.load_schedule('scratch', None)"
    code += "; import metroem.prepare.dataset_spec; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
