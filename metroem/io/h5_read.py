"""Read image sets and field sets; `metroem.io.h5` describes their format."""

import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from metroem.errors import DatasetError
from metroem.geometry.grid import Grid, Resolution, in_nm, nm_of, same_resolution
from metroem.imaging.normalize import DARKEST
from metroem.io.cloud_paths import check_dataset
from metroem.io.h5_checks import (
    DEFECTS_KEY,
    attributes_of,
    check_pair,
    check_stored,
    checksums_of,
    opened,
    own_dataset,
    stored_checksums,
    whole_numbers,
)
from metroem.specs.filenames import FieldSetName, ImageSetName
from metroem.utils import format_versions

logger = logging.getLogger(__name__)

ALL = slice(None)
Box = tuple[int, int, int, int, int, int]


class Pair(NamedTuple):
    """Two sections over one area, or their masks.

    An image is float32, exactly 0 where there is no data. A mask is bool.
    """

    src: np.ndarray  # (H, W)
    tgt: np.ndarray  # (H, W)


class _Layout(NamedTuple):
    """Shape, locations and attributes that a file states."""

    shape: tuple[int, ...]  # of the main dataset
    boxes: np.ndarray | None  # (num_pairs, 2, 6) int64; None: file of the original
    offsets: np.ndarray | None  # (num_pairs, 2, 2) int64, x and y, mip-0 pixels
    attributes: dict[str, Any]


