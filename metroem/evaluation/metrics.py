"""How good a field is: against a known truth, by correlation, by its folds.

Two figures compare the field f that aligns src to tgt with the field b that the
same aligner finds from tgt to src. *Cycle*: go there and back from a pixel p of
tgt, |f(p) + b(p + f(p))|. *Swap*: how far b is from the inverse of f, at the pixels
of src. Where f does not fold, the first at p is the second at p + f(p): they differ
in which pixels count, and the second grows where f cannot be inverted.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metroem.geometry.field import check_field, compose, invert, jacobian_determinant
from metroem.imaging.masks import dilate

_ROUNDED = 1e-12  # of a mean of squares, float64


class EndpointError(NamedTuple):
    """|field - true field| over the valid pixels, in pixels."""

    mean: float
    median: float
    p95: float
    p99: float
    above_half: float  # share of valid pixels off by more than 0.5 px
    above_one: float  # by more than 1 px
    above_two: float  # by more than 2 px
    above_eight: float  # by more than 8 px


class Agreement(NamedTuple):
    """How far two fields that should undo each other do not, in pixels."""

    mean: float
    p95: float


class Jacobian(NamedTuple):
    """The Jacobian determinant of p + field(p) over the pixels that count."""

    folds: float  # share of the pixels with a determinant <= 0
    p01: float
    p50: float
    p99: float


def endpoint_error(field: Tensor, truth: Tensor, valid: Tensor) -> EndpointError:
    """Statistics of the endpoint error (EPE) over the valid pixels.

    Args:
        field: (B, 2, H, W), pixels.
        truth: (B, 2, H, W), pixels of the same mip.
        valid: (B, 1, H, W) bool, where the truth is known.

    Returns:
        The statistics; NaN throughout when no pixel is valid.
    """
    check_field(field)
    error = _sorted((field - truth).norm(dim=1, keepdim=True)[valid])
    return EndpointError(
        float(error.mean()),
        *(_percentile(error, share) for share in (0.5, 0.95, 0.99)),
        *(_share(error > px) for px in (0.5, 1.0, 2.0, 8.0)),
    )


def cycle_error(forward: Tensor, backward: Tensor, valid: Tensor) -> Agreement:
    """What is left of a pixel of tgt going to src and back.

    Args:
        forward: (B, 2, H, W), px, aligns src to tgt.
        backward: (B, 2, H, W), px, aligns tgt to src.
        valid: (B, 1, H, W) bool, pixels of tgt that count.

    Returns:
        Of |forward(p) + backward(p + forward(p))|; NaN when no pixel counts.
    """
    return _agreement(compose(forward, backward), valid)


def swap_error(forward: Tensor, backward: Tensor, valid: Tensor) -> Agreement:
    """How far the field of the swapped pair is from the inverse of the pair's.

    Args:
        forward: (B, 2, H, W), px, aligns src to tgt.
        backward: (B, 2, H, W), px, aligns tgt to src.
        valid: (B, 1, H, W) bool, pixels of src that count.

    Returns:
        Of |backward(q) - invert(forward)(q)|; NaN when no pixel counts.
    """
    return _agreement(backward - invert(forward), valid)


def chunked_correlation(
    a: Tensor,
    b: Tensor,
    valid: Tensor,
    *,
    chunk_px: int = 64,
    min_share: float = 0.5,
) -> Tensor:
    """Pearson correlation of two images per chunk (CPC), blank pixels left out.

    Mean, variance and covariance are all taken over the valid pixels of a
    chunk alone.

    Args:
        a: (B, 1, H, W) float.
        b: (B, 1, H, W) float.
        valid: (B, 1, H, W) bool, pixels that count.
        chunk_px: side of a chunk; what is left at the far borders is dropped.
        min_share: share of a chunk's pixels that must be valid for it to count.

    Returns:
        (B, 1, H // chunk_px, W // chunk_px) float64 in -1..1; NaN in chunks
        that do not count, 0 in chunks of which one side has no contrast.
    """
    weight = valid.double()

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, chunk_px)

    share = mean(weight)
    scale = share.clamp(min=1e-12)
    a, b = a.double() * weight, b.double() * weight
    mean_a, mean_b = mean(a) / scale, mean(b) / scale
    covariance = mean(a * b) / scale - mean_a * mean_b
    squares_a, squares_b = mean(a * a) / scale, mean(b * b) / scale
    variance_a, variance_b = squares_a - mean_a**2, squares_b - mean_b**2
    # What rounding leaves of the variance of one grey level is no contrast.
    has_contrast = (variance_a > _ROUNDED * squares_a) & (
        variance_b > _ROUNDED * squares_b
    )
    deviations = torch.where(has_contrast, variance_a * variance_b, 1.0).sqrt()
    correlation = torch.where(has_contrast, covariance / deviations, 0.0)
    return torch.where(share >= min_share, correlation, float("nan"))


def chunked_mean(values: Tensor, valid: Tensor, *, chunk_px: int = 64) -> Tensor:
    """Mean of a map per chunk, over its valid pixels.

    Args:
        values: (B, 1, H, W) float.
        valid: (B, 1, H, W) bool, pixels that count.
        chunk_px: side of a chunk; what is left at the far borders is dropped.

    Returns:
        (B, 1, H // chunk_px, W // chunk_px) float64; NaN in chunks of which
        less than half is valid.
    """
    weight = valid.double()
    share = F.avg_pool2d(weight, chunk_px)
    total = F.avg_pool2d(torch.where(valid, values.double(), 0.0), chunk_px)
    return torch.where(share >= 0.5, total / share.clamp(min=0.5), float("nan"))


def ring(defects: Tensor, px: int) -> Tensor:
    """What lies within some pixels of a defect, the defect itself left out.

    Args:
        defects: (B, 1, H, W) bool.
        px: reach in all 8 directions.

    Returns:
        (B, 1, H, W) bool.
    """
    return dilate(defects, px) & ~defects


def jacobian(field: Tensor, valid: Tensor) -> Jacobian:
    """Share of folds and percentiles of the determinant, over what counts.

    Args:
        field: (B, 2, H, W), pixels; H and W >= 3.
        valid: (B, 1, H, W) bool, pixels that count; the outermost never do.

    Returns:
        The figures; NaN throughout when no pixel counts.
    """
    found = _sorted(jacobian_determinant(field)[valid[..., 1:-1, 1:-1]])
    return Jacobian(
        _share(found <= 0), *(_percentile(found, share) for share in (0.01, 0.5, 0.99))
    )


def fold_share(field: Tensor) -> float:
    """Share of pixels with a Jacobian determinant <= 0."""
    return _share(jacobian_determinant(field) <= 0)


def _agreement(difference: Tensor, valid: Tensor) -> Agreement:
    lengths = _sorted(difference.norm(dim=1, keepdim=True)[valid])
    return Agreement(float(lengths.mean()), _percentile(lengths, 0.95))


def _share(where: Tensor) -> float:
    return float(where.double().mean())


def _sorted(values: Tensor) -> Tensor:
    return values.double().sort().values


def _percentile(ordered: Tensor, share: float) -> float:
    """By hand, since torch.quantile takes at most 16 million values."""
    if ordered.numel() == 0:
        return float("nan")
    return float(ordered[min(int(share * len(ordered)), len(ordered) - 1)])
