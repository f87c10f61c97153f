"""Split a step into tasks, and run them: here, in shards or from a queue."""

import logging
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from metroem.errors import TaskError, UsageError
from metroem.geometry.grid import Grid
from metroem.io.cloud_paths import local_folder
from metroem.io.files import lock, lock_path, make_folder
from metroem.stack.queue_tasks import run_in_queue
from metroem.stack.requests import RunRequest
from metroem.stack.run_tasks import run_here, run_in_processes
from metroem.stack.task_records import MAX_TRIES, Outcome, TaskRecords
from metroem.utils.progress import in_words, progress, size_in_words

logger = logging.getLogger(__name__)

# Failed tasks that are named; all are in the folder of failures.
_NAMED = 10
# Times the needed bytes that a step may read without a warning.
_READ_TOO_MUCH = 1.3
_NAME = re.compile(r"z(-?\d+)-(-?\d+)_x(-?\d+)-(-?\d+)_y(-?\d+)-(-?\d+)_mip(\d+)")


@dataclass(frozen=True)
class Block:
    """An area of consecutive sections: what one task writes.

    Attributes:
        sections: range of z.
        grid: the area.
    """

    sections: range
    grid: Grid

    @property
    def name(self) -> str:
        """Name of the task: its z, and its x and y in mip-0 pixels, ends excluded."""
        (x_end, y_end), grid = self.grid.end, self.grid
        return (
            f"z{self.sections.start}-{self.sections.stop}_x{grid.x}-{x_end}"
            f"_y{grid.y}-{y_end}_mip{grid.mip}"
        )

    @classmethod
    def parse(cls, name: str) -> "Block":
        """Read a name.

        Raises:
            UsageError: it is not the name of a block.
        """
        found = _NAME.fullmatch(name)
        if not found:
            raise UsageError(f"task {name!r}: expected a name such as {_EXAMPLE}")
        z, z_end, x, x_end, y, y_end, mip = map(int, found.groups())
        grid = Grid(mip, x, y, (x_end - x) >> mip, (y_end - y) >> mip)
        return cls(range(z, z_end), grid)


_EXAMPLE = "z0-16_x0-2048_y0-2048_mip0"


def parse_sections(name: str) -> range:
    """Read the name of a task of whole sections, "z0-16" or "z-3-1"; the end excluded.

    Raises:
        UsageError: it is not such a name.
    """
    found = re.fullmatch(r"z(-?\d+)-(-?\d+)", name)
    if not found:
        raise UsageError(f"task {name!r}: expected a name such as z0-16")
    return range(int(found[1]), int(found[2]))


def split_blocks(
    area: Grid, sections: range, chunk_px: int, block_sections: int
) -> list[Block]:
    """Split sections into blocks; those at the far borders may be smaller.

    Args:
        area: the area of all sections.
        sections: range of z.
        chunk_px: side of a block, px of the area's mip.
        block_sections: sections of a block.
    """
    return [
        Block(
            range(z, min(z + block_sections, sections.stop)),
            area.crop(
                row,
                col,
                min(chunk_px, area.rows - row),
                min(chunk_px, area.cols - col),
            ),
        )
        for z in range(sections.start, sections.stop, block_sections)
        for row in range(0, area.rows, chunk_px)
        for col in range(0, area.cols, chunk_px)
    ]


