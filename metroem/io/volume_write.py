"""Writing sections as a CloudVolume."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from cloudvolume import CloudVolume

from metroem.errors import DatasetError
from metroem.grid import Grid
from metroem.normalize import coarsen_image


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
    cloud_path = _create(path.resolve().as_uri(), info, mips)
    for mip in range(mips):
        _write_mip(cloud_path, mip, sections)


def write_field_volume(
    path: Path, fields: np.ndarray, mip: int, shape: tuple[int, int]
) -> None:
    """Write fields of sections as corgie does: channel 0 along y, pixels of `mip`.

    They are read back with `--channel_order yx --field_unit relative`.

    Args:
        path: folder of the volume; made if it is not there.
        fields: (num_sections, 2, h, w), channel 0 along cols, px of `mip`.
        mip: their mip, the only one that is written.
        shape: (H, W) of the images at mip 0.

    Raises:
        DatasetError: fields of another shape than `shape` has at `mip`.
    """
    size = tuple(-(-side >> mip) for side in shape)
    if fields.ndim != 4 or fields.shape[1:] != (2, *size):
        raise DatasetError(
            f"{path}: fields at mip {mip} are (num_sections, 2, {size[0]}, {size[1]}) "
            f"for images of {shape} px, got {fields.shape}"
        )
    info = CloudVolume.create_new_info(
        num_channels=2,
        layer_type="image",
        data_type="float32",
        encoding="raw",
        resolution=(8, 8, 40),
        voxel_offset=(0, 0, 0),
        chunk_size=(128, 128, 1),
        volume_size=(*shape, len(fields)),
    )
    cloud_path = _create(path.resolve().as_uri(), info, mip + 1)
    volume: Any = CloudVolume(cloud_path, mip=mip, progress=False)
    volume[:, :, :] = fields.transpose(2, 3, 0, 1).astype(np.float32)


class SectionVolume:
    """A float32 volume at any cloud path, written section by section.

    A section is one chunk, and its bytes depend on its values alone. It begins
    at x 0, y 0, z 0.

    Attributes:
        path: as cloud-volume opens it.
        mip: the only one that is written.
    """

    def __init__(
        self,
        path: str,
        grid: Grid,
        *,
        num_sections: int,
        num_channels: int,
        resolution: tuple[float, float, float],
    ) -> None:
        """Write the volume's info.

        Args:
            path: with a scheme, for example file:///data/pairs/image.
            grid: its mip and shape are those of all sections.
            num_sections: how many there will be.
            num_channels: 1 for images, 2 for fields.
            resolution: nm per mip-0 pixel along x, y, z.
        """
        self.path, self.mip = path, grid.mip
        info = CloudVolume.create_new_info(
            num_channels=num_channels,
            layer_type="image",
            data_type="float32",
            encoding="raw",
            resolution=resolution,
            voxel_offset=(0, 0, 0),
            chunk_size=(*grid.shape, 1),
            volume_size=(*(size << grid.mip for size in grid.shape), num_sections),
        )
        _create(path, info, grid.mip + 1, chunk_size=(*grid.shape, 1))

    def write(self, z: int, layers: np.ndarray) -> None:
        """Write a section, (C, H, W); rows become the volume's x."""
        volume: Any = CloudVolume(
            self.path, mip=self.mip, progress=False, compress=False
        )
        volume[:, :, z : z + 1] = layers.transpose(1, 2, 0)[:, :, None]


def _create(
    cloud_path: str,
    info: dict[str, Any],
    mips: int,
    chunk_size: tuple[int, int, int] | None = None,
) -> str:
    volume: Any = CloudVolume(cloud_path, info=info, progress=False)
    # Before any data: cloud-volume adds no scale to an info twice.
    for mip in range(1, mips):
        volume.add_scale((2**mip, 2**mip, 1), chunk_size=chunk_size)
    volume.commit_info()
    return volume.cloudpath


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
