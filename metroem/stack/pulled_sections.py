"""Read sections of a volume through fields, each stored chunk once.

A field may be thousands of px long and turn the section. Then the bounding box of the
pixels that it leads to may be twice as large as their area, so only the chunks that it
leads to are read.

Positions are computed in float64, where steps between mips are exact. So a pixel gets
the same value in whatever area it is asked for.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metroem.errors import FieldError
from metroem.geometry.field import check_field
from metroem.geometry.grid import Grid
from metroem.io.volume import Volume

# Rows of the target that are sampled at a time.
_BAND_ROWS = 64
# A rectangle of chunks is read at once if it is at most so much larger than the chunks
# of it that are needed, and has at most so many bytes.
_MAX_READ, _MAX_READ_BYTES = 1.15, 2**26
# Tissue of signed grey levels whose mean is 0 becomes this, since 0 means no data.
_NOT_BLANK = 1e-4
# Empty pixels of a window before the first and after the last one.
_BEFORE, _AFTER = 2, 1


@dataclass
class ReadCount:
    """Bytes of a volume that were read, as its chunks are long without compression.

    Attributes:
        read: bytes of all stored chunks that were read.
        needed: bytes of the distinct stored chunks that fields lead to.
    """

    read: int = 0
    needed: int = 0

    def figures(self) -> dict[str, int]:
        """Return both, as the figures of a task."""
        return {"bytes_read": self.read, "bytes_needed": self.needed}


def iter_pulled(
    volume: Volume,
    fields: Mapping[int, tuple[Tensor, Grid]],
    target: Grid,
    count: ReadCount,
) -> Iterator[tuple[int, Tensor]]:
    """Pull an area of sections through fields, interpolating between pixels.

    Pixels are 0 whose nearest source pixel has no data (0, NaN) or lies outside, and
    those beside a vector that is not finite. Others are interpolated between source
    pixels with data only, and are not 0.

    Args:
        volume: the volume to read, with one channel.
        fields: by z, the field, (1, 2, h, w), pull, pixels of its grid, and its grid,
            of any mip. It covers the target and, unless fields end there, one pixel
            more; beyond its border it is continued in a straight line.
        target: the area to make; its mip is read.
        count: what was read is added to it.

    Yields:
        z, in rising order, and (1, 1, H, W) float32, grey levels.

    Raises:
        DatasetError: the volume cannot be read.
        FieldError: a field does not have the shape of its grid, or does not cover the
            target.
    """
    for z, source, window in _iter_windows(volume, fields, target, count):
        pulled = np.zeros(target.shape, np.float32)
        if window is not None:
            if window.image.dtype.kind == "f":
                window.image[~np.isfinite(window.image)] = 0
            for rows, positions in source.bands():
                pulled[rows] = _interpolate(window, positions)
        yield z, torch.from_numpy(pulled)[None, None]


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
        z, in rising order, and (H, W) as stored; 0 outside of the volume and beside
        vectors that are not finite.

    Raises:
        DatasetError, FieldError: as in `iter_pulled`.
    """
    for z, source, window in _iter_windows(volume, fields, target, count):
        pulled = np.zeros(target.shape, volume.pixel_type(target.mip))
        if window is not None:
            for rows, positions in source.bands():
                nearest = np.floor(positions + 0.5)
                index, _ = _index_in(window, nearest)
                pulled[rows] = window.image.ravel().take(index)
        yield z, pulled


