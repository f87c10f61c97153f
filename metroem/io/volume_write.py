"""Writing CloudVolumes: whole ones on local disk, and section by section anywhere.

A chunk is there whole or not at all: object stores take it so, and on local disk it
is written elsewhere, synced and renamed. Chunks are not compressed, so that any web
server can serve them.
"""

import json
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
from metroem.io.resume import describe_differences
from metroem.io.volume import Volume, crop_array
from metroem.io.zarr_n5 import open_arrays

# Where in an info what MetroEM says about a volume is kept.
NOTES_KEY = "metroem"
_CHUNK_PX = 256
_STAGING = ".writing-"
# cloud-files reads a chunk under any of these names.
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
    """Write sections as a local CloudVolume, one section a chunk.

    Rows become the volume's x and cols its y. Coarser mips average the tissue
    alone; there is no tissue of grey level 0 in an integer volume.

    Args:
        path: folder of the volume; made if it is not there.
        sections: (num_sections, H, W) uint8 or float32, 0 = no data.
        mips: how many mips to write, 1 or more.
        resolution: nm per mip-0 pixel along x, y, z.
        offset: first mip-0 pixel along x, y, z; a multiple of 2**(mips - 1).
        chunk_px: side of a chunk in the plane.

    Raises:
        DatasetError: sections of another shape or type, or no mip.
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
    """What a volume is like that is made where there is none.

    Attributes:
        num_channels: 1 for images, 2 for fields.
        dtype: of its values.
        mip: the one that is written.
        area: what it covers, at mip 0.
        sections: z's that it holds.
        resolution: nm of a mip-0 voxel along x, y, z.
        notes: what its values are, kept in its info; a volume that says otherwise
            is not written to.
    """

    num_channels: int
    dtype: str
    mip: int
    area: Grid
    sections: range
    resolution: tuple[float, float, float]
    notes: Mapping[str, Any] = field(default_factory=dict)

    def info(self, path: str) -> dict[str, Any]:
        """The info file: all mips down to the one that is written."""
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
    """A volume, new or there already, that takes sections one by one.

    What is there already stays: a section that would change other values than 0
    (no data) is refused. One that a killed run began, or finished, holds nothing
    else than what is written again, so the same calls go on with it.

    Args:
        path: of the volume, as cloud-volume opens it.
        wanted: what it is to be like; what is there must agree with it.
        flag: where the path came from, for messages.
        overwrite: change values that are there.

    Raises:
        DatasetError: a volume of another kind is there, or storage fails.
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
            for left in self._folder.glob(f"{_STAGING}*"):  # of runs killed
                shutil.rmtree(left, ignore_errors=True)
        with storage_errors(flag, self.path, doing="written"):
            self._files = CloudFiles(self.path.removeprefix("precomputed://"))
            is_new = self._files.get("info") is None
            if is_new and (there := open_arrays("", split_format(self.path)[1])):
                raise DatasetError(
                    f"{flag} {path}: is a {there.form} volume, which is only read; "
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
        """Write a section, unless it is there.

        Args:
            section: (C, H, W) in the dtype of the volume.
            grid: where it lies, at the mip of the volume.
            z: its section.

        Returns:
            Whether anything was written.

        Raises:
            DatasetError: it lies outside of the volume, other values are there, or
                storage fails.
        """
        self._check_inside(grid, z)
        hull, layers = self._volume.chunks_around(grid, z)
        stored = self._volume.read(hull, layers)
        there = crop_array(stored[z - layers.start], hull, grid)
        if np.array_equal(there, section):
            return False
        differs = (there != 0).any(0) & (there != section).any(0)
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
        """Add to the provenance of the volume, once.

        Args:
            sources: what its values come from.
            entry: what was done, JSON-able.
        """
        with storage_errors(self.flag, self.path, doing="written"):
            found: Any = self._files.get_json("provenance") or {}
            told = {"description": "", "owners": [], "sources": [], "processing": []}
            provenance = {**told, **found}
            provenance["sources"] = sorted({*provenance["sources"], *sources})
            if entry not in provenance["processing"]:
                provenance["processing"] = [*provenance["processing"], dict(entry)]
            if provenance != found:
                self._put_json("provenance", provenance)

    def _check(self, wanted: NewVolume) -> None:
        """Refuse a volume whose values mean something else."""
        volume = self._volume
        volume.check_channels(wanted.num_channels, "what is to be written")
        volume.check_mip("mip", self._mip)
        if volume.dtype != np.dtype(wanted.dtype):
            raise DatasetError(
                f"{self.flag} {self.path}: is there already as {volume.dtype}, "
                f"{wanted.dtype} is to be written; give another path"
            )
        if not np.allclose(volume.resolution, wanted.resolution, rtol=0.01):
            raise DatasetError(
                f"{self.flag} {self.path}: is there already with mip-0 voxels of "
                f"{volume.resolution} nm, to be written are {wanted.resolution} nm; "
                "give another path"
            )
        notes = volume.info.get(NOTES_KEY)
        if notes and (unlike := describe_differences(notes, wanted.notes)):
            raise DatasetError(
                f"{self.flag} {self.path}: is there already, with {unlike}; give the "
                "same flags, or another path"
            )

    def _check_inside(self, grid: Grid, z: int) -> None:
        if self._volume.clip(grid) != grid or not self._volume.holds(z):
            raise DatasetError(
                f"{self.flag} {self.path}: does not reach section {z}, x {grid.x}..."
                f"{grid.end[0]}, y {grid.y}...{grid.end[1]} (mip-0 pixels); give "
                "another path, or make it anew with --like and the volume of the images"
            )

    def _write(self, layers: np.ndarray, hull: Grid, sections: range) -> None:
        """Write whole chunks: (num_sections, C, H, W)."""
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


@contextmanager
def _renamed_into(folder: Path) -> Iterator[Path]:
    """A folder whose files, once written, each replace those of `folder`."""
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
    """cloud-volume's object of a volume to be, its info with all mips."""
    volume: Any = CloudVolume(path, info=info, progress=False)
    # Before any data: cloud-volume adds no scale to an info twice.
    for mip in range(1, mips):
        volume.add_scale((2**mip, 2**mip, 1))
    return volume


def _write_mip(cloud_path: str, mip: int, sections: np.ndarray) -> None:
    volume: Any = CloudVolume(cloud_path, mip=mip, progress=False, compress=False)
    x, y, z = (int(start) for start in volume.bounds.minpt)
    x_end, y_end, _ = (int(end) for end in volume.bounds.maxpt)
    for index, section in enumerate(sections):
        image = torch.from_numpy(section.astype(np.float32))[None, None]
        coarse = coarsen_image(image, mip)[0, 0].numpy()
        if section.dtype == np.uint8:
            coarse = np.where(coarse > 0, np.clip(np.round(coarse), 1, 255), 0)
        here = slice(z + index, z + index + 1)
        volume[x:x_end, y:y_end, here] = coarse.astype(section.dtype)[..., None, None]


class Notes:
    """JSON objects by name in a folder at a cloud path.

    Attributes:
        path: the folder, with a scheme.
    """

    def __init__(self, path: str) -> None:
        prepare_storage()
        self.path = path
        self._files = CloudFiles(path, progress=False)

    def names(self) -> list[str]:
        """All files below the folder, those of volumes too, sorted."""
        return sorted(self._files.list())

    def read(self, names: list[str]) -> dict[str, dict]:
        """The objects by name, less those that were not written to their end."""
        found = {}
        files: Any = self._files.get(names)
        for file in files:
            try:
                found[file["path"]] = json.loads(file["content"] or b"")
            except ValueError:
                continue
        return found

    def write(self, name: str, note: dict) -> None:
        """Keep an object under a name."""
        content = json.dumps(note, indent=1, sort_keys=True).encode()
        self._files.put(name, content, content_type="application/json")

    def delete(self, prefix: str) -> None:
        """Delete the files whose names begin so."""
        self._files.delete([name for name in self.names() if name.startswith(prefix)])
