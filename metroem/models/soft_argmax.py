"""Turn matching weights into displacements (soft-argmax) and average them robustly.

For the weights w(d) of the offsets d of a window, which sum to 1:

    v = sum_d w(d) d                                displacement
    P = (sum_d w(d) d d^T - v v^T + 0.05 I)^-1      precision, the inverse covariance

A mean over a neighbourhood N is taken twice. The second one reduces the weight of
outliers, i.e. of displacements far from the first mean:

    m1 = (sum_N P)^-1 sum_N P v
    m2 = (sum_N Q)^-1 sum_N Q v,     Q = P / (1 + |v - m1|^2 / tolerance^2)

The result mixes v, the means m2 over neighbourhoods of four sizes, and 0. A
neighbourhood is 3 x 3 blocks of pixels. Its mean is interpolated between blocks.

Source: robust means by reweighting as in Holland and Welsch 1977
(doi:10.1080/03610927708827533).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metroem.models.local_correlation import window_offsets

# Side of the blocks, for each size of neighbourhood, px of the maps that are averaged.
POOLS = (2, 4, 8, 16)
# How far `robust_average` sees around a pixel, px. Each of its two means reads blocks
# up to 2 away: it interpolates between neighbouring blocks, and each of these is
# averaged with its own neighbours.
POOLING_RECEPTIVE_PX = 4 * max(POOLS)
_MIN_VARIANCE = 0.05  # px^2: no match is more exact than a fraction of a pixel
# 1 / px^2, added to the sums of P and of Q: where nothing has weight, the mean is 0.
_MIN_PRECISION = 1e-3


def soft_argmax(weights: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Compute the displacement of each pixel, and its precision.

    Args:
        weights: (B, H, W, (2 * radius + 1)**2), summing to 1 over each window.
        radius: radius of the windows, px.

    Returns:
        The displacements, (B, 2, H, W) px, and the inverse of their covariances,
        (B, 3, H, W) 1 / px^2: entries (cols, cols), (rows, rows), (cols, rows).
    """
    offsets = window_offsets(radius, weights.device)
    d_cols, d_rows = offsets.split(1, 1)
    squares = torch.cat((d_cols * d_cols, d_rows * d_rows, d_cols * d_rows), 1)
    moments = (weights @ torch.cat((offsets, squares), 1)).permute(0, 3, 1, 2)
    d_cols, d_rows, cc, rr, cr = moments.split(1, 1)
    cc = cc - d_cols * d_cols + _MIN_VARIANCE
    rr = rr - d_rows * d_rows + _MIN_VARIANCE
    cr = cr - d_cols * d_rows
    precision = torch.cat((rr, cc, -cr), 1) / (cc * rr - cr * cr)
    return torch.cat((d_cols, d_rows), 1), precision


def robust_average(
    displacement: Tensor, precision: Tensor, fractions: Tensor, tolerance: Tensor
) -> Tensor:
    """Mix displacements with their robust means over neighbourhoods.

    Args:
        displacement: (B, 2, H, W), px.
        precision: (B, 3, H, W), as `soft_argmax` returns it, or scaled.
        fractions: (B, 2 + len(POOLS), H, W), summing to 1: of the displacement itself,
            of each neighbourhood, and of no displacement.
        tolerance: distance from the mean that halves a displacement's weight, px.

    Returns:
        (B, 2, H, W), px.
    """
    d_cols, d_rows = displacement.split(1, 1)
    cc, rr, cr = precision.split(1, 1)
    weighted = torch.cat((cc * d_cols + cr * d_rows, cr * d_cols + rr * d_rows), 1)
    weighted = torch.cat((weighted, precision), 1)
    mixed = displacement * fractions[:, :1]
    for index, size in enumerate(POOLS, start=1):
        mean = _neighbourhood_mean(weighted, size)
        distance2 = (displacement - mean).square().sum(1, keepdim=True)
        outlier = distance2 / tolerance.square()
        mean = _neighbourhood_mean(weighted / (1 + outlier), size)
        mixed = mixed + mean * fractions[:, index : index + 1]
    return mixed


def _neighbourhood_mean(weighted: Tensor, size: int) -> Tensor:
    """Average displacements over neighbourhoods of about 3 * `size` px, (B, 2, H, W).

    Args:
        weighted: (B, 5, H, W), precision times displacement, and precision.
        size: side of a block, px.
    """
    rows, cols = weighted.shape[-2:]
    mean = block_upsample(_weighted_mean(block_average(weighted, size)), size)
    return mean[..., :rows, :cols]


