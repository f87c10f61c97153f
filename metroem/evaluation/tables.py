"""Print the scores of a pyramid as tables, and write them as JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metroem.evaluation.scores import (
    CHUNK_PX,
    RING_PX,
    AlignedPair,
    Group,
    PairScore,
    Score,
    SetResult,
    WarpedSection,
    WarpScore,
    Where,
)
from metroem.io.files import make_folder, replace_file

NUM_WORST = 3
_SIGNIFICANT = 6  # digits


def print_scores(
    score: Score, mips: Sequence[int], *, title: str, others: Mapping[str, Score] = {}
) -> None:
    """Print one row per stage, from no alignment to the true field.

    Args:
        score: means over the pairs.
        mips: mip of each stage.
        title: first line, for example the data set.
        others: scores of other pyramids, by name; their last stage gets a row.
    """
    header = f"CPC, {CHUNK_PX} px"
    print(f"\n{title}")
    print(f"{'':<22}{'EPE, px':>10}{'of none':>10}{header:>14}")
    rows = [("no alignment", score.epe_none, score.cpc_none)]
    rows += [(name, other.epe[-1], other.cpc[-1]) for name, other in others.items()]
    stages = zip(mips, score.epe, score.cpc, strict=True)
    rows += [
        (f"stage {stage} (mip {mip})", epe, cpc)
        for stage, (mip, epe, cpc) in enumerate(stages)
    ]
    if not math.isnan(score.cpc_true):
        rows.append(("true field", 0.0, score.cpc_true))
    for name, epe, cpc in rows:
        print(f"{name:<22}{epe:>10.2f}{epe / score.epe_none:>10.2f}{cpc:>14.3f}")
    print(f"pixels folded over by the last stage: {100 * score.folds:.3f} %")


def print_evaluation(results: Sequence[SetResult]) -> None:
    """Print a table per image set, then the worst pairs of all sets.

    Args:
        results: one per image set.
    """
    for result in results:
        size = f"{result.rows}x{result.cols} px at mip {result.mip}"
        count = len(result.pairs) - result.without_value
        print(f"\n{result.file}: means over {count} pairs of {size}")
        _print_num_left_out("pairs", result.without_value)
        if count:
            _print_pairs(result.mean)
            _print_groups(result.groups)
            _print_num_made_worse("pairs", result.pairs, count)
        if result.mean_known is not None:
            count = len(result.known) - result.known_without_value
            print(f"{count} sections, each warped by a known field")
            _print_num_left_out("sections", result.known_without_value)
            if count:
                _print_known(result.mean_known)
                _print_num_made_worse("sections", result.known, count)
    _print_worst(results)


def print_json(figures: Mapping[str, Any]) -> None:
    """Print figures as one line of JSON; infinite numbers and NaN become null."""
    print(json.dumps(plain(figures)))


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """Write figures as JSON; the file appears complete or not at all.

    Args:
        path: of the file; its folder is created.
        figures: mappings, named tuples, sequences, numbers, text, paths. Infinite
            numbers and NaN become null.
    """
    make_folder(path.parent)
    replace_file(path, (json.dumps(plain(figures), indent=1) + "\n").encode())


def plain(value: Any) -> Any:
    """Convert figures to types of JSON, as `write_json` writes them."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.{_SIGNIFICANT}g}") if math.isfinite(value) else None
    return value


