"""Compute the figures of a field on one pair, and their means over pairs.

A field does not choose the pixels that it is measured on. They are the pixels where the
unaligned images overlap, or where the truth is known. A pixel that the field moves out
of the tissue counts as uncorrelated.
"""

import math
from collections.abc import Mapping, Sequence
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
    fold_fraction,
    jacobian,
    ring,
    swap_error,
)
from metroem.geometry.field import pixel_positions, warp
from metroem.geometry.field import sample as read_at
from metroem.imaging.masks import tissue_mask, warp_mask
from metroem.synthetic.distortion import GroundTruth

CHUNK_PX = 64
BAND_PX = 8 * CHUNK_PX  # rows that are compared at once
BORDER_PX = 16  # left out of every figure but `Score.epe` and those of the Jacobian
RING_PX = 32  # around defects
# A chunk counts for a ring from this fraction on, since rings seldom cover half of one.
RING_FRACTION = 1 / 8
# CPC has to fall by more than this to count as worse: interpolation alone, by a field
# of nearly no length, changes it a little.
CPC_NOISE = 1e-3

NAN = float("nan")
ScoreT = TypeVar("ScoreT", bound=tuple)


class Score(NamedTuple):
    """Figures of all stages on a pair, or their means over pairs.

    Figures that need the true field are NaN if there is none.
    """

    epe_none: float  # px, mean endpoint error without alignment
    epe: tuple[float, ...]  # px, one per stage
    cpc_none: float  # mean correlation of chunks of CHUNK_PX, without alignment
    cpc: tuple[float, ...]  # one per stage
    cpc_true: float  # with the true field
    folds: float  # fraction of pixels that the last stage's field folds over


class PairScore(NamedTuple):
    """Figures of a pair without a truth, or their means over pairs.

    CPC is the mean correlation of chunks of CHUNK_PX over the overlap of the unaligned
    images; `cpc_before` is without alignment. `correlation` says how pixels count that
    a field moves out of the tissue. Unknown figures are NaN, and means leave them out.
    All are NaN for a pair that cannot be compared (`can_be_compared`).
    """

    cpc_before: float
    cpc: float
    ring_cpc_before: float  # within RING_PX of defects; NaN where there are none
    ring_cpc: float
    length_px: float  # mean length of the field
    folds_ppm: float  # of the pixels of tissue off defects
    det_p01: float  # percentiles of the Jacobian determinant, same pixels
    det_p50: float
    det_p99: float
    cycle_mean_px: float  # see `metroem.evaluation.metrics.cycle_error`
    cycle_p95_px: float
    swap_mean_px: float  # see `metroem.evaluation.metrics.swap_error`
    swap_p95_px: float
    counted: float  # fraction of pixels that can be compared under the field
    made_worse: float  # 1 if CPC fell by more than CPC_NOISE, else 0


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
    """One chunk of a pair: its figure, and its middle in the image."""

    figure: float  # CPC, or mean endpoint error in px
    row: int
    col: int


class Spot(NamedTuple):
    """The middle of a pair's worst chunk."""

    figure: float  # its CPC, or its mean endpoint error in px
    x: int  # mip-0 pixels, as in a viewer of the volume
    y: int


class Where(NamedTuple):
    """Which pair, and where in it to look first."""

    file: str  # image set
    pair: int  # index in it
    z_src: int
    z_tgt: int
    worst: Spot | None  # None where no chunk counts


class AlignedPair(NamedTuple):
    """The figures of one pair."""

    where: Where
    score: PairScore
    role: str = ""  # in the training, see `metroem.evaluation.plan.find_roles`


class WarpedSection(NamedTuple):
    """The figures of one section warped by a known field."""

    where: Where
    score: WarpScore
    role: str = ""  # of its pair


class Group(NamedTuple):
    """The figures of the pairs that had one role in the training."""

    num_pairs: int  # that have figures
    mean: PairScore


class SetResult(NamedTuple):
    """The figures of a pyramid on one image set of its finest mip."""

    file: str
    mip: int
    rows: int
    cols: int
    mean: PairScore
    pairs: tuple[AlignedPair, ...]
    mean_known: WarpScore | None = None  # None without --known_warps
    known: tuple[WarpedSection, ...] = ()
    without_value: int = 0  # pairs that cannot be compared; means leave them out
    known_without_value: int = 0  # the same for sections
    groups: Mapping[str, Group] = {}  # by role, if the pairs have more than one


