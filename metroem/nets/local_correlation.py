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
    return _LocalCorrelation.apply(a, b, radius)  # type: ignore[no-any-return]


def window_offsets(radius: int, device: torch.device) -> Tensor:
    """The d of `local_correlation` in order: ((2 * radius + 1)**2, 2), cols, rows."""
    steps = torch.arange(-radius, radius + 1, device=device, dtype=torch.float32)
    rows, cols = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack((cols.flatten(), rows.flatten()), 1)


class _LocalCorrelation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, radius: int) -> Tensor:
        batch, channels, rows, cols = a.shape
        side, tile = 2 * radius + 1, min(TILE, cols)
        num_tiles = -(-cols // tile)
        missing = num_tiles * tile - cols
        ours = F.pad(a.permute(2, 0, 3, 1), (0, 0, 0, missing))
        ours = ours.reshape(-1, tile, channels)
        theirs = _windows(b, radius, tile, missing)
        found = ours.new_empty(len(ours), tile, side, side)
        for row in range(side):
            near = theirs[row : row + rows].view(len(ours), -1, channels)
            product = torch.bmm(ours, near.transpose(1, 2))
            found[:, :, row] = _band(product, side)
        ctx.save_for_backward(ours, theirs)
        ctx.radius, ctx.shape = radius, a.shape
        found = found.view(rows, batch, num_tiles * tile, side**2)
        return found[:, :, :cols].permute(1, 3, 0, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        ours, theirs = ctx.saved_tensors
        radius, (batch, channels, rows, cols) = ctx.radius, ctx.shape
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
        by_a = by_a.view(rows, batch, -1, channels)[:, :, :cols]
        by_b = by_a.new_zeros(
            len(theirs), batch, num_tiles * tile + 2 * radius, channels
        )
        for index in range(num_tiles):
            first = index * tile
            by_b[:, :, first : first + reach] += by_windows[:, :, index]
        by_b = by_b[radius : radius + rows, :, radius : radius + cols]
        by_a, by_b = (g.permute(1, 3, 0, 2).to(ours.dtype) for g in (by_a, by_b))
        return by_a, by_b, None


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
