"""Make all mips of sections that come in bands, without holding whole sections.

A band is an area of all rows (x) and some cols (y) of a volume. Coarser mips average
only tissue, as everywhere in MetroEM. Their pixels are the same as if whole sections
were averaged at once: a col that is still without its neighbour waits for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from metroem.geometry.grid import Grid
from metroem.imaging.normalize import coarsen_image, round_greys

# Rows that are averaged at a time: it takes several times their memory.
_SLAB_ROWS = 4096


def coarser_bounds(start: int, end: int) -> tuple[int, int]:
    """Return the first and end pixel, at the next mip, of those from start to end."""
    return start >> 1, -(-end >> 1)


@dataclass
class _Level:
    """Where one mip stands.

    Attributes:
        mip: the mip.
        rows: first and end row, pixels of the mip.
        cols: first and end col.
        waiting: cols that are not a whole chunk yet, as they are written.
        next_col: the first of them.
        single: a col without its neighbour, as it is averaged.
        num_cols: cols that have come.
    """

    mip: int
    rows: tuple[int, int]
    cols: tuple[int, int]
    waiting: list[np.ndarray] = field(default_factory=list)
    next_col: int = 0
    single: np.ndarray | None = None
    num_cols: int = 0


class MipBands:
    """Takes the bands of a layer of sections in order, and yields blocks of all mips.

    Args:
        area: the area of the sections, at the mip of the bands.
        mips: the mips that are yielded; the finest is not below that of the bands.
        chunk_px: blocks are whole chunks of so many cols, but for the last one.
    """

    def __init__(self, area: Grid, mips: range, chunk_px: int) -> None:
        self._mips, self._chunk_px = mips, chunk_px
        x, y = area.x >> area.mip, area.y >> area.mip
        rows, cols = (x, x + area.rows), (y, y + area.cols)
        self._levels = []
        for mip in range(area.mip, mips.stop):
            self._levels.append(_Level(mip, rows, cols, next_col=cols[0]))
            rows, cols = coarser_bounds(*rows), coarser_bounds(*cols)

    def add(self, band: np.ndarray) -> Iterator[tuple[np.ndarray, Grid]]:
        """Take the next cols of all sections.

        Args:
            band: (n, H, w) grey levels, 0 = no data, H = rows of the area.

        Yields:
            (n, 1, H', w') in the type of the bands, and their area.
        """
        dtype, values = band.dtype, band
        for level, coarser in zip(self._levels, [*self._levels[1:], None], strict=True):
            level.num_cols += values.shape[-1]
            is_last = level.num_cols == level.cols[1] - level.cols[0]
            if level.mip in self._mips:
                stored = values
                if stored.dtype != dtype:
                    stored = round_greys(torch.from_numpy(values), dtype)
                level.waiting.append(stored)
                yield from self._whole_chunks(level, is_last)
            if coarser is None:
                return
            values = _averaged(level, values, is_last)
            if not values.shape[-1]:
                return

    def _whole_chunks(
        self, level: _Level, is_last: bool
    ) -> Iterator[tuple[np.ndarray, Grid]]:
        """Yield what has come of a mip, up to the last whole chunk."""
        count = sum(one.shape[-1] for one in level.waiting)
        whole = count if is_last else count // self._chunk_px * self._chunk_px
        if not whole:
            return
        joined = np.concatenate(level.waiting, axis=-1)
        level.waiting = [joined[..., whole:]] if whole < count else []
        block = joined[:, None, :, :whole]
        row, step = level.rows[0], 1 << level.mip
        at = row * step, level.next_col * step
        yield block, Grid(level.mip, *at, *block.shape[2:])
        level.next_col += whole


def _averaged(level: _Level, values: np.ndarray, is_last: bool) -> np.ndarray:
    """Average the cols of a mip that have come in pairs; a single one waits.

    A first row or col whose neighbour is outside of the volume is averaged alone, like
    a last one.

    Returns:
        (n, ceil(H / 2), w) float32.
    """
    is_first = level.num_cols == values.shape[-1]
    if is_first and level.cols[0] % 2:
        values = np.concatenate([values[..., :1], values], axis=-1)
    if level.single is not None:
        values = np.concatenate([level.single, values], axis=-1)
    whole = values.shape[-1]
    if not is_last:
        whole -= whole % 2
    level.single = values[..., whole:].copy() if whole < values.shape[-1] else None
    values = values[..., :whole]
    if level.rows[0] % 2:
        values = np.concatenate([values[:, :1], values], axis=1)
    made = np.empty((len(values), -(-values.shape[1] // 2), -(-whole // 2)), np.float32)
    if not whole:
        return made
    for row in range(0, values.shape[1], _SLAB_ROWS):
        slab = values[:, row : row + _SLAB_ROWS].astype(np.float32)
        slab[~np.isfinite(slab)] = 0  # no data
        coarse = coarsen_image(torch.from_numpy(slab)[:, None], 1)[:, 0].numpy()
        made[:, row // 2 : row // 2 + coarse.shape[1]] = coarse
    return made