def score_pair(
    src: np.ndarray,
    tgt: np.ndarray,
    fields: Sequence[np.ndarray],
    truth: GroundTruth | None = None,
) -> Score:
    """Score the fields of all stages for one pair.

    Args:
        src: (H, W), any real type, raw grey levels, 0 = no data.
        tgt: (H, W), the same.
        fields: one per stage, (2, H, W) float32, px.
        truth: the true field.

    Returns:
        The figures. Without a truth, errors and the true correlation are NaN.
    """
    sample = Sample(_batch(src), _batch(tgt), None, ())
    stages = [torch.from_numpy(np.asarray(field))[None] for field in fields]
    stages.insert(0, torch.zeros_like(stages[0]))
    overlap = valid_overlap(sample, stages[:1])
    epe, cpc_true = [NAN] * len(stages), NAN
    if truth is not None:
        overlap = overlap & truth.valid
        epe = [endpoint_error(f, truth.field, truth.valid).mean for f in stages]
        cpc_true = mean_correlation(sample, truth.field, overlap)
    cpc = [mean_correlation(sample, field, overlap) for field in stages]
    folds = fold_fraction(stages[-1])
    return Score(epe[0], tuple(epe[1:]), cpc[0], tuple(cpc[1:]), cpc_true, folds)


def score_aligned(
    sample: Sample, forward: Tensor, backward: Tensor
) -> tuple[PairScore, Chunk | None]:
    """Score the fields of an aligner for a pair and for the swapped pair.

    Args:
        sample: of batch size 1; defects are detected if it has no masks.
        forward: (1, 2, H, W), px, aligns src to tgt.
        backward: (1, 2, H, W), px, aligns tgt to src.

    Returns:
        The figures, and the chunk of the lowest correlation; None if no chunk counts.
    """
    if not can_be_compared(sample):
        return NO_SCORE, None
    sample = with_defects(sample)
    zero_field = torch.zeros_like(forward)
    overlap = valid_overlap(sample, [zero_field])
    around = overlap & ring(defects_on_tgt(sample, zero_field), RING_PX)
    before, after = (
        mean_correlation(sample, f, overlap) for f in (zero_field, forward)
    )
    determinant = jacobian(forward, _clear(sample.tgt, sample.tgt_defects))
    cycle = cycle_error(forward, backward, overlap)
    swap = swap_error(
        forward, backward, valid_overlap(swap_src_tgt(sample), [zero_field])
    )
    score = PairScore(
        before,
        after,
        mean_correlation(sample, zero_field, around, min_fraction=RING_FRACTION),
        mean_correlation(sample, forward, around, min_fraction=RING_FRACTION),
        _mean_length(forward, overlap),
        1e6 * determinant.folds,
        determinant.p01,
        determinant.p50,
        determinant.p99,
        cycle.mean,
        cycle.p95,
        swap.mean,
        swap.p95,
        counted=float(valid_overlap(sample, [zero_field, forward]).double().mean()),
        made_worse=float(not after >= before - CPC_NOISE),
    )
    lowest = _largest(-correlation(sample, forward, overlap))
    return score, lowest and lowest._replace(figure=-lowest.figure)


