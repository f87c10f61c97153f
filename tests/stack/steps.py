"""A small step that writes files, and processes that run it."""

import json
import multiprocessing
import os
import signal
import sys
import time
import types
from multiprocessing import forkserver
from pathlib import Path

from metroem.errors import DatasetError
from metroem.stack.tasks import Step
from metroem.utils import cli

_FORK = multiprocessing.get_context("fork")


class FilesStep(Step):
    """Writes a file for each task; some of its tasks fail, or take long.

    `acts` says by task what happens first: "raise" an error for users, a "bug", "kill"
    its process, or "wait" for half a minute. With "once" before it, as in "once kill",
    it happens the first time only. Each run is noted in runs/, before it happens.
    """

    def __init__(self, destination, *, tasks=6, seconds=0.0, acts=None, **settings):
        self.name, self.destination = "files", str(destination)
        self.settings = settings
        self.num_tasks, self.seconds, self.acts = tasks, seconds, acts or {}

    def tasks(self):
        return [f"z{i}-{i + 1}" for i in range(self.num_tasks)]

    def run(self, task):
        folder = Path(self.destination)
        (folder / "runs").mkdir(exist_ok=True)
        with (folder / "runs" / task).open("a") as file:
            file.write(f"{os.getpid()}\n")
        act = self.acts.get(task, "")
        if "once" not in act or runs_of(folder)[task] == 1:
            if "raise" in act:
                raise DatasetError(f"{task}: a chunk is broken\nits second line")
            if "bug" in act:
                raise KeyError("bug")
            if "kill" in act:
                os.kill(os.getpid(), signal.SIGKILL)
            if "wait" in act:
                time.sleep(30)
        time.sleep(self.seconds)
        (folder / "out").mkdir(exist_ok=True)
        text = json.dumps([task, dict(self.settings)], sort_keys=True)
        (folder / "out" / f"{task}.txt").write_text(text)
        return {"bytes_read": 12_000, "bytes_needed": 10_000}


def runs_of(folder):
    """How often each task has begun."""
    return {
        path.name: len(path.read_text().split())
        for path in sorted((Path(folder) / "runs").glob("*"))
    }


def wait_until_begun(folder, *tasks):
    """Wait until tasks have begun, and have noted it."""
    wait_for(lambda: all(runs_of(folder).get(task) for task in tasks))


def outputs(folder):
    """The files that the tasks wrote, by name."""
    files = sorted((Path(folder) / "out").glob("*"))
    return {path.name: path.read_bytes() for path in files}


def note(folder, name):
    """A record of the tasks."""
    return json.loads((Path(folder) / "tasks" / f"{name}.json").read_text())


def provide(monkeypatch, make_step):
    """Let workers of this process and its forks make their steps so."""
    module = types.ModuleType("metroem.stack.align_stack")
    module.make_step = make_step  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


def start(function, *arguments):
    """Run a function as a command, in a fork of this process.

    A SIGTERM that comes before the command can handle it is held back until then.
    """
    process = _FORK.Process(target=_as_command, args=(function, *arguments))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    process.start()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process


def _as_command(function, *arguments):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A server that other tests started is a child of the parent, not of this process.
    forkserver._forkserver.__init__()

    def run():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        function(*arguments)

    cli.run(run)


def wait_for(condition, seconds=60.0):
    """Wait until a function returns something, and return that."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
    return found
