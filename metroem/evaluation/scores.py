"""What a field is worth on one pair, and means of that over pairs.

Every figure of a field is taken over pixels that the field does not choose: those that
the pair shows as it came, or whose truth is known. What a field moves out of the
tissue counts for the correlation as if it had nothing in common.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metroem.data.augment import swap_src_tgt
from metroem.data.sample import Sample, with_defects
from metroem.evaluation.metrics import (
    EndpointError,
    chunked_correlation,
    chunked_mean,
    cycle_error,
    endpoint_error,
    fold_share,
    jacobian,
    ring,
    swap_error,
)
from metroem.geometry.field import pixel_positions, warp
from metroem.geometry.field import sample as read_at
from metroem.imaging.masks import tissue_mask, warp_mask
from metroem.synthetic.distortion import GroundTruth

CHUNK_PX = 64
BAND_PX = 8 * CHUNK_PX  # rows that are compared at a time
BORDER_PX = 16  # left out of every figure but those of the Jacobian
RING_PX = 32  # around defects
RING_SHARE = 1 / 8  # of a chunk's pixels: a ring fills few chunks by half
# A field that moves nothing to speak of changes CPC by its interpolation alone.
CPC_NOISE = 1e-3

NAN = float("nan")
ScoreT = TypeVar("ScoreT", bound=tuple)


class Score(NamedTuple):
    """Figures of a pair, or their means over pairs; NaN where there is no truth."""

    epe_none: float  # px, mean endpoint error without alignment
    epe: tuple[float, ...]  # px, one a stage
    cpc_none: float  # mean correlation of chunks of CHUNK_PX, without alignment
    cpc: tuple[float, ...]  # one a stage
    cpc_true: float  # with the true field
    folds: float  # share of pixels that the last stage's field folds over


class PairScore(NamedTuple):
    """Figures of a pair without a truth, or their means over pairs.

    CPC is the mean correlation of chunks of CHUNK_PX over what the pair shows as it
    came, "before" that without alignment; see `correlation` for what a field loses.
    What is not known is NaN: all of it for a pair that cannot be compared, see
    `can_be_compared`, so that no mean takes it in.
    """

    cpc_before: float
    cpc: float
    ring_cpc_before: float  # within RING_PX of defects; NaN where there are none
    ring_cpc: float
    length_px: float  # mean length of the field
    folds_ppm: float  # of the pixels of tissue off defects
    det_p01: float  # percentiles of the Jacobian determinant over the same
    det_p50: float
    det_p99: float
    cycle_mean_px: float  # see `metroem.evaluation.metrics.cycle_error`
    cycle_p95_px: float
    swap_mean_px: float  # see `metroem.evaluation.metrics.swap_error`
    swap_p95_px: float
    counted: float  # share of the pixels that the field leaves to compare
    made_worse: float  # 1 if CPC fell, else 0


class WarpScore(NamedTuple):
    """Figures of a section against itself warped by a known field, or their means."""

    before: EndpointError  # without alignment
    after: EndpointError
    near_px: float  # mean endpoint error near defects; NaN where there are none
    folds_ppm: float  # of the pixels whose truth is known
    identity_px: float  # mean length of the field from the section to itself
    made_worse: float  # 1 if the mean endpoint error rose, else 0


NO_SCORE = PairScore(*[NAN] * len(PairScore._fields))
_NO_ERROR = EndpointError(*[NAN] * len(EndpointError._fields))
NO_WARP_SCORE = WarpScore(_NO_ERROR, _NO_ERROR, NAN, NAN, NAN, NAN)


class Chunk(NamedTuple):
    """One chunk of a pair: its figure, and where its middle is in the image."""

    figure: float  # CPC, or mean endpoint error in px
    row: int
    col: int


class Spot(NamedTuple):
    """The middle of a pair's worst chunk."""

    figure: float  # its CPC, or its mean endpoint error in px
    x: int  # mip-0 pixels, as a viewer of the volume has them
    y: int


class Where(NamedTuple):
    """Which pair, and where in it to look first."""

    file: str  # image set
    pair: int  # index in it
    z_src: int
    z_tgt: int
    worst: Spot | None  # None where no chunk counts


class AlignedPair(NamedTuple):
    """What was found on one pair."""

    where: Where
    score: PairScore


class WarpedSection(NamedTuple):
    """What was found on one section warped by a known field."""

    where: Where
    score: WarpScore


class SetResult(NamedTuple):
    """What was found on one image set, of the finest mip of a pyramid."""

    file: str
    mip: int
    rows: int
    cols: int
    mean: PairScore
    pairs: tuple[AlignedPair, ...]
    mean_known: WarpScore | None = None  # None where none were asked for
    known: tuple[WarpedSection, ...] = ()
    without_value: int = 0  # pairs that cannot be compared, and are in no mean
    known_without_value: int = 0  # sections, likewise