def score_known(
    field: Tensor, truth: GroundTruth, near: Tensor, identity: Tensor
) -> tuple[WarpScore, Chunk | None]:
    """Score a field against the truth.

    Args:
        field: (1, 2, H, W), px.
        truth: the true field.
        near: (1, 1, H, W) bool, near defects.
        identity: (1, 2, H, W), px, from the section to itself unchanged.

    Returns:
        The figures, and the chunk of the largest mean error; None if no chunk counts.
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
    """Average each figure over the pairs that have it."""
    return _mean(scores)


def without_value(scored: Sequence[AlignedPair] | Sequence[WarpedSection]) -> int:
    """Count the pairs, or sections, without figures."""
    return sum(math.isnan(one.score.made_worse) for one in scored)


def can_be_compared(sample: Sample, *, min_fraction: float = 0.5) -> bool:
    """Whether a field can be measured on a pair.

    It can if, without alignment, some chunk has tissue with contrast in both images.
    Defects are not detected: only the sample's own masks count.

    Args:
        sample: of batch size 1.
        min_fraction: fraction of the chunk's pixels that must be tissue in both.
    """
    zero_field = torch.zeros_like(sample.src).expand(-1, 2, -1, -1)
    valid = valid_overlap(sample, [zero_field])
    found = correlation(sample, zero_field, valid, min_fraction=min_fraction)
    return bool((found.nan_to_num() != 0).any())


def correlation(
    sample: Sample, field: Tensor, overlap: Tensor, *, min_fraction: float = 0.5
) -> Tensor:
    """Correlate warped src with tgt, chunk by chunk; see `chunked_correlation`.

    It goes through bands of BAND_PX rows, since float64 takes much memory.

    Args:
        sample: of batch size 1.
        field: (1, 2, H, W), px.
        overlap: (1, 1, H, W) bool, pixels that count, whatever the field is. Where the
            field reads no clear tissue, a pixel counts as uncorrelated.
        min_fraction: fraction of a chunk's pixels that must overlap for it to count.
    """
    found = []
    src_clear = _clear(sample.src, sample.src_defects).float()
    for start in range(0, field.shape[-2] // CHUNK_PX * CHUNK_PX, BAND_PX):
        rows = slice(start, start + BAND_PX)
        overlap_here = overlap[..., rows, :]
        compared = overlap_here & (warp_rows(src_clear, field, rows) > 0.999)
        cpc = chunked_correlation(
            warp_rows(sample.src, field, rows),
            sample.tgt[..., rows, :],
            compared,
            chunk_px=CHUNK_PX,
            min_fraction=0.0,
        )
        compared_fraction, overlap_fraction = (
            F.avg_pool2d(mask.double(), CHUNK_PX) for mask in (compared, overlap_here)
        )
        # A negative correlation is not improved by losing its pixels.
        cpc = torch.minimum(cpc, cpc * compared_fraction / overlap_fraction)
        found.append(torch.where(overlap_fraction >= min_fraction, cpc, NAN))
    return torch.cat(found, -2)


def warp_rows(image: Tensor, field: Tensor, rows: slice) -> Tensor:
    """Warp some rows; equal to the bit to those of `metroem.geometry.field.warp`."""
    part = field[..., rows, :]
    positions = pixel_positions(part)
    positions[:, 1] += rows.start
    return read_at(image, part, positions + part)


def mean_correlation(
    sample: Sample, field: Tensor, overlap: Tensor, *, min_fraction: float = 0.5
) -> float:
    """Average `correlation` over chunks; NaN if none counts."""
    return float(
        correlation(sample, field, overlap, min_fraction=min_fraction).nanmean()
    )


def valid_overlap(sample: Sample, fields: Sequence[Tensor]) -> Tensor:
    """Find the pixels where tgt and src can be compared under every given field.

    Args:
        sample: of batch size 1.
        fields: (1, 2, H, W) each, px.

    Returns:
        (1, 1, H, W) bool: tissue in both images, off the border, and outside of the
        sample's defect masks.
    """
    src = _clear(sample.src, sample.src_defects).float()
    valid = _clear(sample.tgt, sample.tgt_defects)
    valid = valid & _inside_border(valid)
    for field in fields:
        valid = valid & (warp(src, field) > 0.999)
    return valid


def defects_on_tgt(sample: Sample, field: Tensor) -> Tensor:
    """Mark defects of tgt, and of src warped by a field.

    Args:
        sample: of batch size 1, with defect masks.
        field: (1, 2, H, W), px.

    Returns:
        (1, 1, H, W) bool.
    """
    assert sample.src_defects is not None and sample.tgt_defects is not None
    return sample.tgt_defects | warp_mask(sample.src_defects, field)


def _batch(image: np.ndarray) -> Tensor:
    """Convert (H, W) of any real type to (1, 1, H, W) float32."""
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
    """Find the chunk of the largest known figure of (1, 1, rows, cols)."""
    if figures.isnan().all():
        return None
    at = int(figures.nan_to_num(-torch.inf).argmax())
    row, col = divmod(at, figures.shape[-1])
    middle = (CHUNK_PX * row + CHUNK_PX // 2, CHUNK_PX * col + CHUNK_PX // 2)
    return Chunk(float(figures.flatten()[at]), *middle)


def _mean(values: Sequence[Any]) -> Any:
    """Average known numbers, or tuples element by element."""
    if isinstance(values[0], tuple):
        means = [_mean(elements) for elements in zip(*values, strict=True)]
        return getattr(values[0], "_make", tuple)(means)
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else NAN