def _weighted_mean(sums: Tensor) -> Tensor:
    """Divide sums of P v by sums of P: (B, 5, H, W) -> (B, 2, H, W)."""
    by_cols, by_rows, cc, rr, cr = sums.split(1, 1)
    cc, rr = cc + _MIN_PRECISION, rr + _MIN_PRECISION
    solved = torch.cat((rr * by_cols - cr * by_rows, cc * by_rows - cr * by_cols), 1)
    return solved / (cc * rr - cr * cr)


def block_average(x: Tensor, size: int) -> Tensor:
    """Average blocks of `size` x `size` px, then each block with the 8 around it.

    Blocks outside the map are left out.

    Args:
        x: (B, C, H, W).
        size: side of a block, px; the last ones may be smaller.

    Returns:
        (B, C, ceil(H / size), ceil(W / size)).
    """
    run = _block_average_op if torch.compiler.is_compiling() else _average
    return run(x, size)


def block_upsample(blocks: Tensor, size: int) -> Tensor:
    """Interpolate block values, (B, C, h, w), to pixels: (B, C, h * size, w * size).

    Bilinear between the middles of blocks.
    """
    run = _block_upsample_op if torch.compiler.is_compiling() else _upsample
    return run(blocks, size)


def _average(x: Tensor, size: int) -> Tensor:
    x = F.avg_pool2d(x, size, ceil_mode=True, count_include_pad=False)
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _upsample(blocks: Tensor, size: int) -> Tensor:
    return F.interpolate(
        blocks, scale_factor=size, mode="bilinear", align_corners=False
    )


# torch.compile calls these operators as they are, without compiling them.
@torch.library.custom_op("metroem::block_average", mutates_args=())
def _block_average_op(x: Tensor, size: int) -> Tensor:
    return _average(x.contiguous(), size)


@_block_average_op.register_fake
def _(x: Tensor, size: int) -> Tensor:
    rows, cols = x.shape[-2:]
    return x.new_empty(*x.shape[:-2], -(-rows // size), -(-cols // size))


@torch.library.custom_op("metroem::block_average_backward", mutates_args=())
def _block_average_backward(
    gradient: Tensor, size: int, rows: int, cols: int
) -> Tensor:
    pool_backward = torch.ops.aten.avg_pool2d_backward
    gradient = gradient.contiguous()
    # Only the shapes of the poolings' inputs are used.
    blocks, pixels = gradient, gradient.new_empty(*gradient.shape[:-2], rows, cols)
    block_gradient = pool_backward(
        gradient, blocks, [3, 3], [1, 1], [1, 1], False, False, None
    )
    sizes = [size, size]
    return pool_backward(  # type: ignore[no-any-return]
        block_gradient, pixels, sizes, sizes, [0, 0], True, False, None
    )


@_block_average_backward.register_fake
def _(gradient: Tensor, size: int, rows: int, cols: int) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-2], rows, cols)


@torch.library.custom_op("metroem::block_upsample", mutates_args=())
def _block_upsample_op(blocks: Tensor, size: int) -> Tensor:
    return _upsample(blocks.contiguous(), size)


@_block_upsample_op.register_fake
def _(blocks: Tensor, size: int) -> Tensor:
    rows, cols = blocks.shape[-2:]
    return blocks.new_empty(*blocks.shape[:-2], rows * size, cols * size)


@torch.library.custom_op("metroem::block_upsample_backward", mutates_args=())
def _block_upsample_backward(gradient: Tensor, size: int) -> Tensor:
    rows, cols = gradient.shape[-2:]
    shape = [*gradient.shape[:-2], rows // size, cols // size]
    return torch.ops.aten.upsample_bilinear2d_backward(  # type: ignore[no-any-return]
        gradient.contiguous(), [rows, cols], shape, False, float(size), float(size)
    )


@_block_upsample_backward.register_fake
def _(gradient: Tensor, size: int) -> Tensor:
    rows, cols = gradient.shape[-2:]
    return gradient.new_empty(*gradient.shape[:-2], rows // size, cols // size)


def _save_size(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    x, ctx.size = inputs
    ctx.rows, ctx.cols = x.shape[-2:]


def _average_autograd(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return _block_average_backward(gradient, ctx.size, ctx.rows, ctx.cols), None


def _backward_of_block_upsample_op(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return _block_upsample_backward(gradient, ctx.size), None


_block_average_op.register_autograd(_average_autograd, setup_context=_save_size)

_block_upsample_op.register_autograd(
    _backward_of_block_upsample_op, setup_context=_save_size
)