def score_pair(
    src: np.ndarray,
    tgt: np.ndarray,
    fields: Sequence[np.ndarray],
    truth: GroundTruth | None = None,
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
    sample = Sample(_batch(src), _batch(tgt), None, ())
    stages = [torch.from_numpy(np.asarray(field))[None] for field in fields]
    stages.insert(0, torch.zeros_like(stages[0]))
    due = valid_overlap(sample, stages[:1])
    epe, cpc_true = [NAN] * len(stages), NAN
    if truth is not None:
        due = due & truth.valid
        epe = [endpoint_error(f, truth.field, truth.valid).mean for f in stages]
        cpc_true = mean_correlation(sample, truth.field, due)
    cpc = [mean_correlation(sample, field, due) for field in stages]
    folds = fold_share(stages[-1])
    return Score(epe[0], tuple(epe[1:]), cpc[0], tuple(cpc[1:]), cpc_true, folds)


def score_aligned(
    sample: Sample, forward: Tensor, backward: Tensor
) -> tuple[PairScore, Chunk | None]:
    """Score what an aligner makes of a pair, and of the pair swapped.

    Args:
        sample: of batch size 1; its defects are looked for if it has none.
        forward: (1, 2, H, W), px, aligns src to tgt.
        backward: (1, 2, H, W), px, aligns tgt to src.

    Returns:
        The figures, and the chunk of the lowest correlation; None where none counts.
    """
    if not can_be_compared(sample):
        return NO_SCORE, None
    sample = with_defects(sample)
    none = torch.zeros_like(forward)
    due = valid_overlap(sample, [none])
    around = due & ring(defects_on_tgt(sample, none), RING_PX)
    before, after = (mean_correlation(sample, f, due) for f in (none, forward))
    determinant = jacobian(forward, _clear(sample.tgt, sample.tgt_defects))
    cycle = cycle_error(forward, backward, due)
    swap = swap_error(forward, backward, valid_overlap(swap_src_tgt(sample), [none]))
    score = PairScore(
        before,
        after,
        mean_correlation(sample, none, around, min_share=RING_SHARE),
        mean_correlation(sample, forward, around, min_share=RING_SHARE),
        _mean_length(forward, due),
        1e6 * determinant.folds,
        determinant.p01,
        determinant.p50,
        determinant.p99,
        cycle.mean,
        cycle.p95,
        swap.mean,
        swap.p95,
        counted=float(valid_overlap(sample, [none, forward]).double().mean()),
        made_worse=float(not after >= before - CPC_NOISE),
    )
    lowest = _largest(-correlation(sample, forward, due))
    return score, lowest and lowest._replace(figure=-lowest.figure)


def score_known(
    field: Tensor, truth: GroundTruth, near: Tensor, identity: Tensor
) -> tuple[WarpScore, Chunk | None]:
    """Score a field against the truth.

    Args:
        field: (1, 2, H, W), px.
        truth: what it should be.
        near: (1, 1, H, W) bool, near defects.
        identity: (1, 2, H, W), px, from the section to itself unchanged.

    Returns:
        The figures, and the chunk of the largest mean error; None where none counts.
    """
    valid = truth.valid & _inside_border(truth.valid)
    if not valid.any():
        return NO_WARP_SCORE, None
    before = endpoint_error(torch.zeros_like(field), truth.field, valid)
    after = endpoint_error(field, truth.field, valid)
    score = WarpScore(
        before,
        after,
        endpoint_error(field, truth.field, valid & near).mean,
        1e6 * jacobian(field, truth.valid).folds,
        _mean_length(identity, valid),
        made_worse=float(not after.mean <= before.mean),
    )
    errors = (field - truth.field).norm(dim=1, keepdim=True)
    return score, _largest(chunked_mean(errors, valid, chunk_px=CHUNK_PX))


def mean_score(scores: Sequence[ScoreT]) -> ScoreT:
    """The mean of each figure over the pairs that have it."""
    return _mean(scores)


def without_value(scored: Sequence[AlignedPair] | Sequence[WarpedSection]) -> int:
    """How many pairs, or sections, have no figures."""
    return sum(math.isnan(one.score.made_worse) for one in scored)


def can_be_compared(sample: Sample, *, min_share: float = 0.5) -> bool:
    """Whether the images of a pair say anything about a field.

    They do where, as they lie, a chunk has tissue of both, with contrast. Defects that
    the sample does not know of are not looked for.

    Args:
        sample: of batch size 1.
        min_share: share of the chunk's pixels that must be tissue of both.
    """
    none = torch.zeros_like(sample.src).expand(-1, 2, -1, -1)
    valid = valid_overlap(sample, [none])
    found = correlation(sample, none, valid, min_share=min_share)
    return bool((found.nan_to_num() != 0).any())


def correlation(
    sample: Sample, field: Tensor, due: Tensor, *, min_share: float = 0.5
) -> Tensor:
    """CPC of src warped and tgt, a value a chunk; see `chunked_correlation`.

    Some rows of chunks at a time, since it is found in float64.

    Args:
        sample: of batch size 1.
        field: (1, 2, H, W), px.
        due: (1, 1, H, W) bool, pixels that should count: not for the field to choose.
            Those that it reads no clear tissue for correlate by 0.
        min_share: share of a chunk's pixels that must be due for it to count.
    """
    found = []
    src_clear = _clear(sample.src, sample.src_defects).float()
    for start in range(0, field.shape[-2] // CHUNK_PX * CHUNK_PX, BAND_PX):
        rows = slice(start, start + BAND_PX)
        due_here = due[..., rows, :]
        kept = due_here & (warp_rows(src_clear, field, rows) > 0.999)
        alike = chunked_correlation(
            warp_rows(sample.src, field, rows),
            sample.tgt[..., rows, :],
            kept,
            chunk_px=CHUNK_PX,
            min_share=0.0,
        )
        shares = [F.avg_pool2d(m.double(), CHUNK_PX) for m in (kept, due_here)]
        # Nothing is gained by losing what is less than unlike.
        alike = torch.minimum(alike, alike * shares[0] / shares[1])
        found.append(torch.where(shares[1] >= min_share, alike, NAN))
    return torch.cat(found, -2)


def warp_rows(image: Tensor, field: Tensor, rows: slice) -> Tensor:
    """Some rows of `metroem.geometry.field.warp`, bit by bit."""
    part = field[..., rows, :]
    positions = pixel_positions(part)
    positions[:, 1] += rows.start
    return read_at(image, part, positions + part)


def mean_correlation(
    sample: Sample, field: Tensor, due: Tensor, *, min_share: float = 0.5
) -> float:
    """The mean of `correlation` over chunks; NaN where none counts."""
    return float(correlation(sample, field, due, min_share=min_share).nanmean())


def valid_overlap(sample: Sample, fields: Sequence[Tensor]) -> Tensor:
    """Where tgt and src can be compared, whichever of the fields warps src.

    Args:
        sample: of batch size 1.
        fields: (1, 2, H, W) each, px.

    Returns:
        (1, 1, H, W) bool: tissue on both sides, no defect that the sample knows
        of, off the border.
    """
    src = _clear(sample.src, sample.src_defects).float()
    valid = _clear(sample.tgt, sample.tgt_defects)
    valid = valid & _inside_border(valid)
    for field in fields:
        valid = valid & (warp(src, field) > 0.999)
    return valid


def defects_on_tgt(sample: Sample, field: Tensor) -> Tensor:
    """Where tgt, or src warped by a field, has a defect.

    Args:
        sample: of batch size 1, its defects known.
        field: (1, 2, H, W), px.

    Returns:
        (1, 1, H, W) bool.
    """
    assert sample.src_defects is not None and sample.tgt_defects is not None
    return sample.tgt_defects | warp_mask(sample.src_defects, field)


def _batch(image: np.ndarray) -> Tensor:
    """(H, W) of any real type -> (1, 1, H, W) float32."""
    return torch.from_numpy(np.asarray(image, np.float32))[None, None]


def _mean_length(field: Tensor, valid: Tensor) -> float:
    return float(field.norm(dim=1, keepdim=True)[valid].mean())


def _clear(image: Tensor, defects: Tensor | None) -> Tensor:
    tissue = tissue_mask(image)
    return tissue if defects is None else tissue & ~defects


def _inside_border(like: Tensor) -> Tensor:
    inside = torch.zeros_like(like, dtype=torch.bool)
    inside[..., BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX] = True
    return inside


def _largest(figures: Tensor) -> Chunk | None:
    """The chunk of the largest of the figures (1, 1, rows, cols) that is known."""
    if figures.isnan().all():
        return None
    at = int(figures.nan_to_num(-torch.inf).argmax())
    row, col = divmod(at, figures.shape[-1])
    middle = (CHUNK_PX * row + CHUNK_PX // 2, CHUNK_PX * col + CHUNK_PX // 2)
    return Chunk(float(figures.flatten()[at]), *middle)


def _mean(values: Sequence[Any]) -> Any:
    """Mean of numbers that are known, or of tuples place by place."""
    if isinstance(values[0], tuple):
        means = [_mean(place) for place in zip(*values, strict=True)]
        return getattr(values[0], "_make", tuple)(means)
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else NAN
