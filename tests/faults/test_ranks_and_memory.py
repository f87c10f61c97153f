"""Test a rank that dies, and memory that runs out."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.places import agree, check_whole, counted

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["gpu_out_of_memory", "cpu_out_of_memory"])
def test_out_of_memory_says_what_to_lower_and_keeps_the_state(zygote, place, hook):
    folder, calm = place.fresh("training"), place.calm["training"]
    with counted(hook.replace("_", " "), "training"):
        done = zygote.run(folder, calm.command, hook=hook)
        assert done["status"] == 1 and "Traceback" not in done["output"]
        error = done["output"].rpartition("error: ")[2]
        assert error.startswith("stage 0, phase 1: out of memory (")
        for what in ("--checkpoint_activations", "--batch_size (now 1)", "crop_size"):
            assert what in error
        check_whole(folder)
        done = zygote.run(folder, [*calm.command, "--checkpoint_activations"])
        assert done["status"] == 0 and "resumes at phase 1" in done["output"]
        assert agree(folder, calm)


@pytest.mark.slow
def test_a_killed_worker_says_what_to_lower_and_keeps_the_state(zygote, place):
    folder, calm = place.fresh("training"), place.calm["training"]
    workers = [*calm.command, "--num_workers", "2"]
    with counted("worker killed", "training"):
        done = zygote.run(folder, workers, hook="kill_a_worker")
        assert done["status"] == 1, done["output"]
        assert "Traceback" not in done["output"], done["output"]
        error = done["output"].rpartition("error: ")[2]
        assert "a process that reads samples was killed" in error
        assert "lower --num_workers" in error
        done = zygote.run(folder, calm.command)
        assert done["status"] == 0, done["output"]
        assert agree(folder, calm)


def start_ranks(folder, command):
    program, *arguments = command
    more = ["--gpu", "0,1", "--device", "cpu", "--max_epochs", "500"]
    return subprocess.Popen(
        [sys.executable, str(ROOT / program), *arguments, *more, "--batch_size", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def ranks_of(launcher):
    """Find the process of each rank by its environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes().decode().split("\0")
        except (OSError, ValueError):
            continue
        if parent == launcher and (rank := [e for e in environment if "RANK=" in e]):
            found[int(dict(e.split("=", 1) for e in rank)["RANK"])] = int(folder.name)
    return found


def until_trained(process):
    """Read the output until an epoch is done."""
    for line in process.stdout:
        if re.search(r"epoch \d+/500", line):
            return
    raise AssertionError("it never trained")


@pytest.fixture
def long(zygote, place):
    """A folder whose schedule takes long enough to be disturbed."""
    folder = place.fresh("training")
    text = (folder / "schedule.json").read_text()
    text = text.replace('"num_epochs": 3', '"num_epochs": 500, "num_samples": 4')
    (folder / "schedule.json").write_text(text)
    return folder


@pytest.mark.slow
def test_a_rank_that_dies_is_named_and_the_others_end_within_a_minute(long, place):
    with start_ranks(long, place.calm["training"].command) as process:
        until_trained(process)
        ranks = ranks_of(process.pid)
        assert sorted(ranks) == [0, 1]
        with counted("rank killed", "training"):
            died = time.monotonic()
            os.kill(ranks[1], signal.SIGKILL)
            output = process.stdout.read()
            assert process.wait() == 1, output
            assert time.monotonic() - died < 60
            named = f"error: rank 1 (process {ranks[1]}) was killed by SIGKILL"
            assert named in output, output
            assert "Traceback" not in output, output
            assert not Path(f"/proc/{ranks[0]}").exists()
            check_whole(long)


@pytest.mark.slow
def test_a_signal_to_several_ranks_ends_all_and_saves(long, place):
    with start_ranks(long, place.calm["training"].command) as process:
        until_trained(process)
        ranks = ranks_of(process.pid)
        with counted("SIGTERM", "2 ranks"):
            process.terminate()
            output = process.stdout.read()
            assert process.wait() == 143, output
            assert "the same command resumes from here" in output
            assert "Traceback" not in output, output
            assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
            check_whole(long)
