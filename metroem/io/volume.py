"""Read sections of volumes: convert (x, y, z, channel) to (section, channel, row, col).

cloud-volume returns zeros where nothing is stored: for missing chunks, and for scales
that were never written. For mip -1 it takes the last. So mips, bounds and z are checked
here before anything is read.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from cloudvolume import Bbox, CloudVolume
from cloudvolume.exceptions import EmptyVolumeException, InfoUnavailableError

from metroem.errors import DatasetError
from metroem.geometry.grid import Grid, Resolution, in_nm, nm_of, same_resolution
from metroem.io.cloud_errors import (
    BrokenFileError,
    InfoError,
    failed_file,
    file_address,
    reading,
    storage_errors,
)
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
        path: path as cloud-volume opens it. Plain paths become file://, or zarr:// or
            n5:// if they hold such a volume.
        location: location of the chunks: the path, or the one its info redirects to.
        flag: the flag that gave the path, for messages.
        mips: available mips, in rising order. Mip m is the scale that is 2^m times
            coarser than mip 0 in x and y, with the same z. Its position in the info
            does not matter.
        num_channels: 1 for images, 2 for fields.
        dtype: stored data type.
        resolution: nm of a mip-0 voxel along x, y, z.

    Args:
        path: see above.
        flag: see above.
        resolution: resolution of mip 0, if known from the image volume or image files.
            None: the first scale of the info is mip 0.
        only_mip: mip of the only scale, if the volume has a single one and
            `resolution` is None.
        is_read: False if only its bounds are needed; then missing codecs are no error.
        is_whole: metroem wrote all chunks of it, so a missing one is an error. Others
            may leave out chunks without data: they are 0.

    Raises:
        DatasetError: it cannot be opened, no scale is a mip of that resolution, or no
            scale can be read.
    """

    def __init__(
        self,
        path: str,
        *,
        flag: str = "--cv_path",
        resolution: Resolution | None = None,
        only_mip: int = 0,
        is_read: bool = True,
        is_whole: bool = False,
    ) -> None:
        self.path = cloud_path(path)
        self.flag = flag
        self._options: dict[str, Any] = dict(_OPTIONS)
        if is_whole:
            self._options["fill_missing"] = False
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
        """Return the range of z of a mip."""
        return range(*self._bounds(mip)[2])

    def check_mip(self, flag: str, mip: int) -> None:
        """Refuse a mip that does not exist, or does not lie on the finest mip.

        Args:
            flag: the flag that asked for the mip, for messages.
            mip: the mip to check.

        Raises:
            DatasetError: the mip is refused.
        """
        if mip not in self._index:
            x, y, z = self.resolution
            raise DatasetError(
                f"{flag} {mip}: {self.path} has no such mip, of "
                f"{in_nm((x * 2.0**mip, y * 2.0**mip, z))}; available: "
                f"{', '.join(map(str, self.mips))}; its scales are {self._scales}"
                f"{self._how_to_add(mip)}"
            )
        self._check_readable(mip)
        self.check_lies_on(self, mip)

    def check_lies_on(self, other: "Volume", mip: int) -> None:
        """Refuse a mip that is as large as another volume, but shifted.

        Coordinates are absolute, so a volume may be a part of another. But a volume of
        exactly the same size that is shifted has a wrong voxel_offset.

        Args:
            other: the volume that it belongs to; its finest mip is compared.
            mip: mip of this volume.

        Raises:
            DatasetError: the mip is shifted; the message names both volumes.
        """
        finest = other.mips[0]
        box, other_box = self._box(mip), other._box(finest)
        # Both corners of a coarser mip may be rounded to its pixels.
        slack = np.array([(1 << max(mip, finest)) - 1] * 2 + [0])
        size_differs = np.abs(np.diff(box, axis=1) - np.diff(other_box, axis=1))[:, 0]
        shift = np.abs(box[:, 0] - other_box[:, 0])
        if (size_differs <= 2 * slack).all() and (shift > slack).any():
            raise DatasetError(
                f"{self.flag} {self.path}: mip {mip} begins at x, y, z "
                f"{box[:, 0].tolist()}, {other.flag} {other.path} at "
                f"{other_box[:, 0].tolist()} (mip-0 pixels, section), and is as large; "
                "expected one place: correct voxel_offset in the info that is wrong"
            )

    def check_sections(self, sections: range, mip: int) -> None:
        """Refuse sections outside of the volume.

        Raises:
            DatasetError: a section is outside; the message states the bounds.
        """
        held = self.sections_at(mip)
        if not (held.start <= sections.start and sections.stop <= held.stop):
            raise DatasetError(
                f"{self.flag} {self.path}: sections {sections.start}..."
                f"{sections.stop - 1} are needed (the pair of z reads z and z - 1), it "
                f"holds {held.start}...{held.stop - 1}; change --z_start or --z_end"
            )

    def check_covers(self, grid: Grid, what: str, *, at: int | None = None) -> None:
        """Refuse an area that is not inside the volume.

        Args:
            grid: the area, at any mip.
            what: name of the area for the message: "the patch".
            at: the mip that is read. If given, the area may reach out of the bounds by
                less than a pixel of the coarser of both mips. None: the mip of the
                grid, and no tolerance.

        Raises:
            DatasetError: part of the area is outside; the message states the bounds.
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
                cure = "give a volume that covers it, or choose another location"
            raise DatasetError(
                f"{self.flag} {self.path}: {what} at mip {grid.mip} spans x {grid.x}..."
                f"{x_end}, y {grid.y}...{y_end}, the volume x {x0}...{x1}, y {y0}..."
                f"{y1} (mip-0 pixels, the end not included); {cure}"
            )

    def check_channels(self, expected: int, kind: str) -> None:
        """Refuse a volume with another number of channels.

        Args:
            expected: number of channels.
            kind: what has that many channels, for the message.

        Raises:
            DatasetError: the number differs.
        """
        if self.num_channels != expected:
            raise DatasetError(
                f"{self.flag} {self.path}: has {self.num_channels} channels, {kind} "
                f"has {expected}"
            )

    def clip(self, grid: Grid) -> Grid | None:
        """Return the part of a grid inside the volume; None if there is none."""
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
        """Return the area of the volume, at mip 0, and its range of z."""
        (x0, x1), (y0, y1), (z0, z1) = self._box(self.mips[0]).tolist()
        return Grid(0, x0, y0, x1 - x0, y1 - y0), range(z0, z1)

    @property
    def info(self) -> dict[str, Any]:
        """The content of the info file."""
        return self._info

    def chunks_around(self, grid: Grid, z: int) -> tuple[Grid, range]:
        """Return the area and the sections of the stored chunks that overlap a grid.

        Args:
            grid: the area, inside the volume.
            z: a section of the volume.
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
            grid: the area; its corner is a multiple of 2^mip. Pixels outside the
                volume are 0.
            sections: range of z, inside the volume.

        Returns:
            (num_sections, C, H, W), the dtype of the volume, values as stored (may
            contain NaN); 0 where nothing is stored.

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
        voxels = f"mip {grid.mip}, voxels {box}"
        with storage_errors(self.flag, self.path), reading(voxels):
            if self._arrays is None:
                try:
                    cutout = download(volume, box)
                except EmptyVolumeException as error:
                    raise BrokenFileError(
                        "this chunk was written and is missing",
                        "copy it again, or run the step that writes it: --again",
                        file=failed_file(error),
                    ) from error
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
        """Read a window of each section of one slab, each chunk once; see `slabs`.

        Args:
            windows: by z, the window of that section; all at one mip.
            slab: range of z to read; only sections in `windows` are yielded.

        Yields:
            z, and (C, H, W) as stored.

        Raises:
            DatasetError: the volume cannot be read.
        """
        wanted = {z: windows[z] for z in slab if z in windows}
        hull = bounding_grid(list(wanted.values()))
        layers = self.read(hull, slab)
        for z, window in wanted.items():
            yield z, crop_array(layers[z - slab.start], hull, window)

    def slabs(self, mip: int, sections: list[int]) -> list[range]:
        """Group sections by the layer of chunks that stores them.

        Args:
            mip: mip whose chunks are read.
            sections: z of each section, in rising order.

        Returns:
            Ranges of z that cover all of `sections`, one per layer of chunks.
        """
        index = self._index[self.source_mip(mip)]
        thickness = int(self._at(0).mip_chunk_size(index)[2])
        start = int(self._at(0).mip_voxel_offset(index)[2])
        layers: dict[int, list[int]] = {}
        for z in sections:
            layers.setdefault((z - start) // thickness, []).append(z)
        return [range(zs[0], zs[-1] + 1) for zs in layers.values()]

    def source_mip(self, mip: int) -> int:
        """Return the stored mip that a mip is read from: itself."""
        return mip

    def chunk_layout(self, mip: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the first pixel of all chunks, and the size of a chunk.

        Args:
            mip: mip of the pixels; if it is made from a finer one, chunks are areas of
                whole stored chunks.

        Returns:
            Row and col of the first pixel; rows and cols of a chunk.
        """
        source = self.source_mip(mip)
        index, levels = self._index[source], mip - source
        rows, cols = (int(n) for n in self._at(0).mip_chunk_size(index)[:2])
        (x, _), (y, _), _ = self._bounds(mip)
        return (x, y), (max(rows >> levels, 1), max(cols >> levels, 1))

    def layer_around(self, mip: int, z: int) -> range:
        """Return the sections of the layer of chunks that stores a section.

        Args:
            mip: mip whose chunks are read.
            z: the section, inside the volume.
        """
        thickness = int(
            self._at(0).mip_chunk_size(self._index[self.source_mip(mip)])[2]
        )
        _, _, (low, high) = self._bounds(mip)
        first = low + (z - low) // thickness * thickness
        return range(first, min(first + thickness, high))

    def pixel_type(self, mip: int) -> np.dtype:
        """Return the type in which a mip is read: that of the volume."""
        return self.dtype

    def bounds_of(self, mip: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return first and end row, and first and end col, of a mip, in its pixels."""
        x, y, _ = self._bounds(mip)
        return x, y

    def index_of(self, mip: int) -> int:
        """Return the index of a mip among the scales of the info."""
        return self._index[mip]

    def _at(self, index: int) -> Any:
        """Return cloud-volume's object of a scale, one per thread.

        The info is fetched only once.
        """
        opened = self._local.__dict__.setdefault("volumes", {})
        if index not in opened:
            with storage_errors(self.flag, self.path):
                opened[index] = CloudVolume(
                    self.location, mip=index, info=self._info, **self._options
                )
        return opened[index]

    def _open(self) -> dict[str, Any]:
        """Find the format and the location of the volume, and return its info."""
        form, location = split_format(self.path)
        # With a format, since cloud-volume would otherwise open Zarr itself.
        self.location = f"precomputed://{location}"
        if form not in FORMATS:
            try:
                volume: Any = CloudVolume(self.location, **self._options)
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
        self._arrays = open_arrays(form, location)
        if self._arrays is None:
            raise InfoUnavailableError(location)
        if not form:
            self.path = f"{self._arrays.form}://{location}"
        return self._arrays.info

    def _how_to_add(self, mip: int) -> str:
        """Name the command that adds a mip, if it can."""
        is_ours = self._arrays is None and "http" not in self.path.partition("://")[0]
        is_grey = self.num_channels == 1 and self._info.get("type") == "image"
        if not (is_ours and is_grey and mip > self.mips[0]):
            return ""
        return f"; metroem import {self.path} --mips {mip + 1} adds it"

    def _check_readable(self, mip: int) -> None:
        if (problem := self._unreadable.get(self._index[mip])) is not None:
            raise DatasetError(f"{self.flag} {self.path}: mip {mip} {problem}")

    def _bounds(self, mip: int) -> tuple[tuple[int, int], ...]:
        """Return the first and end pixel of a mip along x, y, z."""
        source = self.source_mip(mip)
        box = self._at(0).mip_bounds(self._index[source])
        low, high = (list(map(int, at)) for at in (box.minpt, box.maxpt))
        for axis in (0, 1):
            low[axis] >>= mip - source
            high[axis] = -(-high[axis] >> (mip - source))
        return tuple(zip(low, high, strict=True))

    def _box(self, mip: int) -> np.ndarray:
        """Return start and end of a mip along x, y, z: (3, 2), mip-0 pixels and z."""
        return np.array(self._bounds(mip)) << np.array([[mip], [mip], [0]])


def _index_of_mips(scales: list[Resolution], resolution: Resolution) -> dict[int, int]:
    """Find the scale of each mip: by mip, the index of the first scale that fits."""
    found: dict[int, int] = {}
    x, y, z = resolution
    for index, nm in enumerate(scales):
        mip = round(math.log2(nm[0] / x)) if min(x, nm[0]) > 0 else -1
        if mip >= 0 and same_resolution(nm, (x * 2**mip, y * 2**mip, z)):
            found.setdefault(mip, index)
    return found


# parallel=1, since with more cloud-volume starts new processes for every read. The
# provenance is given, since cloud-volume would fetch it for every object.
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
        volume: volume to read from.
        windows: by z, the window of that section; all at one mip.
        parallel: number of layers of chunks that are read at a time. All of them are
            in memory.

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
    """Return the smallest grid that covers all `grids`, which share mip and pixels."""
    mip = grids[0].mip
    x, y = min(grid.x for grid in grids), min(grid.y for grid in grids)
    x_end, y_end = (max(grid.end[axis] for grid in grids) for axis in (0, 1))
    return Grid(mip, x, y, (x_end - x) >> mip, (y_end - y) >> mip)


ArrayT = TypeVar("ArrayT", bound=Any)


def crop_array(array: ArrayT, grid: Grid, window: Grid) -> ArrayT:
    """Crop an array or a tensor, (..., H, W), on `grid` to `window`.

    `window` is a grid of the same mip inside `grid`.
    """
    row, col = (window.x - grid.x) >> grid.mip, (window.y - grid.y) >> grid.mip
    return array[..., row : row + window.rows, col : col + window.cols]


def _overlap(start: int, size: int, bounds: tuple[int, int]) -> tuple[int, int]:
    """Return the first and end index, of `size` pixels from `start`, inside bounds."""
    return max(bounds[0] - start, 0), min(bounds[1] - start, size)
