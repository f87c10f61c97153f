r"""How long the commands take until they have said their --help.

Fresh processes, one after the other in turn: of python alone, of `import torch`, of
`import metroem`, and of each command with --help.

Example:
    python benchmarks/startup.py
"""

import os
import subprocess
import sys
from pathlib import Path

import side_by_side

from metroem import cli

_ROOT = Path(__file__).parents[1]
_BESIDE = {
    "python -c pass": ("-c", "pass"),
    "import torch": ("-c", "import torch"),
}
_OURS = {
    "import metroem": ("-c", "import metroem"),
    "train.py --help": ("train.py", "--help"),
    "download_image.py --help": ("download_image.py", "--help"),
    "download_field.py --help": ("download_field.py", "--help"),
    "metroem --help": ("-m", "metroem", "--help"),
    "metroem evaluate --help": ("-m", "metroem", "evaluate", "--help"),
}


def main() -> None:
    """Time all in turn; the slowest of ours is the figure."""
    args = side_by_side.parser(__doc__).parse_args()
    contenders = {name: _process(words) for name, words in (_BESIDE | _OURS).items()}
    seconds = side_by_side.median_seconds(contenders, args.rounds)
    slowest = max(seconds[name] for name in _OURS)
    side_by_side.report(seconds, {"slowest_seconds": slowest})


def _process(words: tuple[str, ...]) -> side_by_side.Contender:
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}

    def run() -> None:
        subprocess.run(
            [sys.executable, *words],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=_ROOT,
            env=environment,
        )

    return run


if __name__ == "__main__":
    cli.run(main)
