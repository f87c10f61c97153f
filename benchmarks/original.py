"""metroem 0.1.3 beside ours: a task of it, in a process of its environment.

`make original` makes that environment, `.venv-original`. Each task is a script that
runs there, with nothing of this project but `original_worker.py`.
"""

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

from metroem.errors import UsageError

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-original" / "bin" / "python"


class Original:
    """A task of the original, ready to be run again and again.

    Calling it runs the task once and returns the JSON object that it answers with.

    Raises:
        UsageError: there is no such environment, or the task fails (the message has
            what it wrote).
    """

    def __init__(self, task: str, settings: dict[str, Any], python: Path = PYTHON):
        """Start a task and wait until it is ready.

        Args:
            task: file name of a script beside this one, for `original_worker.serve`.
            settings: for the task, anything JSON has.
            python: of the environment of the original.
        """
        if not python.is_file():
            raise UsageError(f"{python}: no such file; make it with: make original")
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name(task)), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )
        self.ready = self._answer()

    def __call__(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        return self._answer()

    def __enter__(self) -> "Original":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UsageError(
                f"the task of the original ended with status {self._process.wait()}; "
                "what it wrote is above"
            )
        return json.loads(line)
