"""Writing sections as a CloudVolume, for the demo, benchmarks and tests."""

from pathlib import Path

import numpy as np
import torch
from cloudvolume import CloudVolume

from metroem.errors import DatasetError
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
    volume = CloudVolume(
        path.resolve().as_uri(),
        info=CloudVolume.create_new_info(
            num_channels=1,
            layer_type="image",
            data_type=str(sections.dtype),
            encoding="raw",
            resolution=resolution,
            voxel_offset=offset,
            chunk_size=(chunk_px, chunk_px, 1),
            volume_size=(*sections.shape[1:], len(sections)),
        ),
        progress=False,
    )
    # cloud-volume adds no scale to an info twice, so all come before the data.
    for mip in range(1, mips):
        volume.add_scale((2**mip, 2**mip, 1))
    volume.commit_info()
    for mip in range(mips):
        _write_mip(volume.cloudpath, mip, sections)


def _write_mip(cloud_path: str, mip: int, sections: np.ndarray) -> None:
    volume = CloudVolume(cloud_path, mip=mip, progress=False, compress=False)
    x, y, z = (int(start) for start in volume.bounds.minpt)
    x_end, y_end, _ = (int(end) for end in volume.bounds.maxpt)
    for index, section in enumerate(sections):
        image = torch.from_numpy(section.astype(np.float32))[None, None]
        coarse = coarsen_image(image, mip)[0, 0].numpy()
        if section.dtype == np.uint8:
            coarse = np.where(coarse > 0, np.clip(np.round(coarse), 1, 255), 0)
        here = slice(z + index, z + index + 1)
        volume[x:x_end, y:y_end, here] = coarse.astype(section.dtype)[..., None, None]
