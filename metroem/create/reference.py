"""The area that a section is normalised by, if it is not the patch."""

from typing import NamedTuple

from metroem.errors import DatasetError
from metroem.grid import Grid
from metroem.io.volume import Volume


class Reference(NamedTuple):
    """An area of one size, around whatever patch is normalised or profiled by it."""

    volume: Volume
    mip: int
    rows: int  # pixels of `mip`
    cols: int  # pixels of `mip`

    def around(self, window: Grid) -> Grid:
        """The area around the centre of a patch, as far as the volume goes.

        Raises:
            DatasetError: the volume has nothing there.
        """
        x, y = (
            int(center - (size << self.mip) / 2) >> self.mip << self.mip
            for center, size in zip(window.center, (self.rows, self.cols), strict=True)
        )
        inner = self.volume.clip(Grid(self.mip, x, y, self.rows, self.cols))
        if inner is None:
            raise DatasetError(
                f"{self.volume.flag} {self.volume.path}: holds nothing around x {x}, y "
                f"{y} (mip-0 pixels)"
            )
        return inner
