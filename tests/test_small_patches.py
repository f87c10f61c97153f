"""Patches that are too small for a schedule: refused before, by their size."""

import json

import pytest

import train
from metroem.errors import DatasetError, UsageError
from metroem.models.module_folders import init_pyramid
from metroem.prepare.inspect import inspect_dataset
from metroem.prepare.requests import InspectRequest
from metroem.specs.schedule import load_schedule, parse_schedule
from tests.models.specs import CORRELATION, write_spec
from tests.pairs import write_pairs

WARP = {
    "loss_spec": {"type": "known_warp"},
    "augmentations": [
        {"type": "random_turn", "prob": 0.5},
        {"type": "known_warp", "peak_px": 4, "knot_px": 8, "tear": 0.5},
        {"type": "photometric"},
    ],
}
METRIC = {"type": "metric", "params": {"levels": [1, 2], "pre_align_sample": 4}}


def phase(**keys):
    base = {"lr": 1e-4, "num_epochs": 1, "num_samples": 2, "smoothness": 0}
    return {**base, "batch_size": 2, **keys}


def run_of(folder, size, keys, mips=(1,)):
    """A pyramid, pairs of a size at each mip, and the flags that train it."""
    shape = (size << mips[0], (size + 3) << mips[0])
    write_pairs(folder / "data", mips=mips, num_pairs=6, shape=shape)
    for path in init_pyramid(folder / "pyramid", list(mips), "correlation"):
        write_spec(path / "model", CORRELATION)
    (folder / "s.json").write_text(json.dumps({"1": [phase(**keys)]}))
    return (
        ["--pyramid_path", str(folder / "pyramid"), "--train_mode", "custom"]
        + ["--dataset_path", str(folder / "data"), "--device", "cpu"]
        + ["--train_params_path", str(folder / "s.json")]
        + ["--generate_field_stages", "0"]
    )


# ceil(size / 4) pixels must be 3; ceil(size / 2**2) pixels must be 4.
@pytest.mark.parametrize(
    ("keys", "least"), [(WARP, 9), ({"loss_spec": METRIC}, 13)], ids=["warp", "metric"]
)
def test_the_least_size_trains_and_one_pixel_less_is_refused(tmp_path, keys, least):
    train.main(run_of(tmp_path / "fits", least, keys))
    flags = run_of(tmp_path / "small", least - 1, keys)
    expected = (
        f"patches of {least - 1} x {least + 2} px; stage 0, .* at least {least} px"
    )
    with pytest.raises(DatasetError, match=expected):
        train.main(flags)


def test_a_later_stage_is_looked_at_before_the_first_is_trained(tmp_path):
    flags = run_of(tmp_path, 8, WARP, mips=(2, 1))
    (tmp_path / "s.json").write_text(
        json.dumps({"2": [phase()], "1": [phase(loss_spec=METRIC), phase(**WARP)]})
    )
    # 8 px at mip 2 are 16 at mip 1: enough for all of its phases.
    train.main(flags)
    metric = {"type": "metric", "params": {"levels": [2], "pre_align_sample": 8}}
    (tmp_path / "s.json").write_text(
        json.dumps({"2": [phase()], "1": [phase(loss_spec=metric)]})
    )
    with pytest.raises(DatasetError, match=r"stage 1, .* at least 29 px"):
        train.main([*flags, "--checkpoint_name", "new"])
    assert not list((tmp_path / "pyramid").glob("0_*/model/new*"))


def test_a_crop_that_is_too_small_for_its_phase_is_refused():
    with pytest.raises(UsageError, match="crop_size is 8: .* at least 9 px"):
        parse_schedule({"0": [phase(**WARP, crop_size=8)]}, "s.json")
    parse_schedule({"0": [phase(**WARP, crop_size=9)]}, "s.json")


def test_schedules_of_ours_know_their_least_size():
    least = {
        mode: max(
            p.least_px for ps in load_schedule(mode, None).phases.values() for p in ps
        )
        for mode in ("scratch", "aligned", "finetune", "classic")
    }
    assert least == {"scratch": 9, "aligned": 9, "finetune": 9, "classic": 32}


def test_inspect_knows_the_least_size(tmp_path):
    write_pairs(tmp_path / "fits", mips=(0,), num_pairs=2, shape=(9, 20))
    inspect_dataset(InspectRequest(tmp_path / "fits"))
    write_pairs(tmp_path / "small", mips=(0,), num_pairs=2, shape=(20, 8))
    with pytest.raises(
        DatasetError, match="patches 8 px wide; .* at least 9 px a side"
    ):
        inspect_dataset(InspectRequest(tmp_path / "small"))
