"""Record which tasks of a step are done and which failed, at any cloud path.

    <dst>/tasks/<step>.json                the settings of the step, and their digest
    <dst>/tasks/<step>/<task>.json         done-marker: digest, figures, seconds
    <dst>/tasks/<step>/tries/<task>.json   tries of a task that is not done yet
    <dst>/tasks/<step>/failed/<task>.json  a task that failed `MAX_TRIES` times, and why

A marker is written last: the files of its task are complete. It is deleted before the
task is done again with other settings. So no marker ever speaks of files that a stopped
run has partly replaced.
"""

import hashlib
import json
import logging
import os
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from metroem.io.cloud_errors import storage_errors
from metroem.io.cloud_paths import cloud_path
from metroem.io.resume import as_json, describe_differences
from metroem.io.volume_write import Notes

logger = logging.getLogger(__name__)

MAX_TRIES = 3
DIED = (
    "the process that ran it was killed or died, most likely for want of memory: "
    "run fewer at a time, or smaller chunks"
)


@dataclass(frozen=True)
class Outcome:
    """How a try of a task ended.

    Attributes:
        task: its name.
        figures: what `Step.run` returned; empty if it failed.
        seconds: wall time of the try.
        reason: why it failed, in one line; "" if it is done.
        traceback: of an error that is a bug; else "".
    """

    task: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""
    traceback: str = ""

    @property
    def is_done(self) -> bool:
        """Whether the task is done."""
        return not self.reason


@dataclass(frozen=True)
class Try:
    """A try of a task that begins.

    Attributes:
        task: its name.
        number: 1 for the first; above `MAX_TRIES` there is none left.
        previous: how the try before ended; "" for the first.
    """

    task: str
    number: int
    previous: str


@dataclass(frozen=True)
class Found:
    """What is recorded of some tasks.

    Attributes:
        done: markers of today's settings, by task.
        stale: tasks whose marker is of other settings.
        failed: tasks that failed, by task.
    """

    done: dict[str, Outcome]
    stale: list[str]
    failed: dict[str, Outcome]


