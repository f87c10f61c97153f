"""Where places went, as windows of weights say it, and robust means of that.

Source: robust means by reweighting as in Holland and Welsch 1977
(doi:10.1080/03610927708827533).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metroem.models.local_correlation import window_offsets

# Sides of the neighbourhoods that votes are pooled over, px of the level.
POOLS = (2, 4, 8, 16)
# How far around a place `robust_average` sees, from block to block, px: each of its two
# means sees the blocks beside its own, whose sums take in those beside them.
POOLING_REACH = 4 * max(POOLS)
_LEAST_VARIANCE = 0.05  # px^2, of a vote: no match is surer than a part of a pixel
_LEAST_PRECISION = 1e-3  # of a mean, 1 / px^2: where nothing is trusted, it is 0


def soft_argmax(weights: Tensor, radius: int) -> tuple[Tensor, Tensor]:
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


def robust_average(
    votes: Tensor, precision: Tensor, shares: Tensor, tolerance: Tensor
) -> Tensor:
    """Robust means of votes over neighbourhoods, mixed by shares.

    Args:
        votes: (B, 2, H, W).
        precision: (B, 3, H, W), as `soft_argmax` has it: what each vote weighs.
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
    mean = block_upsample(_weighted_mean(block_average(weighted, size)), size)
    return mean[..., :rows, :cols]


def _weighted_mean(sums: Tensor) -> Tensor:
    """(B, 5, H, W), sums of precision times vote and of precision -> (B, 2, H, W)."""
    by_cols, by_rows, cc, rr, cr = sums.split(1, 1)
    cc, rr = cc + _LEAST_PRECISION, rr + _LEAST_PRECISION
    solved = torch.cat((rr * by_cols - cr * by_rows, cc * by_rows - cr * by_cols), 1)
    return solved / (cc * rr - cr * cr)


def block_average(x: Tensor, size: int) -> Tensor:
    """Means over 3 x 3 blocks of `size` x `size` px, those outside left out.

    Args:
        x: (B, C, H, W).
        size: side of a block, px; the last ones may be smaller.

    Returns:
        (B, C, ceil(H / size), ceil(W / size)): for each block the mean of its own
        mean and of those beside it.
    """
    run = _block_means if torch.compiler.is_compiling() else _means
    return run(x, size)


def block_upsample(blocks: Tensor, size: int) -> Tensor:
    """Values of blocks, (B, C, h, w), as pixels: (B, C, h * size, w * size).

    Bilinear, by the middles of the blocks.
    """
    run = _spread if torch.compiler.is_compiling() else _pixels
    return run(blocks, size)


def _means(x: Tensor, size: int) -> Tensor:
    x = F.avg_pool2d(x, size, ceil_mode=True, count_include_pad=False)
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _pixels(blocks: Tensor, size: int) -> Tensor:
    return F.interpolate(
        blocks, scale_factor=size, mode="bilinear", align_corners=False
    )


@torch.library.custom_op("metroem::block_means", mutates_args=())
def _block_means(x: Tensor, size: int) -> Tensor:
    return _means(x.contiguous(), size)


@_block_means.register_fake
def _(x: Tensor, size: int) -> Tensor:
    rows, cols = x.shape[-2:]
    return x.new_empty(*x.shape[:-2], -(-rows // size), -(-cols // size))


@torch.library.custom_op("metroem::block_means_backward", mutates_args=())
def _block_means_backward(gradient: Tensor, size: int, rows: int, cols: int) -> Tensor:
    pool_backward = torch.ops.aten.avg_pool2d_backward
    gradient = gradient.contiguous()
    # Of the inputs of the poolings their shapes alone are looked at.
    blocks, pixels = gradient, gradient.new_empty(*gradient.shape[:-2], rows, cols)
    of_blocks = pool_backward(
        gradient, blocks, [3, 3], [1, 1], [1, 1], False, False, None
    )
    sizes = [size, size]
    return pool_backward(  # type: ignore[no-any-return]
        of_blocks, pixels, sizes, sizes, [0, 0], True, False, None
    )


@_block_means_backward.register_fake
def _(gradient: Tensor, size: int, rows: int, cols: int) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-2], rows, cols)


@torch.library.custom_op("metroem::spread", mutates_args=())
def _spread(blocks: Tensor, size: int) -> Tensor:
    return _pixels(blocks.contiguous(), size)


@_spread.register_fake
def _(blocks: Tensor, size: int) -> Tensor:
    rows, cols = blocks.shape[-2:]
    return blocks.new_empty(*blocks.shape[:-2], rows * size, cols * size)


@torch.library.custom_op("metroem::spread_backward", mutates_args=())
def _spread_backward(gradient: Tensor, size: int) -> Tensor:
    rows, cols = gradient.shape[-2:]
    shape = [*gradient.shape[:-2], rows // size, cols // size]
    return torch.ops.aten.upsample_bilinear2d_backward(  # type: ignore[no-any-return]
        gradient.contiguous(), [rows, cols], shape, False, float(size), float(size)
    )


@_spread_backward.register_fake
def _(gradient: Tensor, size: int) -> Tensor:
    rows, cols = gradient.shape[-2:]
    return gradient.new_empty(*gradient.shape[:-2], rows // size, cols // size)


def _note_size(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    x, ctx.size = inputs
    ctx.rows, ctx.cols = x.shape[-2:]


def _backward_of_means(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return _block_means_backward(gradient, ctx.size, ctx.rows, ctx.cols), None


def _backward_of_spread(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return _spread_backward(gradient, ctx.size), None


_block_means.register_autograd(_backward_of_means, setup_context=_note_size)

_spread.register_autograd(_backward_of_spread, setup_context=_note_size)
