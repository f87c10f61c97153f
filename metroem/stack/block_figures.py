"""Measure one block of an aligned volume: figures of each section, small, JSON-able.

A block's figures are counts, so that those of many blocks can be added; `check_summary`
does so.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from metroem.geometry.field import jacobian_determinant
from metroem.geometry.grid import Grid
from metroem.io.field_volume import FieldVolume
from metroem.io.image_volume import ImageVolume
from metroem.io.volume import Volume, iter_sections
from metroem.stack.check_plan import PLACE_PX
from metroem.stack.histogram import Histogram
from metroem.stack.jumps import WINDOW_PX
from metroem.stack.neighbour_scores import (
    LOOK_BACK,
    SECTIONS_BEFORE,
    NeighbourScores,
    score_sections,
)
from metroem.stack.tasks import Block

# Widths of bins: figures are off by at most half of it.
CORRELATION_STEP, PX_STEP = 0.005, 0.02
_PLACE_WINDOWS = PLACE_PX // WINDOW_PX  # along each side of a place


class ImageBlock:
    """Reads a block of a volume, and sections before it, each chunk once.

    Attributes:
        bytes_read: bytes of the stored chunks that are read, decoded.
        bytes_needed: bytes of the block itself.
    """

    def __init__(self, volume: ImageVolume, block: Block) -> None:
        self._volume, self._block = volume, block
        held, sections = volume.sections_at(volume.mips[0]), block.sections
        start = max(sections.start - SECTIONS_BEFORE, held.start)
        self._sections = range(min(start, sections.start), sections.stop)
        self._held = [z for z in self._sections if z in held]
        self.bytes_read, self.bytes_needed = _count_bytes(
            volume, block.grid, self._held, sections
        )

    def scores(self) -> Iterator[NeighbourScores]:
        """Compare the sections of the block with those before them."""
        return score_sections(self._images(), self._block.sections.start)

    def _images(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield z and (H, W) as stored; 0 where the volume has no section."""
        grid = self._block.grid
        stored = iter_sections(self._volume, dict.fromkeys(self._held, grid))
        for z in self._sections:
            yield z, next(stored)[1][0] if z in self._held else np.zeros(grid.shape)


class FieldBlock:
    """Reads the fields of a block, and counts folds.

    Pixels of the field belong to the block in which they begin. Two more are read in
    front of them, for differences: so a fold at the border of two blocks is counted
    once.

    Attributes:
        bytes_read: bytes of the stored chunks that are read, decoded.
        bytes_needed: bytes of the block itself.
    """

    def __init__(self, field: FieldVolume, block: Block) -> None:
        self._field, self._sections = field, block.sections
        mip, grid = field.mip, block.grid
        x, y = (-(-at >> mip) - 2 for at in (grid.x, grid.y))
        x_end, y_end = (-(-at >> mip) for at in grid.end)
        rows, cols = x_end - x, y_end - y
        self._window = field.volume.clip(Grid(mip, x << mip, y << mip, rows, cols))
        zs = list(block.sections)
        self.bytes_read = self.bytes_needed = 0
        if self._window is not None:
            self.bytes_read, _ = _count_bytes(field.volume, self._window, zs, zs)
            _, self.bytes_needed = _count_bytes(field.volume, grid.cover(mip), zs, zs)

    def counts(self) -> Iterator[dict[str, Any]]:
        """Count for each section which signs determinants have.

        A placement may mirror a section: then all of its determinants are negative. So
        folds have the rarer sign, which only the whole section tells.

        Yields:
            "signs": number of negative, zero and positive determinants; "still": pixels
            that are not moved; "at": x and y of a pixel of the rarer sign, mip-0
            pixels, None if there is none.
        """
        window = self._window
        if window is None or min(window.shape) < 3:
            for _ in self._sections:
                yield {"signs": [0, 0, 0], "still": 0, "at": None}
            return
        windows = dict.fromkeys(self._sections, window)
        for _, stored in iter_sections(self._field.volume, windows):
            yield self._count(stored, window)

    def _count(self, stored: np.ndarray, window: Grid) -> dict[str, Any]:
        """Count the signs of one section."""
        vectors = self._field.displacements(stored) / (1 << self._field.mip)
        field = torch.from_numpy(np.ascontiguousarray(vectors))[None]
        determinants = jacobian_determinant(field)[0, 0].numpy()
        is_known = np.isfinite(determinants)
        # Where nothing is stored, vectors are 0; the step at the border is no fold.
        moves = (stored != 0).any(0)
        moves = moves[1:-1, 1:-1] & (
            moves[:-2, 1:-1] & moves[2:, 1:-1] & moves[1:-1, :-2] & moves[1:-1, 2:]
        )
        negative, zero, positive = (
            mask & is_known & moves
            for mask in (determinants < 0, determinants == 0, determinants > 0)
        )
        rarer = min(negative, positive, key=np.count_nonzero)
        folds = np.argwhere(rarer | zero)
        at = None
        if len(folds):
            distance = np.square(folds - np.median(folds, axis=0)).sum(1)
            row, col = (int(index) + 1 for index in folds[distance.argmin()])
            x, y = window.crop(row, col, 1, 1).center
            at = {"x": int(x), "y": int(y)}
        return {
            "signs": [int(mask.sum()) for mask in (negative, zero, positive)],
            "still": int((is_known & ~moves).sum()),
            "at": at,
        }


