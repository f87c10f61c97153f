"""Put texts into a queue and take them out: a folder (fq://) or Amazon SQS (sqs://).

The queues are those of the package task-queue, and its tools work on them: `ptq
status`, `ptq release`. Two things are done here instead. Its way of taking a message
out decodes it and looks up a class that it names, before a caller can check it; a
message that is not JSON would stop every worker. Its way of putting one in shows others
half of it, and passes over those that SQS refuses.

A message that was taken out is leased: nobody else gets it until the lease ends. Its
holder deletes it when the work is done. If the holder dies, the message comes back.
"""

import fcntl
import os
import random
import re
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from tenacity import Retrying, retry_if_exception, stop_before_delay
from tenacity.wait import wait_random_exponential

from metroem.errors import DatasetError, UsageError
from metroem.io.cloud_errors import storage_errors
from metroem.io.cloud_retry import TIMEOUT_S, is_retryable, prepare_storage
from metroem.io.files import make_folder

# Messages are short; more bytes of one are not read.
MAX_BYTES = 64 * 1024
SQS_LONGEST_LEASE_S = 12 * 3600
# Messages of a request to SQS, and requests at a time.
_BATCH, _THREADS = 10, 16
# Seconds that SQS may be out of reach: a worker should outlive a break of the network.
_PATIENCE_S = 10 * TIMEOUT_S
# Seconds to wait for a message of an empty queue of SQS: below the limit of a read.
_LISTEN_S = 3
# Name of a message in a folder: the second at which its lease ends, and its id.
_NAME = re.compile(r"(\d+)--([\w-]+)\.json")


@dataclass(frozen=True)
class Received:
    """A message that was taken out of a queue.

    Attributes:
        content: its bytes, which may be anything; at most `MAX_BYTES` + 1 of them.
        handle: names it to its queue.
    """

    content: bytes
    handle: str


class Queue(ABC):
    """A queue of messages; any number of processes may use it.

    Its methods raise DatasetError if the queue cannot be used.

    Attributes:
        url: its address.
    """

    url: str

    @abstractmethod
    def put(self, texts: Sequence[str]) -> None:
        """Put messages into the queue."""

    @abstractmethod
    def lease(self, seconds: int) -> Received | None:
        """Take a message out for some seconds; None if none can be had now."""

    @abstractmethod
    def renew(self, received: Received, seconds: int) -> None:
        """Let a lease end some seconds from now; 0 gives the message back."""

    @abstractmethod
    def delete(self, received: Received) -> None:
        """Delete a message for good."""

    @abstractmethod
    def count(self) -> int:
        """Count the messages, leased ones too; for SQS the number is a rough one."""


def open_queue(url: str) -> Queue:
    """Open a queue.

    Args:
        url: fq://FOLDER, which is made if it is missing, or sqs://NAME.

    Raises:
        UsageError: task-queue is not installed.
        DatasetError: there is no such queue, or it cannot be reached.
        StorageError: the folder cannot be made.
    """
    prepare_storage()
    try:
        from taskqueue import TaskQueue
    except ImportError as error:
        raise UsageError(
            f"--queue {url}: task-queue is not installed ({error}); install it with "
            "pip install 'metroem[queue]'"
        ) from error
    scheme, _, location = url.partition("://")
    if scheme == "fq":
        folder = Path(location).expanduser().absolute()
        make_folder(folder / "queue")
        make_folder(folder / "movement")
        return _FolderQueue(url, folder, TaskQueue(f"fq://{folder}").api)
    # task-queue prints a line at each failed try to find the queue.
    with _sqs_errors(url), redirect_stdout(StringIO()):
        return _SqsQueue(url, TaskQueue(url).api)


