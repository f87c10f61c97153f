"""Processes that do the tasks of an evaluation."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from metroem.errors import DatasetError, ResourceError
from metroem.evaluation import workers
from metroem.evaluation.plan import Task
from metroem.evaluation.workers import choose_workers, run_tasks
from metroem.utils.stop_request import StopRequest

TASKS = [Task(0, index, False, "") for index in range(5)]


@dataclass(frozen=True)
class _Sleeper:
    """Does tasks in the place of a measurer: later ones take less time."""

    folder: Path
    what: str = ""
    seconds: float = 0.1

    def run(self, task):
        if self.what == "die" and task.index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "fail" and task.index == 1:
            raise DatasetError("the pair is damaged")
        if self.what == "hang" and task.index > 0:
            (self.folder / str(os.getpid())).touch()
            time.sleep(600)
        time.sleep(self.seconds * (5 - task.index) / 5)
        return task.index, torch.get_num_threads()


Sleeper: Any = _Sleeper


@pytest.mark.parametrize("num", [1, 2])
def test_results_come_in_the_order_of_the_tasks_from_one_thread_each(tmp_path, num):
    with StopRequest(None) as stop:
        found = list(run_tasks(Sleeper(tmp_path), TASKS, num, stop))
    assert found == [(task, (task.index, 1)) for task in TASKS]


def test_a_process_that_dies_is_named(tmp_path):
    message = "a process of --workers 2 died.*resumes from here"
    with StopRequest(None) as stop, pytest.raises(ResourceError, match=message):
        list(run_tasks(Sleeper(tmp_path, "die"), TASKS, 2, stop))


def test_an_error_of_a_pair_is_raised_in_the_first_process(tmp_path):
    with StopRequest(None) as stop, pytest.raises(DatasetError, match="damaged"):
        list(run_tasks(Sleeper(tmp_path, "fail"), TASKS, 2, stop))


def test_after_a_signal_running_tasks_get_some_seconds_and_no_process_is_left(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(workers, "GRACE_S", 0.5)
    with StopRequest(None) as stop:
        tasks = run_tasks(Sleeper(tmp_path, "hang"), TASKS, 2, stop)
        assert next(tasks) == (TASKS[0], (0, 1))
        while not list(tmp_path.iterdir()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        assert list(tasks) == []
        assert stop.code == 143
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)


def test_there_is_a_process_for_each_core_and_one_on_a_gpu(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_workers(None, cpu, 12) == 3
    assert choose_workers(None, cpu, 11) == 2  # four tasks each, at least
    assert choose_workers(None, cpu, 2) == 1
    assert choose_workers(4, cpu, 2) == 2
    assert choose_workers(None, gpu, 9) == 1
    assert choose_workers(4, gpu, 9) == 4
