"""Run the layers of the template `correlation` on large maps, tile by tile.

A layer needs many times the memory of its maps while it runs. Here each layer runs on
one tile after the other, padded by as many pixels as the layer sees. The result equals
that of the whole map, apart from rounding, so there is no seam.

Each layer goes over all tiles before the next one begins. All layers on one tile would
need too much padding: the coarsest level sees more than 700 px of the image.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metroem.geometry.field import pixel_positions, sample
from metroem.models.soft_argmax import POOLS

# Displacements are averaged over blocks, so tiles begin and end where blocks do.
_BLOCK_PX = max(POOLS)


class TileWindow(NamedTuple):
    """One tile of a map: its rows and cols."""

    padded: tuple[slice, slice]  # read by the layer
    core: tuple[slice, slice]  # part of it where the result is that of the whole map

    @property
    def core_in_padded(self) -> tuple[slice, slice]:
        """The core, counted from the start of the padded window."""
        rows, cols = (
            slice(core.start - padded.start, core.stop - padded.start)
            for core, padded in zip(self.core, self.padded, strict=True)
        )
        return rows, cols


class Pair(NamedTuple):
    """The input of a step."""

    src: Tensor  # (B, C, h, w), unit vectors
    tgt: Tensor  # (B, C, h, w), unit vectors
    features: Tensor  # (B, C, h, w), of tgt
    tissue: Tensor  # (B, 1, h, w), fraction of src that has data


class LevelMaps(NamedTuple):
    """The input of all steps of a level, for the whole section."""

    features: Tensor  # (2B, C, h, w), src half and tgt half
    tissue: Tensor  # (B, 1, h, w), fraction of src that has data


def unit_vectors(features: Tensor) -> Tensor:
    """Scale features, (B, C, h, w), to length 1 over the channels, in float32."""
    unit = features.float()
    return unit * (unit.square().sum(1, keepdim=True) + 1e-6).rsqrt()


def tile_windows(
    shape: Sequence[int], side: int, receptive_px: int
) -> Iterator[TileWindow]:
    """Split a map of (H, W) px into tiles, row by row; their cores cover it once.

    Args:
        shape: (H, W).
        side: side of a padded tile, px; larger if one block and its padding need more.
        receptive_px: how far a layer sees on each side of a pixel.
    """
    rows, cols = (_spans(size, side, receptive_px) for size in shape)
    for padded_rows, core_rows in rows:
        for padded_cols, core_cols in cols:
            yield TileWindow((padded_rows, padded_cols), (core_rows, core_cols))


def encode_tiled(encode: Any, side: int, x: Tensor) -> Tensor:
    """Run a `metroem.models.correlation_net.Encoder` tile by tile.

    Args:
        encode: the encoder of a level.
        side: side of a tile, px of the result.
        x: (B, C, H, W), H and W even.

    Returns:
        (B, features, H / 2, W / 2).
    """
    rows, cols = (size // 2 for size in x.shape[-2:])
    whole = None
    for tile in tile_windows((rows, cols), side, encode.receptive_px):
        finer = (slice(2 * s.start, 2 * s.stop) for s in tile.padded)
        whole = _write_core(whole, encode(x[(..., *finer)]), tile, (rows, cols))
    assert whole is not None
    return whole


def search_tiled(
    step: Any,
    side: int,
    maps: LevelMaps,
    field: Tensor | None,
    hidden: Tensor | None,
    *,
    keep_hidden: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a `metroem.models.correlation_net.MatchingStep` tile by tile.

    Args:
        step: a step of the level.
        side: side of a tile, px of the level.
        maps: maps of the level.
        field: field found so far, (B, 2, h, w), pixels of the level.
        hidden: hidden map of the earlier step, of this level or the coarser one.
        keep_hidden: whether to return this step's hidden map; the last one is not used.

    Returns:
        Field, confidence and hidden map (or None) of the whole section.
    """
    rows, cols = maps.features.shape[-2:]
    whole: list[Tensor | None] = [None] * (3 if keep_hidden else 2)
    for tile in tile_windows((rows, cols), side, step.receptive_px):
        tile_field = None if field is None else field[(..., *tile.padded)]
        tile_hidden = None
        if hidden is not None:
            size = rows // hidden.shape[-2]
            coarser = (slice(s.start // size, s.stop // size) for s in tile.padded)
            tile_hidden = hidden[(..., *coarser)]
        found = step.search(_pair(maps, tile_field, tile), tile_field, tile_hidden)
        whole = [
            _write_core(one_whole, part, tile, (rows, cols))
            for one_whole, part in zip(whole, found[: len(whole)], strict=True)
        ]
    return tuple(whole) if keep_hidden else (*whole, None)  # type: ignore[return-value]


def _spans(size: int, side: int, receptive_px: int) -> list[tuple[slice, slice]]:
    """Split one axis: padded window and core of each tile."""
    margin = -(-receptive_px // _BLOCK_PX) * _BLOCK_PX
    max_core = max(side - 2 * margin, _BLOCK_PX)
    blocks = -(-size // _BLOCK_PX)
    num_tiles = -(-size // max_core) if size > side else 1
    step = -(-blocks // num_tiles) * _BLOCK_PX
    spans = []
    for start in range(0, size, step):
        stop = min(start + step, size)
        padded = slice(max(start - margin, 0), min(stop + margin, size))
        spans.append((padded, slice(start, stop)))
    return spans


def _pair(maps: LevelMaps, field: Tensor | None, tile: TileWindow) -> Pair:
    """Crop the input of a step to a tile, src warped by the field."""
    here = (..., *tile.padded)
    src, tgt = maps.features.chunk(2)
    tgt = tgt[here]
    if field is None:
        return Pair(unit_vectors(src[here]), unit_vectors(tgt), tgt, maps.tissue[here])
    corner = [tile.padded[1].start, tile.padded[0].start]
    positions = pixel_positions(field) + field
    positions = positions + positions.new_tensor(corner).view(1, 2, 1, 1)
    warped = _sample_prepared(src, positions, unit_vectors)
    tissue = _sample_prepared(maps.tissue, positions, Tensor.float)
    return Pair(warped, unit_vectors(tgt), tgt, tissue)


def _sample_prepared(
    values: Tensor, positions: Tensor, prepare: Callable[[Tensor], Tensor]
) -> Tensor:
    """Sample a map at positions in its pixels; prepare only the part that is read."""
    rows, cols = values.shape[-2:]
    # All positions beyond the map read the same.
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
    local = positions - positions.new_tensor(corner).view(1, 2, 1, 1)
    return sample(near, local, local)


def _write_core(
    whole: Tensor | None, part: Tensor, tile: TileWindow, shape: tuple[int, int]
) -> Tensor:
    """Write the core of a tile into the whole map, which the first tile creates."""
    if whole is None:
        is_channels_last = not part.is_contiguous() and part.shape[1] > 1
        layout = torch.channels_last if is_channels_last else torch.contiguous_format
        size = (*part.shape[:2], *shape)
        whole = torch.empty(
            size, dtype=part.dtype, device=part.device, memory_format=layout
        )
    whole[(..., *tile.core)] = part[(..., *tile.core_in_padded)]
    return whole