class Step(ABC):
    """A list of independent tasks that write files below a destination.

    A step can be pickled: worker processes get a copy. It opens volumes when a task
    first needs them.

    Attributes:
        name: "place-match", "pairs", ...; also the folder of its done-markers.
        destination: the folder of the stack.
        settings: what the results depend on, JSON-able; with the settings of the steps
            before. A task that was done with other settings is done again.
    """

    name: str
    destination: str
    settings: Mapping[str, Any]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out cached properties: volumes that a copy opens by itself."""
        cached = {
            name
            for one in type(self).__mro__
            for name, value in vars(one).items()
            if isinstance(value, cached_property)
        }
        return {k: v for k, v in self.__dict__.items() if k not in cached}

    @abstractmethod
    def tasks(self) -> Sequence[str]:
        """List the names of all tasks: the same list in every process."""

    def prepare(self, replaces: bool) -> None:  # noqa: B027  most have nothing to do
        """Refuse what cannot be written, and make the volumes, before any task runs.

        Each command and each shard does so; workers of a queue do not.

        Args:
            replaces: no task is done with today's settings, or all are run again.

        Raises:
            MetroEMError: the tasks cannot be done.
        """

    @abstractmethod
    def run(self, task: str) -> Mapping[str, Any]:
        """Do one task. Doing it again, also at the same time, writes the same bytes.

        Returns:
            Figures of the task for its done-marker, JSON-able, for example
            {"bytes_read": 1000, "bytes_needed": 900}.

        Raises:
            MetroEMError: it cannot be done; the message says why.
        """


def run_step(step: Step, request: RunRequest) -> bool:
    """Run the tasks of a step that are not done yet, as the flags say.

    Here, in processes, for one shard, or by putting them into a queue and waiting for
    workers. A task that fails is tried `MAX_TRIES` times; all others are done.

    Args:
        step: the step; the steps before it are complete.
        request: where the tasks are run, and whether finished ones are run again.

    Returns:
        Whether the step is complete; with --shard, tasks of other shards may be open.

    Raises:
        TaskError: tasks failed; the log names them and says why.
        StorageError: another command writes to this destination, or it cannot be
            written to.
        UsageError, DatasetError: see `open_queue`.
    """
    with one_command(step.destination, request):
        records = TaskRecords(step.destination, step.name, step.settings)
        tasks = step.tasks()
        mine = _tasks_of_shard(tasks, request.shard)
        found = records.look(mine)
        todo = [task for task in mine if request.again or task not in found.done]
        _announce(step, len(tasks), len(mine), len(todo), request)
        if todo:
            step.prepare(replaces=request.again or not found.done)
        changed = records.write_settings()
        if changed and found.stale:
            logger.info(
                "step %s: %d tasks were done with other settings: %s",
                *(step.name, len(found.stale), changed),
            )
        records.clear(todo, found)
        outcomes = dict(found.done)
        started = time.monotonic()
        with closing(_run(step, records, todo, request)) as ended:
            for outcome in _with_estimate(step.name, ended, len(todo), request):
                outcomes[outcome.task] = outcome
        if todo:
            _summarize(step.name, list(outcomes.values()), time.monotonic() - started)
        failed = [outcomes[task] for task in todo if not outcomes[task].is_done]
        if failed:
            raise _failure(step, records, failed, len(todo))
        return _is_complete(step.name, records, tasks, request.shard)


@contextmanager
def one_command(destination: str, request: RunRequest) -> Iterator[None]:
    """Lock a local destination against other commands; shards run side by side."""
    folder = local_folder(destination)
    if folder is None or request.shard or request.queue:
        yield
        return
    make_folder(folder)
    with lock(lock_path(folder / "tasks")):
        yield


def _tasks_of_shard(tasks: Sequence[str], shard: str | None) -> list[str]:
    """List the tasks of a shard, "i/n"; a task that is the only one is of all."""
    if shard is None or len(tasks) == 1:
        return list(tasks)
    part, num_parts = map(int, shard.split("/"))
    return list(tasks[part::num_parts])


def _announce(
    step: Step, total: int, mine: int, todo: int, request: RunRequest
) -> None:
    """Log how many tasks there are, and how many of them are done already."""
    tasks = f"{total} tasks" if total != 1 else "1 task"
    part = f", {mine} of them in shard {request.shard}" if request.shard else ""
    done = f", {mine - todo} of them done already" if mine != todo else ""
    again = ", all are run again" if request.again else ""
    where = f" by the workers of {request.queue}" if request.queue else ""
    if not where and request.workers > 1:
        where = f" in {request.workers} processes"
    left = f"; {todo} to do{where}" if todo else "; nothing to do"
    logger.info("step %s: %s%s%s%s%s", step.name, tasks, part, done, again, left)


def _run(
    step: Step, records: TaskRecords, tasks: Collection[str], request: RunRequest
) -> Generator[Outcome, None, None]:
    """Run tasks where the flags say; yields how each ended."""
    if request.queue is not None:
        if tasks:
            yield from run_in_queue(records, request.queue, tasks)
    elif request.workers > 1:
        yield from run_in_processes(step, records, tasks, request.workers)
    else:
        yield from run_here(step, records, tasks)


def _with_estimate(
    name: str, outcomes: Iterator[Outcome], total: int, request: RunRequest
) -> Iterator[Outcome]:
    """Show the progress of tasks; after the first ones log how long all will take."""
    first, started, seconds = max(2, request.workers), time.monotonic(), 0.0
    what = f"step {name}, tasks"
    if not total:
        return
    for done, outcome in enumerate(progress(outcomes, what, total=total), start=1):
        yield outcome
        seconds += outcome.seconds
        if done == first and done < total:
            # How many workers a queue has is not known. Here processes take seconds
            # to start, which would count for too much.
            elapsed = time.monotonic() - started
            spent = elapsed if request.queue else seconds / request.workers
            logger.info(
                "step %s: the other %d tasks will take about %s",
                *(name, total - done, in_words(spent / done * (total - done))),
            )


def _summarize(name: str, outcomes: Sequence[Outcome], seconds: float) -> None:
    """Log the time of a run, and the bytes that all tasks of the step have read."""
    read, needed = (
        sum(outcome.figures.get(key, 0) for outcome in outcomes)
        for key in ("bytes_read", "bytes_needed")
    )
    num_done = sum(outcome.is_done for outcome in outcomes)
    logger.info(
        "step %s: %s done; %s, %s of tasks%s",
        name,
        "1 task is" if num_done == 1 else f"{num_done} tasks are",
        in_words(seconds),
        in_words(sum(outcome.seconds for outcome in outcomes)),
        f"; {size_in_words(read)} read, {size_in_words(needed)} needed"
        if needed
        else "",
    )
    if needed and read > _READ_TOO_MUCH * needed:
        logger.warning(
            "step %s: read %.1f times the bytes that it needed; larger chunks, or ones "
            "that fit those of the volume, are read less often",
            *(name, read / needed),
        )


def _failure(
    step: Step, records: TaskRecords, failed: Sequence[Outcome], total: int
) -> TaskError:
    """Log which tasks failed and why; return the error that says so in one line."""
    for outcome in failed[:_NAMED]:
        logger.error("step %s: %s failed: %s", step.name, outcome.task, outcome.reason)
    if len(failed) > _NAMED:
        logger.error("step %s: and %d more failed", step.name, len(failed) - _NAMED)
    first = failed[0]
    return TaskError(
        f"step {step.name}: {len(failed)} of {total} tasks failed, each {MAX_TRIES} "
        f"times; {first.task}: {first.reason} (reasons of all: "
        f"{records.path}/{step.name}/failed); the same command tries them again"
    )


def _is_complete(
    name: str, records: TaskRecords, tasks: Sequence[str], shard: str | None
) -> bool:
    """Whether all tasks are done; if not, log how many belong to other shards."""
    if shard is None or len(tasks) == 1:
        return True
    if num_open := records.count_open(tasks):
        logger.info(
            "step %s: %d of %d tasks belong to other shards and are not done; run "
            "them, then this command again",
            *(name, num_open, len(tasks)),
        )
    return not num_open
