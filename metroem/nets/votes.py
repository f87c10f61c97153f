"""Where places went, as windows of weights say it, and robust means of that.

Source: robust means by reweighting as in Holland and Welsch 1977
(doi:10.1080/03610927708827533).
"""

import torch
from torch import Tensor

from metroem.nets.block_means import block_means, spread
from metroem.nets.local_correlation import window_offsets

# Sides of the neighbourhoods that votes are pooled over, px of the level.
POOLS = (2, 4, 8, 16)
# How far around a place `pooled` sees, from block to block: each of its two means
# sees the blocks beside its own, whose sums take in those beside them, px.
POOLING_REACH = 4 * max(POOLS)
_LEAST_VARIANCE = 0.05  # px^2, of a vote: no match is surer than a part of a pixel
_LEAST_PRECISION = 1e-3  # of a mean, 1 / px^2: where nothing is trusted, it is 0


def votes_of(weights: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Where places went: mean and precision over the weights of their windows.

    Args:
        weights: (B, H, W, (2 * radius + 1)**2), which sum to 1.
        radius: of the windows, px.

    Returns:
        The means, (B, 2, H, W) px, and the inverse of their covariances,
        (B, 3, H, W) 1 / px^2: along cols, along rows, and of both.
    """
    offsets = window_offsets(radius, weights.device)
    d_cols, d_rows = offsets.split(1, 1)
    squares = torch.cat((d_cols * d_cols, d_rows * d_rows, d_cols * d_rows), 1)
    moments = (weights @ torch.cat((offsets, squares), 1)).permute(0, 3, 1, 2)
    d_cols, d_rows, cc, rr, cr = moments.split(1, 1)
    cc = cc - d_cols * d_cols + _LEAST_VARIANCE
    rr = rr - d_rows * d_rows + _LEAST_VARIANCE
    cr = cr - d_cols * d_rows
    precision = torch.cat((rr, cc, -cr), 1) / (cc * rr - cr * cr)
    return torch.cat((d_cols, d_rows), 1), precision


def pooled(
    votes: Tensor, precision: Tensor, shares: Tensor, tolerance: Tensor
) -> Tensor:
    """Robust means of votes over neighbourhoods, mixed by shares.

    Args:
        votes: (B, 2, H, W).
        precision: (B, 3, H, W), as `votes_of` has it: what each vote weighs.
        shares: (B, 2 + len(POOLS), H, W): of the votes themselves, of each
            neighbourhood, and of no change at all; they sum to 1.
        tolerance: how far a vote is off the mean to weigh half, px.
    """
    (d_cols, d_rows), (cc, rr, cr) = votes.split(1, 1), precision.split(1, 1)
    weighted = torch.cat((cc * d_cols + cr * d_rows, cr * d_cols + rr * d_rows), 1)
    weighted = torch.cat((weighted, precision), 1)
    mixed = votes * shares[:, :1]
    for index, size in enumerate(POOLS, start=1):
        mean = _pool(weighted, size)
        off = (votes - mean).square().sum(1, keepdim=True)
        mean = _pool(weighted / (1 + off / tolerance.square()), size)
        mixed = mixed + mean * shares[:, index : index + 1]
    return mixed


def _pool(weighted: Tensor, size: int) -> Tensor:
    """Means over neighbourhoods of about 3 * `size` px, (B, 2, H, W).

    Args:
        weighted: (B, 5, H, W), precision times vote, and precision.
        size: of the blocks that they are summed over first, px.
    """
    rows, cols = weighted.shape[-2:]
    mean = spread(_weighted_mean(block_means(weighted, size)), size)
    return mean[..., :rows, :cols]


def _weighted_mean(sums: Tensor) -> Tensor:
    """(B, 5, H, W), sums of precision times vote and of precision -> (B, 2, H, W)."""
    by_cols, by_rows, cc, rr, cr = sums.split(1, 1)
    cc, rr = cc + _LEAST_PRECISION, rr + _LEAST_PRECISION
    solved = torch.cat((rr * by_cols - cr * by_rows, cc * by_rows - cr * by_cols), 1)
    return solved / (cc * rr - cr * cr)
