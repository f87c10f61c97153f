"""Time several ways of doing one thing in turn, within one run.

Other work on the machine then slows all of them equally, and their ratios stay. The
last line that a benchmark prints is one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from metroem.errors import UsageError
from metroem.utils import cli

Contender = Callable[[], object]

MIN_ROUNDS = 7


def parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser with the flags of all benchmarks: --rounds, --threads."""
    made = cli.parser(description)
    made.add_argument("--rounds", type=int, default=9, help="at least 7 (9)")
    made.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    return made


def median_seconds(
    contenders: Mapping[str, Contender], rounds: int
) -> dict[str, float]:
    """Time each contender once per round, after one round that is not counted.

    Args:
        contenders: functions without arguments, by name.
        rounds: number of rounds.

    Returns:
        Median wall time of each, seconds.

    Raises:
        UsageError: fewer than 7 rounds.
    """
    if rounds < MIN_ROUNDS:
        raise UsageError(f"--rounds {rounds}: expected at least {MIN_ROUNDS}")
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def report(seconds: Mapping[str, float], figures: Mapping[str, object]) -> None:
    """Print one line per contender, then all figures as one line of JSON.

    Args:
        seconds: by contender.
        figures: results of the benchmark by name, such as ratios.
    """
    for name, value in seconds.items():
        print(f"{name:>40}: {1000 * value:10.2f} ms")
    print(json.dumps({"torch": torch.__version__, "seconds": seconds, **figures}))
