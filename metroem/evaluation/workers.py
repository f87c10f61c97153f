"""Do the tasks of an evaluation: in this process, or in several of one thread each."""

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch

from metroem.errors import ResourceError
from metroem.evaluation.measure import Measured, Measurer
from metroem.evaluation.plan import Task
from metroem.utils.processes import start_working
from metroem.utils.stop_request import StopRequest

# Seconds that running pairs get to end after Ctrl-C or SIGTERM.
GRACE_S = 10.0
# A process takes some seconds to start, so it is worth it for so many tasks.
LEAST_TASKS = 4
_LOOK_S = 0.2  # how often a signal is looked for


def choose_workers(asked: int | None, device: torch.device, num_tasks: int) -> int:
    """Choose the number of processes.

    Args:
        asked: of --workers; None takes one per core, as far as each has
            `LEAST_TASKS`, or one on a GPU.
        device: of the networks.
        num_tasks: no more processes than tasks are needed.
    """
    if asked is None:
        # A cluster may give this process only a part of the cores.
        cores = len(os.sched_getaffinity(0)) if device.type == "cpu" else 1
        asked = min(cores, num_tasks // LEAST_TASKS)
    return max(1, min(asked, num_tasks))


def run_tasks(
    measurer: Measurer, tasks: Sequence[Task], num_workers: int, stop: StopRequest
) -> Iterator[tuple[Task, Measured]]:
    """Do tasks, with one thread each: so the figures depend on no number of threads.

    After a signal no further task is started. Running ones are ended: in this process
    without a limit of time, in others within `GRACE_S` seconds.

    Args:
        measurer: does a task.
        tasks: in the order in which their results are wanted.
        num_workers: processes; 1 is this process.
        stop: says that a signal came.

    Yields:
        Each task and its result, in the order of the tasks.

    Raises:
        ResourceError: a process died.
    """
    if num_workers > 1:
        yield from _run_in_processes(measurer, tasks, num_workers, stop)
        return
    for task in tasks:
        if stop.code:
            return
        with _one_thread():
            result = measurer.run(task)
        yield task, result


def _run_in_processes(
    measurer: Measurer, tasks: Sequence[Task], num_workers: int, stop: StopRequest
) -> Iterator[tuple[Task, Measured]]:
    others = set(multiprocessing.active_children())
    # Forked from a process that has imported this file, and nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(num_workers, context, _start, (measurer,))
    waiting = deque(tasks)
    handed: deque[tuple[Task, Future[Measured]]] = deque()
    abandoned: list[Future[Measured]] = []
    deadline = float("inf")
    try:
        while waiting or handed:
            if stop.code:
                waiting.clear()
                deadline = min(deadline, time.monotonic() + GRACE_S)
            running = [future for _, future in handed if not future.done()]
            while waiting and len(running) < num_workers:
                task = waiting.popleft()
                running.append(pool.submit(_run, task))
                handed.append((task, running[-1]))
            if handed and handed[0][1].done():
                task, future = handed.popleft()
                yield task, future.result()
            elif handed and time.monotonic() >= deadline:
                abandoned.append(handed.popleft()[1])
            else:
                wait(running, _LOOK_S, FIRST_COMPLETED)
    except BrokenProcessPool as error:
        if stop.code:  # the signal went to all processes of a job
            return
        raise ResourceError(
            f"a process of --workers {num_workers} died, most likely for want of "
            "memory: give fewer; the same command resumes from here"
        ) from error
    finally:
        abandoned += [future for _, future in handed]
        if not all(future.done() for future in abandoned):
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
        pool.shutdown(cancel_futures=True)


# The measurer of this process, if it is one of several.
_measurer: Measurer | None = None


def _start(measurer: Measurer) -> None:
    """Set up a process that does tasks."""
    global _measurer
    start_working()
    _measurer = measurer


def _run(task: Task) -> Measured:
    assert _measurer is not None
    return _measurer.run(task)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