class _PairFile:
    """Base class of image sets and field sets: names, boxes, reading by pair.

    The file is opened for each read, so that data-loading processes share no handle.
    It costs 0.1 ms; decompressing a crop of 1024 px takes 50 ms.
    """

    KEYS: tuple[str, ...] = ()

    def __init__(
        self, path: Path, corner: tuple[int, int, int], mip: int, *, verifies: bool
    ) -> None:
        self.path = path
        self._corner = corner
        self.mip = mip
        self.verifies = verifies
        self._verified: set[int] = set()
        layout = self._layout()
        self.num_pairs = layout.shape[0]
        self.shape: tuple[int, int] = (layout.shape[-2], layout.shape[-1])
        self.attributes = layout.attributes
        self.resolution = self._resolution()
        self._boxes, self._offsets = layout.boxes, layout.offsets
        self._check()

    def __len__(self) -> int:
        return self.num_pairs

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def grid(self, index: int) -> Grid:
        """Return the frame of a pair at this mip: the grid of its fields in all stages.

        It is the box of src, less the offset by which src was moved.
        """
        self._check_index(index)
        x, y, _ = self._corner
        if self._boxes is not None:
            offset = self._frame_offset(index)
            x, y = (int(self._boxes[index, 0, axis]) - offset[axis] for axis in (0, 1))
        return Grid(self.mip, x, y, *self.shape)

    def box(self, index: int, side: int) -> Box:
        """Box that one side was read from: x0, y0, z0, x1, y1, z1, mip-0 pixels."""
        self._check_index(index)
        if self._boxes is not None:
            box = [int(value) for value in self._boxes[index, side]]
            return box[0], box[1], box[2], box[3], box[4], box[5]
        grid, z = self.grid(index), self._corner[2] + index - side
        return grid.x, grid.y, z, *grid.end, z + 1

    def sections(self, index: int) -> tuple[int, int]:
        """Return z of src and z of tgt."""
        return self.box(index, 0)[2], self.box(index, 1)[2]

    def offset(self, index: int, side: int) -> tuple[int, int]:
        """Offset of one side: (x, y), mip-0 pixels.

        For images, where they were read relative to the frame. For fields, the
        translation taken out of the vectors.
        """
        self._check_index(index)
        if self._offsets is None:
            return 0, 0
        return int(self._offsets[index, side, 0]), int(self._offsets[index, side, 1])

    def _resolution(self) -> Resolution | None:
        """nm of a mip-0 voxel along x, y, z; None if the file does not say."""
        found = self.attributes.get("resolution")
        if found is None:
            return None
        try:
            return nm_of(found)
        except (TypeError, ValueError):
            raise DatasetError(
                f"{self.path}: resolution is {found!r}: expected nm along x, y, z"
            ) from None

    def check_resolution(self, other: "ImageSet | FieldSet") -> None:
        """Refuse a set of the same location whose mip-0 pixels have another size.

        A set that does not state its resolution passes.

        Raises:
            DatasetError: the sizes differ.
        """
        if not same_resolution(self.resolution, other.resolution):
            raise DatasetError(
                f"{self.path}: its mip-0 pixels are {in_nm(self.resolution)}, those of "
                f"{other.path.name} {in_nm(other.resolution)}: mips and coordinates of "
                "the two do not mean the same; download one of them again, from a "
                "volume whose scales are mips of the other"
            )

    def identity(self, index: int) -> str:
        """Return a hash of a pair's content and location, in hex.

        It is the pair's CRC-32, continued over its boxes and offsets.
        """
        location = [*self.box(index, 0), *self.box(index, 1)]
        location += [*self.offset(index, 0), *self.offset(index, 1)]
        checksum = int(self._checksums[index]) & 0xFFFFFFFF
        return f"{zlib.crc32(repr(location).encode(), checksum):08x}"

    @cached_property
    def _checksums(self) -> np.ndarray:
        return checksums_of(self.path)

    @property
    def is_original(self) -> bool:
        """Whether the file is of the original, without any metadata."""
        return self._boxes is None

    def _frame_offset(self, index: int) -> tuple[int, int]:
        """Offset of the src box from the frame, (x, y); (0, 0) for fields."""
        return 0, 0

    def _check_index(self, index: int) -> None:
        if not 0 <= index < self.num_pairs:
            raise IndexError(f"{self.path}: pair {index} of {self.num_pairs}")

    def _check(self) -> None:
        version = self.attributes.get("format_version", format_versions.SETS)
        format_versions.check_version(
            version, format_versions.SETS, str(self.path), DatasetError
        )
        if self._stated("mip", self.mip) != self.mip:
            raise DatasetError(
                f"{self.path}: named as mip {self.mip}, but it was written at mip "
                f"{self.attributes['mip']}; give it its name back"
            )
        with self._main() as main:
            if self.verifies and stored_checksums(main.file) is None:
                logger.warning("%s: has no checksums, --verify checks none", self.path)

    @property
    def request(self) -> dict[str, Any]:
        """The request that the file was made for; {} if it does not say."""
        return self._object("request") or {}

    def _object(self, key: str) -> dict[str, Any] | None:
        """Return an attribute that must be an object; None if it is missing."""
        value = self.attributes.get(key)
        if value is not None and not isinstance(value, dict):
            raise DatasetError(f"{self.path}: {key} is {value!r}: expected an object")
        return value

    def _stated(self, key: str, default: int) -> int:
        """Return an attribute that must be a whole number."""
        value = self.attributes.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise DatasetError(
                f"{self.path}: {key} is {value!r}: expected a whole number"
            )
        return value

    def _layout(self) -> _Layout:
        with self._main() as main:
            file = main.file
            boxes = own_dataset(file, "box")
            offsets = own_dataset(file, "offset")
            shape = main.shape
            check_stored(main)
            layout = _Layout(
                shape,
                whole_numbers(boxes, (shape[0], 2, 6)),
                whole_numbers(offsets, (shape[0], 2, 2)),
                attributes_of(file),
            )
        return layout

    @contextmanager
    def _pair(self, index: int) -> Iterator[h5py.Dataset]:
        """Open the main dataset to read a pair; `verifies` checks its first read."""
        self._check_index(index)
        with self._main() as main:
            if self.verifies and index not in self._verified:
                check_pair(main.file, index)
                self._verified.add(index)
            yield main

    @contextmanager
    def _main(self) -> Iterator[h5py.Dataset]:
        with opened(self.path) as file:
            found = (own_dataset(file, key) for key in self.KEYS)
            main = next((one for one in found if one is not None), None)
            if main is None:
                raise DatasetError(
                    f"{self.path}: no dataset named {' or '.join(self.KEYS)} in it, "
                    f"found {sorted(file) or 'nothing'}"
                )
            yield main


