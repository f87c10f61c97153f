"""Scores of a pyramid as a table for people and a line for programs."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from metroem.evaluate import CHUNK_PX, Score


def print_scores(score: Score, mips: Sequence[int], *, title: str) -> None:
    """Print one row a stage, from no alignment to the truth.

    Args:
        score: means over the pairs.
        mips: mip of each stage.
        title: what was scored.
    """
    header = f"CPC, {CHUNK_PX} px"
    print(f"\n{title}")
    print(f"{'':<20}{'EPE, px':>10}{'of none':>10}{header:>14}")
    rows = [("no alignment", score.epe_none, score.cpc_none)]
    stages = zip(mips, score.epe, score.cpc, strict=True)
    rows += [
        (f"stage {stage} (mip {mip})", epe, cpc)
        for stage, (mip, epe, cpc) in enumerate(stages)
    ]
    if not math.isnan(score.cpc_true):
        rows.append(("true field", 0.0, score.cpc_true))
    for name, epe, cpc in rows:
        print(f"{name:<20}{epe:>10.2f}{epe / score.epe_none:>10.2f}{cpc:>14.3f}")
    print(f"pixels folded over by the last stage: {100 * score.folds:.3f} %")


def print_json(figures: Mapping[str, Any]) -> None:
    """Print figures as one line of JSON; what is NaN becomes null."""
    print(json.dumps({key: _plain(value) for key, value in figures.items()}))


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 4)
    return value
