"""train.py end to end on small pairs, as a user calls it."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import train
from metroem.errors import MetroEMError
from metroem.io.h5 import (
    FieldSet,
    FieldSetMeta,
    ImageSet,
    PairLocation,
    write_field_set,
)
from metroem.models.module_folders import init_pyramid
from metroem.prepare.inspect import inspect_dataset
from metroem.prepare.requests import InspectRequest
from metroem.training import run as training
from metroem.training import write_fields as writing
from metroem.training.requests import TrainRequest
from tests.models.specs import scalenet, write_spec
from tests.pairs import SHIFT_PX, write_pairs

ROOT = Path(__file__).parents[1]
PHASE = {"lr": 1e-3, "num_epochs": 2, "smoothness": 5, "crop_size": 48}
METRIC = {"type": "metric", "params": {"levels": [0, 1], "pre_align_sample": 8}}


@pytest.fixture
def run(tmp_path):
    """A pyramid of two stages, pairs at both mips, a schedule of two phases."""
    write_pairs(tmp_path / "data", mips=(2, 1), num_pairs=6, shape=(128, 176))
    for module in init_pyramid(tmp_path / "pyramid", [2, 1], "scalenet"):
        write_spec(module / "model", scalenet(4, 6))
    phases = [
        {**PHASE, "augmentations": [{"type": "warp"}, {"type": "random_transpose"}]},
        {**PHASE, "num_epochs": 1, "loss_spec": METRIC},
    ]
    (tmp_path / "schedule.json").write_text(json.dumps({"1": phases}))
    return tmp_path


def twin_of(run):
    """A second run beside the first: equal data, pyramid and schedule."""
    twin = run / "twin"
    for name in ("data", "pyramid"):
        shutil.copytree(run / name, twin / name)
    shutil.copy(run / "schedule.json", twin)
    return twin


def arguments(run, *more):
    return [
        *("--pyramid_path", str(run / "pyramid")),
        *("--dataset_path", str(run / "data")),
        *("--train_mode", "custom"),
        *("--train_params_path", str(run / "schedule.json")),
        *("--device", "cpu", "--checkpoint_name", "ck", "--val_pairs", "1"),
        *more,
    ]


def digest(run):
    """sha256 of the weights and of the fields of all stages."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in [
            *run.glob("pyramid/*/model/ck.state.pth.tar"),
            *run.glob("pyramid/.train/ck/*_last.state.pth.tar"),
        ]
    } | {
        path.name: hashlib.sha256(h5py.File(path)["main"][:].tobytes()).hexdigest()
        for path in run.glob("data/field_*.h5")
    }


def test_a_request_has_a_field_for_each_flag():
    flags = {action.dest for action in train.build_parser()._actions} - {"help"}
    assert flags == {field.name for field in dataclasses.fields(TrainRequest)}


def test_a_pyramid_is_trained_stage_by_stage(run):
    train.main(arguments(run))

    # The field of stage 0 was brought to mip 1, where stage 1 started from it.
    first = FieldSet(run / "data" / "field_0_x0_y0_z1_MIP1_ck.h5")
    last = FieldSet(run / "data" / "field_1_x0_y0_z1_MIP1_ck.h5")
    assert first.shape == last.shape == (64, 88)
    found = np.median(last.read(0)[0, 16:-16, 16:-16])
    assert found == pytest.approx(SHIFT_PX / 2, abs=0.3)  # px of mip 1

    for module in ("0_mip2in_scalenet", "1_mip1in_scalenet"):
        weights = run / "pyramid" / module / "model" / "ck.state.pth.tar"
        assert torch.load(weights, weights_only=True)
        assert sorted(p.name for p in weights.parent.iterdir()) == [
            "ck.state.pth.tar",
            "model_spec.json",
        ]
    lines = (run / "pyramid" / ".train" / "ck" / "metrics.jsonl").read_text()
    places = [
        (r["stage"], r["phase"], r["epoch"])
        for r in map(json.loads, lines.splitlines())
    ]
    assert places == [(s, p, e) for s in (0, 1) for p, e in ((0, 0), (0, 1), (1, 0))]
    assert "held out: x0_y0_z1_MIP2.h5 pair 5" in (run / "pyramid/ck.log").read_text()


def test_a_finished_run_is_not_repeated_and_restart_repeats_it(run):
    train.main(arguments(run, "--max_epochs", "1"))
    before = digest(run)
    stamps = {p: p.stat().st_mtime_ns for p in run.glob("data/*.h5")}
    # As if killed after the fields had their name, before their parts were gone.
    left = run / "data/.field_0_x0_y0_z1_MIP1_ck.h5.parts"
    left.mkdir()
    train.main(arguments(run, "--max_epochs", "1"))
    assert not left.exists()
    assert stamps == {p: p.stat().st_mtime_ns for p in run.glob("data/*.h5")}
    train.main(arguments(run, "--max_epochs", "1", "--restart"))
    assert digest(run) == before


