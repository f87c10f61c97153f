"""Read sections from image files: folders of images, TIFF stacks, arrays and volumes.

An image has y along its rows and x along its cols; volumes have x first. `swap_axes`
is the one place that turns one into the other. When a stack is opened, only names and
headers are read. Sections are read in bands of rows, so that a section may be larger
than memory where its format can be read in parts.
"""

import errno
import logging
import math
import re
import struct
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from PIL import Image

from metroem.errors import DatasetError, first_line
from metroem.geometry.grid import Grid
from metroem.imaging.normalize import round_greys
from metroem.io.cloud_paths import check_source, cloud_path, local_folder
from metroem.io.image_volume import ImageVolume, content_digest

logger = logging.getLogger(__name__)

TIFF_SUFFIXES = (".tif", ".tiff")
SUFFIXES = (*TIFF_SUFFIXES, ".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".jp2", ".webp")
# Rows that are read at a time, unless the parts of a file are larger.
BAND_ROWS = 512
# Parts of a file (strips, tiles) of more rows are not decoded again for each band.
_LARGEST_PART = 2048
_KINDS = "buif"
_OF_STORAGE = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
# What the libraries raise for files that are broken.
_BROKEN = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError),
    *(NotImplementedError, RuntimeError, OverflowError, AttributeError),
    *(struct.error, zlib.error, tifffile.TiffFileError),
)
_UNITS_NM = {
    **dict.fromkeys(("nm", "nanometer", "nanometers"), 1.0),
    **dict.fromkeys(("um", "µm", "μm", "\\u00b5m", "micron", "microns"), 1e3),
    **dict.fromkeys(("micrometer", "micrometers"), 1e3),
    **dict.fromkeys(("mm", "millimeter"), 1e6),
    **dict.fromkeys(("å", "angstrom"), 0.1),
}


# nm along x, y, z; None for what is not stated.
StatedNm = tuple[float | None, float | None, float | None]


class UnreadableSection(DatasetError):
    """A section that cannot be read, or that is not an image of grey levels."""


@dataclass(frozen=True)
class Section:
    """A section, as the header of its file states it.

    Attributes:
        name: of its file, or of its page, for messages.
        shape: rows (y) and cols (x) of the image.
        dtype: data type of its grey levels.
        num_channels: 1, or more if its channels have to be compared: RGB, alpha.
        stamp: size and time of its file; other values mean another content.
        band_rows: rows that are best read at a time.
    """

    name: str
    shape: tuple[int, int]
    dtype: np.dtype
    num_channels: int = 1
    stamp: tuple[int, int] = (0, 0)
    band_rows: int = BAND_ROWS


