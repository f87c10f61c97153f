"""Write CloudVolumes: complete ones on local disk, or section by section anywhere.

Chunks are written atomically. Object stores do so themselves; on local disk a chunk is
written elsewhere, synced and renamed. Chunks are not compressed, so that any web server
can serve them.
"""

import json
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cloudfiles import CloudFiles
from cloudvolume import CloudVolume

from metroem.errors import DatasetError
from metroem.geometry.grid import Grid
from metroem.imaging.normalize import coarsen_image, round_greys
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
from metroem.io.volume_info import check_encoding
from metroem.io.zarr_n5 import open_arrays

logger = logging.getLogger(__name__)

# Key of an info under which MetroEM stores its own metadata.
NOTES_KEY = "metroem"
# Notes of fields as corgie stores them.
FIELD_NOTES = {
    "kind": "fields",
    "direction": "pull",
    "channel_order": "yx",
    "field_unit": "relative",
}
_CHUNK_PX = 256
_STAGING = ".writing-"
# A block is written within this time, s.
_STAGING_S = 24 * 3600
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
        layer_type: "image", or "segmentation" for labels, as viewers show it.
    """

    num_channels: int
    dtype: str
    mip: int
    area: Grid
    sections: range
    resolution: tuple[float, float, float]
    notes: Mapping[str, Any] = field(default_factory=dict)
    layer_type: str = "image"

    def info(self, path: str, mips: int = 1) -> dict[str, Any]:
        """Make the info, with mip 0 and all mips up to those that are written.

        Args:
            path: path of the volume.
            mips: number of mips that are written, from `mip` on.
        """
        info = CloudVolume.create_new_info(
            num_channels=self.num_channels,
            layer_type=self.layer_type,
            data_type=self.dtype,
            encoding="raw",
            # Scales are named by it: 4_4_40, not 4.0_4.0_40.0.
            resolution=[int(nm) if nm == int(nm) else nm for nm in self.resolution],
            voxel_offset=(self.area.x, self.area.y, self.sections.start),
            chunk_size=(_CHUNK_PX, _CHUNK_PX, 1),
            volume_size=(*self.area.shape, len(self.sections)),
        )
        info = _with_mips(path, info, self.mip + mips).info
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
                _put_json(self._files, self._folder, "info", wanted.info(self.path))
        self._volume = Volume(self.path, flag=flag)
        _check_not_redirected(self._volume, self.path, flag)
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
            _describe(self._files, self._folder, sources, entry)

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
        index = self._volume.index_of(self._mip)
        _upload(
            *(self._volume.info, index, self._folder or self.path),
            *(layers, hull, sections.start),
        )


class BlockWriter:
    """Writes blocks of a volume, each as whole chunks; several processes may.

    Writing a block again replaces its files by the same bytes. A volume that exists may
    only differ in its bounds. It grows to what is wanted and never shrinks, and its
    chunks keep their names, unless its content is to be replaced.

    Attributes:
        path: path of the volume, with a scheme.
        flag: the flag that gave the path, for messages.
        mips: the mips that are written.

    Args:
        path: path of the volume, as cloud-volume opens it.
        wanted: properties of the volume; its area begins at whole pixels of all mips.
        flag: the flag that gave the path, for messages.
        mips: number of mips that are written, from `wanted.mip` on.
        block_px: side of a block, pixels of `wanted.mip`.
        chunk_size: size of a chunk along rows, cols and z. In coarser mips they are
            smaller where a block would not consist of whole ones.
        encoding: of the chunks, as cloud-volume names it.
        replaces: all that exists will be written again: the volume gets the bounds that
            are wanted, so that nothing old shows beyond them.

    Raises:
        UsageError: the encoding cannot hold the type.
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
        replaces: bool = False,
    ) -> None:
        check_destination(flag, path)
        check_encoding(encoding, wanted.dtype)
        prepare_storage()
        self.path, self.flag = cloud_path(path), flag
        self.mips = range(wanted.mip, wanted.mip + mips)
        self._folder = local_folder(self.path)
        if self._folder is not None:
            self.path = f"file://{self._folder}"
            make_folder(self._folder)
            _remove_staging(self._folder)
        with storage_errors(flag, self.path, doing="written"):
            self._info = wanted.info(self.path, mips)
            for mip, scale in enumerate(self._info["scales"]):
                side = max(block_px >> max(mip - wanted.mip, 0), 1)
                rows, cols, layers = chunk_size
                size = [math.gcd(rows, side), math.gcd(cols, side), layers]
                scale |= {"encoding": encoding, "chunk_sizes": [size]}
                if encoding == "compressed_segmentation":
                    scale["compressed_segmentation_block_size"] = [8, 8, 8]
            self._files = CloudFiles(self.path.removeprefix("precomputed://"))
            found: Any = self._files.get_json("info")
            if found is None and (arrays := open_arrays("", split_format(path)[1])):
                raise DatasetError(
                    f"{flag} {path}: is a {arrays.form} volume, which is only read; "
                    "give another path"
                )
            if found is not None:
                self._check_kind(found)
                if replaces:
                    self._warn_of_hidden(found)
                else:
                    self._grow_to_hold(found)
            if found != self._info:
                _put_json(self._files, self._folder, "info", self._info)

    def write(self, values: np.ndarray, grid: Grid, sections: range) -> None:
        """Write a block at one of the mips.

        Args:
            values: (n, C, H, W) in the dtype of the volume.
            grid: its area; its mip is written.
            sections: its range of z.

        Raises:
            DatasetError: the block does not consist of whole chunks, or storage fails.
        """
        with storage_errors(self.flag, self.path, doing="written"):
            _upload(
                *(self._info, grid.mip, self._folder or self.path),
                *(values, grid, sections.start),
            )

    def describe(self, sources: Sequence[str], entry: Mapping[str, Any]) -> None:
        """Add to the provenance, as `SectionWriter.describe` does."""
        with storage_errors(self.flag, self.path, doing="written"):
            _describe(self._files, self._folder, sources, entry)

    def _check_kind(self, found: dict[str, Any]) -> None:
        """Refuse an existing volume that differs in more than its bounds."""
        if differences := describe_differences(_kind(found), _kind(self._info)):
            raise DatasetError(
                f"{self.flag} {self.path}: already exists, with {differences}; delete "
                "it, or give another path"
            )

    def _warn_of_hidden(self, found: dict[str, Any]) -> None:
        """Say that the volume that exists reached further."""
        (start, end), (new_start, new_end) = map(_bounds, (found, self._info))
        if (start < new_start).any() or (end > new_end).any():
            logger.warning(
                "%s: held voxels %s to %s, and is replaced by %s to %s",
                *(self.path, start.tolist(), end.tolist()),
                *(new_start.tolist(), new_end.tolist()),
            )

    def _grow_to_hold(self, found: dict[str, Any]) -> None:
        """Extend the bounds to those of the volume that exists.

        Raises:
            DatasetError: chunks would get other names.
        """
        for scale, old in zip(self._info["scales"], found["scales"], strict=True):
            starts = np.array([old["voxel_offset"], scale["voxel_offset"]])
            ends = starts + np.array([old["size"], scale["size"]])
            if (np.diff(starts, axis=0) % scale["chunk_sizes"][0]).any():
                raise DatasetError(
                    f"{self.flag} {self.path}: already exists and begins at voxel "
                    f"{starts[0].tolist()}, asked for: {starts[1].tolist()}, which is "
                    f"not whole chunks of {scale['chunk_sizes'][0]} away; give another "
                    "path"
                )
            scale["voxel_offset"] = starts.min(0).tolist()
            scale["size"] = (ends.max(0) - starts.min(0)).tolist()


