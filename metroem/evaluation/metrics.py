"""Measure a field: against a known truth, by correlation, and by its folds.

Two figures compare the field f, which aligns src to tgt, with the field b, which the
same aligner finds from tgt to src:

    cycle(p) = |f(p) + b(p + f(p))|     p: a pixel of tgt, which goes to src and back
    swap(q) = |b(q) - inverse(f)(q)|    q: a pixel of src

Where f does not fold, cycle(p) = swap(p + f(p)). The two differ in the pixels that
count, and swap grows where f cannot be inverted.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metroem.geometry.field import check_field, compose, invert, jacobian_determinant
from metroem.imaging.masks import dilate

_ROUNDING = 1e-12  # fraction of a mean of squares, float64


class EndpointError(NamedTuple):
    """|field - true field| over the valid pixels, in pixels."""

    mean: float
    median: float
    p95: float
    p99: float
    above_half: float  # fraction of valid pixels off by more than 0.5 px
    above_one: float  # by more than 1 px
    above_two: float  # by more than 2 px
    above_eight: float  # by more than 8 px


class Agreement(NamedTuple):
    """Distance of two fields from being inverse to each other, in pixels."""

    mean: float
    p95: float


class Jacobian(NamedTuple):
    """The Jacobian determinant of p + field(p) over the pixels that count."""

    folds: float  # fraction of pixels with a determinant <= 0
    p01: float
    p50: float
    p99: float


def endpoint_error(field: Tensor, truth: Tensor, valid: Tensor) -> EndpointError:
    """Compute statistics of the endpoint error (EPE) over the valid pixels.

    Args:
        field: (B, 2, H, W), pixels.
        truth: (B, 2, H, W), pixels of the same mip.
        valid: (B, 1, H, W) bool, where the truth is known.

    Returns:
        The statistics; all are NaN if no pixel is valid.
    """
    check_field(field)
    error = _sorted((field - truth).norm(dim=1, keepdim=True)[valid])
    return EndpointError(
        float(error.mean()),
        *(_percentile(error, fraction) for fraction in (0.5, 0.95, 0.99)),
        *(_fraction(error > px) for px in (0.5, 1.0, 2.0, 8.0)),
    )


def cycle_error(forward: Tensor, backward: Tensor, valid: Tensor) -> Agreement:
    """Measure by how far a pixel of tgt misses itself after going to src and back.

    Args:
        forward: (B, 2, H, W), px, aligns src to tgt.
        backward: (B, 2, H, W), px, aligns tgt to src.
        valid: (B, 1, H, W) bool, pixels of tgt that count.

    Returns:
        Statistics of |forward(p) + backward(p + forward(p))|; NaN if no pixel counts.
    """
    return _agreement(compose(forward, backward), valid)


def swap_error(forward: Tensor, backward: Tensor, valid: Tensor) -> Agreement:
    """Measure how far the field of the swapped pair is from the inverse field.

    Args:
        forward: (B, 2, H, W), px, aligns src to tgt.
        backward: (B, 2, H, W), px, aligns tgt to src.
        valid: (B, 1, H, W) bool, pixels of src that count.

    Returns:
        Statistics of |backward(q) - invert(forward)(q)|; NaN if no pixel counts.
    """
    return _agreement(backward - invert(forward), valid)


def chunked_correlation(
    a: Tensor,
    b: Tensor,
    valid: Tensor,
    *,
    chunk_px: int = 64,
    min_fraction: float = 0.5,
) -> Tensor:
    """Compute the Pearson correlation of two images in each chunk (CPC).

    Mean, variance and covariance use only the valid pixels of a chunk.

    Args:
        a: (B, 1, H, W) float.
        b: (B, 1, H, W) float.
        valid: (B, 1, H, W) bool, pixels that count.
        chunk_px: side of a chunk; incomplete chunks at the far borders are dropped.
        min_fraction: fraction of a chunk's pixels that must be valid for it to count.

    Returns:
        (B, 1, H // chunk_px, W // chunk_px) float64 in -1..1; NaN in chunks
        that do not count, 0 in chunks where one image has no contrast.
    """
    weight = valid.double()

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, chunk_px)

    fraction = mean(weight)
    scale = fraction.clamp(min=1e-12)
    a, b = a.double() * weight, b.double() * weight
    mean_a, mean_b = mean(a) / scale, mean(b) / scale
    covariance = mean(a * b) / scale - mean_a * mean_b
    squares_a, squares_b = mean(a * a) / scale, mean(b * b) / scale
    variance_a, variance_b = squares_a - mean_a**2, squares_b - mean_b**2
    # The variance of a constant image is not 0 after rounding; it is not contrast.
    has_contrast = (variance_a > _ROUNDING * squares_a) & (
        variance_b > _ROUNDING * squares_b
    )
    deviations = torch.where(has_contrast, variance_a * variance_b, 1.0).sqrt()
    correlation = torch.where(has_contrast, covariance / deviations, 0.0)
    return torch.where(fraction >= min_fraction, correlation, float("nan"))


def chunked_mean(values: Tensor, valid: Tensor, *, chunk_px: int = 64) -> Tensor:
    """Average a map in each chunk, over its valid pixels.

    Args:
        values: (B, 1, H, W) float.
        valid: (B, 1, H, W) bool, pixels that count.
        chunk_px: side of a chunk; incomplete chunks at the far borders are dropped.

    Returns:
        (B, 1, H // chunk_px, W // chunk_px) float64; NaN in chunks where
        less than half is valid.
    """
    weight = valid.double()
    fraction = F.avg_pool2d(weight, chunk_px)
    total = F.avg_pool2d(torch.where(valid, values.double(), 0.0), chunk_px)
    return torch.where(fraction >= 0.5, total / fraction.clamp(min=0.5), float("nan"))


def ring(defects: Tensor, px: int) -> Tensor:
    """Mark the pixels near a defect, without the defect itself.

    Args:
        defects: (B, 1, H, W) bool.
        px: distance in all 8 directions.

    Returns:
        (B, 1, H, W) bool.
    """
    return dilate(defects, px) & ~defects


def jacobian(field: Tensor, valid: Tensor) -> Jacobian:
    """Compute the fraction of folds and percentiles of the determinant.

    Args:
        field: (B, 2, H, W), pixels; H and W >= 3.
        valid: (B, 1, H, W) bool, pixels that count; those at the edge never do.

    Returns:
        The figures; all are NaN if no pixel counts.
    """
    found = _sorted(jacobian_determinant(field)[valid[..., 1:-1, 1:-1]])
    return Jacobian(
        _fraction(found <= 0),
        *(_percentile(found, fraction) for fraction in (0.01, 0.5, 0.99)),
    )


def fold_fraction(field: Tensor) -> float:
    """Compute the fraction of pixels with a Jacobian determinant <= 0."""
    return _fraction(jacobian_determinant(field) <= 0)


def _agreement(difference: Tensor, valid: Tensor) -> Agreement:
    lengths = _sorted(difference.norm(dim=1, keepdim=True)[valid])
    return Agreement(float(lengths.mean()), _percentile(lengths, 0.95))


def _fraction(where: Tensor) -> float:
    return float(where.double().mean())


def _sorted(values: Tensor) -> Tensor:
    return values.double().sort().values


def _percentile(ordered: Tensor, fraction: float) -> float:
    """Pick a percentile of sorted values; torch.quantile takes at most 16 million."""
    if ordered.numel() == 0:
        return float("nan")
    return float(ordered[min(int(fraction * len(ordered)), len(ordered) - 1)])
