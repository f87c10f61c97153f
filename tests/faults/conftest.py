"""Where commands are run and disturbed; the faults tried, as a table at the end.

python -m pytest tests/faults -m ""
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.places import TRIED, Place, make_place

ROOT = Path(__file__).parents[2]


class Zygote:
    """The process that forks commands; see tests/faults/zygote.py."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        assert self._process.stdout.readline() == "ready\n"

    def run(self, folder, command, **disturbed):
        """Run a command in a folder: its status, seconds and output."""
        asked: dict = {"command": list(map(str, command)), "folder": str(folder)}
        self._process.stdin.write(json.dumps(asked | disturbed) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture(scope="session")
def zygote():
    process = Zygote()
    yield process
    process.close()


@pytest.fixture(scope="session")
def place(zygote, tmp_path_factory) -> Place:
    """What all commands start from, and what they make of it undisturbed."""
    return make_place(zygote, tmp_path_factory.mktemp("faults"))


def pytest_terminal_summary(terminalreporter):
    """One line a fault and command."""
    if not TRIED:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{'fault':<28}{'command':<18}{'tried':>6} survived")
    for (fault, command), (tried, survived) in sorted(TRIED.items()):
        line = f"{fault:<28}{command:<18}{tried:>6} {survived:>8}"
        terminalreporter.write_line(line)
    sums = [sum(counts) for counts in zip(*TRIED.values(), strict=True)]
    terminalreporter.write_line(f"{'in all':<46}{sums[0]:>6} {sums[1]:>8}")
