"""Means over blocks and the blocks beside them, which compile in seconds.

torch.compile writes the slopes of pooling as sums over the windows that a pixel lies
in, and those of eight poolings at once kept its algebra busy for minutes (torch 2.13,
2026-11). What it cannot look into it calls as it is.
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
    if torch.compiler.is_compiling():
        return _opaque(x, size)  # type: ignore[no-any-return]
    return _means(x, size)


def _means(x: Tensor, size: int) -> Tensor:
    x = F.avg_pool2d(x, size, ceil_mode=True, count_include_pad=False)
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


@torch.library.custom_op("metroem::block_means", mutates_args=())
def _opaque(x: Tensor, size: int) -> Tensor:
    return _means(x.contiguous(), size)


@_opaque.register_fake
def _(x: Tensor, size: int) -> Tensor:
    rows, cols = x.shape[-2:]
    return x.new_empty(*x.shape[:-2], -(-rows // size), -(-cols // size))


@torch.library.custom_op("metroem::block_means_backward", mutates_args=())
def _opaque_backward(gradient: Tensor, size: int, rows: int, cols: int) -> Tensor:
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


@_opaque_backward.register_fake
def _(gradient: Tensor, size: int, rows: int, cols: int) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-2], rows, cols)


def _note_shape(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    x, ctx.size = inputs
    ctx.rows, ctx.cols = x.shape[-2:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return _opaque_backward(gradient, ctx.size, ctx.rows, ctx.cols), None


_opaque.register_autograd(_backward, setup_context=_note_shape)
