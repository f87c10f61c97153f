"""How well fields align pairs, against a truth where there is one."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metroem.distort import Truth
from metroem.field import warp
from metroem.metrics import chunked_correlation, endpoint_error, fold_share

CHUNK_PX = 32
BORDER_PX = 16  # of a pair without a truth


class Score(NamedTuple):
    """Figures of a pair, or their means over pairs; NaN where there is no truth."""

    epe_none: float  # px, mean endpoint error without alignment
    epe: tuple[float, ...]  # px, one a stage
    cpc_none: float  # mean correlation of chunks of CHUNK_PX, without alignment
    cpc: tuple[float, ...]  # one a stage
    cpc_true: float  # with the true field
    folds: float  # share of pixels that the last stage's field folds over


def score_pair(
    src: np.ndarray,
    tgt: np.ndarray,
    fields: Sequence[np.ndarray],
    truth: Truth | None = None,
) -> Score:
    """Score the fields that each stage gives for one pair.

    Args:
        src: (H, W), any real type, raw grey levels, 0 = no data.
        tgt: (H, W), likewise.
        fields: one a stage, (2, H, W) float32, px.
        truth: the field that truly aligns them.

    Returns:
        The figures; errors and the true correlation NaN without a truth.
    """
    images = _tensor(src), _tensor(tgt)
    stages = [torch.from_numpy(np.asarray(field))[None] for field in fields]
    none = torch.zeros_like(stages[0])
    if truth is None:
        epe = [float("nan")] * (1 + len(stages))
        cpc_true = float("nan")
    else:
        epe = [
            endpoint_error(field, truth.field, truth.valid).mean
            for field in (none, *stages)
        ]
        cpc_true = correlation(*images, truth.field, truth.valid)
    valid = None if truth is None else truth.valid
    cpc = [correlation(*images, field, valid) for field in (none, *stages)]
    folds = fold_share(stages[-1])
    return Score(epe[0], tuple(epe[1:]), cpc[0], tuple(cpc[1:]), cpc_true, folds)


def correlation(
    src: Tensor, tgt: Tensor, field: Tensor, valid: Tensor | None = None
) -> float:
    """Mean correlation of chunks (CPC) of src warped and tgt.

    Args:
        src: (1, 1, H, W) float, raw grey levels, 0 = no data.
        tgt: (1, 1, H, W) float, likewise.
        field: (1, 2, H, W), px.
        valid: (1, 1, H, W) bool, pixels that count; all but a border if None.
            What is blank on either side never counts.

    Returns:
        The mean over chunks of CHUNK_PX that are at least half valid.
    """
    if valid is None:
        valid = torch.zeros_like(tgt, dtype=torch.bool)
        inside = slice(BORDER_PX, -BORDER_PX)
        valid[..., inside, inside] = True
    tissue = (warp((src != 0).float(), field) > 0.999) & (tgt != 0)
    chunks = chunked_correlation(
        warp(src, field), tgt, valid & tissue, chunk_px=CHUNK_PX
    )
    return float(chunks.nanmean())


def mean_score(scores: Sequence[Score]) -> Score:
    """The mean of each figure over pairs that have it."""

    def mean(values: Sequence[float]) -> float:
        known = [value for value in values if value == value]
        return sum(known) / len(known) if known else float("nan")

    def mean_stages(values: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
        return tuple(mean(stage) for stage in zip(*values, strict=True))

    epe_none, epe, cpc_none, cpc, cpc_true, folds = zip(*scores, strict=True)
    return Score(
        mean(epe_none),
        mean_stages(epe),
        mean(cpc_none),
        mean_stages(cpc),
        mean(cpc_true),
        mean(folds),
    )


def _tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(image, np.float32))[None, None]
