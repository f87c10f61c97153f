"""CloudVolumes: the one place that knows x, y, z and channel.

cloud-volume answers with zeros where nothing is stored: chunks that are missing,
scales that were never written, mip -1 (it takes the last). So mips, bounds and z are
checked here before anything is read.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from cloudvolume import Bbox, CloudVolume
from cloudvolume.exceptions import InfoUnavailableError

from metroem.errors import DatasetError
from metroem.geometry.grid import Grid, Resolution, in_nm, nm_of, same_resolution
from metroem.io.cloud_errors import InfoError, file_address, reading, storage_errors
from metroem.io.cloud_paths import check_source, cloud_path, split_format
from metroem.io.cloud_retry import prepare_storage
from metroem.io.shards import download
from metroem.io.volume_info import unreadable_mips
from metroem.io.zarr_n5 import FORMATS, ArrayVolume, open_arrays

logger = logging.getLogger(__name__)

WHAT_TO_CHECK = (
    "check the coordinates (mip-0 pixels), and that this mip was written: what is not "
    "there looks like zeros"
)


class Volume:
    """A volume opened for reading sections.

    Attributes:
        path: as cloud-volume opens it; plain paths become file://, and zarr:// or
            n5:// where that is what is there.
        location: of its chunks: the path, or where its info says that it is now.
        flag: where the path came from, for messages.
        mips: those that it has, in rising order. Mip m is the scale that is 2^m times
            coarser than mip 0 in x and y, with the same z, wherever its info lists it.
        num_channels: 1 for images, 2 for fields.
        dtype: as stored.
        resolution: nm of a mip-0 voxel along x, y, z.

    Args:
        path: see above.
        flag: see above.
        resolution: what mip 0 is, where something else says it: the volume of the
            images, or their files. None: the first scale of the info is mip 0.
        only_mip: which mip it is if it has one scale alone, and nothing says what
            mip 0 is.
        is_read: False if only its bounds are wanted, which need no codec.

    Raises:
        DatasetError: it cannot be opened, or no scale is a mip of that resolution, or
            none can be read.
    """

    def __init__(
        self,
        path: str,
        *,
        flag: str = "--cv_path",
        resolution: Resolution | None = None,
        only_mip: int = 0,
        is_read: bool = True,
    ) -> None:
        self.path = cloud_path(path)
        self.flag = flag
        self._local = threading.local()
        check_source(flag, self.path)
        prepare_storage()
        self._arrays: ArrayVolume | None = None
        with storage_errors(flag, self.path), reading(file_address(self.path, "info")):
            self._info = self._open()
            self._unreadable = (
                self._arrays.unreadable
                if self._arrays is not None
                else unreadable_mips(self._info)
            )
            scales = [nm_of(scale["resolution"]) for scale in self._info["scales"]]
            if is_read and len(self._unreadable) == len(scales):
                raise InfoError(self._unreadable[0])
            self.num_channels = int(self._info["num_channels"])
            self.dtype = np.dtype(self._info["data_type"])
        if resolution is None:
            x, y, z = scales[0]
            times = 1 << only_mip if len(scales) == 1 else 1
            resolution = x / times, y / times, z
            if times > 1:
                logger.info(
                    "%s: its only scale, %s, is taken for mip %d, so that mip 0 is %s",
                    *(self.path, in_nm(scales[0]), only_mip, in_nm(resolution)),
                )
        self.resolution = resolution
        self._scales = ", ".join(map(in_nm, scales))
        self._index = _index_of_mips(scales, resolution)
        self.mips = sorted(self._index)
        if not self.mips:
            raise DatasetError(
                f"{flag} {self.path}: its scales are {self._scales}; expected mips of "
                f"the images, whose mip 0 is {in_nm(resolution)}: 1, 2, 4 ... times "
                "that in x and y, with the same z; mips and coordinates of the two "
                "must mean the same"
            )

    def sections_at(self, mip: int) -> range:
        """The z's that a mip holds."""
        return range(*self._bounds(mip)[2])

    def check_mip(self, flag: str, mip: int) -> None:
        """Refuse a mip that is not there, or lies elsewhere than the finest.

        Raises:
            DatasetError: as said.
        """
        if mip not in self._index:
            x, y, z = self.resolution
            raise DatasetError(
                f"{flag} {mip}: {self.path} has no such mip, of "
                f"{in_nm((x * 2.0**mip, y * 2.0**mip, z))}; available: "
                f"{', '.join(map(str, self.mips))}; its scales are {self._scales}"
            )
        self._check_readable(mip)
        self.check_lies_on(self, mip)

    def check_lies_on(self, other: "Volume", mip: int) -> None:
        """Refuse a mip that is as large as another volume and lies elsewhere.

        Coordinates are absolute, so that a volume may hold a part of another. One
        that is exactly as large and is shifted has a wrong voxel_offset.

        Args:
            other: what it belongs to; its finest mip is compared.
            mip: of this volume.

        Raises:
            DatasetError: as said; both are named.
        """
        finest = other.mips[0]
        here, there = self._box(mip), other._box(finest)
        # Both corners of a coarser mip may be rounded to its pixels.
        slack = np.array([(1 << max(mip, finest)) - 1] * 2 + [0])
        differ = np.abs(np.diff(here, axis=1) - np.diff(there, axis=1))[:, 0]
        apart = np.abs(here[:, 0] - there[:, 0])
        if (differ <= 2 * slack).all() and (apart > slack).any():
            raise DatasetError(
                f"{self.flag} {self.path}: mip {mip} begins at x, y, z "
                f"{here[:, 0].tolist()}, {other.flag} {other.path} at "
                f"{there[:, 0].tolist()} (mip-0 pixels, section), and is as large; "
                "expected one place: correct voxel_offset in the info that is wrong"
            )

    def check_sections(self, sections: range, mip: int) -> None:
        """Refuse sections that a mip of the volume does not hold.

        Raises:
            DatasetError: some are outside; the bounds are named.
        """
        here = self.sections_at(mip)
        if not (here.start <= sections.start and sections.stop <= here.stop):
            raise DatasetError(
                f"{self.flag} {self.path}: sections {sections.start}..."
                f"{sections.stop - 1} are needed (the pair of z reads z and z - 1), it "
                f"holds {here.start}...{here.stop - 1}; change --z_start or --z_end"
            )

    def check_covers(self, grid: Grid, what: str, *, at: int | None = None) -> None:
        """Refuse an area that the volume does not hold.

        Args:
            grid: the area, of any mip.
            what: the area in words: "the patch".
            at: the mip that is read; to less than a pixel, of either mip, bounds may
                differ then. None: that of the grid.

        Raises:
            DatasetError: some of it is outside; the bounds are named.
        """
        mip = grid.mip if at is None else at
        (x0, x1), (y0, y1), _ = self._box(mip).tolist()
        slack = 0 if at is None else (1 << max(at, grid.mip)) - 1
        x_end, y_end = grid.end
        if not (
            x0 - slack <= grid.x
            and x_end <= x1 + slack
            and y0 - slack <= grid.y
            and y_end <= y1 + slack
        ):
            cure = "change --x_offset, --y_offset or the size"
            if at is not None:
                cure = "give a volume that covers it, or take another place"
            raise DatasetError(
                f"{self.flag} {self.path}: {what} at mip {grid.mip} spans x {grid.x}..."
                f"{x_end}, y {grid.y}...{y_end}, the volume x {x0}...{x1}, y {y0}..."
                f"{y1} (mip-0 pixels, the end not included); {cure}"
            )

    def check_channels(self, expected: int, kind: str) -> None:
        """Refuse a volume with another number of channels.

        Raises:
            DatasetError: as said.
        """
        if self.num_channels != expected:
            raise DatasetError(
                f"{self.flag} {self.path}: has {self.num_channels} channels, {kind} "
                f"has {expected}"
            )

    def clip(self, grid: Grid) -> Grid | None:
        """The part of a grid that the volume holds; None if there is none."""
        x, y, _ = self._bounds(grid.mip)
        scale = 1 << grid.mip
        row, row_end = _overlap(grid.x // scale, grid.rows, x)
        col, col_end = _overlap(grid.y // scale, grid.cols, y)
        if row >= row_end or col >= col_end:
            return None
        return grid.crop(row, col, row_end - row, col_end - col)

    def holds(self, z: int) -> bool:
        """Whether a section lies inside the volume."""
        return z in self.sections_at(self.mips[0])

    def extent(self) -> tuple[Grid, range]:
        """All that the volume holds: the area, at mip 0, and the sections."""
        (x0, x1), (y0, y1), (z0, z1) = self._box(self.mips[0]).tolist()
        return Grid(0, x0, y0, x1 - x0, y1 - y0), range(z0, z1)

    @property
    def info(self) -> dict[str, Any]:
        """The info file."""
        return self._info

    def chunks_around(self, grid: Grid, z: int) -> tuple[Grid, range]:
        """The area and the sections of the stored chunks that hold some of a grid.

        Args:
            grid: the area, inside the volume.
            z: a section that the volume holds.
        """
        size = self._at(0).mip_chunk_size(self._index[grid.mip])
        corner = grid.x >> grid.mip, grid.y >> grid.mip, z
        shape = (*grid.shape, 1)
        spans = []
        for axis, (low, high) in enumerate(self._bounds(grid.mip)):
            step, start = int(size[axis]), corner[axis]
            first = low + (start - low) // step * step
            last = low - (low - start - shape[axis]) // step * step
            spans.append((first, min(last, high)))
        (x, x_end), (y, y_end), (z_start, z_end) = spans
        hull = Grid(grid.mip, x << grid.mip, y << grid.mip, x_end - x, y_end - y)
        return hull, range(z_start, z_end)

    def read(self, grid: Grid, sections: range) -> np.ndarray:
        """Read one area of consecutive sections, each stored chunk once.

        Args:
            grid: the area; its corner a multiple of 2^mip. What lies outside the
                volume comes as 0.
            sections: z's, all of them in the volume.

        Returns:
            (num_sections, C, H, W), the dtype of the volume, as stored (NaN may be
            among it); 0 where nothing is stored.

        Raises:
            DatasetError: the volume cannot be read.
        """
        self._check_readable(grid.mip)
        shape = (len(sections), self.num_channels, *grid.shape)
        inner = self.clip(grid)
        if inner is None:
            return np.zeros(shape, self.dtype)
        x, y = inner.x >> grid.mip, inner.y >> grid.mip
        box = Bbox(
            (x, y, sections.start), (x + inner.rows, y + inner.cols, sections.stop)
        )
        volume = self._at(self._index[grid.mip])
        place = f"mip {grid.mip}, voxels {box}"
        with storage_errors(self.flag, self.path), reading(place):
            if self._arrays is None:
                cutout = download(volume, box)
            else:
                cutout = self._arrays.read(self._index[grid.mip], box)
        array = np.asarray(cutout).transpose(2, 3, 0, 1)
        if inner == grid:
            return array
        whole = np.zeros(shape, self.dtype)
        row, col = x - (grid.x >> grid.mip), y - (grid.y >> grid.mip)
        whole[:, :, row : row + inner.rows, col : col + inner.cols] = array
        return whole

    def read_layer(
        self, windows: Mapping[int, Grid], slab: range
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Read a window of each section of one of `slabs`, each chunk once.

        Args:
            windows: by z, the area wanted of that section; all of one mip.
            slab: sections to read, those of `windows` among them.

        Yields:
            z and (C, H, W) as stored.

        Raises:
            DatasetError: the volume cannot be read.
        """
        wanted = {z: windows[z] for z in slab if z in windows}
        hull = bounding_grid(list(wanted.values()))
        layers = self.read(hull, slab)
        for z, window in wanted.items():
            yield z, crop_array(layers[z - slab.start], hull, window)

    def slabs(self, mip: int, sections: list[int]) -> list[range]:
        """Group sections so that those of one layer of chunks come together.

        Args:
            mip: whose chunks.
            sections: z's, in rising order.

        Returns:
            Ranges that cover all of `sections`, one a layer of chunks.
        """
        index = self._index[self.source_mip(mip)]
        thickness = int(self._at(0).mip_chunk_size(index)[2])
        start = int(self._at(0).mip_voxel_offset(index)[2])
        layers: dict[int, list[int]] = {}
        for z in sections:
            layers.setdefault((z - start) // thickness, []).append(z)
        return [range(zs[0], zs[-1] + 1) for zs in layers.values()]

    def source_mip(self, mip: int) -> int:
        """The stored mip that another is read from: itself."""
        return mip

    def index_of(self, mip: int) -> int:
        """Which scale of the info a mip is."""
        return self._index[mip]

    def _at(self, index: int) -> Any:
        """cloud-volume's object, one a thread and scale; the info is fetched once."""
        opened = self._local.__dict__.setdefault("volumes", {})
        if index not in opened:
            with storage_errors(self.flag, self.path):
                opened[index] = CloudVolume(
                    self.location, mip=index, info=self._info, **_OPTIONS
                )
        return opened[index]

    def _open(self) -> dict[str, Any]:
        """Find out of which format it is, where, and what it says of itself."""
        form, place = split_format(self.path)
        # With a format, since cloud-volume else takes Zarr for its own.
        self.location = f"precomputed://{place}"
        if form not in FORMATS:
            try:
                volume: Any = CloudVolume(self.location, **_OPTIONS)
            except InfoUnavailableError:
                if form:
                    raise
            else:
                if (found := volume.meta.path.format) != "precomputed":
                    raise InfoError(
                        f"leads to a volume of format {found}; give its path"
                    )
                self.location = f"precomputed://{volume.meta.cloudpath}"
                return volume.info
        self._arrays = open_arrays(form, place)
        if self._arrays is None:
            raise InfoUnavailableError(place)
        if not form:
            self.path = f"{self._arrays.form}://{place}"
        return self._arrays.info

    def _check_readable(self, mip: int) -> None:
        if (problem := self._unreadable.get(self._index[mip])) is not None:
            raise DatasetError(f"{self.flag} {self.path}: mip {mip} {problem}")

    def _bounds(self, mip: int) -> tuple[tuple[int, int], ...]:
        """First and end pixel of a mip along x, y, z."""
        source = self.source_mip(mip)
        box = self._at(0).mip_bounds(self._index[source])
        low, high = (list(map(int, at)) for at in (box.minpt, box.maxpt))
        for axis in (0, 1):
            low[axis] >>= mip - source
            high[axis] = -(-high[axis] >> (mip - source))
        return tuple(zip(low, high, strict=True))

    def _box(self, mip: int) -> np.ndarray:
        """(3, 2): first and end of a mip along x, y, z, mip-0 pixels and sections."""
        return np.array(self._bounds(mip)) << np.array([[mip], [mip], [0]])


def _index_of_mips(scales: list[Resolution], resolution: Resolution) -> dict[int, int]:
    """By mip, the first scale that is it."""
    found: dict[int, int] = {}
    x, y, z = resolution
    for index, nm in enumerate(scales):
        mip = round(math.log2(nm[0] / x)) if min(x, nm[0]) > 0 else -1
        if mip >= 0 and same_resolution(nm, (x * 2**mip, y * 2**mip, z)):
            found.setdefault(mip, index)
    return found


# parallel=1: with more, cloud-volume starts processes anew for every read. It would
# fetch the provenance, which nothing here reads, for every object made.
_OPTIONS: dict[str, Any] = {
    "provenance": {"sources": [], "owners": [], "processing": [], "description": ""},
    "fill_missing": True,
    "bounded": True,
    "progress": False,
    "parallel": 1,
}


def iter_sections(
    volume: Volume, windows: Mapping[int, Grid], *, parallel: int = 1
) -> Iterator[tuple[int, np.ndarray]]:
    """Read a window of each section, each stored chunk once.

    Args:
        volume: where from.
        windows: by z, the area wanted of that section; all of one mip.
        parallel: how many layers of chunks are read at a time; that many are in
            memory.

    Yields:
        z, in rising order, and (C, H, W) as stored.

    Raises:
        DatasetError: the volume cannot be read.
    """
    if not windows:
        return
    mip = next(iter(windows.values())).mip
    slabs = volume.slabs(mip, sorted(windows))
    if parallel == 1:
        for slab in slabs:
            yield from volume.read_layer(windows, slab)
        return
    pool = ThreadPoolExecutor(parallel)
    ahead: deque[Future[list[tuple[int, np.ndarray]]]] = deque()
    try:
        for slab in slabs:
            ahead.append(
                pool.submit(lambda at: list(volume.read_layer(windows, at)), slab)
            )
            if len(ahead) == parallel:
                yield from ahead.popleft().result()
        for layer in ahead:
            yield from layer.result()
    finally:
        pool.shutdown(cancel_futures=True)


def bounding_grid(grids: list[Grid]) -> Grid:
    """The smallest grid that covers some of one mip, whose pixels coincide."""
    mip = grids[0].mip
    x, y = min(grid.x for grid in grids), min(grid.y for grid in grids)
    x_end, y_end = (max(grid.end[axis] for grid in grids) for axis in (0, 1))
    return Grid(mip, x, y, (x_end - x) >> mip, (y_end - y) >> mip)


def crop_array(array: np.ndarray, grid: Grid, window: Grid) -> np.ndarray:
    """The part of (..., H, W) on `grid` that `window`, of the same mip, wants."""
    row, col = (window.x - grid.x) >> grid.mip, (window.y - grid.y) >> grid.mip
    return array[..., row : row + window.rows, col : col + window.cols]


def _overlap(start: int, size: int, bounds: tuple[int, int]) -> tuple[int, int]:
    """First and end index, within `size` pixels from `start`, inside bounds."""
    return max(bounds[0] - start, 0), min(bounds[1] - start, size)
