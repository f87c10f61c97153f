"""Write the sections of a volume as image files: the command `metroem export-images`.

Each section is one file, z0007.png, so that `metroem import` finds the same z. Files
are written atomically, and those that are done are kept.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from metroem.errors import DatasetError
from metroem.export.requests import ExportImagesRequest
from metroem.geometry.grid import Grid, Resolution
from metroem.io.files import (
    atomic_write,
    lock,
    lock_path,
    remove_partial_files,
    replace_file,
    try_writing,
)
from metroem.io.image_files import BAND_ROWS, as_image
from metroem.io.image_volume import ImageVolume, content_digest
from metroem.io.resume import as_json, describe_differences
from metroem.utils.progress import progress, size_in_words

logger = logging.getLogger(__name__)

_RECORD = ".export-images.json"
_TYPES = {"png": ("uint8", "uint16"), "tiff": ("uint8", "uint16", "float32")}
_ENDINGS = {"png": ".png", "tiff": ".tif"}
# Sections that share chunks are read together up to so many bytes. A larger section is
# read band by band; PNG then holds it whole.
_MOST_BYTES = 2**29
# A TIFF of more bytes is a BigTIFF.
_MOST_TIFF_BYTES = 4 * 10**9
_STRIP_ROWS = BAND_ROWS


def export_images(request: ExportImagesRequest) -> None:
    """Write each section of a volume as a file.

    Raises:
        DatasetError: the volume lacks the mip, an area or a section, or its type does
            not fit the format; or the folder has files of another export.
        StorageError: a file cannot be written.
    """
    volume = ImageVolume(request.cv_path)
    volume.check_channels(1, "a volume of grey levels")
    volume.check_mip("--mip", request.mip)
    grid, sections = _area(volume, request), _sections(volume, request)
    dtype = _stored_type(volume, request)
    folder, ending = request.dst_folder, _ENDINGS[request.format]
    width = max(4, len(str(sections[-1])))
    paths = {z: folder / f"z{z:0{width}d}{ending}" for z in sections}
    try_writing(folder, "--dst_folder")
    with lock(lock_path(folder / _RECORD)):
        for path in paths.values():
            remove_partial_files(path)
        wanted = {
            "cv_path": volume.path,
            "content": content_digest(volume, volume.extent()[1], grid),
            "mip": grid.mip,
            "area": [grid.x, grid.y, grid.rows, grid.cols],
            "format": request.format,
        }
        _check_record(folder, wanted, list(paths.values()))
        todo = [z for z in sections if not paths[z].exists()]
        num_bytes = grid.rows * grid.cols * dtype.itemsize
        logger.info(
            "%s: %d sections of %d x %d px (x, y) at mip %d, %s, z %d...%d; %s to "
            "read%s",
            *(volume.path, len(sections), grid.rows, grid.cols, grid.mip, dtype),
            *(sections[0], sections[-1], size_in_words(len(todo) * num_bytes)),
            f"; {len(sections) - len(todo)} are done already"
            if len(todo) < len(sections)
            else "",
        )
        for z, bands in progress(
            _iter_bands(volume, grid, todo, dtype),
            "export, sections",
            total=len(todo),
        ):
            _write(paths[z], bands, grid, dtype, volume.resolution)
    logger.info(
        "%s: %s to %s", folder, paths[sections[0]].name, paths[sections[-1]].name
    )


def _iter_bands(
    volume: ImageVolume, grid: Grid, todo: list[int], dtype: np.dtype
) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    """Read sections, each chunk once if sections that share chunks fit into memory.

    Yields:
        z, and the bands of its image from top to bottom, (rows = y, cols = x).
    """
    most = _MOST_BYTES // (grid.rows * grid.cols * dtype.itemsize)
    for slab in volume.slabs(grid.mip, todo):
        if not most:
            for z in (z for z in slab if z in todo):
                yield z, _read_bands(volume, grid, z, dtype)
            continue
        for start in range(slab.start, slab.stop, most):
            part = range(start, min(start + most, slab.stop))
            for z, section in zip(part, volume.read(grid, part)[:, 0], strict=True):
                if z in todo:
                    yield z, iter([as_image(section, dtype)])


def _read_bands(
    volume: ImageVolume, grid: Grid, z: int, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Read a section that is larger than memory may be; yields bands of its image."""
    for col in range(0, grid.cols, BAND_ROWS):
        window = grid.crop(0, col, grid.rows, min(BAND_ROWS, grid.cols - col))
        yield as_image(volume.read(window, range(z, z + 1))[0, 0], dtype)