@dataclass(frozen=True)
class MipsWriter:
    """Writes mips of a volume whose info lists them when all are complete.

    Until `finish` no program can open what is half written. Several processes may write
    different blocks. Writing a block again replaces its files by the same bytes.

    Attributes:
        path: path of the volume, with a scheme.
        flag: the flag that gave the path, for messages.
        info: the info of the complete volume.
        scales: by mip that is written, its index in the info.
    """

    path: str
    flag: str
    info: Mapping[str, Any]
    scales: Mapping[int, int]

    @classmethod
    def of_new(
        cls, path: str, flag: str, wanted: NewVolume, mips: int, chunk_px: int
    ) -> "MipsWriter":
        """Prepare a new volume of raw chunks, one section thick.

        Args:
            path: path of the volume, as cloud-volume opens it.
            flag: the flag that gave it, for messages.
            wanted: its properties; its mip is 0.
            mips: number of mips.
            chunk_px: side of a chunk.

        Raises:
            DatasetError, UsageError: no volume can be written there.
        """
        check_destination(flag, path)
        prepare_storage()
        path = cloud_path(path)
        info = wanted.info(path)
        info["scales"][0]["chunk_sizes"] = [[chunk_px, chunk_px, 1]]
        for _ in range(1, mips):
            info["scales"].append(_next_scale(info["scales"][-1]))
        return cls(_with_scheme(path), flag, info, {mip: mip for mip in range(mips)})

    @classmethod
    def of_existing(cls, volume: Volume, mip: int, mips: range) -> "MipsWriter":
        """Prepare mips that a volume lacks; all that it has stays as it is.

        Args:
            volume: the volume, precomputed.
            mip: the stored mip that they are made of.
            mips: the mips to add; `mip` + 1 or coarser.

        Raises:
            DatasetError, UsageError: no volume can be written there.
        """
        check_destination(volume.flag, volume.path)
        _check_not_redirected(volume, volume.path, volume.flag)
        info = {**volume.info, "scales": list(volume.info["scales"])}
        scale, scales = info["scales"][volume.index_of(mip)], {}
        for coarser in range(mip + 1, mips.stop):
            scale = _next_scale(scale)
            if coarser in mips and coarser not in volume.mips:
                scales[coarser] = len(info["scales"])
                info["scales"].append(scale)
        return cls(_with_scheme(volume.path), volume.flag, info, scales)

    def found(self) -> dict[str, Any] | None:
        """Read the info that is there; None if there is none."""
        with storage_errors(self.flag, self.path):
            return self._files.get_json("info")

    def write(self, values: np.ndarray, grid: Grid, sections: range) -> None:
        """Write whole chunks of one of the mips.

        Args:
            values: (n, C, H, W) in the dtype of the volume.
            grid: its area; its mip is written.
            sections: its range of z.

        Raises:
            DatasetError: the block does not consist of whole chunks, or storage fails.
        """
        place = local_folder(self.path) or self.path
        with storage_errors(self.flag, self.path, doing="written"):
            _upload(
                *(dict(self.info), self.scales[grid.mip], place),
                *(values, grid, sections.start),
            )

    def begin(self) -> None:
        """Make the folder on local disk; delete what killed runs left."""
        if (folder := local_folder(self.path)) is not None:
            make_folder(folder)
            for leftover in folder.glob(f"{_STAGING}*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def finish(self, sources: Sequence[str], entry: Mapping[str, Any]) -> None:
        """Write the provenance and then the info, which opens the volume.

        Args:
            sources: paths that the values come from.
            entry: record of the processing, JSON-able.
        """
        folder = local_folder(self.path)
        with storage_errors(self.flag, self.path, doing="written"):
            _describe(self._files, folder, sources, entry)
            _put_json(self._files, folder, "info", self.info)

    @property
    def _files(self) -> Any:
        return CloudFiles(self.path.removeprefix("precomputed://"))


def _check_not_redirected(volume: Volume, path: str, flag: str) -> None:
    """Refuse to write to a path whose info leads elsewhere."""
    if file_address(volume.location, "") != file_address(path, ""):
        raise DatasetError(
            f"{flag} {path}: its info says that it is now at {volume.location}; give "
            "that path"
        )


def _with_scheme(path: str) -> str:
    """Return the path of a volume, file:// if it is a local folder."""
    folder = local_folder(path)
    return path if folder is None else f"file://{folder}"


def _next_scale(scale: Mapping[str, Any]) -> dict[str, Any]:
    """Make the scale of the next mip: half the pixels in x and y, raw chunks."""
    start = [int(at) for at in scale["voxel_offset"]]
    end = [at + int(size) for at, size in zip(start, scale["size"], strict=True)]
    x, y, z = scale["resolution"]
    resolution = [2 * x, 2 * y, z]
    start[:2] = (at >> 1 for at in start[:2])
    end[:2] = (-(-at >> 1) for at in end[:2])
    return {
        "key": "_".join(map(str, resolution)),
        "resolution": resolution,
        "voxel_offset": start,
        "size": [b - a for a, b in zip(start, end, strict=True)],
        "chunk_sizes": scale["chunk_sizes"][:1],
        "encoding": "raw",
    }


def _bounds(info: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return first and end voxel of mip 0, x, y, z."""
    start = np.array(info["scales"][0]["voxel_offset"])
    return start, start + info["scales"][0]["size"]


def _kind(info: Mapping[str, Any]) -> dict[str, Any]:
    """List what an info says but for its bounds; values of scales by their number."""
    flat = {key: value for key, value in info.items() if key != "scales"}
    for mip, scale in enumerate(info.get("scales", [])):
        flat |= {
            f"{key} of mip {mip}": value
            for key, value in scale.items()
            if key not in ("size", "voxel_offset")
        }
    return flat


def _upload(
    info: dict[str, Any],
    index: int,
    place: Path | str,
    values: np.ndarray,
    area: Grid,
    z: int,
) -> None:
    """Write whole chunks of a volume.

    Args:
        info: of the volume.
        index: of the scale in the info.
        place: folder of the volume, into which each file is renamed, or its cloud path.
        values: (n, C, H, W).
        area: area of the values.
        z: the first section.
    """
    x, y = area.x >> area.mip, area.y >> area.mip
    num_sections, _, rows, cols = values.shape
    box = slice(x, x + rows), slice(y, y + cols), slice(z, z + num_sections)
    how: dict[str, Any] = {"compress": False, "progress": False, "provenance": {}}
    if isinstance(place, str):
        volume: Any = CloudVolume(place, index, info=info, **how)
        volume[box] = values.transpose(2, 3, 0, 1)
        return
    with _renamed_into(place) as staging:
        volume = CloudVolume(f"file://{staging}", index, info=info, **how)
        volume[box] = values.transpose(2, 3, 0, 1)


def _describe(
    files: Any, folder: Path | None, sources: Sequence[str], entry: Mapping[str, Any]
) -> None:
    """Add sources and an entry to the provenance of a volume."""
    found: Any = files.get_json("provenance") or {}
    empty = {"description": "", "owners": [], "sources": [], "processing": []}
    provenance = {**empty, **found}
    provenance["sources"] = sorted({*provenance["sources"], *sources})
    if entry not in provenance["processing"]:
        provenance["processing"] = [*provenance["processing"], dict(entry)]
    if provenance != found:
        _put_json(files, folder, "provenance", provenance)


def _put_json(
    files: Any, folder: Path | None, name: str, content: Mapping[str, Any]
) -> None:
    """Write a JSON file of a volume; on local disk into its folder, atomically."""
    text = json.dumps(content, indent=2, sort_keys=True).encode()
    if folder is None:
        files.put(name, text, content_type="application/json", cache_control="no-cache")
        return
    with _renamed_into(folder) as staging:
        (staging / name).write_bytes(text)


def _remove_staging(folder: Path) -> None:
    """Delete what killed runs left; writers that are at work have newer folders."""
    oldest = time.time() - _STAGING_S
    for leftover in folder.glob(f"{_STAGING}*"):
        with suppress(FileNotFoundError):  # another process deletes it, too
            if leftover.stat().st_mtime < oldest:
                shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _renamed_into(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; after the block its files replace those of `folder`.

    Each file is synced and renamed.
    """
    # Named before it is made, so that a signal at any moment leaves nothing behind.
    staging = folder / f"{_STAGING}{uuid.uuid4().hex}"
    try:
        staging.mkdir()
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
        coarse = round_greys(coarsen_image(image, mip)[0, 0], section.dtype)
        at_z = slice(z + index, z + index + 1)
        volume[x:x_end, y:y_end, at_z] = coarse[..., None, None]


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