def count_figures(scores: NeighbourScores) -> dict[str, Any]:
    """Count what a section of a block has, for `check_summary`.

    Returns:
        "pixels", "tissue": pixels in all, and with data; "windows": number of windows
        that were compared with the section 0 (none), 1, 2 ... before; "lost", "alone":
        numbers of windows; "correlation", "jump", "jitter": pairs of a `Histogram`.
    """
    windows = np.bincount(scores.against.ravel(), minlength=LOOK_BACK + 1)
    found: dict[str, Any] = {
        "pixels": scores.tissue.size,
        "tissue": int(scores.tissue.sum()),
        "windows": windows.tolist(),
        "lost": int(scores.lost.sum()),
        "alone": scores.num_alone,
    }
    for name, values, step in (
        ("correlation", scores.correlation, CORRELATION_STEP),
        ("jump", scores.jumps, PX_STEP),
        ("jitter", scores.jitter, PX_STEP),
    ):
        histogram = Histogram(step)
        histogram.add(values)
        found[name] = histogram.pairs()
    return found


def describe_cells(
    scores: NeighbourScores, grid: Grid, cell_px: int
) -> list[list[float | None] | None]:
    """Describe the cells of a block, row by row, by their worst places.

    Args:
        scores: of a section in the block.
        grid: the area of the block.
        cell_px: side of a cell, a multiple of `PLACE_PX`.

    Returns:
        The fields of a `Place` but its z; None for a cell that was compared with
        nothing.
    """
    side, (rows, cols) = cell_px // WINDOW_PX, scores.against.shape
    cells: list[list[float | None] | None] = []
    for row in range(0, rows, side):
        for col in range(0, cols, side):
            cell = slice(row, row + side), slice(col, col + side)
            if not scores.against[cell].any():
                cells.append(None)
                continue
            places = [
                (slice(i, i + _PLACE_WINDOWS), slice(j, j + _PLACE_WINDOWS))
                for i in range(row, min(row + side, rows), _PLACE_WINDOWS)
                for j in range(col, min(col + side, cols), _PLACE_WINDOWS)
            ]
            errors = [_mean(scores.errors[place]) for place in places]
            # The first one of several that are as bad.
            worst = max(range(len(places)), key=lambda at: (_known(errors[at]), -at))
            place = places[worst]
            x, y = _middle(place, grid)
            back = int(scores.against[place].max() or scores.against[cell].max())
            figures = [_mean(scores.correlation[cell]), errors[worst]]
            figures.append(_median(scores.jumps[place]))
            # cols run along the volume's y.
            figures += [_median(scores.vectors[place][..., axis]) for axis in (1, 0)]
            cells.append([scores.z - back, x, y, *figures])
    return cells


def _median(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else None


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else None


def _known(error: float | None) -> float:
    return -1.0 if error is None else error


def _middle(place: tuple[slice, slice], grid: Grid) -> tuple[int, int]:
    """Return x and y of the middle of a place, mip-0 pixels."""
    corner = [one.start * WINDOW_PX for one in place]
    sizes = (
        min(PLACE_PX, size - start)
        for size, start in zip(grid.shape, corner, strict=True)
    )
    x, y = grid.crop(*corner, *sizes).center
    return int(x), int(y)


def _count_bytes(
    volume: Volume, grid: Grid, zs: Sequence[int], own: Sequence[int]
) -> tuple[int, int]:
    """Count the bytes of stored chunks that are read, and the bytes that are needed.

    Args:
        volume: the volume.
        grid: the area that is read.
        zs: the sections that are read, in rising order.
        own: the sections that are needed.
    """
    mip = volume.source_mip(grid.mip)
    inner = volume.clip(grid.at_mip(mip))
    if inner is None or not zs:
        return 0, 0
    voxel_bytes = volume.num_channels * volume.dtype.itemsize
    num_voxels = 0
    for slab in volume.slabs(grid.mip, list(zs)):
        hull, layers = volume.chunks_around(inner, slab.start)
        num_voxels += hull.rows * hull.cols * len(layers)
    num_needed = inner.rows * inner.cols * len(set(own) & set(zs))
    return num_voxels * voxel_bytes, num_needed * voxel_bytes