def _write(
    path: Path,
    bands: Iterator[np.ndarray],
    grid: Grid,
    dtype: np.dtype,
    resolution: Resolution,
) -> None:
    """Write an image, atomically; a TIFF band by band, with the size of a pixel."""
    with atomic_write(path) as partial:
        if path.suffix == ".png":
            Image.fromarray(np.concatenate(list(bands))).save(partial, "PNG")
            return
        x, y, z = resolution
        per_nm = 1 / (x * 2**grid.mip), 1 / (y * 2**grid.mip)
        shape = grid.cols, grid.rows
        strips = (
            band[row : row + _STRIP_ROWS].tobytes()
            for band in bands
            for row in range(0, len(band), _STRIP_ROWS)
        )
        tifffile.imwrite(
            partial,
            strips,
            shape=shape,
            dtype=dtype,
            rowsperstrip=_STRIP_ROWS,
            bigtiff=shape[0] * shape[1] * dtype.itemsize > _MOST_TIFF_BYTES,
            photometric="minisblack",
            # In the words of ImageJ, which most programs read.
            description=f"ImageJ=1.54f\nunit=nm\nspacing={z:g}\n",
            resolution=per_nm,
            resolutionunit="NONE",
            metadata=None,
            software="metroem",
        )


def _area(volume: ImageVolume, request: ExportImagesRequest) -> Grid:
    """Return the area that the flags choose, at its mip.

    Raises:
        DatasetError: part of it is outside of the volume.
    """
    (x, x_end), (y, y_end) = volume.bounds_of(request.mip)
    step, size = 1 << request.mip, request.patch_size
    if request.x_offset is not None:
        x = request.x_offset // step
    if request.y_offset is not None:
        y = request.y_offset // step
    rows, cols = (size, size) if size else (x_end - x, y_end - y)
    if min(rows, cols) < 1:
        raise DatasetError(
            f"--x_offset {x * step} --y_offset {y * step}: is behind the end of "
            f"{volume.path}, x {x_end * step}, y {y_end * step} (mip-0 pixels)"
        )
    grid = Grid(request.mip, x * step, y * step, rows, cols)
    volume.check_covers(grid, "the area")
    return grid


def _sections(volume: ImageVolume, request: ExportImagesRequest) -> range:
    """Return the sections that the flags choose.

    Raises:
        DatasetError: one is outside of the volume, or below 0.
    """
    held = volume.sections_at(volume.source_mip(request.mip))
    start = held.start if request.z_start is None else request.z_start
    end = held.stop if request.z_end is None else request.z_end
    if not held.start <= start < end <= held.stop:
        raise DatasetError(
            f"--z_start {start} --z_end {end}: {volume.path} holds sections "
            f"{held.start}...{held.stop - 1}"
        )
    if start < 0:
        raise DatasetError(
            f"{volume.path}: begins at z {start}, and names of files hold no z below "
            "0; give --z_start 0 or above"
        )
    return range(start, end)


def _stored_type(volume: ImageVolume, request: ExportImagesRequest) -> np.dtype:
    """Return the type of the files: that of the volume (DatasetError)."""
    if str(volume.dtype) not in (known := _TYPES[request.format]):
        raise DatasetError(
            f"--format {request.format}: holds {', '.join(known)}, and "
            f"{volume.path} is {volume.dtype}"
        )
    return volume.dtype


def _check_record(folder: Path, wanted: dict, paths: list[Path]) -> None:
    """Refuse a folder with files of another export; else record this one.

    Raises:
        DatasetError: the folder holds such files.
    """
    record = folder / _RECORD
    if not record.exists():
        if other := next((path for path in paths if path.exists()), None):
            raise DatasetError(
                f"{other}: is there already, of another program; give another "
                "--dst_folder, or delete it"
            )
        replace_file(record, json.dumps(as_json(wanted), indent=1).encode())
        return
    try:
        found = json.loads(record.read_text())
    except ValueError as error:
        raise DatasetError(f"{record}: unreadable ({error}); delete it") from error
    if differences := describe_differences(found, wanted):
        raise DatasetError(
            f"{folder}: holds another export: {differences}; give another "
            "--dst_folder, or delete its files"
        )