def _print_pairs(mean: PairScore) -> None:
    _print_row("", "before", "after")
    chunks = f"CPC, {CHUNK_PX} px chunks"
    _print_row(chunks, f"{mean.cpc_before:.3f}", f"{mean.cpc:.3f}")
    if not math.isnan(mean.ring_cpc):
        ring = f"  within {RING_PX} px of defects"
        _print_row(ring, f"{mean.ring_cpc_before:.3f}", f"{mean.ring_cpc:.3f}")
    _print_row("length of the field, px", "", f"{mean.length_px:.2f}")
    _print_row("", "mean", "p95")
    for name, *figures in (
        ("cycle error, px", mean.cycle_mean_px, mean.cycle_p95_px),
        ("swap error, px", mean.swap_mean_px, mean.swap_p95_px),
    ):
        _print_row(name, *(f"{figure:.2f}" for figure in figures))
    _print_row("", "p1", "p50", "p99")
    percentiles = mean.det_p01, mean.det_p50, mean.det_p99
    _print_row("Jacobian determinant", *(f"{figure:.2f}" for figure in percentiles))
    _print_row("folds off defects, ppm", f"{mean.folds_ppm:.1f}")


def _print_groups(groups: Mapping[str, Group]) -> None:
    """Print the main figures of the pairs of each role in the training."""
    for role, (num_pairs, mean) in groups.items():
        name = f"  CPC, {num_pairs} {role or 'unknown'}"
        _print_row(name, f"{mean.cpc_before:.3f}", f"{mean.cpc:.3f}")


def _print_known(mean: WarpScore) -> None:
    _print_row("EPE, px", "mean", "median", "p95", "p99", "> 1 px", "> 8 px")
    for name, error in (("  before", mean.before), ("  after", mean.after)):
        lengths = (f"{figure:.2f}" for figure in error[:4])
        above = (f"{100 * s:.2f} %" for s in (error.above_one, error.above_eight))
        _print_row(name, *lengths, *above)
    if not math.isnan(mean.near_px):
        _print_row("  after, near defects", f"{mean.near_px:.2f}")
    _print_row("folds, ppm", f"{mean.folds_ppm:.1f}")
    _print_row("section on itself, px", f"{mean.identity_px:.3f}")


def _print_num_left_out(what: str, count: int) -> None:
    if count:
        print(f"{what} left out, no overlap or no contrast: {count}")


def _print_num_made_worse(
    what: str, scored: Sequence[AlignedPair] | Sequence[WarpedSection], count: int
) -> None:
    worse = sum(one.score.made_worse == 1 for one in scored)
    _print_row(f"{what} made worse", f"{worse} of {count}")


def _print_row(name: str, *cells: str) -> None:
    print(f"{name:<28}" + "".join(f"{cell:>10}" for cell in cells))


def _print_worst(results: Sequence[SetResult]) -> None:
    """Print the pairs of lowest CPC, then the sections of largest EPE."""
    pairs = [
        pair
        for result in results
        for pair in result.pairs
        if not math.isnan(pair.score.made_worse)
    ]
    # NaN comes first: the field left nothing to compare.
    pairs.sort(key=lambda pair: (pair.score.cpc == pair.score.cpc, pair.score.cpc))
    print("\nworst pairs (x, y: middle of the worst chunk, mip-0 pixels)")
    for where, score, _ in pairs[:NUM_WORST]:
        cpc = f"CPC {score.cpc:.3f}, before {score.cpc_before:.3f}"
        print(f"  {_describe_pair(where)}: {cpc}{_describe_spot(where, '.3f')}")
    known = [
        section
        for result in results
        for section in result.known
        if not math.isnan(section.score.made_worse)
    ]
    if known:
        known.sort(key=lambda section: -section.score.after.mean)
        print("worst sections warped by a known field")
    for where, score, _ in known[:NUM_WORST]:
        epe = f"EPE {score.after.mean:.2f} px, before {score.before.mean:.2f}"
        print(f"  {_describe_pair(where)}: {epe}{_describe_spot(where, '.2f')}")


def _describe_pair(where: Where) -> str:
    return f"{where.file} pair {where.pair} (z {where.z_src} on {where.z_tgt})"


def _describe_spot(where: Where, digits: str) -> str:
    spot = where.worst
    if spot is None:
        return "; no chunk counts"
    return f"; worst {spot.figure:{digits}} at x {spot.x}, y {spot.y}"
