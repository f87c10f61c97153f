"""How good a field is: against a known truth, by correlation, by its folds."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metroem.field import check_field


class EndpointError(NamedTuple):
    """|field - true field| over the valid pixels, in pixels."""

    mean: float
    median: float
    p95: float
    p99: float
    above_half: float  # share of valid pixels off by more than 0.5 px
    above_one: float  # by more than 1 px
    above_two: float  # by more than 2 px


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
    error = (field - truth).norm(dim=1, keepdim=True)[valid].double()
    if error.numel() == 0:
        return EndpointError(*[float("nan")] * 7)
    # Sorted by hand, since torch.quantile takes at most 16 million values.
    ordered = error.sort().values

    def percentile(share: float) -> float:
        return float(ordered[min(int(share * len(ordered)), len(ordered) - 1)])

    return EndpointError(
        float(error.mean()),
        percentile(0.5),
        percentile(0.95),
        percentile(0.99),
        *(float((error > px).double().mean()) for px in (0.5, 1.0, 2.0)),
    )


def chunked_correlation(
    a: Tensor, b: Tensor, valid: Tensor, *, chunk_px: int = 64
) -> Tensor:
    """Pearson correlation of two images per chunk (CPC), blank pixels left out.

    Mean, variance and covariance are all taken over the valid pixels of a
    chunk alone.

    Args:
        a: (B, 1, H, W) float.
        b: (B, 1, H, W) float.
        valid: (B, 1, H, W) bool, pixels that count.
        chunk_px: side of a chunk; what is left at the far borders is dropped.

    Returns:
        (B, 1, H // chunk_px, W // chunk_px) float64 in -1..1; NaN in chunks
        of which less than half is valid, 0 in chunks without contrast.
    """
    weight = valid.double()

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, chunk_px)

    share = mean(weight)
    scale = share.clamp(min=1e-12)
    a, b = a.double() * weight, b.double() * weight
    mean_a, mean_b = mean(a) / scale, mean(b) / scale
    covariance = mean(a * b) / scale - mean_a * mean_b
    variances = (mean(a * a) / scale - mean_a**2) * (mean(b * b) / scale - mean_b**2)
    has_contrast = variances > 1e-16
    correlation = torch.where(
        has_contrast, covariance / variances.clamp(min=1e-16).sqrt(), 0.0
    )
    return torch.where(share >= 0.5, correlation, float("nan"))


def jacobian_determinant(field: Tensor) -> Tensor:
    """Determinant of d(p + field(p)) / dp by central differences.

    Args:
        field: (B, 2, H, W), pixels; H and W >= 3.

    Returns:
        (B, 1, H - 2, W - 2); 1 where nothing is stretched, <= 0 at a fold.
    """
    check_field(field)
    along_cols = (field[..., 1:-1, 2:] - field[..., 1:-1, :-2]) / 2
    along_rows = (field[..., 2:, 1:-1] - field[..., :-2, 1:-1]) / 2
    determinant = (1 + along_cols[:, 0]) * (1 + along_rows[:, 1]) - (
        along_cols[:, 1] * along_rows[:, 0]
    )
    return determinant[:, None]


def fold_share(field: Tensor) -> float:
    """Share of pixels with a Jacobian determinant <= 0."""
    return float((jacobian_determinant(field) <= 0).double().mean())
