"""CloudVolumes on local disk for tests, and a count of what is read from them."""

from collections import Counter
from pathlib import Path

import numpy as np
from cloudfiles import interfaces
from cloudvolume import CloudVolume


def make_volume(
    folder: Path,
    by_mip: list[np.ndarray | None],
    *,
    offset: tuple[int, int, int] = (0, 0, 0),
    chunk: tuple[int, int, int] = (32, 32, 1),
    resolution: tuple[int, int, int] = (4, 4, 40),
) -> str:
    """Write a volume and return its path.

    Args:
        folder: for the volume.
        by_mip: (Z, C, X, Y) of each mip, 0 first; None is a mip never written.
        offset: voxel offset at mip 0.
        chunk: chunk size in x, y, z.
        resolution: nm.
    """
    first = by_mip[0]
    info = CloudVolume.create_new_info(
        num_channels=first.shape[1],
        layer_type="image",
        data_type=str(first.dtype),
        encoding="raw",
        resolution=resolution,
        voxel_offset=offset,
        chunk_size=chunk,
        volume_size=(*first.shape[2:], first.shape[0]),
    )
    path = f"file://{folder}"
    volume = CloudVolume(path, info=info, progress=False)
    for mip in range(1, len(by_mip)):
        volume.add_scale((2**mip, 2**mip, 1), chunk_size=chunk)
    volume.commit_info()
    for mip, data in enumerate(by_mip):
        if data is not None:
            level = CloudVolume(path, mip=mip, progress=False, compress=False)
            x, y, z = level.voxel_offset
            sections, _, rows, cols = data.shape
            level[x : x + rows, y : y + cols, z : z + sections] = data.transpose(
                2, 3, 0, 1
            )
    return path


class ReadCount:
    """Counts the chunk files that are read, by path, and their bytes."""

    def __init__(self, monkeypatch) -> None:
        self.times: Counter[str] = Counter()
        self.num_bytes = 0
        original = interfaces.FileInterface.get_file

        def get_file(this, file_path, *args, **kwargs):
            result = original(this, file_path, *args, **kwargs)
            if result[0] is not None and "_" in file_path:
                self.times[file_path] += 1
                self.num_bytes += len(result[0])
            return result

        monkeypatch.setattr(interfaces.FileInterface, "get_file", get_file)
