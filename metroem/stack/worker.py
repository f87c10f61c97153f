"""Do the tasks of a queue, one at a time: the command `metroem worker`.

Messages are not trusted. Only tasks of the destination that this worker was started for
are run. A message that nobody could run is set aside as <dst>/tasks/refused/<hash>.json
and deleted. One that another worker could run is held back for `HOLD_S` seconds and
stays in the queue.
"""

import hashlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Collection
from importlib import import_module
from types import TracebackType
from typing import NamedTuple

from metroem.errors import MetroEMError, UsageError, first_line
from metroem.io.cloud_errors import storage_errors
from metroem.io.queues import SQS_LONGEST_LEASE_S, Queue, Received, open_queue
from metroem.io.volume_write import Notes
from metroem.stack.queue_tasks import Message
from metroem.stack.requests import WorkerRequest
from metroem.stack.run_tasks import try_task
from metroem.stack.task_records import (
    Outcome,
    TaskRecords,
    records_path,
    stack_path,
)
from metroem.stack.tasks import Step
from metroem.utils.progress import in_words
from metroem.utils.stop_request import StopRequest

logger = logging.getLogger(__name__)

# Seconds between two looks at a queue that has nothing for this worker.
IDLE_S = 1.0
# Looks at an empty queue until it is believed: SQS counts roughly.
_LOOKS = 3
# Seconds until a task that failed is tried again, by this worker or another.
RETRY_S = 2
# Seconds that messages are held back that this worker may not run.
HOLD_S = 30
# Such messages in a row after which a worker without --wait ends.
_MOST_HELD = 100
# Times in a row that storage may fail before the worker ends: a minute and more.
_MOST_ERRORS = 5
# Seconds that a task gets to end after a signal; then it is given back.
GRACE_S = 10.0


class _Work(NamedTuple):
    """A task that a message names, and may be run."""

    step: Step
    records: TaskRecords
    task: str


class _Refused(Exception):
    """A message that no worker could run."""


class _Held(Exception):
    """A message that this worker may not run now, but another or later may."""


def run_worker(request: WorkerRequest) -> None:
    """Do the tasks of a queue until it is empty, or for ever.

    A signal (Ctrl-C, SIGTERM) gives the running task `GRACE_S` seconds to end. Then it
    goes back to the queue, and the try does not count.

    Raises:
        UsageError, DatasetError, StorageError: the queue or the destination cannot be
            used; see `open_queue`.
        SystemExit: with 1 if tasks failed, 130 or 143 after a signal.
    """
    if request.queue.startswith("sqs://") and request.lease_s > SQS_LONGEST_LEASE_S:
        raise UsageError(
            f"--lease_s {request.lease_s}: SQS leases for {SQS_LONGEST_LEASE_S} s at "
            "most; the lease is renewed while a task runs, so a short one is enough"
        )
    worker = _Worker(request, open_queue(request.queue))
    with StopRequest(None) as stop:
        worker.run(stop)
    logger.info("%s", worker.summary())
    if code := stop.code or (1 if worker.num_failed else 0):
        sys.exit(code)