class SectionStack(ABC):
    """Sections by z, read in bands of rows.

    Attributes:
        path: of the files.
        sections: by z, the sections that can be read, as far as their headers tell.
        broken: by z, the file and why it cannot be read.
        resolution: nm of a voxel along x, y, z; None for what is not stated.
        corner: first mip-0 pixel along x and y.
        digest: of the content, where there are no stamps.
    """

    path: str
    sections: dict[int, Section]
    broken: dict[int, str]
    resolution: StatedNm = (None, None, None)
    corner: tuple[int, int] = (0, 0)
    digest: str = ""

    @cached_property
    def span(self) -> range:
        """The range of z from the first to the last section."""
        found = sorted({*self.sections, *self.broken})
        return range(found[0], found[-1] + 1)

    @cached_property
    def missing(self) -> dict[int, str]:
        """By z, why a section inside of the span cannot be read."""
        gaps = set(self.span) - self.sections.keys() - self.broken.keys()
        return dict(sorted({**self.broken, **dict.fromkeys(gaps, "no file")}.items()))

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Rows and cols that hold every section."""
        shapes = [section.shape for section in self.sections.values()]
        return max(rows for rows, _ in shapes), max(cols for _, cols in shapes)

    @cached_property
    def band_rows(self) -> int:
        """Rows that are best read at a time."""
        return max(section.band_rows for section in self.sections.values())

    def layers(self) -> list[range]:
        """Group the span into sections that are best read together."""
        return [range(z, z + 1) for z in self.span]

    def read(self, sections: range, rows: range) -> np.ndarray:
        """Read a band of sections that can be read.

        Args:
            sections: range of z; consecutive ones of one layer.
            rows: rows (y) of the images.

        Returns:
            (n, X, Y), as volumes have them: x is cols of the images, y their rows. Rows
            below the end of a smaller image are left out.

        Raises:
            UnreadableSection: the file is broken, or is not grey.
        """
        (z,) = sections
        section = self.sections[z]
        with _reading(section.name):
            inner = range(rows.start, min(rows.stop, section.shape[0]))
            image = self._read_rows(z, inner) if len(inner) else None
            if image is None:
                return np.zeros((1, section.shape[1], 0), section.dtype)
            return swap_axes(as_grey(image))[None]

    @abstractmethod
    def _read_rows(self, z: int, rows: range) -> np.ndarray:
        """Read rows of an image: (rows, cols), or (rows, cols, channels)."""


def swap_axes(image: np.ndarray) -> np.ndarray:
    """Turn an image, rows = y, into a section of a volume, rows = x; or back."""
    return np.ascontiguousarray(image.swapaxes(-1, -2))


def as_image(section: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Turn a section, rows = x, into an image of a type, rows = y.

    Args:
        section: (X, Y) grey levels; floats are rounded if the type needs it.
        dtype: of the image.
    """
    if section.dtype != dtype:
        section = round_greys(torch.from_numpy(section), dtype)
    return swap_axes(section)


def as_grey(image: np.ndarray) -> np.ndarray:
    """Take the grey levels of an image, 0 where it is transparent.

    Args:
        image: (H, W), or (H, W, C): grey, grey and alpha, RGB, or RGB and alpha.

    Returns:
        (H, W) in the type of the image; True and False become 255 and 0.

    Raises:
        UnreadableSection: its channels differ, or it has another number of them.
    """
    if image.ndim == 3:
        channels = np.moveaxis(image, 2, 0)
        if len(channels) > 4:
            raise UnreadableSection(
                f"has {len(channels)} channels; expected one, or equal ones"
            )
        grey = channels[0]
        if len(channels) > 2:
            differs = (grey != channels[1]) | (grey != channels[2])
            if len(channels) == 4:  # what is transparent has no colour
                differs &= channels[3] != 0
            if differs.any():
                row, col = (int(at[0]) for at in np.nonzero(differs))
                red, green, blue = (int(one[row, col]) for one in channels[:3])
                raise UnreadableSection(
                    f"is in colour: red {red}, green {green}, blue {blue} at row {row} "
                    f"of those read, col {col}; expected grey levels: convert it"
                )
        if len(channels) in (2, 4):
            grey = np.where(channels[-1] == 0, 0, grey).astype(grey.dtype)
        image = grey
    return image.astype(np.uint8) * 255 if image.dtype == bool else image


def open_stack(path: str, flag: str = "SECTIONS") -> SectionStack:
    """Open sections in any of the forms that `metroem import` takes.

    Args:
        path: a folder of images, a TIFF, a .npy, an image, or a volume (precomputed,
            OME-Zarr, Zarr, N5), also on cloud storage.
        flag: name of the argument, for messages.

    Raises:
        DatasetError: there is nothing of that kind, or two files are one section.
    """
    folder = local_folder(path)
    if folder is None or _is_volume(folder):
        return VolumeSections(path, flag)
    if folder.is_dir():
        return ImageFolder(folder, flag)
    if not folder.exists():
        raise DatasetError(f"{flag} {path}: no such file or folder; check the path")
    suffix = folder.suffix.lower()
    if suffix == ".npy":
        return ArrayFile(folder, flag)
    if suffix in TIFF_SUFFIXES:
        return TiffStack(folder, flag)
    if suffix in SUFFIXES:
        return ImageFolder(folder.parent, flag, only=folder.name)
    raise DatasetError(
        f"{flag} {path}: is a {suffix or 'file without an ending'}; expected a folder "
        "of images, a TIFF, a .npy of (z, rows, cols), or a volume: precomputed, "
        "OME-Zarr, Zarr, N5"
    )


