"""Test train.py --tensorboard, reading its files as TensorBoard does."""

import importlib.util
import json

import pytest
import torch

import train
from metroem.data.sample import Sample
from metroem.errors import UsageError
from metroem.models.module_folders import init_pyramid
from metroem.training.requests import TrainRequest
from metroem.training.step import StepMetrics
from metroem.training.tensorboard import TensorBoardWriter
from metroem.training.validate import EpochReport, HeldOut
from tests.pairs import SHIFT_PX, shifted_pair, write_pairs

NAN = float("nan")
PHASE = {"lr": 1e-3, "num_epochs": 1, "smoothness": 5, "crop_size": 48}

PICTURES = ["held out/after", "held out/before", "held out/field"]


def scores(loss):
    return StepMetrics(loss, NAN, NAN, NAN, 2 * loss, 1.0, 0.5)


def events(folder):
    """What TensorBoard shows of a run."""
    module = "tensorboard.backend.event_processing.event_accumulator"
    found = pytest.importorskip(module).EventAccumulator(str(folder))
    return found.Reload()


def curve(found, tag):
    return [(event.step, event.value) for event in found.Scalars(tag)]


@pytest.fixture
def pairs(tmp_path):
    """Pairs, a pyramid of one stage and a schedule of two phases."""
    pytest.importorskip("tensorboard")
    write_pairs(tmp_path / "data", mips=(0,), num_pairs=5, shape=(96, 128))
    (tmp_path / "schedule.json").write_text(json.dumps({"0": [PHASE, PHASE]}))
    return tmp_path


def trained(folder, name, *more):
    """The weights that a training makes, bytes."""
    init_pyramid(folder / name, [0])
    train.main(
        [
            *("--pyramid_path", str(folder / name), "--device", "cpu"),
            *("--dataset_path", str(folder / "data"), "--val_pairs", "1"),
            *("--train_mode", "custom"),
            *("--train_params_path", str(folder / "schedule.json")),
            *more,
        ]
    )
    (weights,) = folder.glob(f"{name}/*/model/checkpoint.state.pth.tar")
    return weights.read_bytes()


@pytest.mark.slow
def test_scores_and_a_held_out_pair_are_written_and_change_nothing(pairs):
    assert trained(pairs, "watched", "--tensorboard") == trained(pairs, "alone")

    run = pairs / "watched" / ".train" / "checkpoint"
    found = events(run / "tensorboard" / "stage_0")
    logged = (run / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in logged]
    for name in ("training", "validation"):
        losses = [line[name]["loss"] for line in lines]
        # Steps are the stage's epochs over both phases.
        assert [step for step, _ in curve(found, f"loss/{name}")] == [1, 2]
        values = [value for _, value in curve(found, f"loss/{name}")]
        assert values == pytest.approx(losses, rel=1e-6)
    assert sorted(found.Tags()["images"]) == PICTURES
    assert not (pairs / "alone" / ".train" / "checkpoint" / "tensorboard").exists()


def test_a_run_that_resumes_writes_its_epochs_once(tmp_path):
    pytest.importorskip("tensorboard")
    for epochs in ((1, 2, 3), (3, 4)):  # the third was lost with the first process
        with TensorBoardWriter(tmp_path) as board:
            for epoch in epochs:
                score = scores(len(epochs) + epoch / 8)
                board.write(EpochReport(0, epoch, score, None, None))
    found = events(tmp_path / "stage_0")
    expected = [(1, 3.125), (2, 3.25), (3, 2.375), (4, 2.5)]
    assert curve(found, "loss/training") == expected
    # What is not known is left out.
    assert "similarity/training" not in found.Tags()["scalars"]


def test_pictures_are_upright(tmp_path):
    pytest.importorskip("tensorboard")
    sample = Sample(*shifted_pair(48, 64, seed=0), None, ("a pair",))
    field = torch.full((1, 2, 48, 64), SHIFT_PX)
    with TensorBoardWriter(tmp_path) as board:
        held_out = HeldOut(sample, field)
        board.write(EpochReport(2, 1, scores(1.0), scores(2.0), held_out))
    found = events(tmp_path / "stage_2")
    assert sorted(found.Tags()["images"]) == PICTURES
    for tag in PICTURES:  # rows run along x
        (image,) = found.Images(tag)
        assert (image.width, image.height) == (48, 64)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--tensorboard: .* pip install tensorboard"):
        TrainRequest(tmp_path, tmp_path, tensorboard=True)
