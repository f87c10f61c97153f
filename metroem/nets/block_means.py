"""Means over blocks of pixels, and back to pixels, as torch.compile can take them.

torch.compile writes out the slopes of pooling and of interpolation. Those of eight
poolings at once kept its algebra busy for minutes, and of an interpolation between
single pixels it makes code that its own check refuses (torch 2.13, 2026-11; issue
160391 of pytorch). So compiled networks call these as they are.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def block_means(x: Tensor, size: int) -> Tensor:
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


def spread(blocks: Tensor, size: int) -> Tensor:
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
