"""Layers of the network of the template `correlation`, shown a map tile by tile.

What a layer keeps while it works takes many times the memory of its maps. Here it
works on one tile at a time, with as much around it as the layer sees: what it gives
is what the whole map gives, but for rounding. So there is no seam, whatever is done
with the field later. All levels in turn on each tile would see too far for that:
the coarsest sees more than 700 px of the image.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metroem.geometry.field import pixel_positions, sample
from metroem.models.soft_argmax import POOLS

# Votes are pooled over blocks: tiles begin and end where blocks do.
_BLOCK_PX = max(POOLS)


class TileWindow(NamedTuple):
    """One tile of a map: rows and cols."""

    shown: tuple[slice, slice]  # to the layer
    kept: tuple[slice, slice]  # those of them that the layer gives as for the whole

    @property
    def inner(self) -> tuple[slice, slice]:
        """What is kept, counted from where what is shown begins."""
        rows, cols = (
            slice(kept.start - shown.start, kept.stop - shown.start)
            for kept, shown in zip(self.kept, self.shown, strict=True)
        )
        return rows, cols


class Pair(NamedTuple):
    """What a step looks at."""

    src: Tensor  # (B, C, h, w), unit vectors
    tgt: Tensor  # (B, C, h, w), unit vectors
    features: Tensor  # (B, C, h, w), of tgt
    tissue: Tensor  # (B, 1, h, w), share of src that has data


class LevelMaps(NamedTuple):
    """What the steps of a level look at, of the whole section."""

    features: Tensor  # (2B, C, h, w), src half and tgt half
    tissue: Tensor  # (B, 1, h, w), share of src that has data


def unit_vectors(features: Tensor) -> Tensor:
    """(B, C, h, w) -> the same in float32, of length 1 over the channels."""
    unit = features.float()
    return unit * (unit.square().sum(1, keepdim=True) + 1e-6).rsqrt()


def cuts(shape: Sequence[int], side: int, reach: int) -> Iterator[TileWindow]:
    """The tiles of a map of (H, W) px, row by row; what they keep covers it once.

    Args:
        shape: (H, W).
        side: of a tile, px, unless a block and `reach` around it take more.
        reach: how far a layer sees, px.
    """
    rows, cols = (_spans(size, side, reach) for size in shape)
    for shown_rows, kept_rows in rows:
        for shown_cols, kept_cols in cols:
            yield TileWindow((shown_rows, shown_cols), (kept_rows, kept_cols))


def encode_by_tiles(encode: Any, side: int, x: Tensor) -> Tensor:
    """`metroem.models.correlation_net.Encoder`, tile by tile.

    Args:
        encode: the encoder of a level.
        side: of a tile, px of what it gives.
        x: (B, C, H, W), H and W even.

    Returns:
        (B, features, H / 2, W / 2).
    """
    rows, cols = (size // 2 for size in x.shape[-2:])
    whole = None
    for cut in cuts((rows, cols), side, encode.reach):
        twice = (slice(2 * s.start, 2 * s.stop) for s in cut.shown)
        whole = _put(whole, encode(x[(..., *twice)]), cut, (rows, cols))
    assert whole is not None
    return whole


def search_by_tiles(
    step: Any,
    side: int,
    maps: LevelMaps,
    field: Tensor | None,
    hidden: Tensor | None,
    *,
    keep_hidden: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`metroem.models.correlation_net.MatchingStep`, tile by tile.

    Args:
        step: of the level.
        side: of a tile, px of the level.
        maps: of the level.
        field: found so far, (B, 2, h, w), pixels of the level.
        hidden: of the step before, at this level or the coarser one.
        keep_hidden: return that of this step, too; the last one's is of no use.

    Returns:
        What the step returns for the whole.
    """
    rows, cols = maps.features.shape[-2:]
    whole: list[Tensor | None] = [None] * (3 if keep_hidden else 2)
    for cut in cuts((rows, cols), side, step.reach):
        part = None if field is None else field[(..., *cut.shown)]
        known = None
        if hidden is not None:
            size = rows // hidden.shape[-2]
            less = (slice(s.start // size, s.stop // size) for s in cut.shown)
            known = hidden[(..., *less)]
        found = step.search(_pair(maps, part, cut), part, known)
        whole = [
            _put(all_, one, cut, (rows, cols))
            for all_, one in zip(whole, found[: len(whole)], strict=True)
        ]
    return tuple(whole) if keep_hidden else (*whole, None)  # type: ignore[return-value]


def _spans(size: int, side: int, reach: int) -> list[tuple[slice, slice]]:
    """What is shown, and what is kept of it, along one axis."""
    around = -(-reach // _BLOCK_PX) * _BLOCK_PX
    most = max(side - 2 * around, _BLOCK_PX)
    blocks = -(-size // _BLOCK_PX)
    num_tiles = -(-size // most) if size > side else 1
    step = -(-blocks // num_tiles) * _BLOCK_PX
    spans = []
    for start in range(0, size, step):
        stop = min(start + step, size)
        shown = slice(max(start - around, 0), min(stop + around, size))
        spans.append((shown, slice(start, stop)))
    return spans


def _pair(maps: LevelMaps, field: Tensor | None, cut: TileWindow) -> Pair:
    """What a step is shown of a tile, src as the field moves it."""
    here = (..., *cut.shown)
    src, tgt = maps.features.chunk(2)
    tgt = tgt[here]
    if field is None:
        return Pair(unit_vectors(src[here]), unit_vectors(tgt), tgt, maps.tissue[here])
    corner = [cut.shown[1].start, cut.shown[0].start]
    positions = pixel_positions(field) + field
    positions = positions + positions.new_tensor(corner).view(1, 2, 1, 1)
    moved = _read(src, positions, unit_vectors)
    tissue = _read(maps.tissue, positions, Tensor.float)
    return Pair(moved, unit_vectors(tgt), tgt, tissue)


def _read(
    values: Tensor, positions: Tensor, prepare: Callable[[Tensor], Tensor]
) -> Tensor:
    """A map at positions in its pixels, prepared no farther around than needed."""
    rows, cols = values.shape[-2:]
    # Beyond the map all reads the same.
    size = positions.new_tensor([cols, rows]).view(1, 2, 1, 1)
    positions = torch.minimum(positions.nan_to_num(nan=-2.0).clamp(min=-2.0), size + 1)
    low = positions.amin((0, 2, 3)).floor().long() - 1
    high = positions.amax((0, 2, 3)).ceil().long() + 2
    box, corner = [], []
    for axis, length in ((1, rows), (0, cols)):
        start = min(max(int(low[axis]), 0), length - 1)
        box.append(slice(start, min(max(int(high[axis]), start + 1), length)))
        corner.insert(0, start)
    near = prepare(values[(..., *box)])
    moved = positions - positions.new_tensor(corner).view(1, 2, 1, 1)
    return sample(near, moved, moved)


def _put(
    whole: Tensor | None, part: Tensor, cut: TileWindow, shape: tuple[int, int]
) -> Tensor:
    """Write what a tile keeps into the map of the whole, made at the first tile."""
    if whole is None:
        last = not part.is_contiguous() and part.shape[1] > 1
        layout = torch.channels_last if last else torch.contiguous_format
        size = (*part.shape[:2], *shape)
        whole = torch.empty(
            size, dtype=part.dtype, device=part.device, memory_format=layout
        )
    whole[(..., *cut.kept)] = part[(..., *cut.inner)]
    return whole