class _Worker:
    """A worker, and what it has done.

    Attributes:
        num_failed: tasks that failed for good in it.
    """

    def __init__(self, request: WorkerRequest, queue: Queue) -> None:
        self._request, self._queue = request, queue
        self._destination = stack_path(request.dst_path)
        self._known: dict[str, tuple[Step, TaskRecords, Collection[str]]] = {}
        self.num_done = self.num_failed = self.num_refused = 0
        self._held: set[int] = set()  # hashes of messages that were held back
        self._held_in_a_row = self._errors_in_a_row = 0
        self._said: set[str] = set()

    def run(self, stop: StopRequest) -> None:
        """Do tasks until the queue is empty or a signal came."""
        looks = 0
        while not stop.code:
            received = self._queue.lease(self._request.lease_s)
            if received is not None:
                self._handle(received, stop)
                looks = 0
            elif not self._request.wait and self._queue.count() <= len(self._held):
                looks += 1
                if looks == _LOOKS:
                    return
            if self._held_in_a_row >= _MOST_HELD and not self._request.wait:
                return
            if received is None:
                time.sleep(IDLE_S)

    def summary(self) -> str:
        """Say what was done."""
        text = f"{self.num_done} tasks done, {self.num_failed} failed"
        if self.num_refused:
            text += (
                f", {self.num_refused} messages refused: they are in "
                f"{records_path(self._destination)}/refused"
            )
        if self._held:
            text += f"; {len(self._held)} messages are left for others"
        return text

    def _handle(self, received: Received, stop: StopRequest) -> None:
        """Do the task of a message, or refuse it; the message is dealt with."""
        try:
            with _Lease(self._queue, received, self._request.lease_s, stop):
                work = self._find(received.content)
                was_done = work.records.is_done(work.task)
                outcome = Outcome(work.task) if was_done else try_task(*work)
        except _Refused as reason:
            self._set_aside(received, str(reason))
            self._queue.delete(received)
        except _Held as reason:
            self._hold_back(received, str(reason))
        except KeyboardInterrupt:
            logger.info("the task was interrupted: it goes back to the queue")
            self._queue.renew(received, 0)
        except Exception as error:  # of storage: those of a task are its outcome
            self._queue.renew(received, RETRY_S)
            self._errors_in_a_row += 1
            if self._errors_in_a_row == _MOST_ERRORS:
                raise
            logger.warning("%s: the task goes back to the queue", first_line(error))
            time.sleep(RETRY_S * self._errors_in_a_row)
        else:
            self._held_in_a_row = self._errors_in_a_row = 0
            if outcome is None:
                self._queue.renew(received, RETRY_S)
            else:
                self._queue.delete(received)
                self._count(work, outcome, was_done)

    def _count(self, work: _Work, outcome: Outcome, was_done: bool) -> None:
        """Log and count how a task ended for good."""
        name = f"step {work.step.name}: {work.task}"
        if was_done:
            logger.info("%s: is done already", name)
        elif outcome.is_done:
            self.num_done += 1
            logger.info("%s: done in %s", name, in_words(outcome.seconds))
        else:
            self.num_failed += 1
            logger.error("%s: failed: %s", name, outcome.reason)

    def _hold_back(self, received: Received, reason: str) -> None:
        """Leave a message for others; say why, once for each reason."""
        if reason not in self._said:
            logger.warning("%s", reason)
            self._said.add(reason)
        self._held.add(hash(received.content))
        self._held_in_a_row += 1
        self._queue.renew(received, HOLD_S)

    def _find(self, content: bytes) -> _Work:
        """Parse a message and find its task.

        Raises:
            _Refused: it names no task of this destination.
            _Held: it is of another destination, or its step has other settings.
            MetroEMError: the settings of the stack cannot be read.
        """
        message = Message.parse(content)
        if isinstance(message, str):
            raise _Refused(message)
        if message.destination != self._destination:
            raise _Held(
                f"the queue has tasks of {ascii(message.destination)}, which this "
                f"worker was not started for (--dst_path {self._request.dst_path}); "
                "they stay in the queue"
            )
        if message.step not in self._known:
            self._make(message.step)
        step, records, tasks = self._known[message.step]
        if records.stored_digest() not in (None, records.digest):
            step, records, tasks = self._make(message.step)
            if records.stored_digest() not in (None, records.digest):
                raise _Held(
                    f"step {step.name}: the settings of {self._destination} are not "
                    "those that its tasks were put into the queue with; they stay in "
                    "the queue"
                )
        if message.task not in tasks:  # the stack may have grown
            step, records, tasks = self._make(message.step)
        if message.task not in tasks:
            raise _Refused(f"step {step.name} has no task {message.task!r}")
        return _Work(step, records, message.task)

    def _make(self, name: str) -> tuple[Step, TaskRecords, Collection[str]]:
        """Make a step from the settings of the stack.

        Raises:
            _Refused: there is no step of this name.
        """
        # Imported late and by name: it imports all steps, and needs none of this.
        align_stack = import_module("metroem.stack.align_stack")
        try:
            step: Step = align_stack.make_step(self._destination, name)
        except UsageError as error:
            raise _Refused(f"step {name!r}: {first_line(error)}") from None
        records = TaskRecords(step.destination, step.name, step.settings)
        self._known[name] = step, records, frozenset(step.tasks())
        return self._known[name]

    def _set_aside(self, received: Received, reason: str) -> None:
        """Store a message that is refused, if possible, and count it."""
        self.num_refused += 1
        logger.warning("a message was refused: %s", ascii(reason)[1:-1])
        text = received.content[:1000].decode(errors="replace")
        name = hashlib.sha256(received.content).hexdigest()[:16]
        path = records_path(self._destination)
        try:
            with storage_errors("--dst_path", path, doing="written"):
                note = {"reason": reason, "message": text, "queue": self._queue.url}
                Notes(path).write(f"refused/{name}.json", note)
        except MetroEMError as error:
            logger.warning("it cannot be set aside: %s", error)


class _Lease:
    """Context manager that renews a lease, and interrupts a task that must end.

    A thread renews the lease three times in its length. `GRACE_S` seconds after a
    signal it raises KeyboardInterrupt in the main thread.
    """

    def __init__(
        self, queue: Queue, received: Received, seconds: int, stop: StopRequest
    ) -> None:
        self._queue, self._received, self._seconds = queue, received, seconds
        self._stop, self._ended = stop, threading.Event()
        self._thread = threading.Thread(target=self._hold, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _hold(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        renewed, deadline = time.monotonic(), float("inf")
        while not self._ended.wait(min(0.2, self._seconds / 10)):
            now = time.monotonic()
            if self._stop.code:
                deadline = min(deadline, now + GRACE_S)
            if now >= deadline:
                signal.pthread_kill(main, signal.SIGINT)
                return
            if now - renewed >= self._seconds / 3:
                renewed = now
                try:
                    self._queue.renew(self._received, self._seconds)
                except MetroEMError as error:
                    logger.warning("the lease is not renewed: %s", error)
