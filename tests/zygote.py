"""A process that imports everything once, and forks a child for each command.

A fresh python takes seconds to import torch, a fork milliseconds. Torch is safe to
fork here: the process that forks has run nothing, so it has one thread.

Reads one JSON object a line: `command` (its first word is a script of ours, `metroem`,
or the path of any other script), `folder`, `environment` (all of it, None for that of
this process), `signal` (a number, None for none), `after` (seconds from the start to
the signal), `hook` (a function of tests.faults.hooks, called before the command),
`to_the_end` (with the end of python); answers with `status` (as subprocess has it),
`seconds`, `printed` (stdout), `errors` (stderr) and `output` (one after the other).
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
TOO_LONG_S = 400.0
# What commands import when they need it; torch._dynamo comes with an optimizer.
IMPORTED = (
    "metroem.training.run",
    "metroem.evaluation.evaluate",
    "metroem.prepare.download_image",
)
IMPORTED += ("metroem.prepare.download_field", "metroem.prepare.make_dataset")
IMPORTED += ("torch._dynamo", "modelhouse", "artificery")


def wait_shorter():
    """Let cloud-files look every 2 ms whether its threads are done, not every 100.

    It waits so at each load of a module and at each read of several chunks.
    """
    from cloudfiles import threaded_queue  # after HOME is set: it keeps that

    threaded_queue.time = SimpleNamespace(
        sleep=lambda seconds: time.sleep(min(seconds, 0.002))
    )


class Zygote:
    """The process that forks commands, as tests have it."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        assert self._process.stdout.readline() == "ready\n"

    def run(self, folder, command, **more):
        """Run a command in a folder: its status, seconds and output."""
        asked: dict = {"command": list(map(str, command)), "folder": str(folder)}
        self._process.stdin.write(json.dumps(asked | more) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def main():
    """Import, say so, then do what is asked until the input ends."""
    import torch

    torch.set_num_threads(1)
    # What runs in the background of a shell was begun with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in IMPORTED:
        importlib.import_module(name)
    from metroem.training import write_fields as writing
    from tests import commands
    from tests.faults import hooks

    wait_shorter()

    # Finetuning takes most of the time, and no test is about what it finds.
    writing.finetune_iterations = lambda stage: 8 // 2**stage
    mains = {name: module.main for name, module in commands.SCRIPTS.items()}
    mains["metroem"] = commands.metroem_main.main
    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1
    answer = sys.stdout
    gc.collect()
    gc.freeze()
    answer.write("ready\n")
    answer.flush()
    for line in sys.stdin:
        answer.write(json.dumps(attempt(json.loads(line), mains, hooks)) + "\n")
        answer.flush()


def attempt(asked, mains, hooks):
    """Run one command in a child, and send it a signal if that is asked for."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            become(asked, mains, hooks, output, errors)
        status = wait(pid, started, asked)
        seconds = time.monotonic() - started
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return {
            "status": status,
            "seconds": seconds,
            "printed": texts[0],
            "errors": texts[1],
            "output": "".join(texts),
        }


def become(asked, mains, hooks, output, errors):
    """Be the command, to the end of the process."""
    from metroem.utils import cli

    if asked.get("environment") is not None:
        os.environ.clear()
        os.environ.update(asked["environment"])

    os.setpgid(0, 0)
    os.chdir(asked["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in ((1, output), (2, errors)):
        os.dup2(file.fileno(), number)
    program, *arguments = asked["command"]
    sys.argv = [program, *arguments]
    code = 1
    try:
        if asked.get("hook"):
            getattr(hooks, asked["hook"])()
        if program in mains:
            cli.run(lambda: mains[program](arguments))
        else:
            sys.path.insert(0, str(Path(program).parent))
            runpy.run_path(program, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    if asked.get("to_the_end"):
        sys.exit(code)  # libraries that are in a bad way crash there
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # python takes a second to take leave


def wait(pid, started, asked):
    """The exit status of the child, after the signal if it lived to get it."""
    at = started + (asked["after"] if asked.get("signal") else TOO_LONG_S)
    number = asked.get("signal") or signal.SIGKILL
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= at:
            os.kill(pid, number)
            at, number = started + TOO_LONG_S, signal.SIGKILL
        time.sleep(0.001)


if __name__ == "__main__":
    main()