def test_labels_come_from_the_first_weights_if_there_were_any(run, monkeypatch):
    keeps, train_stage = [], training.train_stage

    def noted(config, *others):
        keeps.append(config.keeps_labels)
        train_stage(config, *others)

    monkeypatch.setattr(training, "train_stage", noted)
    zero = ("--max_epochs", "1", "--train_stages", "0", "--generate_field_stages")
    for _ in range(2):
        train.main(arguments(run, *zero))
    shutil.rmtree(run / "pyramid" / ".train")  # as in a copy of the trained pyramid
    for _ in range(2):
        train.main(arguments(run, *zero))
    assert keeps == [False, False, True, True]


def test_bf16_inside_the_network_trains(run):
    zero = ("--max_epochs", "1", "--train_stages", "0", "--generate_field_stages", "0")
    train.main(arguments(run, *zero, "--precision", "bf16"))
    assert FieldSet(run / "data" / "field_0_x0_y0_z1_MIP1_ck.h5").read(0).any()


def test_a_network_that_does_nothing_is_noticed(run, monkeypatch, caplog):
    # A network of a few epochs still moves something; any change is too small here.
    monkeypatch.setattr("metroem.training.stage.COLLAPSED_PX", 1e6)
    train.main(arguments(run, "--max_epochs", "1", "--train_stages", "0"))
    assert "it has collapsed to doing nothing; try a lower smoothness" in caplog.text


def test_other_settings_do_not_overwrite_a_run(run):
    train.main(arguments(run, "--max_epochs", "1", "--train_stages", "0"))
    with pytest.raises(MetroEMError, match="--seed was 0, is 1"):
        train.main(arguments(run, "--max_epochs", "1", "--seed", "1"))
    with pytest.raises(MetroEMError, match="num_epochs of phase 1 was 1, is 2"):
        train.main(arguments(run, "--max_epochs", "2", "--train_stages", "0"))


def test_stages_can_be_run_one_at_a_time(run):
    whole = run / "whole"
    whole.mkdir()
    for name in ("data", "pyramid", "schedule.json"):
        os.symlink(run / name, whole / name)
    zero = ("--train_stages", "0", "--generate_field_stages", "0")
    train.main(arguments(run, *zero, "--max_epochs", "1"))
    one = ("--train_stages", "1", "--generate_field_stages", "1")
    train.main(arguments(run, *one, "--max_epochs", "1"))
    assert len(list(run.glob("data/field_1_*"))) == 1


def test_a_stage_without_its_prior_fields_says_what_to_do(run):
    with pytest.raises(MetroEMError, match="field_0_x0_y0_z1_MIP1_ck.h5: no such"):
        train.main(arguments(run, "--train_stages", "1"))


def test_prior_fields_that_no_stage_will_write_are_missed_before_any_training(run):
    with pytest.raises(MetroEMError, match="field_0_x0_y0_z1_MIP1_ck.h5: no such"):
        train.main(arguments(run, "--generate_field_stages", "1"))
    assert not list(run.glob("pyramid/.train/ck/*.pth.tar"))


def test_fields_that_were_not_trained_here_are_not_overwritten(run):
    train.main(arguments(run, "--max_epochs", "1", "--generate_field_stages", "0"))
    path = run / "data" / "field_0_x0_y0_z1_MIP1_ck.h5"
    with h5py.File(path, "r+") as file:
        for name in list(file.attrs):
            del file.attrs[name]
    with pytest.raises(MetroEMError, match="was not made by this program's training"):
        train.main(arguments(run, "--max_epochs", "1"))


def test_time_up_stops_cleanly_and_the_same_command_goes_on(run):
    other = twin_of(run)
    train.main(arguments(other))

    for _ in range(3):
        train.main(arguments(run, "--max_minutes", "0.005"))
    train.main(arguments(run))

    assert digest(run) == digest(other)


def test_images_of_mips_that_are_missing_are_refused_before_any_training(run):
    (run / "data" / "x0_y0_z1_MIP1.h5").unlink()
    with pytest.raises(MetroEMError, match="no image set at mip 1"):
        train.main(arguments(run))
    assert not list(run.glob("pyramid/*/model/ck*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gpu", "all"), "--gpu 'all'"),
        (("--val_pairs", "-1"), "--val_pairs -1"),
        (("--val_pairs", "6"), "leaves none to train on"),
        (("--checkpoint_name", "a/b"), "--checkpoint_name 'a/b'"),
        (("--train_stages", "2"), r"--train_stages: .*\[2\]"),
        (("--max_minutes", "0"), "--max_minutes 0"),
        (("--dataset_path", "nowhere"), "--dataset_path nowhere: no such folder"),
        (("--pyramid_path", "nowhere"), "nowhere: no such pyramid"),
    ],
)
def test_flags_that_cannot_work_are_named(run, flags, message):
    with pytest.raises(MetroEMError, match=message):
        train.main(arguments(run, *flags))