class ImageFolder(SectionStack):
    """A folder with an image for each section; see `number_sections` for their z."""

    def __init__(self, folder: Path, flag: str, only: str | None = None) -> None:
        self.path = str(folder / only if only else folder)
        self._folder = folder
        names = [only] if only else _image_names(folder, flag)
        self._names = number_sections(names, f"{flag} {self.path}")
        self.sections, self.broken, nm = {}, {}, (None, None, None)
        for z, name in self._names.items():
            try:
                with _reading(name):
                    section, stated = _image_header(folder / name)
            except UnreadableSection as error:
                self.broken[z] = str(error)
                continue
            self.sections[z] = section
            if any(stated):
                nm = stated
        self.resolution = nm
        _drop_other_types(self)
        self._open: tuple[int, Any] = (-1, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": (-1, None)}

    def _read_rows(self, z: int, rows: range) -> np.ndarray:
        if self._open[0] != z:  # one section at a time is open, or in memory
            path = self._folder / self._names[z]
            is_tiff = path.suffix.lower() in TIFF_SUFFIXES
            self._open = -1, None  # free the one before
            self._open = z, _TiffFile(path) if is_tiff else _decode(path)
        image = self._open[1]
        if isinstance(image, _TiffFile):
            return image.pages[0].read(rows)
        return _crop(image, rows)


class TiffStack(SectionStack):
    """A TIFF whose pages are sections, from z 0 on."""

    def __init__(self, path: Path, flag: str) -> None:
        self.path, self._file = str(path), path
        self.sections, self.broken = {}, {}
        self._tiff: _TiffFile | None = None
        try:
            with _reading(path.name):
                tiff = self._tiff = _TiffFile(path)
        except UnreadableSection as error:
            raise DatasetError(f"{flag} {path.parent}/{error}") from error
        self.resolution = tiff.resolution
        for z, page in enumerate(tiff.pages):
            try:
                with _reading(page.name):
                    self.sections[z] = page.header()
            except UnreadableSection as error:
                self.broken[z] = str(error)
        if not self.sections:
            first = next(iter(self.broken.values()), "it has no pages")
            raise DatasetError(f"{flag} {path}: no page can be read: {first}")
        _drop_other_types(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tiff": None}

    def _read_rows(self, z: int, rows: range) -> np.ndarray:
        if self._tiff is None:
            self._tiff = _TiffFile(self._file)
        return self._tiff.read(z, rows)


class ArrayFile(SectionStack):
    """A .npy of (z, rows, cols), or one section, (rows, cols); read by memory map."""

    def __init__(self, path: Path, flag: str) -> None:
        self.path, self._file = str(path), path
        try:
            with _reading(path.name):
                array = np.load(path, mmap_mode="r", allow_pickle=False)
        except UnreadableSection as error:
            raise DatasetError(f"{flag} {path.parent}/{error}") from error
        if (
            array.ndim not in (2, 3)
            or 0 in array.shape
            or array.dtype.kind not in _KINDS
        ):
            raise DatasetError(
                f"{flag} {path}: holds {array.dtype} of shape {array.shape}; expected "
                "grey levels, (z, rows, cols)"
            )
        self._array: Any = None  # opened by each process
        dtype = np.dtype(np.uint8) if array.dtype == bool else array.dtype
        rows, cols = array.shape[-2:]
        stamp, dtype = _stamp(path), dtype.newbyteorder("=")
        self.sections = {
            z: Section(f"{path.name}[{z}]", (rows, cols), dtype, 1, stamp)
            for z in range(len(array) if array.ndim == 3 else 1)
        }
        self.broken = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}

    def _read_rows(self, z: int, rows: range) -> np.ndarray:
        if self._array is None:
            array = np.load(self._file, mmap_mode="r", allow_pickle=False)
            self._array = array if array.ndim == 3 else array[None]
        return np.array(_crop(self._array[z], rows))


class VolumeSections(SectionStack):
    """The sections of a volume, at its finest mip or another one.

    Attributes:
        mip: the mip that is read.
        area: area of all sections, at that mip.
    """

    def __init__(self, path: str, flag: str, mip: int | None = None) -> None:
        check_source(flag, cloud_path(path))
        self._flag, self._volume = flag, ImageVolume(path, flag=flag)
        self.path = self._volume.path
        self._volume.check_channels(1, "a volume of grey levels")
        self.mip = self._volume.mips[0] if mip is None else mip
        self._volume.check_mip(flag, self.mip)
        (x, x_end), (y, y_end) = self._volume.bounds_of(self.mip)
        step = 1 << self.mip
        self.area = Grid(self.mip, x * step, y * step, x_end - x, y_end - y)
        self.corner = self.area.x, self.area.y
        held = self._volume.sections_at(self.mip)
        _, (_, chunk) = self._volume.chunk_layout(self.mip)
        dtype = self._volume.pixel_type(self.mip)
        self.sections = {
            z: Section(
                *(f"section {z}", (y_end - y, x_end - x), dtype),
                band_rows=max(BAND_ROWS // chunk, 1) * chunk,
            )
            for z in held
        }
        self.broken = {}
        if tuple(self._volume.resolution) != (1, 1, 1):  # taken where none is stated
            self.resolution = self._volume.resolution
        self.digest = content_digest(self._volume, held)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_volume": None}

    @property
    def volume(self) -> ImageVolume:
        """The volume; a copy of this object in another process opens it again."""
        if self._volume is None:
            self._volume = ImageVolume(self.path, flag=self._flag)
        return self._volume

    def layers(self) -> list[range]:
        """Group sections by the layer of chunks that stores them."""
        return self.volume.slabs(self.mip, list(self.span))

    def read(self, sections: range, rows: range) -> np.ndarray:
        """Read a band; a volume has its axes in the order of the result.

        Raises:
            DatasetError: the volume cannot be read. A server that is away for a while
                is no reason to take its sections for broken.
        """
        inner = range(rows.start, min(rows.stop, self.area.cols))
        window = self.area.crop(0, inner.start, self.area.rows, len(inner))
        return self.volume.read(window, sections)[:, 0]

    def _read_rows(self, z: int, rows: range) -> np.ndarray:
        return swap_axes(self.read(range(z, z + 1), rows)[0])


def number_sections(names: Sequence[str], what: str) -> dict[int, str]:
    """Find the z of image files from the numbers in their names.

    Names that only differ in numbers, of which one counts the files with few gaps, have
    that number as z. Other files are numbered from 0 in natural order: 2 before 10.

    Args:
        names: of the files, in any order.
        what: the folder, for messages.

    Raises:
        DatasetError: two files have the same number.
    """
    ordered = sorted(names, key=_natural)
    stems = [re.split(r"(\d+)", Path(name).stem) for name in ordered]
    texts = {tuple(stem[::2]) for stem in stems}
    counted = {index: name for index, name in enumerate(ordered)}
    if len(ordered) == 1:
        (stem,) = stems
        is_z = len(stem) > 1 and re.search(r"(?i)z[_-]?$", stem[-3]) and not stem[-1]
        return {int(stem[-2]): ordered[0]} if is_z else counted
    if len(texts) > 1:
        if any(len(stem) > 1 for stem in stems):
            logger.info(
                "%s: names differ in more than numbers (%s, %s): natural order, from "
                "z 0 on; missing sections are not noticed",
                *(what, *_unlike(ordered, stems)),
            )
        return counted
    columns = list(zip(*(map(int, stem[1::2]) for stem in stems), strict=True))
    varying = [column for column in columns if len(set(column)) > 1] or [
        column for column in columns[-1:]
    ]
    unique = [column for column in varying if len(set(column)) == len(column)]
    if not unique:
        numbers = varying[-1] if varying else (0,) * len(ordered)
        twice = next(number for number, n in Counter(numbers).items() if n > 1)
        same = [n for n, at in zip(ordered, numbers, strict=True) if at == twice]
        raise DatasetError(
            f"{what}: {same[0]} and {same[1]} are both section {twice}; expected one "
            "image for each section: take one of them away (tiles of a section have to "
            "be stitched before)"
        )
    for column in reversed(unique):
        num_gaps = max(column) - min(column) + 1 - len(column)
        if 2 * num_gaps <= len(column):
            return dict(sorted(zip(column, ordered, strict=True)))
    logger.info(
        "%s: numbers in names are far apart (%s, %s): natural order, from z 0 on; "
        "missing sections are not noticed",
        *(what, ordered[0], ordered[1]),
    )
    return counted


def _unlike(names: list[str], stems: list[list[str]]) -> tuple[str, str]:
    """Pick two names whose texts differ."""
    first = stems[0][::2]
    other = next(n for n, s in zip(names, stems, strict=True) if s[::2] != first)
    return names[0], other


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts numbers in names by their value."""
    parts = re.split(r"(\d+)", name.lower())
    return [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in parts]


def _image_names(folder: Path, flag: str) -> list[str]:
    """List the images of a folder; name what is passed over."""
    visible = [one for one in folder.iterdir() if not one.name.startswith(".")]
    num_hidden = sum(1 for _ in folder.iterdir()) - len(visible)
    folders = sorted(one.name for one in visible if one.is_dir())
    files = [one for one in visible if not one.is_dir()]
    images = [one.name for one in files if one.suffix.lower() in SUFFIXES]
    others = sorted(one.name for one in files if one.suffix.lower() not in SUFFIXES)
    if not images:
        inside = f"sub-folders ({_some(folders)})" if folders else _some(others)
        raise DatasetError(
            f"{flag} {folder}: holds {inside or 'nothing'}; expected images "
            f"({', '.join(SUFFIXES)}){': give one of them' if folders else ''}"
        )
    skipped = [*(f"{name}/" for name in folders), *others]
    if num_hidden:
        skipped.append(f"{num_hidden} hidden")
    if skipped:
        logger.info("%s: passed over: %s", folder, _some(skipped))
    return images


def _some(names: Sequence[str], most: int = 10) -> str:
    """List names; of many, the first ones and the number of others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _drop_other_types(stack: SectionStack) -> None:
    """Move sections of another type than most have to the broken ones."""
    found = Counter(section.dtype for section in stack.sections.values())
    if len(found) < 2:
        return
    (usual, _), *_ = found.most_common(1)
    for z, section in list(stack.sections.items()):
        if section.dtype != usual:
            del stack.sections[z]
            stack.broken[z] = f"{section.name}: is {section.dtype}, most are {usual}"


def _stamp(path: Path) -> tuple[int, int]:
    """Return size and time of a file."""
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _is_volume(folder: Path) -> bool:
    """Whether a folder holds a precomputed volume, a Zarr or an N5."""
    metadata = "info", "zarr.json", ".zattrs", ".zarray", "attributes.json"
    return folder.is_dir() and any((folder / name).is_file() for name in metadata)


def _crop(image: np.ndarray, rows: range) -> np.ndarray:
    return image[rows.start : rows.stop]


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn errors of a block that reads a section into one that names its file."""
    try:
        yield
    except UnreadableSection as error:
        raise UnreadableSection(f"{name}: {error}") from error
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno in _OF_STORAGE:
            raise  # not the fault of this file
        raise UnreadableSection(
            f"{name}: cannot be read ({first_line(error)[:200]})"
        ) from error


def _image_header(
    path: Path,
) -> tuple[Section, StatedNm]:
    """Read the header of an image of one section, and the nm that it states."""
    if path.suffix.lower() in TIFF_SUFFIXES:
        tiff = _TiffFile(path)
        if len(tiff.pages) != 1:
            raise UnreadableSection(
                f"has {len(tiff.pages)} pages; expected one section"
            )
        return tiff.pages[0].header(), tiff.resolution
    with _pillow(path) as image:
        dtype, num_channels = _type_of_mode(image)
        shape = image.height, image.width
        if image.format == "PNG" and num_channels > 1 and _png_bits(path) == 16:
            raise UnreadableSection(  # Pillow would drop half of the bits
                "has 16 bit in several channels; expected one: save it as grey"
            )
    section = Section(path.name, shape, dtype, num_channels, _stamp(path))
    return section, (None, None, None)


def _png_bits(path: Path) -> int:
    """Return the bits of a channel that the header of a PNG states."""
    with path.open("rb") as file:
        return file.read(25)[24]


@contextmanager
def _pillow(path: Path) -> Iterator[Image.Image]:
    """Open an image of any size by Pillow."""
    most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # sections are large
    try:
        with Image.open(path) as image:
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = most


def _type_of_mode(image: Image.Image) -> tuple[np.dtype, int]:
    """Return the type and the number of channels that `_pixels` gives."""
    mode = image.mode
    if mode == "1" or mode == "L":
        return np.dtype(np.uint8), 2 if "transparency" in image.info else 1
    if mode.startswith("I;16"):
        return np.dtype(np.uint16), 1
    if mode in ("I", "F"):
        return np.dtype(np.int32 if mode == "I" else np.float32), 1
    if mode in ("LA", "La", "P", "PA", "RGB", "RGBA"):
        return np.dtype(np.uint8), 4
    raise UnreadableSection(f"is a {mode} image; expected grey levels: convert it")


def _pixels(image: Image.Image) -> np.ndarray:
    """Return the pixels of an image, with a palette resolved."""
    _, num_channels = _type_of_mode(image)
    if num_channels == 1:
        array = np.asarray(image)
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    if num_channels == 2:
        return np.asarray(image.convert("LA"))
    return np.asarray(image.convert("RGBA"))


def _decode(path: Path, page: int = 0) -> np.ndarray:
    """Decode a whole image by Pillow."""
    with _pillow(path) as image:
        if page:
            image.seek(page)
        return _pixels(image)


class _TiffFile:
    """The sections of a TIFF, whatever program wrote it; the file is not held open.

    Attributes:
        pages: its sections.
        resolution: nm along x, y, z that ImageJ or OME metadata state.

    Raises:
        UnreadableSection: it has several channels, or both times and depths.
    """

    def __init__(self, path: Path) -> None:
        with tifffile.TiffFile(path) as tiff:
            self.resolution = _stated_nm(tiff)
            self.pages = _tiff_pages(path, tiff)
        self._last = 0

    def read(self, number: int, rows: range) -> np.ndarray:
        """Read rows of a page; pages read before are no longer held in memory."""
        if number != self._last:
            self.pages[self._last].forget()
            self._last = number
        return self.pages[number].read(rows)


def _tiff_pages(path: Path, tiff: Any) -> list["_TiffPage"]:
    """List the sections of a TIFF; see `_TiffFile` for the errors."""
    _check_chain(tiff)
    series = tiff.series
    is_one = tiff.is_imagej or tiff.is_ome or (tiff.is_shaped and len(series) == 1)
    if not is_one:  # pages may differ in size; small copies are left out
        pages = [one for one in tiff.pages if not (one.is_reduced or one.is_mask)]
        return [
            _TiffPage(path, page, _name(path, number, len(pages)))
            for number, page in enumerate(pages)
        ]
    if len(series) > 1:
        logger.info("%s: has %d images; the first is taken", path.name, len(series))
    image = series[0].levels[0]
    sizes = dict(zip(image.axes, image.shape, strict=True))
    extra = {a: n for a, n in sizes.items() if a not in "YXS" and n > 1}
    if "C" in extra or not re.fullmatch(r"[^YXS]*YXS?", image.axes):
        raise UnreadableSection(
            f"has axes {image.axes} of {image.shape}: channels; expected sections of "
            "grey levels: save one channel"
        )
    if len(extra) > 1:
        raise UnreadableSection(
            f"has axes {image.axes} of {image.shape}; expected one beside rows and "
            "cols: save one time, or one depth"
        )
    count = math.prod(extra.values())
    if tiff.is_imagej and count < (stated := _stated_images(tiff)):
        raise UnreadableSection(
            f"is cut short: states {stated} images, holds {count} whole ones"
        )
    offset, page = image.dataoffset, image.keyframe
    if offset is not None and page.photometric != 0 and image.dtype.kind in "uif":
        # One block of bytes. ImageJ has only the first page of more than 4 GB.
        tail = [sizes[axis] for axis in "YXS" if axis in sizes]
        dtype = image.dtype.newbyteorder(tiff.byteorder)
        end = offset + count * math.prod(tail) * dtype.itemsize
        if (found := path.stat().st_size) < end:
            raise UnreadableSection(f"is cut short: {found} bytes, expected {end}")
        stack = np.memmap(path, dtype, "r", offset, (count, *tail))
        return [
            _TiffPage(path, page, _name(path, number, count), one)
            for number, one in enumerate(stack)
        ]
    if len(image.pages) != count:
        raise UnreadableSection(
            f"has {len(image.pages)} pages for {count} sections; save a page for each"
        )
    return [
        _TiffPage(path, page, _name(path, number, count))
        for number, page in enumerate(image.pages)
    ]


def _check_chain(tiff: Any) -> None:
    """Refuse a TIFF whose list of pages leads beyond its end.

    Each page says where the next one is. Of a file that is cut short, tifffile lists
    the pages before the cut, as if they were all.

    Raises:
        UnreadableSection: the last page that can be read is not the last one.
    """
    count, at = len(tiff.pages), tiff.pages.next_page_offset
    if at is not None:
        tiff.filehandle.seek(at)
        link = tiff.filehandle.read(tiff.tiff.offsetsize)
        if len(link) < tiff.tiff.offsetsize or any(link):
            raise UnreadableSection(f"is cut short: more pages than {count} are stated")


def _name(path: Path, number: int, count: int) -> str:
    """Name a page for messages."""
    return path.name if count == 1 else f"{path.name} page {number}"


class _TiffPage:
    """A page of a TIFF that is read in parts, as far as it can.

    Attributes:
        name: of the page, for messages.
    """

    def __init__(
        self, path: Path, page: Any, name: str, mapped: np.ndarray | None = None
    ) -> None:
        self.name, self._path, self._page, self._mapped = name, path, page, mapped
        self._whole: np.ndarray | None = None
        if page is not None:  # tifffile reads these now, while its file is open
            page = self._page = page.aspage()
            self._jpegtables, _ = page.jpegtables, page.dataoffsets
            self._source = page.parent.filehandle.path

    def header(self) -> Section:
        """Read what the page states.

        Raises:
            UnreadableSection: it is cut short, or is not an image of grey levels.
        """
        name, stamp = self.name, _stamp(self._path)
        if self._mapped is not None:
            rows, cols, num_channels = (*self._mapped.shape, 1)[:3]
            dtype = self._mapped.dtype.newbyteorder("=")
            return Section(name, (rows, cols), dtype, num_channels, stamp)
        page = self._page
        if page is None:
            raise UnreadableSection("its page is missing")
        ends = zip(page.dataoffsets, page.databytecounts, strict=True)
        end = max((offset + count for offset, count in ends), default=0)
        if end > stamp[0]:
            raise UnreadableSection(
                f"is cut short: {stamp[0]} bytes, expected at least {end}"
            )
        shape = page.imagelength, page.imagewidth
        if self._is_plain:
            num_channels = page.samplesperpixel
            dtype, bands = np.dtype(page.dtype), self._band_rows
            return Section(name, shape, dtype, num_channels, stamp, bands)
        with _pillow(self._path) as image:
            image.seek(page.index)
            dtype, num_channels = _type_of_mode(image)
            return Section(name, shape, dtype, num_channels, stamp)

    def read(self, rows: range) -> np.ndarray:
        """Read rows: (rows, cols), or (rows, cols, channels)."""
        if self._mapped is not None:
            image = np.array(_crop(self._mapped, rows))
            return image.astype(image.dtype.newbyteorder("="))
        page = self._page
        if self._whole is None:
            if not self._is_plain:
                self._whole = _decode(self._path, page.index)
            elif self._part_rows > _LARGEST_PART:
                self._whole = self._read_parts(range(page.imagelength))
        if self._whole is not None:
            return _crop(self._whole, rows)
        return self._read_parts(rows)

    def forget(self) -> None:
        """Free what is in memory."""
        self._whole = None

    @property
    def _is_plain(self) -> bool:
        """Whether tifffile decodes it, without other packages; else Pillow has to."""
        page = self._page
        return (
            page.photometric in (0, 1, 2)
            and page.bitspersample in (8, 16, 32, 64)
            and page.dtype is not None
            and page.dtype.kind in _KINDS
            and (
                page.compression == 1
                or _has(tifffile.TIFF.DECOMPRESSORS, page.compression)
            )
            and (
                page.predictor == 1 or _has(tifffile.TIFF.UNPREDICTORS, page.predictor)
            )
            and (page.planarconfig == 1 or page.samplesperpixel == 1)
            and page.imagedepth == 1
            and not page.is_subsampled
        )

    @property
    def _part_rows(self) -> int:
        """Rows of a strip or a tile."""
        page = self._page
        rows = page.tilelength if page.is_tiled else page.rowsperstrip
        return min(rows, page.imagelength)

    @property
    def _band_rows(self) -> int:
        """Rows that are best read at a time: whole strips or tiles."""
        part = self._part_rows
        return BAND_ROWS if part > _LARGEST_PART else -(-BAND_ROWS // part) * part

    def _read_parts(self, rows: range) -> np.ndarray:
        """Decode the strips or tiles that hold some rows."""
        page, step = self._page, self._part_rows
        across = -(-page.imagewidth // page.tilewidth) if page.is_tiled else 1
        samples = page.samplesperpixel
        band = np.zeros((len(rows), page.imagewidth, samples), page.dtype)
        how = {"jpegtables": self._jpegtables} if self._jpegtables else {}
        with open(self._source, "rb") as file:
            for index in range(
                rows.start // step * across, -(-rows.stop // step) * across
            ):
                file.seek(page.dataoffsets[index])
                content = file.read(page.databytecounts[index])
                if not content:  # not stored: no data
                    continue
                part, place, _ = page.decode(content, index, **how)
                if part is None:
                    continue
                part, row, col = part[0], place[2], place[3]
                width = min(part.shape[1], page.imagewidth - col)
                if len(part) < min(step, page.imagelength - row):
                    raise UnreadableSection(f"is cut short at row {row + len(part)}")
                first, end = max(row, rows.start), min(row + len(part), rows.stop)
                band[first - rows.start : end - rows.start, col : col + width] = part[
                    first - row : end - row, :width
                ]
        if page.photometric == 0:  # 0 is white
            highest = np.iinfo(page.dtype.name).max if page.dtype.kind == "u" else 0
            band = highest - band
        return band[..., 0] if samples == 1 else band


def _has(codecs: Any, key: int) -> bool:
    """Whether tifffile has a codec, of its own or of imagecodecs."""
    with suppress(KeyError):
        return codecs[key] is not None
    return False


def _stated_images(tiff: Any) -> int:
    """Return the number of images that ImageJ's metadata state."""
    return int((tiff.imagej_metadata or {}).get("images", 1))


def _stated_nm(tiff: Any) -> StatedNm:
    """Read the nm of a voxel that ImageJ or OME-TIFF metadata state."""
    if tiff.is_imagej:
        about: Mapping[str, Any] = tiff.imagej_metadata or {}
        unit = _UNITS_NM.get(str(about.get("unit", "")).lower())
        sides: list[float | None] = []
        for tag in ("XResolution", "YResolution"):
            found = tiff.pages[0].tags.get(tag)
            number = found.value[0] / found.value[1] if found and found.value[1] else 0
            sides.append(round(unit / number, 6) if unit and number else None)
        spacing = about.get("spacing")
        depth = float(spacing) * unit if unit and spacing else None
        return sides[0], sides[1], depth
    if tiff.is_ome:
        pixels = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", tiff.ome_metadata or "")
        found = []
        for axis in "XYZ":
            text = pixels[0] if pixels else ""
            size = re.search(rf'PhysicalSize{axis}="([^"]+)"', text)
            unit = re.search(rf'PhysicalSize{axis}Unit="([^"]+)"', text)
            nm = _UNITS_NM.get(unit[1].lower() if unit else "µm")
            found.append(float(size[1]) * nm if size and nm else None)
        return found[0], found[1], found[2]
    return None, None, None