class ImageSet(_PairFile):
    """The image pairs of one location at one mip.

    Attributes:
        path: the h5 file.
        name: location, mip and suffix, parsed from the file name.
        num_pairs: number of pairs.
        shape: (H, W) of every image, pixels of `mip`.
        mip: mip of the images.
        attributes: all attributes of the file; {} for files of the original.
        resolution: nm of a mip-0 voxel along x, y, z; None if the file does not say.
        verifies: whether the checksum of a pair is checked before its first read.
        normalization: {"kind": "raw"}, {"kind": "tissue", "reference": ...}, or
            None if the file does not say.

    Raises:
        DatasetError: the file does not exist, has no images, or images of another
            shape; or its name does not state location and mip.
    """

    KEYS = ("img", "main")

    def __init__(self, path: Path, *, verifies: bool = False) -> None:
        name = ImageSetName.parse(Path(path).name)
        if name is None:
            raise DatasetError(
                f"{path}: expected the name of an image set, "
                "x<X>_y<Y>_z<Z>_MIP<m>[_<suffix>].h5, for example x0_y0_z10_MIP2.h5"
            )
        self.name = name
        corner = name.x, name.y, name.z
        super().__init__(Path(path), corner, name.mip, verifies=verifies)
        self.normalization: dict | None = self._object("normalization")

    @property
    def has_reference(self) -> bool:
        """Whether the images were normalised by an area around the patch.

        A pale or dark patch is then far from mean 0 and std 1.
        """
        said = self.normalization or {}
        reference = said.get("reference")
        area = reference.get("area") if isinstance(reference, dict) else None
        return said.get("kind") == "tissue" and area == "around the patch"

    def read(self, index: int, rows: slice = ALL, cols: slice = ALL) -> Pair:
        """Read a pair, or a window of it; 0 where below `DARKEST` or not finite."""
        pair = self.read_stored(index, rows, cols)
        pair[~((pair >= DARKEST) & (pair < np.inf))] = 0
        return Pair(pair[0], pair[1])

    def read_stored(
        self, index: int, rows: slice = ALL, cols: slice = ALL
    ) -> np.ndarray:
        """Read a pair, or a window of it, unchanged: (2, h, w) float32."""
        with self._pair(index) as main:
            return np.asarray(main[index, :, rows, cols], dtype=np.float32)

    def read_defects(
        self, index: int, rows: slice = ALL, cols: slice = ALL
    ) -> Pair | None:
        """Read the defect masks of a pair, or of a window, bool; None if not known."""
        with self._pair(index) as main:
            masks = own_dataset(main.file, DEFECTS_KEY)
            if masks is None:
                return None
            pair = np.asarray(masks[index, :, rows, cols]) != 0
        return Pair(pair[0], pair[1])

    def has_tissue(self, index: int) -> bool:
        """Whether both sides of a pair have tissue.

        The file states it. For files of the original, the images are read.
        """
        self._check_index(index)
        with self._main() as main:
            blank = own_dataset(main.file, "blank")
            if blank is not None:
                return bool((np.asarray(blank[index]) < 1).all())
        return all(bool((image != 0).any()) for image in self.read(index))

    def _frame_offset(self, index: int) -> tuple[int, int]:
        return self.offset(index, 0)

    def _check(self) -> None:
        super()._check()
        with self._main() as main:
            if main.ndim != 4 or main.shape[1] != 2 or 0 in main.shape:
                raise DatasetError(
                    f"{self.path}: images are (num_pairs, 2, H, W), got {main.shape}"
                )
            masks = own_dataset(main.file, DEFECTS_KEY)
            if masks is not None and masks.shape != main.shape:
                raise DatasetError(
                    f"{self.path}: {DEFECTS_KEY} is {masks.shape}, expected the "
                    f"{main.shape} of the images"
                )


