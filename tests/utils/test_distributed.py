"""Test that two gloo processes exchange values, and that one process works alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metroem.data.dataset import Split
from metroem.errors import UsageError
from metroem.specs.modules import ModuleSpec
from metroem.specs.schedule import Phase
from metroem.training import run
from metroem.training.checkpoint import RunFolder
from metroem.training.config import StageConfig
from metroem.training.requests import TrainRequest
from metroem.utils import distributed

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, os, sys, time
from pathlib import Path
import torch
from metroem.errors import UsageError
from metroem.utils import distributed

folder, rank = Path(sys.argv[1]), distributed.rank()
found = {}
with distributed.process_group(torch.device("cpu")):
    taken = []
    for number in distributed.work_queue(12):
        time.sleep(0.01 + 0.2 * rank)
        taken.append(number)
    found["taken"] = taken
    found["again"] = list(distributed.work_queue(3))
    steps = iter([1, 2, 3]) if rank == 0 else iter([])
    distributed.follow(steps, 3)
    found["left"] = len(list(steps))
    distributed.check_shared(folder)
    distributed.SEEN_WITHIN_S = 0.0
    own = folder / str(rank)
    own.mkdir()
    for name, check in {
        "own": lambda: distributed.check_shared(own),
        "same": lambda: distributed.check_same((7, 1), "it"),
        "other": lambda: distributed.check_same((7, rank), "it"),
    }.items():
        try:
            check()
            found[name] = None
        except UsageError as error:
            found[name] = str(error)
(folder / f"{rank}.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launch, str(script), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(folder.glob(".seen-*"))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_each_number_is_for_one_rank_and_more_are_for_the_faster(two_ranks):
    first, second = (found["taken"] for found in two_ranks)
    assert sorted(first + second) == list(range(12))
    assert len(first) > 2 * len(second) > 0
    assert sorted(two_ranks[0]["again"] + two_ranks[1]["again"]) == [0, 1, 2]


@pytest.mark.slow
def test_the_first_rank_goes_through_the_steps(two_ranks):
    assert two_ranks[0]["left"] == 0


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_noticed(two_ranks):
    assert two_ranks[0]["own"] is None
    assert "rank 1 does not see what rank 0 writes" in two_ranks[1]["own"]


@pytest.mark.slow
def test_values_that_differ_are_noticed_on_both_ranks(two_ranks):
    for found in two_ranks:
        assert found["same"] is None
        assert "different versions of it" in found["other"]


def test_one_process_alone_has_all_numbers_and_all_steps(tmp_path):
    steps = iter([1, 2, 3])
    assert list(distributed.work_queue(3)) == [0, 1, 2]
    distributed.follow(steps, 3)
    assert list(steps) == []
    distributed.check_shared(tmp_path)
    distributed.check_same((1, 2), "it")


@pytest.mark.parametrize(
    ("asked", "ranks", "kept"), [(None, 1, None), (None, 3, 3), (6, 3, 6)]
)
def test_a_run_without_a_batch_size_depends_on_its_ranks(tmp_path, asked, ranks, kept):
    config = StageConfig(
        module=ModuleSpec(0, 1, "x", tmp_path),
        phases=(Phase(lr=1e-3, num_epochs=1, smoothness=0),),
        split=Split([], []),
        run=RunFolder(tmp_path),
        checkpoint_name="ck",
        device=torch.device("cpu"),
        seed=0,
        batch_size=asked,
        num_workers=0,
        precision="fp32",
        num_ranks=ranks,
    )
    assert config.fingerprint()["--batch_size"] == kept


def test_beginning_anew_is_refused_where_torchrun_restarts(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(UsageError, match="each restart of torchrun"):
        TrainRequest(tmp_path, tmp_path, restart=True)
    TrainRequest(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("cores", "ranks", "workers"), [(16, 1, 8), (16, 4, 4), (4, 1, 4), (2, 4, 1)]
)
def test_a_rank_with_a_gpu_reads_with_its_share_of_the_cores(
    monkeypatch, cores, ranks, workers
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert run._workers_for(torch.device("cuda")) == workers
    assert run._workers_for(torch.device("cpu")) == 0
