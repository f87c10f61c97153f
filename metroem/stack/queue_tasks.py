"""Put the tasks of a step into a queue, and wait until workers have done them.

A message is a JSON object that names a step, a task and a destination. It is parsed as
data, and names nothing that could be imported or evaluated.
"""

import logging
import time
from collections.abc import Collection, Iterator
from typing import Annotated

import msgspec

from metroem.errors import StorageError
from metroem.io.queues import MAX_BYTES, open_queue
from metroem.stack.task_records import MAX_TRIES, Outcome, TaskRecords

logger = logging.getLogger(__name__)

# Seconds between two looks for markers, at least.
POLL_S = 1.0
# Seconds after which tasks that are in no marker and in no queue are put again.
LOST_S = 60.0

_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A task in a queue.

    Attributes:
        step: name of the step.
        task: name of the task.
        destination: folder of the stack, with a scheme.
    """

    step: _Text
    task: _Text
    destination: _Text

    def encode(self) -> str:
        """Return the message as JSON."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def parse(cls, content: bytes) -> "Message | str":
        """Parse the bytes of a message.

        Returns:
            The message, or why it is none.
        """
        if len(content) > MAX_BYTES:
            return f"more than {MAX_BYTES} bytes"
        try:
            return msgspec.json.decode(content, type=cls, strict=True)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return f"not a task: {error}"


def run_in_queue(
    records: TaskRecords, url: str, tasks: Collection[str]
) -> Iterator[Outcome]:
    """Put tasks into a queue, and wait until workers have done them.

    Args:
        records: of the step; no task has a marker or a failure.
        url: fq://FOLDER or sqs://NAME.
        tasks: to be done.

    Yields:
        How each task ended, once its marker or its failure is there.

    Raises:
        UsageError, DatasetError, StorageError: see `open_queue`.
        StorageError: tasks are lost: the queue is empty, and nothing tells of them.
    """
    queue = open_queue(url)
    if already := queue.count():
        logger.warning(
            "%s: holds %d messages already; a task that is in it twice may run twice, "
            "with the same result",
            *(url, already),
        )
    missing = dict.fromkeys(tasks)
    times_put, news = 0, float("-inf")
    while missing:
        if time.monotonic() - news > LOST_S:
            if times_put == MAX_TRIES:
                raise StorageError(
                    f"--queue {url}: {len(missing)} tasks of step {records.step} are "
                    f"neither done nor in the queue, after they were put into it "
                    f"{times_put} times; see what the workers print, and "
                    f"{records.path}/refused"
                )
            if times_put:
                logger.warning(
                    "%s: is empty, %d tasks are not done; they are put into it again",
                    *(url, len(missing)),
                )
            queue.put(
                [
                    Message(records.step, task, records.destination).encode()
                    for task in missing
                ]
            )
            times_put, news = times_put + 1, time.monotonic()
        started = time.monotonic()
        found = records.look(missing)
        for task, outcome in (found.failed | found.done).items():
            del missing[task]
            times_put, news = 1, time.monotonic()
            yield outcome
        if missing:
            if queue.count():
                news = time.monotonic()
            # A long listing is not repeated all the time.
            time.sleep(max(POLL_S, 5 * (time.monotonic() - started)))
