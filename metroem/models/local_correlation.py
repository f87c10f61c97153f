"""How alike each place of one map is to a window of places of another.

Plain torch would read the second map once per place of the window, or copy it as
often. Here rows are cut into tiles, and one matrix product a row of the window
compares all columns of a tile with all that its windows reach; of the product
only the diagonals that lie within the window are kept.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Columns compared in one product: longer tiles compute more that is not kept
# (fastest of 16, 32, 64 on an Intel Xeon with AMX, 2026-11).
TILE = 32


def local_correlation(a: Tensor, b: Tensor, radius: int) -> Tensor:
    """Sum over the channels of a(p) * b(p + d) for each d of a window.

    Args:
        a: (B, C, H, W), any floating dtype.
        b: (B, C, H, W), the same dtype.
        radius: of the square window, pixels.

    Returns:
        (B, (2 * radius + 1)**2, H, W) in channels-last memory, in the dtype of
        `a`: d runs over rows first, then cols, from -radius to radius, as in
        `window_offsets`. Places outside of `b` count as 0.
    """
    return _correlation(a, b, radius)  # type: ignore[no-any-return]


def window_offsets(radius: int, device: torch.device) -> Tensor:
    """The d of `local_correlation` in order: ((2 * radius + 1)**2, 2), cols, rows."""
    steps = torch.arange(-radius, radius + 1, device=device, dtype=torch.float32)
    rows, cols = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack((cols.flatten(), rows.flatten()), 1)


# Operations of their own, which torch.compile calls as they are: written out, with a
# product for each row of a window, each took it half a minute, not 3 s (torch 2.13,
# 2026-11).
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
    side, tile, reach = 2 * radius + 1, ours.shape[1], theirs.shape[3]
    num_tiles = theirs.shape[2]
    missing = num_tiles * tile - cols
    gradient = F.pad(gradient.permute(2, 0, 3, 1), (0, 0, 0, missing))
    gradient = gradient.reshape(len(ours), tile, side, side).to(ours.dtype)
    product = gradient.new_zeros(len(ours), tile, reach)
    band = _band(product, side)
    # Sums in float32: a bf16 sum would lose the smaller terms.
    by_a = torch.zeros_like(ours, dtype=torch.float32)
    by_windows = torch.zeros_like(theirs, dtype=torch.float32)
    for row in range(side):
        band.copy_(gradient[:, :, row])
        near = slice(row, row + rows)
        by_a += torch.bmm(product, theirs[near].view(len(ours), reach, channels))
        by_near = torch.bmm(product.transpose(1, 2), ours)
        by_windows[near] += by_near.view(theirs[near].shape)
    by_b = by_a.new_zeros(len(theirs), batch, num_tiles * tile + 2 * radius, channels)
    for index in range(num_tiles):
        first = index * tile
        by_b[:, :, first : first + reach] += by_windows[:, :, index]
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
    """(H * B * tiles, tile, C) of `a`, and the `_windows` of `b`."""
    cols, channels = a.shape[-1], a.shape[1]
    tile = min(TILE, cols)
    missing = -(-cols // tile) * tile - cols
    ours = F.pad(a.permute(2, 0, 3, 1), (0, 0, 0, missing))
    return ours.reshape(-1, tile, channels), _windows(b, radius, tile, missing)


def _as_maps(found: Tensor, a: Tensor) -> Tensor:
    """(H * B * tiles, tile, side, side) -> (B, side**2, H, W), for the shape of `a`."""
    batch, _, rows, cols = a.shape
    found = found.view(rows, batch, -1, found.shape[2] ** 2)
    return found[:, :, :cols].permute(1, 3, 0, 2)


def _like_maps(gradient: Tensor, x: Tensor) -> Tensor:
    """(H, B, W, C) -> (B, C, H, W), in the dtype of `x`, its memory its own."""
    found = gradient.permute(1, 3, 0, 2)
    return found.to(x.dtype, memory_format=torch.channels_last, copy=True)


def _windows(b: Tensor, radius: int, tile: int, missing: int) -> Tensor:
    """(H + 2 * radius, B, tiles, tile + 2 * radius, C): what each tile may see."""
    padded = F.pad(
        b.permute(2, 0, 3, 1),
        (0, 0, radius, missing + radius, 0, 0, radius, radius),
    )
    return padded.unfold(2, tile + 2 * radius, tile).transpose(3, 4).contiguous()


def _band(product: Tensor, side: int) -> Tensor:
    """View (N, tile, side) of (N, tile, tile + side - 1): entries (i, i + k)."""
    num, tile, reach = product.shape
    return product.as_strided((num, tile, side), (tile * reach, reach + 1, 1))
