"""Read sections of a volume through fields, each stored chunk once.

A field may be thousands of px long and turn the section. Only the chunks that it leads
to are read: for each row of chunks, from the first to the last one that is needed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metroem.errors import UsageError
from metroem.geometry.field import pixel_positions, resample_field, sample
from metroem.geometry.grid import Grid
from metroem.io.volume import Volume

# Least weight of tissue around a position whose nearest pixel is tissue: a quarter,
# less what rounding takes.
_MIN_WEIGHT = 0.2


@dataclass
class ReadCount:
    """Bytes that were read of a volume.

    Attributes:
        read: bytes of all stored chunks that were read.
        needed: bytes of the stored chunks that pulled pixels lie in, each once a task.
    """

    read: int = 0
    needed: int = 0

    def figures(self) -> dict[str, int]:
        """Return both, as the figures of a task."""
        return {"bytes_read": self.read, "bytes_needed": self.needed}


class _Window(NamedTuple):
    """The part of a section that a field leads to."""

    positions: Tensor  # (1, 2, H, W) float32: col and row, less `offset`
    offset: tuple[int, int]  # col and row, pixels of the target's mip
    chunks: Mapping[int, tuple[int, int]]  # by row of chunks, first and last col


def iter_pulled(
    volume: Volume,
    fields: Mapping[int, tuple[Tensor, Grid]],
    target: Grid,
    count: ReadCount,
) -> Iterator[tuple[int, Tensor]]:
    """Pull an area of sections through fields, interpolating between pixels.

    Pixels whose nearest source pixel has no data, or lies outside, are 0. Others are
    interpolated between pixels with data only.

    Args:
        volume: the volume to read, with one channel.
        fields: by z, the field, (1, 2, h, w), pull, pixels of its grid, and its grid,
            which covers the target.
        target: the area to make; its mip is read.
        count: what was read is added to it.

    Yields:
        z, in rising order, and (1, 1, H, W) float32, grey levels.

    Raises:
        DatasetError: the volume cannot be read.
        UsageError: a field does not cover the target.
    """
    for z, image, positions in _iter_read(volume, fields, target, count):
        if image is None:
            yield z, torch.zeros(1, 1, *target.shape)
            continue
        grey = torch.from_numpy(image.astype(np.float32))[None, None]
        grey = torch.where(torch.isfinite(grey), grey, 0.0)
        tissue = (grey != 0).float()
        values, weight = sample(torch.cat((grey, tissue), 1), grey, positions).split(
            1, 1
        )
        is_tissue = sample(tissue, grey, positions, mode="nearest") > 0
        safe = weight.clamp(min=_MIN_WEIGHT)
        yield z, torch.where(is_tissue, values / safe, 0.0)


def iter_nearest(
    volume: Volume,
    fields: Mapping[int, tuple[Tensor, Grid]],
    target: Grid,
    count: ReadCount,
) -> Iterator[tuple[int, np.ndarray]]:
    """Pull an area of sections through fields, taking the nearest pixel.

    Args:
        volume: as in `iter_pulled`; of any type, for example labels.
        fields: as in `iter_pulled`.
        target: as in `iter_pulled`.
        count: as in `iter_pulled`.

    Yields:
        z, in rising order, and (H, W) in the type of the volume, 0 outside of it.

    Raises:
        DatasetError, UsageError: as in `iter_pulled`.
    """
    for z, image, positions in _iter_read(volume, fields, target, count):
        pulled = np.zeros(target.shape, volume.dtype)
        if image is not None:
            cols, rows = torch.floor(positions[0] + 0.5).long().numpy()
            inside = (rows >= 0) & (cols >= 0)
            inside &= (rows < image.shape[0]) & (cols < image.shape[1])
            pulled[inside] = image[rows[inside], cols[inside]]
        yield z, pulled


def _iter_read(
    volume: Volume,
    fields: Mapping[int, tuple[Tensor, Grid]],
    target: Grid,
    count: ReadCount,
) -> Iterator[tuple[int, np.ndarray | None, Tensor]]:
    """Read the part of each section that its field leads to.

    Yields:
        z, the part, (h, w) as stored, or None if there is nothing, and the positions
        in it, (1, 2, H, W), col and row.
    """
    corner, size = volume.chunk_layout(target.mip)
    for slab in volume.slabs(target.mip, sorted(fields)):
        windows = {
            z: _find_window(volume, *fields[z], target, (corner, size))
            for z in slab
            if z in fields
        }
        rows: dict[int, tuple[int, int]] = {}
        for window in windows.values():
            for row, (first, last) in window.chunks.items():
                low, high = rows.get(row, (first, last))
                rows[row] = min(low, first), max(high, last)
            pixels = sum(last + 1 - first for first, last in window.chunks.values())
            count.needed += pixels * size[0] * size[1] * volume.dtype.itemsize
        layers, begin = _read_chunks(volume, rows, slab, target.mip, (corner, size))
        if layers is not None:
            count.read += layers[1]
        for z, window in windows.items():
            if layers is None or not window.chunks:
                yield z, None, window.positions
                continue
            shift = [o - b for o, b in zip(window.offset, begin, strict=True)]
            moved = window.positions + torch.tensor(shift, dtype=torch.float32).view(
                1, 2, 1, 1
            )
            yield z, layers[0][z - slab.start], moved


_Layout = tuple[tuple[int, int], tuple[int, int]]  # corner and size of chunks


def _find_window(
    volume: Volume, field: Tensor, grid: Grid, target: Grid, layout: _Layout
) -> _Window:
    """Find where a field leads to, and the chunks that are there."""
    if not grid.covers(target):
        raise UsageError(f"a field on {grid} does not cover {target}")
    scale = 2.0 ** (grid.mip - target.mip)
    # The mean is taken out in whole pixels, since float32 rounds long displacements.
    mean = [round(float(one) * scale) for one in field.double().mean((0, 2, 3))]
    offset_field = torch.tensor(mean, dtype=torch.float64).view(1, 2, 1, 1) / scale
    rest = resample_field((field.double() - offset_field).float(), grid, target)
    positions = pixel_positions(rest) + rest
    offset = mean[0] + (target.y >> target.mip), mean[1] + (target.x >> target.mip)
    (row0, col0), (rows, cols) = layout
    x, y = volume.bounds_of(target.mip)
    # Bilinear interpolation reads the next pixel, too.
    at_row = positions[0, 1].double().floor().long() + offset[1]
    at_col = positions[0, 0].double().floor().long() + offset[0]
    near = (at_row >= x[0] - 1) & (at_row < x[1]) & (at_col >= y[0] - 1)
    near &= at_col < y[1]
    at_row, at_col = at_row[near], at_col[near]
    low_row = torch.div(at_row.clamp(min=x[0]) - row0, rows, rounding_mode="floor")
    high_row = (at_row + 1).clamp(max=x[1] - 1) - row0
    high_row = torch.div(high_row, rows, rounding_mode="floor")
    chunks: dict[int, tuple[int, int]] = {}
    for row in torch.cat((low_row.unique(), high_row.unique())).unique().tolist():
        of_row = at_col[(low_row == row) | (high_row == row)]
        first = max(int(of_row.min()), y[0]) - col0
        last = min(int(of_row.max()) + 1, y[1] - 1) - col0
        chunks[row] = first // cols, last // cols
    return _Window(positions, offset, chunks)


def _read_chunks(
    volume: Volume,
    rows: Mapping[int, tuple[int, int]],
    slab: range,
    mip: int,
    layout: _Layout,
) -> tuple[tuple[np.ndarray, int] | None, tuple[int, int]]:
    """Read rows of chunks into one array.

    Returns:
        (n, h, w) as stored, 0 where nothing was read, and the bytes that were read;
        None if there are none. And col and row of its first pixel.
    """
    if not rows:
        return None, (0, 0)
    (row0, col0), (num_rows, num_cols) = layout
    x, y = volume.bounds_of(mip)
    first_col = min(first for first, _ in rows.values())
    last_col = max(last for _, last in rows.values())
    top, bottom = row0 + min(rows) * num_rows, row0 + (max(rows) + 1) * num_rows
    left, right = col0 + first_col * num_cols, col0 + (last_col + 1) * num_cols
    top, bottom = max(top, x[0]), min(bottom, x[1])
    left, right = max(left, y[0]), min(right, y[1])
    layers = np.zeros((len(slab), bottom - top, right - left), volume.dtype)
    num_bytes = 0
    for row, (first, last) in rows.items():
        low = max(row0 + row * num_rows, x[0])
        high = min(row0 + (row + 1) * num_rows, x[1])
        begin = max(col0 + first * num_cols, y[0])
        end = min(col0 + (last + 1) * num_cols, y[1])
        strip = Grid(mip, low << mip, begin << mip, high - low, end - begin)
        read = volume.read(strip, slab)[:, 0]
        num_bytes += read.size * volume.dtype.itemsize
        layers[:, low - top : high - top, begin - left : end - left] = read
    return (layers, num_bytes), (left, top)
