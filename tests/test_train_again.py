"""The same training again: in another process, and after a kill at a bad moment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from metroem.models.module_folders import init_pyramid
from metroem.training import stage
from tests.pairs import write_pairs
from tests.test_train import arguments, digest, twin_of

ROOT = Path(__file__).parents[1]
SCRATCH = ROOT / "metroem" / "specs" / "schedules" / "scratch.json"
LEVEL = {"features": 4, "blocks": 0, "radius": [1], "hidden": 4, "dilations": [1]}
NET = {"type": "correlation", "levels": [LEVEL, LEVEL]}
SHORT = {"num_epochs": 1, "num_samples": 8, "crop_size": 64, "batch_size": 2}


@pytest.fixture
def run(tmp_path):
    """A tiny network, and the phases of --train_mode scratch, short."""
    write_pairs(tmp_path / "data", mips=(1,), num_pairs=4, shape=(128, 176))
    (module,) = init_pyramid(tmp_path / "pyramid", [1])
    (module / "model" / "model_spec.json").write_text(json.dumps(NET))
    phases = [{**phase, **SHORT} for phase in json.loads(SCRATCH.read_text())["3"]]
    (tmp_path / "schedule.json").write_text(json.dumps({"1": phases}))
    return tmp_path


@pytest.mark.slow
def test_another_process_with_workers_makes_the_same_bytes(run):
    twin = twin_of(run)
    train.main(arguments(run))
    command = [sys.executable, str(ROOT / "train.py"), *arguments(twin)]
    subprocess.run(
        [*command, "--num_workers", "2"],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"},
    )
    assert digest(run) == digest(twin) and len(digest(run)) == 3


class _Killed(BaseException):
    """Stands for what ends a process between two files."""


@pytest.mark.parametrize("begins_from_weights", [False, True])
def test_a_run_killed_between_its_first_best_weights_and_its_state(
    run, monkeypatch, begins_from_weights
):
    best = run / "pyramid" / "0_mip1in_correlation" / "model" / "ck.state.pth.tar"
    if begins_from_weights:
        train.main(arguments(run, "--max_epochs", "1", "--seed", "3"))
        for written in (*run.glob("pyramid/.train/ck/*"), *run.glob("data/field_*")):
            written.unlink()
    twin = twin_of(run)
    train.main(arguments(twin, "--max_epochs", "1"))
    content = best.read_bytes() if begins_from_weights else None
    save = stage.save_state

    def save_unless_best_is_new(path, state):
        if best.is_file() and best.read_bytes() != content:
            raise _Killed
        save(path, state)

    monkeypatch.setattr(stage, "save_state", save_unless_best_is_new)
    with pytest.raises(_Killed):
        train.main(arguments(run, "--max_epochs", "1"))
    monkeypatch.undo()
    train.main(arguments(run, "--max_epochs", "1"))
    assert digest(run) == digest(twin)


@pytest.mark.slow
def test_two_ranks_end_within_1e_5_of_one_process(run, zygote):
    schedule = json.loads((run / "schedule.json").read_text())
    phases = [{**phase, "accumulate": 2, "ema": 0.9} for phase in schedule["1"]]
    (run / "schedule.json").write_text(json.dumps({"1": phases}))
    twin = twin_of(run)
    train.main(arguments(run))
    done = zygote.run(twin, ["train.py", *arguments(twin), "--gpu", "0,1"])
    assert done["status"] == 0, done["output"][-2000:]
    name = "pyramid/.train/ck/stage_0_last.state.pth.tar"
    a, b = (torch.load(f / name, weights_only=True) for f in (run, twin))
    apart = max((a[key] - b[key]).abs().max().item() for key in a)
    assert apart <= 1e-5
