"""Write CloudVolumes: complete ones on local disk, or section by section anywhere.

Chunks are written atomically. Object stores do so themselves; on local disk a chunk is
written elsewhere, synced and renamed. Chunks are not compressed, so that any web server
can serve them.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cloudfiles import CloudFiles
from cloudvolume import CloudVolume

from metroem.errors import DatasetError
from metroem.geometry.grid import Grid
from metroem.imaging.normalize import coarsen_image
from metroem.io.cloud_errors import file_address, storage_errors
from metroem.io.cloud_paths import (
    check_destination,
    cloud_path,
    local_folder,
    split_format,
)
from metroem.io.cloud_retry import prepare_storage
from metroem.io.files import make_folder, replace_file
from metroem.io.resume import describe_differences
from metroem.io.volume import Volume, crop_array
from metroem.io.zarr_n5 import open_arrays

# Key of an info under which MetroEM stores its own metadata.
NOTES_KEY = "metroem"
_CHUNK_PX = 256
_STAGING = ".writing-"
# cloud-files also finds a chunk under its name with one of these endings.
_COMPRESSED = (".gz", ".br", ".zstd", ".xz", ".bz2")


def write_volume(
    path: Path,
    sections: np.ndarray,
    mips: int,
    *,
    resolution: tuple[int, int, int] = (8, 8, 40),
    offset: tuple[int, int, int] = (0, 0, 0),
    chunk_px: int = 128,
) -> None:
    """Write sections as a local CloudVolume, with chunks of one section.

    Rows become the volume's x, and cols its y. Coarser mips average only tissue. In
    uint8 volumes averaged tissue is at least 1, since 0 means no data.

    Args:
        path: folder of the volume; made if it does not exist.
        sections: (num_sections, H, W) uint8 or float32, 0 = no data.
        mips: number of mips to write, 1 or more.
        resolution: nm per mip-0 pixel along x, y, z.
        offset: first mip-0 pixel along x, y, z; a multiple of 2**(mips - 1).
        chunk_px: side of a chunk in the plane.

    Raises:
        DatasetError: the sections have another shape or type, or `mips` is below 1.
    """
    known = sections.dtype in (np.dtype(np.uint8), np.dtype(np.float32))
    if sections.ndim != 3 or not known or mips < 1:
        raise DatasetError(
            f"{path}: sections are (num_sections, H, W) uint8 or float32 and mips "
            f">= 1, got {sections.dtype} {sections.shape} and {mips} mips"
        )
    info = CloudVolume.create_new_info(
        num_channels=1,
        layer_type="image",
        data_type=str(sections.dtype),
        encoding="raw",
        resolution=resolution,
        voxel_offset=offset,
        chunk_size=(chunk_px, chunk_px, 1),
        volume_size=(*sections.shape[1:], len(sections)),
    )
    volume = _with_mips(cloud_path(str(path)), info, mips)
    volume.commit_info()
    for mip in range(mips):
        _write_mip(volume.cloudpath, mip, sections)


@dataclass(frozen=True)
class NewVolume:
    """Properties of a volume to create.

    Attributes:
        num_channels: 1 for images, 2 for fields.
        dtype: data type of its values.
        mip: the mip that is written.
        area: the area that it covers, at mip 0.
        sections: its range of z.
        resolution: nm of a mip-0 voxel along x, y, z.
        notes: what its values mean; stored in its info. An existing volume with other
            notes is not written to.
    """

    num_channels: int
    dtype: str
    mip: int
    area: Grid
    sections: range
    resolution: tuple[float, float, float]
    notes: Mapping[str, Any] = field(default_factory=dict)

    def info(self, path: str) -> dict[str, Any]:
        """Make the info, with mip 0 and all mips up to the one that is written."""
        info = CloudVolume.create_new_info(
            num_channels=self.num_channels,
            layer_type="image",
            data_type=self.dtype,
            encoding="raw",
            resolution=self.resolution,
            voxel_offset=(self.area.x, self.area.y, self.sections.start),
            chunk_size=(_CHUNK_PX, _CHUNK_PX, 1),
            volume_size=(*self.area.shape, len(self.sections)),
        )
        info = _with_mips(path, info, self.mip + 1).info
        return {**info, NOTES_KEY: dict(self.notes)} if self.notes else info


class SectionWriter:
    """Writes a volume, new or existing, section by section.

    Existing values are kept: a section that would change values other than 0 (no data)
    is refused. To resume a killed run, make the same calls again. They write the same
    values, so its finished and unfinished sections are not refused.

    Args:
        path: path of the volume, as cloud-volume opens it.
        wanted: properties of the volume; an existing volume must agree with them.
        flag: the flag that gave the path, for messages.
        overwrite: whether existing values may be changed.

    Raises:
        DatasetError: a volume of another kind exists there, or storage fails.
    """

    def __init__(
        self, path: str, wanted: NewVolume, *, flag: str, overwrite: bool = False
    ) -> None:
        check_destination(flag, path)
        prepare_storage()
        self.path, self.flag = cloud_path(path), flag
        self._overwrite, self._mip = overwrite, wanted.mip
        self._folder = local_folder(self.path)
        if self._folder is not None:
            self.path = f"file://{self._folder}"
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.glob(f"{_STAGING}*"):  # of killed runs
                shutil.rmtree(leftover, ignore_errors=True)
        with storage_errors(flag, self.path, doing="written"):
            self._files = CloudFiles(self.path.removeprefix("precomputed://"))
            is_new = self._files.get("info") is None
            if is_new and (arrays := open_arrays("", split_format(self.path)[1])):
                raise DatasetError(
                    f"{flag} {path}: is a {arrays.form} volume, which is only read; "
                    "give another path"
                )
            if is_new:
                self._put_json("info", wanted.info(self.path))
        self._volume = Volume(self.path, flag=flag)
        if file_address(self._volume.location, "") != file_address(self.path, ""):
            raise DatasetError(
                f"{flag} {path}: its info says that it is now at "
                f"{self._volume.location}; give that path"
            )
        if not is_new:
            self._check(wanted)

    def put(self, section: np.ndarray, grid: Grid, z: int) -> bool:
        """Write a section, unless the volume already has it.

        Args:
            section: (C, H, W) in the dtype of the volume.
            grid: its area, at the mip that is written.
            z: its z.

        Returns:
            Whether anything was written.

        Raises:
            DatasetError: the section lies outside of the volume, would change existing
                values, or storage fails.
        """
        self._check_inside(grid, z)
        hull, layers = self._volume.chunks_around(grid, z)
        stored = self._volume.read(hull, layers)
        existing = crop_array(stored[z - layers.start], hull, grid)
        if np.array_equal(existing, section):
            return False
        differs = (existing != 0).any(0) & (existing != section).any(0)
        if differs.any() and not self._overwrite:
            raise DatasetError(
                f"{self.flag} {self.path}: section {z} holds other values at "
                f"{differs.mean():.1%} of x {grid.x}...{grid.end[0]}, y {grid.y}..."
                f"{grid.end[1]} (mip-0 pixels); give --overwrite to replace them, or "
                "another path"
            )
        changed = stored.copy()
        crop_array(changed[z - layers.start], hull, grid)[:] = section
        with storage_errors(self.flag, self.path, doing="written"):
            self._write(changed, hull, layers)
        return True

    def describe(self, sources: Sequence[str], entry: Mapping[str, Any]) -> None:
        """Add sources and an entry to the provenance, unless it already has them.

        Args:
            sources: paths that the values come from.
            entry: record of the processing, JSON-able.
        """
        with storage_errors(self.flag, self.path, doing="written"):
            found: Any = self._files.get_json("provenance") or {}
            empty = {"description": "", "owners": [], "sources": [], "processing": []}
            provenance = {**empty, **found}
            provenance["sources"] = sorted({*provenance["sources"], *sources})
            if entry not in provenance["processing"]:
                provenance["processing"] = [*provenance["processing"], dict(entry)]
            if provenance != found:
                self._put_json("provenance", provenance)

    def _check(self, wanted: NewVolume) -> None:
        """Refuse an existing volume that does not agree with `wanted`."""
        volume = self._volume
        volume.check_channels(wanted.num_channels, "what is to be written")
        volume.check_mip("mip", self._mip)
        if volume.dtype != np.dtype(wanted.dtype):
            raise DatasetError(
                f"{self.flag} {self.path}: already exists as {volume.dtype}, "
                f"{wanted.dtype} is to be written; give another path"
            )
        if not np.allclose(volume.resolution, wanted.resolution, rtol=0.01):
            raise DatasetError(
                f"{self.flag} {self.path}: already exists with mip-0 voxels of "
                f"{volume.resolution} nm, to be written are {wanted.resolution} nm; "
                "give another path"
            )
        notes = volume.info.get(NOTES_KEY)
        if notes and (differences := describe_differences(notes, wanted.notes)):
            raise DatasetError(
                f"{self.flag} {self.path}: already exists, with {differences}; give "
                "the same flags, or another path"
            )

    def _check_inside(self, grid: Grid, z: int) -> None:
        """Refuse a section or an area outside of the volume (DatasetError)."""
        if self._volume.clip(grid) != grid or not self._volume.holds(z):
            raise DatasetError(
                f"{self.flag} {self.path}: does not reach section {z}, x {grid.x}..."
                f"{grid.end[0]}, y {grid.y}...{grid.end[1]} (mip-0 pixels); give "
                "another path, or make it again with --like and the volume of the "
                "images"
            )

    def _write(self, layers: np.ndarray, hull: Grid, sections: range) -> None:
        """Write whole chunks, (num_sections, C, H, W), at `hull` and `sections`."""
        x, y = hull.x >> hull.mip, hull.y >> hull.mip
        box = (
            slice(x, x + hull.rows),
            slice(y, y + hull.cols),
            slice(sections.start, sections.stop),
        )
        values = layers.transpose(2, 3, 0, 1)
        if self._folder is None:
            self._open(self.path)[box] = values
            return
        with _renamed_into(self._folder) as staging:
            self._open(f"file://{staging}")[box] = values

    def _open(self, path: str) -> Any:
        return CloudVolume(
            path,
            mip=self._volume.index_of(self._mip),
            info=self._volume.info,
            compress=False,
            progress=False,
        )

    def _put_json(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=2, sort_keys=True)
        if self._folder is None:
            self._files.put(
                name,
                text.encode(),
                content_type="application/json",
                cache_control="no-cache",
            )
            return
        with _renamed_into(self._folder) as staging:
            (staging / name).write_text(text)


class BlockWriter:
    """Writes blocks of a volume, each as whole chunks; several processes may.

    Writing a block again replaces its files by the same bytes. A volume that exists may
    only differ in its bounds: it grows to what is wanted, and chunks keep their names.

    Args:
        path: path of the volume, as cloud-volume opens it.
        wanted: properties of the volume. Its area and its sections must begin where
            chunks of all mips do.
        flag: the flag that gave the path, for messages.
        mips: number of mips that are written, from `wanted.mip` on.
        block_px: side of a block, pixels of `wanted.mip`.
        chunk_size: largest size of a chunk along rows, cols and z. Chunks are smaller
            if a block would not consist of whole ones.
        encoding: of the chunks, as cloud-volume names it.

    Raises:
        DatasetError: a volume of another kind exists there, or storage fails.
    """

    def __init__(
        self,
        path: str,
        wanted: NewVolume,
        *,
        flag: str,
        block_px: int,
        chunk_size: tuple[int, int, int],
        mips: int = 1,
        encoding: str = "raw",
    ) -> None:
        check_destination(flag, path)
        prepare_storage()
        self.path, self.flag, self._wanted = cloud_path(path), flag, wanted
        self._folder = local_folder(self.path)
        self.mips = range(wanted.mip, wanted.mip + mips)
        if self._folder is not None:
            make_folder(self._folder)
        info = CloudVolume.create_new_info(
            num_channels=wanted.num_channels,
            layer_type="image",
            data_type=wanted.dtype,
            encoding=encoding,
            resolution=wanted.resolution,
            voxel_offset=(wanted.area.x, wanted.area.y, wanted.sections.start),
            chunk_size=chunk_size,
            volume_size=(*wanted.area.shape, len(wanted.sections)),
        )
        with storage_errors(flag, self.path, doing="written"):
            info = _with_mips(self.path, info, self.mips.stop).info
            for mip, scale in enumerate(info["scales"]):
                scale["encoding"] = encoding
                side = max(block_px >> max(mip - wanted.mip, 0), 1)
                rows, cols, layers = chunk_size
                size = [math.gcd(rows, side), math.gcd(cols, side), layers]
                scale["chunk_sizes"] = [size]
            if wanted.notes:
                info[NOTES_KEY] = dict(wanted.notes)
            files = CloudFiles(self.path.removeprefix("precomputed://"))
            found: Any = files.get_json("info")
            if found is not None:
                self._check_grows(found, info)
            if found != info:
                self._put_info(files, info)
        self._info = info

    def write(self, values: np.ndarray, grid: Grid, sections: range) -> None:
        """Write a block at one of the mips.

        Args:
            values: (n, C, H, W) in the dtype of the volume.
            grid: its area; its mip is written.
            sections: its range of z.

        Raises:
            DatasetError: the block does not consist of whole chunks, or storage fails.
        """
        x, y = grid.x >> grid.mip, grid.y >> grid.mip
        box = (
            slice(x, x + grid.rows),
            slice(y, y + grid.cols),
            slice(sections.start, sections.stop),
        )
        stored = values.transpose(2, 3, 0, 1)
        with storage_errors(self.flag, self.path, doing="written"):
            if self._folder is None:
                self._open(self.path, grid.mip)[box] = stored
                return
            with _renamed_into(self._folder) as staging:
                self._open(f"file://{staging}", grid.mip)[box] = stored

    def _open(self, path: str, mip: int) -> Any:
        return CloudVolume(
            path,
            mip=mip,
            info=self._info,
            compress=False,
            progress=False,
            provenance={},
        )

    def _check_grows(self, found: dict[str, Any], info: dict[str, Any]) -> None:
        """Refuse a volume that exists, unless only its bounds differ."""
        bounds = ("size", "voxel_offset")
        kinds = []
        for one in (found, info):
            scales = [
                {key: value for key, value in scale.items() if key not in bounds}
                for scale in one.get("scales", [])
            ]
            kinds.append(json.dumps({**one, "scales": scales}, sort_keys=True))
        if kinds[0] != kinds[1]:
            before, now = (json.loads(kind) for kind in kinds)
            differences = describe_differences(_flat(before), _flat(now))
            raise DatasetError(
                f"{self.flag} {self.path}: already exists, with {differences}; delete "
                "it, or give another path"
            )

    def _put_info(self, files: Any, info: dict[str, Any]) -> None:
        text = json.dumps(info, indent=2, sort_keys=True)
        if self._folder is None:
            content_type = "application/json"
            files.put("info", text.encode(), content_type, cache_control="no-cache")
        else:
            replace_file(self._folder / "info", text.encode())


def _flat(info: Mapping[str, Any]) -> dict[str, Any]:
    """Name the values of an info, those of its scales by their number."""
    flat = {key: value for key, value in info.items() if key != "scales"}
    for mip, scale in enumerate(info.get("scales", [])):
        flat |= {f"{key} of mip {mip}": value for key, value in scale.items()}
    return flat


@contextmanager
def _renamed_into(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; after the block its files replace those of `folder`.

    Each file is synced and renamed.
    """
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
    try:
        yield staging
        for written in sorted(p for p in staging.rglob("*") if p.is_file()):
            with written.open("rb") as file:
                os.fsync(file.fileno())
            target = folder / written.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(written, target)
            for ending in _COMPRESSED:
                target.with_name(target.name + ending).unlink(missing_ok=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _with_mips(path: str, info: dict[str, Any], mips: int) -> Any:
    """Make cloud-volume's object of a new volume, with all mips in its info."""
    volume: Any = CloudVolume(path, info=info, progress=False)
    # Add all scales before any data; cloud-volume adds no scale twice.
    for mip in range(1, mips):
        volume.add_scale((2**mip, 2**mip, 1))
    return volume


def _write_mip(cloud_path: str, mip: int, sections: np.ndarray) -> None:
    """Write all sections, given at mip 0, at one mip of a volume."""
    volume: Any = CloudVolume(cloud_path, mip=mip, progress=False, compress=False)
    x, y, z = (int(start) for start in volume.bounds.minpt)
    x_end, y_end, _ = (int(end) for end in volume.bounds.maxpt)
    for index, section in enumerate(sections):
        image = torch.from_numpy(section.astype(np.float32))[None, None]
        coarse = coarsen_image(image, mip)[0, 0].numpy()
        if section.dtype == np.uint8:
            coarse = np.where(coarse > 0, np.clip(np.round(coarse), 1, 255), 0)
        at_z = slice(z + index, z + index + 1)
        volume[x:x_end, y:y_end, at_z] = coarse.astype(section.dtype)[..., None, None]


class Notes:
    """JSON objects stored by name in a folder at a cloud path.

    Each is written whole or not at all; two writers of one name leave the note of one
    of them.

    Attributes:
        path: the folder, with a scheme.
    """

    def __init__(self, path: str) -> None:
        prepare_storage()
        self.path = path
        self._folder = local_folder(path)
        self._files = CloudFiles(path, progress=False)

    def names(self, prefix: str = "") -> list[str]:
        """List the files below the folder, including files of volumes, sorted.

        Args:
            prefix: with which their names begin; the storage lists no others.
        """
        return sorted(self._files.list(prefix))

    def read(self, names: list[str]) -> dict[str, dict]:
        """Read objects by name; missing and incomplete ones are left out."""
        found = {}
        files: Any = self._files.get(names)
        for file in files:
            try:
                found[file["path"]] = json.loads(file["content"] or b"")
            except ValueError:
                continue
        return found

    def write(self, name: str, note: dict) -> None:
        """Store an object under a name.

        Raises:
            StorageError: the disk is full, or may not be written to.
        """
        content = json.dumps(note, indent=1, sort_keys=True).encode()
        self.put(name, content, "application/json")

    def put(self, name: str, content: bytes, content_type: str) -> None:
        """Store a file of another kind under a name; errors as in `write`."""
        if self._folder is None:
            self._files.put(name, content, content_type=content_type)
            return
        make_folder((self._folder / name).parent)
        replace_file(self._folder / name, content)

    def delete(self, prefix: str) -> None:
        """Delete the files whose names begin with a prefix."""
        self._files.delete(self.names(prefix))

    def remove(self, names: Sequence[str]) -> None:
        """Delete files by name; missing ones are passed over."""
        self._files.delete(names)