class FieldSet(_PairFile):
    """The fields of one image set at one mip.

    Attributes:
        path: the h5 file.
        name: stage, location, mip and checkpoint, parsed from the file name.
        num_pairs: number of pairs.
        shape: (H, W) of every field, pixels of `mip`.
        mip: mip of the fields.
        num_sides: 2 if there is a field for tgt as well, else 1.
        attributes: all attributes of the file; {} for files of the original.
        resolution: nm of a mip-0 voxel along x, y, z; None if the file does not say.
        verifies: whether the checksum of a pair is checked before its first read.

    Raises:
        DatasetError: the file does not exist, has no fields, or fields of another
            shape; or its name does not state stage, location and mip.
    """

    KEYS = ("main", "field")

    def __init__(self, path: Path, *, verifies: bool = False) -> None:
        name = FieldSetName.parse(Path(path).name)
        # The location is the name of an image set without its mip.
        images = name and ImageSetName.parse(f"{name.place}_MIP{name.mip}.h5")
        if name is None or images is None:
            raise DatasetError(
                f"{path}: expected the name of a field set, "
                "field_<STAGE>_x<X>_y<Y>_z<Z>[_<suffix>]_MIP<m>[_<checkpoint>].h5, "
                "for example field_0_x0_y0_z10_MIP2_checkpoint.h5"
            )
        self.name = name
        corner = images.x, images.y, images.z
        super().__init__(Path(path), corner, name.mip, verifies=verifies)

    def read(
        self, index: int, side: int = 0, rows: slice = ALL, cols: slice = ALL
    ) -> np.ndarray:
        """Read a field, or a window of it.

        Returns:
            (2, h, w) float32, pixels of the set's mip, channel 0 along cols.

        Raises:
            DatasetError: `side` is 1 and the set has only fields of src.
        """
        if side >= self.num_sides:
            raise DatasetError(f"{self.path}: has no field for the tgt side")
        with self._pair(index) as main:
            where = (index, side) if main.ndim == 5 else (index,)
            return np.asarray(main[(*where, ALL, rows, cols)], dtype=np.float32)

    def _check(self) -> None:
        super()._check()
        with self._main() as main:
            shape = main.shape
        if len(shape) not in (4, 5) or shape[-3] != 2 or 0 in shape or shape[1] != 2:
            raise DatasetError(
                f"{self.path}: fields are (num_pairs, 2, H, W), downloaded ones "
                f"(num_pairs, 2, 2, H, W), got {shape}"
            )
        self.num_sides = len(shape) - 3

    @property
    def is_of_pyramid(self) -> bool:
        """Whether a trained pyramid wrote the fields; else they were downloaded."""
        return "weights_sha256" in self.request


def find_image_sets(folder: Path, *, verifies: bool = False) -> list[ImageSet]:
    """Open the image sets of a folder, sorted by name.

    A warning names h5 files that are neither image sets nor field sets by their name.

    Args:
        folder: folder of the image sets.
        verifies: whether the sets check each pair before its first read.

    Raises:
        DatasetError: the folder does not exist, or an image set cannot be used.
    """
    return [
        ImageSet(path, verifies=verifies)
        for path in _visible_h5_files(folder)
        if ImageSetName.parse(path.name) or _is_stray(path)
    ]


def find_field_sets(folder: Path) -> list[FieldSet]:
    """Open the field sets of a folder, sorted by name.

    Raises:
        DatasetError: the folder does not exist, or a field set cannot be used.
    """
    return [
        FieldSet(path)
        for path in _visible_h5_files(folder)
        if FieldSetName.parse(path.name)
    ]


def _visible_h5_files(folder: Path) -> list[Path]:
    check_dataset(folder)
    return sorted(path for path in folder.glob("*.h5") if path.name[0] != ".")


def _is_stray(path: Path) -> bool:
    if FieldSetName.parse(path.name) is None:
        logger.warning(
            "%s: left out: its name is neither of an image set nor of a field set", path
        )
    return False
