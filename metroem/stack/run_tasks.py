"""Run the tasks of a step on this machine: in this process, or in several."""

import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from metroem.errors import MetroEMError, ResourceError, disk_error, first_line
from metroem.stack.task_records import DIED, MAX_TRIES, Outcome, TaskRecords, Try
from metroem.utils import cli

if TYPE_CHECKING:
    from metroem.stack.tasks import Step

# Seconds that running tasks get to end after Ctrl-C or SIGTERM.
GRACE_S = 5.0
# What numpy, torch and OpenCV read when they are imported.
_ONE_THREAD = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
    "OPENCV_FOR_THREADS_NUM",
)


def run_here(
    step: "Step", records: TaskRecords, tasks: Collection[str]
) -> Iterator[Outcome]:
    """Run tasks one after the other in this process.

    A task that fails is tried again after all others, `MAX_TRIES` times in all.

    Yields:
        How each task ended, when it is done or has failed for good.
    """
    waiting = deque(tasks)
    while waiting:
        task = waiting.popleft()
        outcome = try_task(step, records, task)
        if outcome is None:
            waiting.append(task)
        else:
            yield outcome


def try_task(step: "Step", records: TaskRecords, task: str) -> Outcome | None:
    """Run a task, and count the try.

    Returns:
        How it ended; None if it failed and has another try.
    """
    begun = records.begin_try(task)
    if begun.number > MAX_TRIES:  # its process died each time
        outcome = Outcome(task, reason=begun.previous)
    else:
        try:
            outcome = run_task(step, records, task)
        except BaseException:  # interrupted: not the fault of the task
            records.undo_try(begun)
            raise
    return outcome if records.end_try(begun, outcome) else None


def run_task(step: "Step", records: TaskRecords, task: str) -> Outcome:
    """Run a task, and write its marker if it is done."""
    started = time.monotonic()
    try:
        figures = step.run(task)
        outcome = Outcome(task, figures, time.monotonic() - started)
        records.write_marker(outcome)
    except Exception as error:
        for_user = disk_error(error) if isinstance(error, OSError) else None
        for_user = error if isinstance(error, MetroEMError) else for_user
        reason = first_line(for_user or error)
        return Outcome(
            task,
            seconds=time.monotonic() - started,
            reason=reason if for_user else f"{type(error).__name__}: {reason}",
            traceback="" if for_user else traceback.format_exc(),
        )
    return outcome


def run_in_processes(
    step: "Step", records: TaskRecords, tasks: Collection[str], num_processes: int
) -> Iterator[Outcome]:
    """Run tasks in processes of one thread each, handed out one by one.

    A process that dies counts as a try of its task, and is replaced. When the generator
    is closed or interrupted, running tasks get `GRACE_S` seconds to end.

    Yields:
        How each task ended, when it is done or has failed for good.

    Raises:
        ResourceError: a process cannot start.
    """
    waiting = deque(tasks)
    idle: list[_Member] = []
    busy: list[_Member] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < num_processes:
                begun = records.begin_try(waiting.popleft())
                if begun.number > MAX_TRIES:  # its process died each time
                    outcome = Outcome(begun.task, reason=begun.previous)
                    records.end_try(begun, outcome)
                    yield outcome
                    continue
                busy.append(idle.pop() if idle else _Member(step))
                busy[-1].begin(begun)
            for member in _with_news(busy, None):
                outcome = member.receive()
                if outcome is None:
                    continue
                busy.remove(member)
                if member.is_alive:
                    idle.append(member)
                if records.end_try(member.begun, outcome):
                    yield outcome
                else:
                    waiting.append(outcome.task)
    finally:
        _end(idle, busy, records)


class _Member:
    """A process that runs tasks, and the connection to it.

    Attributes:
        begun: the try that it works on, or the last one.
        is_alive: whether its end has not been noticed.
    """

    begun: Try

    def __init__(self, step: "Step") -> None:
        # Processes are forked from one that has imported the step, and nothing else.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, type(step).__module__])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(step, theirs), daemon=True)
        with _one_thread():
            self.process.start()
        theirs.close()  # so that the connection ends with the process
        self.is_alive, self._has_started = True, False

    def begin(self, begun: Try) -> None:
        """Hand a task to the process."""
        self.begun = begun
        with suppress(OSError):  # it died, which `receive` notices
            self.connection.send(begun.task)

    def receive(self) -> Outcome | None:
        """Receive what the process has to say; waits until it says something.

        Returns:
            The outcome of its task, also if the process died; None if it has only
            started.

        Raises:
            ResourceError: it died before it had started.
        """
        try:
            outcome = self.connection.recv()
        except (EOFError, OSError):
            self.is_alive = False
            self.process.join()
            code = self.process.exitcode
            if not self._has_started:
                raise ResourceError(
                    f"a process of --workers ended with code {code} before its first "
                    "task; its error is above; --workers 1 needs no other process"
                ) from None
            return Outcome(self.begun.task, reason=f"exit code {code}: {DIED}")
        self._has_started = True
        return outcome

    def end(self) -> None:
        """Let the process end, which it does once nothing more can come.

        A process that is killed leaves its semaphores, and Python warns of them.
        """
        self.connection.close()
        self.process.join(GRACE_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def _with_news(members: list[_Member], seconds: float | None) -> list[_Member]:
    """Wait until processes say something or die, or until the seconds have passed."""
    ready = wait([member.connection for member in members], seconds)
    return [member for member in members if member.connection in ready]


def _end(idle: list[_Member], busy: list[_Member], records: TaskRecords) -> None:
    """End all processes; those with a task get `GRACE_S` seconds to end it."""
    deadline = time.monotonic() + GRACE_S
    running = list(busy)
    try:
        while running and (seconds := deadline - time.monotonic()) > 0:
            for member in _with_news(running, seconds):
                outcome = member.receive()
                if outcome is None:
                    continue
                running.remove(member)
                if member.is_alive:
                    records.end_try(member.begun, outcome)
                else:  # the signal went to it, too
                    records.undo_try(member.begun)
    finally:
        for member in running:
            member.kill()
            records.undo_try(member.begun)
        for member in (*idle, *busy):
            if member not in running:
                member.end()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Set the variables of `_ONE_THREAD` for processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def _work(step: "Step", connection: Connection) -> None:
    """Run tasks as their names come, until the connection ends; a process does this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent decides
    cli.configure_logging(logging.WARNING)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    records = TaskRecords(step.destination, step.name, step.settings)
    connection.send(None)
    with suppress(EOFError, OSError):  # its parent died
        while True:
            connection.send(run_task(step, records, connection.recv()))
