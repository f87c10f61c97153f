"""Correlate each pixel of one map with a window of pixels of another.

    correlation(p, d) = sum_c a_c(p) b_c(p + d),    d within a square window

Plain torch would read the second map once for each d, or copy it as often. Here each
row of `a` is split into tiles of columns. For each row of the window, one matrix
product multiplies all columns of a tile by all columns of `b` that the tile's windows
contain. Entry (i, i + k) of the product belongs to column i and to offset k. So the
window is a band of diagonals; the other entries are dropped:

    product, (tile, tile + 2 * radius)    ->    band, (tile, 2 * radius + 1)

The backward pass writes the gradient into such a band, and multiplies by `b` and `a`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Columns of a tile: longer tiles compute more entries that are dropped (fastest of 16,
# 32, 64 on an Intel Xeon with AMX, 2026-11).
TILE = 32


def local_correlation(a: Tensor, b: Tensor, radius: int) -> Tensor:
    """Sum over the channels of a(p) * b(p + d) for each d of a window.

    Args:
        a: (B, C, H, W), any floating dtype.
        b: (B, C, H, W), the same dtype.
        radius: radius of the square window, pixels.

    Returns:
        (B, (2 * radius + 1)**2, H, W) in channels-last memory, in the dtype of
        `a`: d runs over rows first, then cols, from -radius to radius, as in
        `window_offsets`. Pixels outside of `b` are 0.
    """
    return _correlation(a, b, radius)  # type: ignore[no-any-return]


def window_offsets(radius: int, device: torch.device) -> Tensor:
    """List the d of `local_correlation`: ((2 * radius + 1)**2, 2), cols, rows."""
    steps = torch.arange(-radius, radius + 1, device=device, dtype=torch.float32)
    rows, cols = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack((cols.flatten(), rows.flatten()), 1)


# Custom operators, which torch.compile calls without compiling them. Compiling the loop
# over the rows of a window took half a minute for each, not 3 s (torch 2.13, 2026-11).
@torch.library.custom_op("metroem::local_correlation", mutates_args=())
def _correlation(a: Tensor, b: Tensor, radius: int) -> Tensor:
    rows, side = a.shape[-2], 2 * radius + 1
    ours, theirs = _tiles(a, b, radius)
    found = ours.new_empty(*ours.shape[:2], side, side)
    for row in range(side):
        near = theirs[row : row + rows].view(len(ours), -1, ours.shape[2])
        product = torch.bmm(ours, near.transpose(1, 2))
        found[:, :, row] = _band(product, side)
    return _as_maps(found, a)


@_correlation.register_fake
def _(a: Tensor, b: Tensor, radius: int) -> Tensor:
    ours, side = _tiles(a, b, radius)[0], 2 * radius + 1
    return _as_maps(ours.new_empty(*ours.shape[:2], side, side), a)


@torch.library.custom_op("metroem::local_correlation_backward", mutates_args=())
def _correlation_backward(
    gradient: Tensor, a: Tensor, b: Tensor, radius: int
) -> tuple[Tensor, Tensor]:
    batch, channels, rows, cols = a.shape
    ours, theirs = _tiles(a, b, radius)
    side, tile, width = 2 * radius + 1, ours.shape[1], theirs.shape[3]
    num_tiles = theirs.shape[2]
    missing = num_tiles * tile - cols
    gradient = F.pad(gradient.permute(2, 0, 3, 1), (0, 0, 0, missing))
    gradient = gradient.reshape(len(ours), tile, side, side).to(ours.dtype)
    product = gradient.new_zeros(len(ours), tile, width)
    band = _band(product, side)
    # Sums in float32: a bf16 sum would lose the smaller terms.
    by_a = torch.zeros_like(ours, dtype=torch.float32)
    by_windows = torch.zeros_like(theirs, dtype=torch.float32)
    for row in range(side):
        band.copy_(gradient[:, :, row])
        near = slice(row, row + rows)
        by_a += torch.bmm(product, theirs[near].view(len(ours), width, channels))
        by_near = torch.bmm(product.transpose(1, 2), ours)
        by_windows[near] += by_near.view(theirs[near].shape)
    by_b = by_a.new_zeros(len(theirs), batch, num_tiles * tile + 2 * radius, channels)
    for index in range(num_tiles):
        first = index * tile
        by_b[:, :, first : first + width] += by_windows[:, :, index]
    by_b = by_b[radius : radius + rows, :, radius : radius + cols]
    by_a = by_a.view(rows, batch, -1, channels)[:, :, :cols]
    return _like_maps(by_a, a), _like_maps(by_b, b)


@_correlation_backward.register_fake
def _(gradient: Tensor, a: Tensor, b: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    by_a, by_b = (x.new_empty(x.permute(2, 0, 3, 1).shape) for x in (a, b))
    return _like_maps(by_a, a), _like_maps(by_b, b)


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    a, b, ctx.radius = inputs
    ctx.save_for_backward(a, b)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_correlation_backward(gradient, *ctx.saved_tensors, ctx.radius), None


_correlation.register_autograd(_backward, setup_context=_keep_inputs)


def _tiles(a: Tensor, b: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Split `a` into tiles, (H * B * tiles, tile, C), and `b` into `_windows`."""
    cols, channels = a.shape[-1], a.shape[1]
    tile = min(TILE, cols)
    missing = -(-cols // tile) * tile - cols
    ours = F.pad(a.permute(2, 0, 3, 1), (0, 0, 0, missing))
    return ours.reshape(-1, tile, channels), _windows(b, radius, tile, missing)


def _as_maps(found: Tensor, a: Tensor) -> Tensor:
    """Join tiles: (H * B * tiles, tile, side, side) -> (B, side**2, H, W)."""
    batch, _, rows, cols = a.shape
    found = found.view(rows, batch, -1, found.shape[2] ** 2)
    return found[:, :, :cols].permute(1, 3, 0, 2)


def _like_maps(gradient: Tensor, x: Tensor) -> Tensor:
    """Permute and copy: (H, B, W, C) -> (B, C, H, W), in the dtype of `x`."""
    found = gradient.permute(1, 3, 0, 2)
    return found.to(x.dtype, memory_format=torch.channels_last, copy=True)


def _windows(b: Tensor, radius: int, tile: int, missing: int) -> Tensor:
    """Copy the columns of each tile: (H + 2 radius, B, tiles, tile + 2 radius, C)."""
    padded = F.pad(
        b.permute(2, 0, 3, 1),
        (0, 0, radius, missing + radius, 0, 0, radius, radius),
    )
    return padded.unfold(2, tile + 2 * radius, tile).transpose(3, 4).contiguous()


def _band(product: Tensor, side: int) -> Tensor:
    """View the band (i, i + k) of a product: (N, tile, width) -> (N, tile, side)."""
    num, tile, width = product.shape
    return product.as_strided((num, tile, side), (tile * width, width + 1, 1))