def strip_to_the_original(folder, suffix):
    """Leave of each image set what the original wrote: one array, no more."""
    for path in folder.glob("*.h5"):
        with h5py.File(path) as file:
            images = file["img"][:]
        path.unlink()
        with h5py.File(path.with_name(f"{path.stem}_{suffix}.h5"), "w") as file:
            file.create_dataset("main", data=images, compression="lzf")


def test_files_of_the_original_are_read_and_trained_on(run):
    strip_to_the_original(run / "data", "old")
    train.main(arguments(run, "--max_epochs", "1"))
    fields = FieldSet(run / "data" / "field_1_x0_y0_z1_old_MIP1_ck.h5")
    assert fields.num_pairs == 6 and fields.shape == (64, 88)
    inspect_dataset(InspectRequest(run / "data", run / "pyramid", "ck"))


ORIGINAL_CREATE = """
import os
import torch
import metroem

class Model(torch.nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()
        self.aligner = metroem.aligner.Aligner(*args, **kwargs)

    def forward(self, **kwargs):
        return self.aligner.forward(**kwargs)

def create(**kwargs):
    folder = os.path.dirname(os.path.realpath(__file__))
    return Model(model_folder=os.path.join(folder, "model"), **kwargs)
"""


def test_modules_of_the_original_train_unchanged(run):
    for module in run.glob("pyramid/*_mip*"):
        (module / "create.py").write_text(ORIGINAL_CREATE)
    train.main(arguments(run, "--max_epochs", "1"))
    assert "stock operators" in (run / "pyramid" / "ck.log").read_text()
    assert FieldSet(run / "data" / "field_1_x0_y0_z1_MIP1_ck.h5").read(0).any()


def test_a_downloaded_field_takes_the_place_of_stage_0(run):
    images = ImageSet(run / "data" / "x0_y0_z1_MIP1.h5")
    rows, cols = images.shape
    field = np.zeros((2, 2, rows, cols), np.float32)
    field[0, 0] = SHIFT_PX / 2  # px of mip 1: src is placed by it, tgt is in place
    frames = [PairLocation(images.grid(i), images.sections(i)) for i in range(6)]
    meta = FieldSetMeta(frames, "test", "", {}, stage=0, tag="ck", num_sides=2)
    write_field_set(run / "data" / "field_0_x0_y0_z1_MIP1_ck.h5", [field] * 6, meta)
    one = ("--train_stages", "1", "--generate_field_stages", "1")
    train.main(arguments(run, "--max_epochs", "1", *one))
    last = FieldSet(run / "data" / "field_1_x0_y0_z1_MIP1_ck.h5").read(0)
    assert np.median(last[0, 16:-16, 16:-16]) == pytest.approx(SHIFT_PX / 2, abs=0.2)
    # The downloaded set is not one that training may replace.
    with pytest.raises(MetroEMError, match="was not made by this program"):
        train.main(arguments(run, "--max_epochs", "1"))


def spoil(path):
    """Numbers in src of the second pair whose squares are infinite."""
    with h5py.File(path, "r+") as file:
        file["img"][1, 0] = np.full(file["img"].shape[2:], 1e30, np.float32)


def test_a_bad_pair_is_skipped_and_listed(run, monkeypatch):
    # On such a pair the finetuner tries all of its steps.
    monkeypatch.setattr(writing, "finetune_iterations", lambda stage: 2)
    spoil(run / "data" / "x0_y0_z1_MIP2.h5")
    zero = ("--train_stages", "0", "--generate_field_stages", "0")
    train.main(arguments(run, "--max_epochs", "1", *zero))
    listed = (run / "pyramid/.train/ck/quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["pair"] for line in listed] == [
        "x0_y0_z1_MIP2.h5 pair 1 (z 2 on 1)"
    ]


def test_a_run_of_bad_steps_ends_with_advice(run):
    schedule = {"1": [{**PHASE, "num_epochs": 50, "lr": 1e12}]}
    (run / "schedule.json").write_text(json.dumps(schedule))
    with pytest.raises(MetroEMError, match="not finite.*lower lr"):
        train.main(arguments(run, "--train_stages", "0"))


@pytest.mark.slow
def test_a_bad_loss_on_one_rank_leaves_both_going(run, zygote):
    write_pairs(run / "data", mips=(2, 1), num_pairs=11, shape=(128, 176))
    spoil(run / "data" / "x0_y0_z1_MIP2.h5")
    zero = ("--train_stages", "0", "--generate_field_stages", "0")
    two = ("--gpu", "0,1")
    done = zygote.run(run, ["train.py", *arguments(run, *zero, *two)])
    assert done["status"] == 0, done["output"][-2000:]
    assert "bad loss, step skipped" in done["output"]
    state = torch.load(run / "pyramid/.train/ck/stage_0.state.pt", weights_only=True)
    assert state["phase"] == 2
    assert state["quarantine"] == ["x0_y0_z1_MIP2.h5 pair 1 (z 2 on 1)"]
    assert all(torch.isfinite(w).all() for w in state["net"].values())
