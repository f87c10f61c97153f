"""Make the cases of the bench again, and measure figures that its results lack."""

import importlib
import logging
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bench_adapter
import numpy as np
from quality_results import FULL, METHODS, NETWORKS, Checks, Record, Results

from metroem.errors import UsageError

logger = logging.getLogger("metroem.benchmarks.quality")

# Limits of the steps of finetuning per stage; the last one is no limit in practice.
STEPS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 15, 300)


class Solved(NamedTuple):
    """A case and a field for it."""

    record: Record
    src: np.ndarray  # (H, W) float32, 0 = no data
    tgt: np.ndarray  # (H, W)
    warped_src: np.ndarray  # (H, W), src warped by the field
    field: np.ndarray  # (2, H, W), px, channel 0 along cols
    truth: np.ndarray  # (2, H, W)
    valid: np.ndarray  # (H, W) bool, where the truth is known and scored


class Cases:
    """The cases of one stack."""

    def __init__(self, bench: Path, stack: str, seed: int) -> None:
        """Load the bench and the stack.

        Args:
            bench: folder of the bench, named "bench".
            stack: in the notation of the bench, FILE.npy[:FIRST:LAST].
            seed: of the cases.

        Raises:
            UsageError: the folder has no bench.
        """
        self.cases, self.fields = load_bench(bench)
        self.stack, _ = self.cases.load_stack(stack)
        self.seed = seed

    def make(self, record: Record) -> Any:
        """Make the case of a record, as the bench made it."""
        label = record["label"].removesuffix("px")
        return self.cases.make_case(
            self.stack,
            record["family"],
            int(label) if label.isdigit() else label,
            record["z"],
            self.seed,
        )

    def solve(self, record: Record, pyramid: str) -> Solved:
        """Align the case of a record again, finetuned."""
        case = self.make(record)
        field = bench_adapter.align(case.src, case.tgt, pyramid)
        truth, valid, _ = case.truth()
        warped = self.fields.warp(case.src, field, order=1)
        return Solved(record, case.src, case.tgt, warped, field, truth, valid)

    def folds_off_defects(self, record: Record, field: np.ndarray) -> float:
        """Compute the fraction of folds, ppm, off defects, where the truth is known."""
        _, valid, near = self.make(record).truth()
        determinant = self.fields.jacobian_det(field)[valid & ~near]
        return 1e6 * float((determinant <= 0).mean())


def load_bench(folder: Path) -> tuple[Any, Any]:
    """Import the bench's modules `cases` and `fields`.

    Raises:
        UsageError: the folder has no bench.
    """
    if folder.resolve().name != "bench" or not (folder / "run.py").is_file():
        raise UsageError(
            f"--bench {folder}: expected a folder named bench that holds run.py"
        )
    parent = str(folder.resolve().parent)
    if parent not in sys.path:
        sys.path.append(parent)
    names = ("bench.cases", "bench.fields")
    cases, fields = (importlib.import_module(name) for name in names)
    return cases, fields


def check(cases: Cases, results: Results, pyramid: str) -> Checks:
    """Measure folds, and sections with themselves, with and without finetuning."""
    sections = sorted({record["z"] for record in results.records})
    identity, folds = {}, {}
    for method in (FULL, NETWORKS):
        align = getattr(bench_adapter, METHODS[method][0])
        lengths, fractions = [], []
        for z in sections:
            section = cases.stack[z]
            field = align(section, section, pyramid)
            lengths.append(float(np.hypot(*field).mean()))
        for record in results.of(method, "ABC"):
            fraction = 1e6 * record["fold_frac"]
            if fraction and record["family"] == "C":
                case = cases.make(record)
                field = align(case.src, case.tgt, pyramid)
                fraction = cases.folds_off_defects(record, field)
            fractions.append(fraction)
        identity[method], folds[method] = max(lengths), statistics.fmean(fractions)
        logger.info("%s: sections with themselves, folds: done", method)
    return Checks(identity, folds)


def picked(results: Results, family: str) -> dict[str, Record]:
    """Pick the best, the median and the worst pair of a family, finetuned."""
    records = sorted(results.of(FULL, family), key=lambda record: record["epe_mean"])
    positions = {"best": 0, "median": len(records) // 2, "worst": -1}
    return {name: records[position] for name, position in positions.items()}


def epe_by_steps(
    cases: Cases,
    records: Iterable[Record],
    pyramid: str,
    steps: Sequence[int] = STEPS,
) -> dict[int, float]:
    """Measure the mean EPE for each limit of the steps of finetuning per stage."""
    errors: dict[int, list[float]] = {limit: [] for limit in steps}
    for record in records:
        case = cases.make(record)
        truth, valid, _ = case.truth()
        for limit in steps:
            field = bench_adapter.finetuned_for(case.src, case.tgt, pyramid, limit)
            errors[limit].append(float(np.hypot(*(field - truth))[valid].mean()))
    return {limit: statistics.fmean(found) for limit, found in errors.items()}