class TaskRecords:
    """The records of one step at a destination.

    All methods raise DatasetError or StorageError if the storage fails.

    Attributes:
        destination: folder of the stack, with a scheme.
        path: folder of the records, with a scheme.
        step: name of the step.
        digest: of the settings.
    """

    def __init__(
        self, destination: str, step: str, settings: Mapping[str, Any]
    ) -> None:
        self.destination, self.step = stack_path(destination), step
        self.path = records_path(destination)
        self._settings = as_json(settings)
        text = json.dumps(self._settings, sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        with self._storage("read"):
            self._notes = Notes(self.path)

    def look(self, tasks: Collection[str]) -> Found:
        """Look up tasks: one listing, and a read of each marker that is there."""
        with self._storage("read"):
            names = set(self._notes.names(f"{self.step}/"))
            markers = [self._marker(task) for task in tasks]
            failures = [self._failure(task) for task in tasks]
            notes = self._notes.read(
                [name for name in (*markers, *failures) if name in names]
            )
        done, stale, failed = {}, [], {}
        for task, marker, failure in zip(tasks, markers, failures, strict=True):
            if note := notes.get(marker):
                if note["digest"] == self.digest:
                    done[task] = Outcome(task, note["figures"], note["seconds"])
                else:
                    stale.append(task)
            if note := notes.get(failure):
                failed[task] = Outcome(task, reason=note["reason"])
        return Found(done, stale, failed)

    def count_open(self, tasks: Collection[str]) -> int:
        """Count tasks that are not done; 0 only if all are.

        A marker is only read if each task has one: there may be millions. So a marker
        of other settings counts as done while others are missing.
        """
        with self._storage("read"):
            names = set(self._notes.names(f"{self.step}/"))
        num_missing = sum(self._marker(task) not in names for task in tasks)
        return num_missing or len(tasks) - len(self.look(tasks).done)

    def clear(self, tasks: Collection[str], found: Found) -> None:
        """Delete markers and failures of tasks that will be run.

        Args:
            tasks: that will be run.
            found: what `look` found of them.
        """
        with_marker = {*found.done, *found.stale}
        names = [self._marker(task) for task in tasks if task in with_marker]
        names += [self._failure(task) for task in tasks if task in found.failed]
        if names:
            with self._storage("written"):
                self._notes.remove(names)

    def write_settings(self) -> str:
        """Store the settings of the step.

        Returns:
            How the stored ones differed, in words; "" if they did not.
        """
        name = f"{self.step}.json"
        note = {"digest": self.digest, "settings": self._settings}
        with self._storage("written"):
            found = self._notes.read([name]).get(name)
            if found == note:
                return ""
            self._notes.write(name, note)
        if found is None:
            return ""
        return describe_differences(_flat(found["settings"]), _flat(self._settings))

    def stored_digest(self) -> str | None:
        """Read the digest of the stored settings; None if there are none."""
        name = f"{self.step}.json"
        with self._storage("read"):
            note = self._notes.read([name]).get(name)
        return None if note is None else note["digest"]

    def begin_try(self, task: str) -> Try:
        """Count a try before it begins, since its process may die."""
        name = self._tries(task)
        with self._storage("written"):
            note = self._notes.read([name]).get(name)
            if note is None or note["digest"] != self.digest:
                note = {"tries": 0, "reason": ""}
            begun = Try(task, note["tries"] + 1, note["reason"])
            if begun.number <= MAX_TRIES:
                self._write_tries(task, begun.number, DIED)
        return begun

    def end_try(self, begun: Try, outcome: Outcome) -> bool:
        """Record how a try ended; the marker of a done task is written before.

        Returns:
            Whether that is final: the task is done, or no try is left.
        """
        with self._storage("written"):
            if not outcome.is_done and begun.number < MAX_TRIES:
                self._write_tries(outcome.task, begun.number, outcome.reason)
                logger.warning(
                    "step %s: %s: try %d of %d failed: %s",
                    *(self.step, begun.task, begun.number, MAX_TRIES, outcome.reason),
                )
                return False
            if not outcome.is_done:
                note = {"digest": self.digest, "tries": MAX_TRIES}
                note |= {"reason": outcome.reason, "traceback": outcome.traceback}
                self._notes.write(self._failure(outcome.task), note | _about_here())
            self._notes.remove([self._tries(outcome.task)])
        return True

    def undo_try(self, begun: Try) -> None:
        """Take back the count of a try that was interrupted."""
        with self._storage("written"):
            if begun.number > 1:
                self._write_tries(begun.task, begun.number - 1, begun.previous)
            else:
                self._notes.remove([self._tries(begun.task)])

    def is_done(self, task: str) -> bool:
        """Whether a task is done; a marker of other settings is deleted."""
        name = self._marker(task)
        with self._storage("read"):
            note = self._notes.read([name]).get(name)
        if note is not None and note["digest"] != self.digest:
            with self._storage("written"):
                self._notes.remove([name])
            return False
        return note is not None

    def write_marker(self, outcome: Outcome) -> None:
        """Record that a task is done: its files are complete."""
        note = {"digest": self.digest, "seconds": round(outcome.seconds, 3)}
        note["figures"] = dict(outcome.figures)
        with self._storage("written"):
            self._notes.write(self._marker(outcome.task), note | _about_here())

    def _write_tries(self, task: str, tries: int, reason: str) -> None:
        note = {"digest": self.digest, "tries": tries, "reason": reason}
        self._notes.write(self._tries(task), note | _about_here())

    def _marker(self, task: str) -> str:
        return f"{self.step}/{task}.json"

    def _tries(self, task: str) -> str:
        return f"{self.step}/tries/{task}.json"

    def _failure(self, task: str) -> str:
        return f"{self.step}/failed/{task}.json"

    @contextmanager
    def _storage(self, doing: str) -> Iterator[None]:
        with storage_errors("--dst_path", self.path, doing=doing):
            yield


def stack_path(destination: str) -> str:
    """Return the folder of a stack as messages name it: absolute, with a scheme."""
    return cloud_path(destination).removeprefix("precomputed://")


def records_path(destination: str) -> str:
    """Return the folder of the records of a destination, with a scheme."""
    return f"{stack_path(destination)}/tasks"


def _about_here() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Name nested settings by their path, "pairs.neighbours"."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{above}{key}.")
        else:
            flat[f"{above}{key}"] = value
    return flat