class _FolderQueue(Queue):
    """A queue in a folder, laid out as task-queue does.

    queue/<second>--<id>.json: a message, leased until that second, or 0.
    movement/<id>: the names that it had, the last one last.

    task-queue rounds the time down to whole seconds, so a second is added to a lease.
    """

    def __init__(self, url: str, folder: Path, api: Any) -> None:
        self.url, self._folder, self._api = url, folder, api

    def put(self, texts: Sequence[str]) -> None:
        with storage_errors("--queue", self.url, doing="written"):
            for text in texts:
                identifier = str(uuid.uuid4())
                name = f"0--{identifier}.json"
                self._movements(identifier).write_text(f"{name}\n")
                # Beside queue/, so that nobody takes out half of it.
                partial = self._folder / f".{name}.tmp"
                try:
                    partial.write_text(text)
                    os.replace(partial, self._folder / "queue" / name)
                finally:
                    partial.unlink(missing_ok=True)

    def lease(self, seconds: int) -> Received | None:
        with storage_errors("--queue", self.url):
            for name, identifier in self._free():
                new = f"{int(time.time()) + seconds + 1}--{identifier}.json"
                try:  # whoever renames it has it
                    os.rename(self._folder / "queue" / name, self._path(new))
                except FileNotFoundError:
                    continue
                with self._movements(identifier).open("a") as movements:
                    fcntl.lockf(movements, fcntl.LOCK_EX)
                    movements.write(f"{new}\n")
                with self._path(new).open("rb") as file:
                    return Received(file.read(MAX_BYTES + 1), identifier)
        return None

    def renew(self, received: Received, seconds: int) -> None:
        with storage_errors("--queue", self.url, doing="written"):
            self._api.renew_lease(received.handle, seconds + 1 if seconds else 0)

    def delete(self, received: Received) -> None:
        with storage_errors("--queue", self.url, doing="written"):
            self._api.delete(received.handle)

    def count(self) -> int:
        with storage_errors("--queue", self.url):
            return sum(_NAME.fullmatch(file.name) is not None for file in self._scan())

    def _free(self) -> Iterator[tuple[str, str]]:
        """Yield names and ids of messages that nobody holds.

        They come in a random order within a window, so that workers seldom want the
        same one at the same time.
        """
        now, window = int(time.time()), []
        for file in self._scan():
            found = _NAME.fullmatch(file.name)
            if found and int(found[1]) <= now:
                window.append((file.name, found[2]))
            if len(window) == 256:
                random.shuffle(window)
                yield from window
                window = []
        random.shuffle(window)
        yield from window

    def _scan(self) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self._folder / "queue") as files:
            yield from files

    def _path(self, name: str) -> Path:
        return self._folder / "queue" / name

    def _movements(self, identifier: str) -> Path:
        return self._folder / "movement" / identifier


class _SqsQueue(Queue):
    """A queue of Amazon SQS, or of a server that speaks its language."""

    def __init__(self, url: str, api: Any) -> None:
        self.url, self._api = url, api

    def put(self, texts: Sequence[str]) -> None:
        batches = [texts[i : i + _BATCH] for i in range(0, len(texts), _BATCH)]
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(self._put, batches):
                pass

    def lease(self, seconds: int) -> Received | None:
        with _sqs_errors(self.url):
            for attempt in _patiently():
                with attempt:
                    answer = self._api.sqs.receive_message(
                        QueueUrl=self._api.qurl,
                        MaxNumberOfMessages=1,
                        VisibilityTimeout=seconds,
                        WaitTimeSeconds=_LISTEN_S,
                    )
        for message in answer.get("Messages", ()):
            content = message["Body"].encode(errors="replace")
            return Received(content[: MAX_BYTES + 1], message["ReceiptHandle"])
        return None

    def renew(self, received: Received, seconds: int) -> None:
        with _sqs_errors(self.url):
            self._api.renew_lease(SimpleNamespace(id=received.handle), seconds)

    def delete(self, received: Received) -> None:
        with _sqs_errors(self.url):
            self._api.delete(received.handle)

    def count(self) -> int:
        with _sqs_errors(self.url):
            return self._api.enqueued

    def _put(self, texts: Sequence[str]) -> None:
        """Put at most `_BATCH` messages."""
        entries = [{"Id": str(i), "MessageBody": text} for i, text in enumerate(texts)]
        with _sqs_errors(self.url):
            for attempt in _patiently():
                with attempt:
                    answer = self._api.sqs.send_message_batch(
                        QueueUrl=self._api.qurl, Entries=entries
                    )
        if failed := answer.get("Failed"):
            raise DatasetError(
                f"--queue {self.url}: refused {len(failed)} of {len(texts)} messages "
                f"({failed[0].get('Message') or failed[0].get('Code')}); give the same "
                "command again"
            )


def _patiently() -> Retrying:
    """Try a request to SQS again after errors that may pass; boto3 does not here."""
    return Retrying(
        stop=stop_before_delay(_PATIENCE_S),
        wait=wait_random_exponential(TIMEOUT_S / 24, TIMEOUT_S),
        retry=retry_if_exception(_may_pass),
        reraise=True,
    )


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, BotoCoreError | ClientError) and is_retryable(error)


@contextmanager
def _sqs_errors(url: str) -> Iterator[None]:
    """Turn errors of SQS into one line that says what to do.

    Raises:
        DatasetError: there is no such queue, or it cannot be reached.
    """
    with storage_errors("--queue", url, doing="used"):
        try:
            yield
        except ClientError as error:
            if "NonExistentQueue" not in str(error) and "QueueDoesNotExist" not in (
                error.response.get("Error", {}).get("Code", "")
            ):
                raise
            raise DatasetError(
                f"--queue {url}: there is no such queue in this region; make it with "
                f"aws sqs create-queue --queue-name {url.rpartition('/')[2]}, or set "
                "AWS_DEFAULT_REGION"
            ) from error