class _SourcePositions:
    """Where the pixels of an area lie in a section.

    Args:
        field: (1, 2, h, w), pull, pixels of `grid`.
        grid: grid of the field.
        target: the area.

    Raises:
        FieldError: the field does not have the shape of its grid, or does not cover
            the target.
    """

    def __init__(self, field: Tensor, grid: Grid, target: Grid) -> None:
        check_field(field)
        if tuple(field.shape[-2:]) != grid.shape or not grid.covers(target):
            raise FieldError(
                f"a field of {tuple(field.shape[-2:])} px on {grid} does not cover "
                f"{target}"
            )
        self._grid, self._target = grid, target
        # In a straight line beyond the centres of the outermost pixels.
        self._field = np.pad(
            field[0].double().cpu().numpy(),
            ((0, 0), (1, 1), (1, 1)),
            mode="reflect",
            reflect_type="odd",
        )

    def bands(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield some rows of the target after others, and their positions."""
        num_rows, num_cols = self._target.shape
        for start in range(0, num_rows, _BAND_ROWS):
            rows = np.arange(start, min(start + _BAND_ROWS, num_rows))
            yield slice(start, int(rows[-1]) + 1), self.at(rows, np.arange(num_cols))

    def nodes(self) -> np.ndarray:
        """Compute positions between which all others lie.

        They are those of the centres of the field's pixels inside of the target, and of
        the target's border: between four of them positions are bilinear.

        Returns:
            (2, n, m), as `at` returns them.
        """
        target, grid = self._target, self._grid
        ratio = 2.0 ** (grid.mip - target.mip)
        nodes = []
        for size, length, shift in (
            (target.rows, grid.rows, grid.x - target.x),
            (target.cols, grid.cols, grid.y - target.y),
        ):
            centres = (np.arange(length) + 0.5) * ratio + shift / 2**target.mip - 0.5
            inner = centres[(centres > 0) & (centres < size - 1)]
            nodes.append(np.concatenate([[0], inner, [size - 1]]))
        return self.at(*nodes)

    def at(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """Compute positions.

        Args:
            rows: (n,) rows of the target, not whole ones, too.
            cols: (m,) columns of the target.

        Returns:
            (2, n, m) float64, row and col, pixels of the target's mip, counted from the
            volume's; NaN beside vectors that are NaN.
        """
        target, grid, field = self._target, self._grid, self._field
        ratio = 2.0 ** (target.mip - grid.mip)
        row = (rows + 0.5) * ratio + (target.x - grid.x) / 2**grid.mip + 0.5
        col = (cols + 0.5) * ratio + (target.y - grid.y) / 2**grid.mip + 0.5
        first = np.clip(np.floor(row).astype(int), 0, field.shape[1] - 2)
        weight = (row - first)[:, None]
        field = field[:, first] * (1 - weight) + field[:, first + 1] * weight
        first = np.clip(np.floor(col).astype(int), 0, field.shape[2] - 2)
        weight = col - first
        vectors = field[..., first] * (1 - weight) + field[..., first + 1] * weight
        along_cols, along_rows = vectors / ratio
        return np.stack(
            [
                (rows + (target.x >> target.mip))[:, None] + along_rows,
                cols + (target.y >> target.mip) + along_cols,
            ]
        )


class _Window(NamedTuple):
    """The part of a section that a field leads to.

    Attributes:
        corner: first row and col, pixels of the volume.
        chunks: bool, a row and a column of chunks each; True: the field leads there.
        image: (h + 3, w + 3) as stored, with empty pixels around it.
    """

    corner: tuple[int, int]
    chunks: np.ndarray
    image: np.ndarray


@dataclass(frozen=True)
class _Chunks:
    """The chunks of a mip.

    Attributes:
        edges: first pixel of each row of chunks, and the end of the last one; the same
            of columns.
    """

    edges: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, volume: Volume, mip: int) -> "_Chunks":
        """Find the chunks of a volume."""
        _, sizes = volume.chunk_layout(mip)
        edges = [
            np.append(np.arange(low, high, size), high)
            for (low, high), size in zip(volume.bounds_of(mip), sizes, strict=True)
        ]
        return cls((edges[0], edges[1]))

    def num_pixels(self, chosen: np.ndarray) -> int:
        """Count the pixels of chunks, bool of each row and column of chunks."""
        heights, widths = map(np.diff, self.edges)
        return int(heights @ chosen @ widths)

    def grid(self, mip: int, rows: slice, cols: slice) -> Grid:
        """Return the area of a rectangle of chunks."""
        (x, x_end), (y, y_end) = (
            (int(edges[of.start]), int(edges[of.stop]))
            for edges, of in zip(self.edges, (rows, cols), strict=True)
        )
        return Grid(mip, x << mip, y << mip, x_end - x, y_end - y)


def _iter_windows(
    volume: Volume,
    fields: Mapping[int, tuple[Tensor, Grid]],
    target: Grid,
    count: ReadCount,
) -> Iterator[tuple[int, _SourcePositions, _Window | None]]:
    """Read the part of each section that its field leads to, a slab at a time.

    Yields:
        z, positions, and the part that they lie in, None if it is outside.
    """
    if not fields:
        return
    chunks = _Chunks.of(volume, target.mip)
    for slab in volume.slabs(target.mip, sorted(fields)):
        sources = {z: _SourcePositions(*fields[z], target) for z in slab if z in fields}
        windows = {
            z: _find_window(source, chunks, volume.pixel_type(target.mip))
            for z, source in sources.items()
        }
        _read_windows(volume, target.mip, slab, chunks, windows, count)
        for z, source in sources.items():
            yield z, source, windows.pop(z)


def _find_window(
    source: _SourcePositions, chunks: _Chunks, dtype: np.dtype
) -> _Window | None:
    """Find the chunks that positions lie in, and make an empty image for them."""
    nodes = source.nodes()
    corners = nodes[:, :-1, :-1], nodes[:, :-1, 1:], nodes[:, 1:, :-1], nodes[:, 1:, 1:]
    low, high = np.minimum.reduce(corners), np.maximum.reduce(corners)
    starts, ends = (np.array([edges[at] for edges in chunks.edges]) for at in (0, -1))
    is_near = (high > starts[:, None, None] - 1) & (low < ends[:, None, None])
    is_near = is_near.all(0)
    if not is_near.any():
        return None
    # Interpolation reads the pixels on both sides.
    first = np.maximum(np.floor(low[:, is_near]), starts[:, None]).astype(int)
    last = np.minimum(np.ceil(high[:, is_near]), ends[:, None] - 1).astype(int)
    spans = [
        [np.searchsorted(edges, at[axis], side="right") - 1 for at in (first, last)]
        for axis, edges in enumerate(chunks.edges)
    ]
    # Sums along both axes fill the rectangles whose corners are marked.
    (row, row_last), (col, col_last) = spans
    marks = np.zeros([len(edges) for edges in chunks.edges], int)
    np.add.at(marks, (row, col), 1)
    np.add.at(marks, (row_last + 1, col), -1)
    np.add.at(marks, (row, col_last + 1), -1)
    np.add.at(marks, (row_last + 1, col_last + 1), 1)
    chosen = marks.cumsum(0).cumsum(1)[:-1, :-1] > 0
    corner, end = first.min(1), last.max(1) + 1
    shape = end - corner + _BEFORE + _AFTER
    return _Window(
        (int(corner[0]), int(corner[1])), chosen, np.zeros(tuple(shape), dtype)
    )


def _read_windows(
    volume: Volume,
    mip: int,
    slab: range,
    chunks: _Chunks,
    windows: Mapping[int, _Window | None],
    count: ReadCount,
) -> None:
    """Fill the windows of a slab, reading each chunk once."""
    masks = [window.chunks for window in windows.values() if window is not None]
    if not masks:
        return
    needed = np.logical_or.reduce(masks)
    layer = volume.layer_around(mip, slab.start)
    levels = mip - volume.source_mip(mip)
    pixel_bytes = len(layer) * volume.dtype.itemsize << 2 * levels
    count.needed += chunks.num_pixels(needed) * pixel_bytes
    _, (rows, cols) = volume.chunk_layout(mip)
    for rectangle in _split(needed, _MAX_READ_BYTES // (rows * cols * pixel_bytes)):
        grid = chunks.grid(mip, *rectangle)
        count.read += grid.rows * grid.cols * pixel_bytes
        layers = volume.read(grid, slab)[:, 0]
        for z, window in windows.items():
            if window is not None:
                _paste(layers[z - slab.start], grid, window)


def _split(needed: np.ndarray, most: int) -> list[tuple[slice, slice]]:
    """Split the chunks that are needed into rectangles without much else in them.

    Args:
        needed: bool, a row and a column of chunks each.
        most: number of chunks of a rectangle; a single chunk is always allowed.
    """
    rows, cols = (np.flatnonzero(needed.any(axis)) for axis in (1, 0))
    if not len(rows):
        return []
    row, col = int(rows[0]), int(cols[0])
    inner = needed[row : int(rows[-1]) + 1, col : int(cols[-1]) + 1]
    if inner.size <= max(most, 1) and inner.size <= _MAX_READ * inner.sum():
        height, width = inner.shape
        return [(slice(row, row + height), slice(col, col + width))]
    (by_row, row_cut), (by_col, col_cut) = _best_cut(inner), _best_cut(inner.T)
    if by_row <= by_col:
        parts = [(0, 0, inner[:row_cut]), (row_cut, 0, inner[row_cut:])]
    else:
        parts = [(0, 0, inner[:, :col_cut]), (0, col_cut, inner[:, col_cut:])]
    return [
        (
            slice(row + down + one.start, row + down + one.stop),
            slice(col + right + other.start, col + right + other.stop),
        )
        for down, right, part in parts
        for one, other in _split(part, most)
    ]


def _best_cut(needed: np.ndarray) -> tuple[tuple[int, int], int]:
    """Find between which rows to cut, so that the two bounding boxes are small.

    Returns:
        The area of both boxes and how far the cut is from the middle, to be compared;
        and the number of rows before the cut.
    """
    num_rows, num_cols = needed.shape
    if num_rows < 2:
        return (2 * needed.size, 0), 0
    is_used = needed.any(1)
    first = np.where(is_used, needed.argmax(1), num_cols)
    last = np.where(is_used, num_cols - needed[:, ::-1].argmax(1), 0)
    before = np.maximum.accumulate(last) - np.minimum.accumulate(first)
    after = np.maximum.accumulate(last[::-1]) - np.minimum.accumulate(first[::-1])
    cuts = np.arange(1, num_rows)
    areas = before[:-1] * cuts + after[::-1][1:] * (num_rows - cuts)
    from_middle = np.abs(2 * cuts - num_rows)
    best = int(np.lexsort((from_middle, areas))[0])
    return (int(areas[best]), int(from_middle[best])), int(cuts[best])


def _paste(layer: np.ndarray, grid: Grid, window: _Window) -> None:
    """Copy what was read of a section into its window."""
    height, width = (size - _BEFORE - _AFTER for size in window.image.shape)
    row, col = window.corner
    x, y = grid.x >> grid.mip, grid.y >> grid.mip
    low, high = max(x, row), min(x + grid.rows, row + height)
    left, right = max(y, col), min(y + grid.cols, col + width)
    if low < high and left < right:
        window.image[
            low - row + _BEFORE : high - row + _BEFORE,
            left - col + _BEFORE : right - col + _BEFORE,
        ] = layer[low - x : high - x, left - y : right - y]


def _index_in(window: _Window, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the pixels of a window that positions lie in.

    Args:
        window: the window.
        positions: (2, n, m) float64, row and col, pixels of the volume.

    Returns:
        (n, m) index into the flat image of the pixel at or before the position along
        both axes, an empty one for positions outside; and (2, n, m) float64, how far
        the position is from its centre, 0 to 1.
    """
    corner = np.array(window.corner, np.float64)[:, None, None]
    ends = np.array(window.image.shape)[:, None, None] - _BEFORE - _AFTER
    places = positions - corner
    with np.errstate(invalid="ignore"):  # NaN lies outside
        is_inside = ((places >= -1) & (places < ends)).all(0)
    places = np.where(is_inside, places, -_BEFORE)
    first = np.floor(places)
    row, col = first.astype(np.intp) + _BEFORE
    return row * window.image.shape[1] + col, places - first


def _interpolate(window: _Window, positions: np.ndarray) -> np.ndarray:
    """Interpolate an image between its pixels with data; see `iter_pulled`.

    Args:
        window: the image.
        positions: (2, n, m) float64, row and col, pixels of the volume.

    Returns:
        (n, m) float32.
    """
    index, fractions = _index_in(window, positions)
    down, right = fractions.astype(np.float32)
    up, left = 1 - down, 1 - right
    flat, stride = window.image.ravel(), window.image.shape[1]
    total = np.zeros(index.shape, np.float32)
    tissue = np.zeros(index.shape, np.float32)
    nearest = np.zeros(index.shape, bool)
    for step, along_rows, along_cols, is_nearest in (
        (0, up, left, (down < 0.5) & (right < 0.5)),
        (1, up, right, (down < 0.5) & (right >= 0.5)),
        (stride, down, left, (down >= 0.5) & (right < 0.5)),
        (stride + 1, down, right, (down >= 0.5) & (right >= 0.5)),
    ):
        values = flat.take(index + step).astype(np.float32)
        has_data = values != 0
        weight = along_rows * along_cols
        total += weight * values
        tissue += weight * has_data
        nearest |= is_nearest & has_data
    # The nearest pixel has at least a quarter of the weight.
    mean = total / np.maximum(tissue, 0.2)
    return np.where(nearest, np.where(mean == 0, np.float32(_NOT_BLANK), mean), 0)
