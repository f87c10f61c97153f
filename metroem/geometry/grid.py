"""Locate the pixels of an array in the volume, and give their size."""

from collections.abc import Sequence
from dataclasses import dataclass

from metroem.errors import DatasetError

Resolution = tuple[float, float, float]  # nm of a voxel along x, y, z


def nm_of(values: Sequence[float]) -> Resolution:
    """Turn three numbers into a resolution."""
    x, y, z = (float(value) for value in values)
    return x, y, z


def in_nm(resolution: Resolution | None) -> str:
    """Describe a resolution in words, "8x8x40 nm"."""
    if resolution is None:
        return "not known"
    return "x".join(f"{nm:g}" for nm in resolution) + " nm"


def same_resolution(one: Resolution | None, other: Resolution | None) -> bool:
    """Whether two resolutions agree to 1 %; an unknown one agrees with any."""
    if one is None or other is None:
        return True
    return all(abs(a - b) <= 0.01 * abs(b) for a, b in zip(one, other, strict=True))


@dataclass(frozen=True)
class Grid:
    """The pixel grid of an image or a field: its mip, corner and shape.

    Rows run along the volume's x and cols along its y (no transpose between volume,
    file and network). Pixel (i, j) covers 2**mip x 2**mip mip-0 pixels; the first one
    is (x + i * 2**mip, y + j * 2**mip).

    Attributes:
        mip: image level, >= 0.
        x: first mip-0 pixel along the volume's x, and so along the rows.
        y: first mip-0 pixel along the volume's y, and so along the cols.
        rows: number of rows, H.
        cols: number of cols, W.

    Raises:
        DatasetError: a negative mip, or no pixels.
    """

    mip: int
    x: int
    y: int
    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.mip < 0 or self.rows < 1 or self.cols < 1:
            raise DatasetError(f"{self}: mip must be >= 0, rows and cols >= 1")

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W), pixels of the grid's mip."""
        return self.rows, self.cols

    @property
    def end(self) -> tuple[int, int]:
        """(x, y) one past the last mip-0 pixel."""
        return self.x + (self.rows << self.mip), self.y + (self.cols << self.mip)

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) of the middle, mip-0 pixels."""
        (x_end, y_end) = self.end
        return (self.x + x_end) / 2, (self.y + y_end) / 2

    def covers(self, other: "Grid") -> bool:
        """Whether the whole of `other` lies inside this grid."""
        return (
            self.x <= other.x
            and self.y <= other.y
            and self.end[0] >= other.end[0]
            and self.end[1] >= other.end[1]
        )

    def overlap(self, other: "Grid") -> "Grid | None":
        """The common part of two grids of one mip whose pixels coincide, or None."""
        x, y = max(self.x, other.x), max(self.y, other.y)
        x_end, y_end = (min(a, b) for a, b in zip(self.end, other.end, strict=True))
        rows, cols = (x_end - x) >> self.mip, (y_end - y) >> self.mip
        return Grid(self.mip, x, y, rows, cols) if min(rows, cols) > 0 else None

    def crop(self, row: int, col: int, rows: int, cols: int) -> "Grid":
        """The grid of `array[row : row + rows, col : col + cols]`."""
        scale = 1 << self.mip
        return Grid(self.mip, self.x + row * scale, self.y + col * scale, rows, cols)

    def at_mip(self, mip: int) -> "Grid":
        """The smallest grid of a mip, from the same corner, that covers this one."""
        rows, cols = (
            -(-(size << self.mip) >> mip) if mip > self.mip else size << self.mip >> mip
            for size in self.shape
        )
        return Grid(mip, self.x, self.y, rows, cols)

    def cover(self, mip: int, *, margin_px: int = 0) -> "Grid":
        """The grid of another mip that covers this one, on whole pixels of that mip.

        Args:
            mip: mip of the new grid.
            margin_px: pixels of `mip` to add on each side.
        """
        x, y = ((at >> mip) - margin_px for at in (self.x, self.y))
        x_end, y_end = (-(-at >> mip) + margin_px for at in self.end)
        return Grid(mip, x << mip, y << mip, x_end - x, y_end - y)
