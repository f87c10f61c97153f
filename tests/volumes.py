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


def make_scales(
    folder: Path,
    scales: dict[tuple[int, int, int], np.ndarray],
    *,
    resolution: tuple[int, int, int] = (8, 8, 40),
    offset: tuple[int, int, int] = (0, 0, 0),
    encoding: str = "raw",
    chunk: tuple[int, int, int] = (32, 32, 1),
) -> str:
    """Write a volume of scales of any factors and return its path.

    Args:
        folder: for the volume.
        scales: by factor along x, y, z over `resolution`: (Z, C, X, Y). The first need
            not be (1, 1, 1).
        resolution: nm at factor (1, 1, 1).
        offset: first voxel at factor (1, 1, 1), a multiple of all factors.
        encoding: of all scales.
        chunk: size in x, y, z.
    """
    infos = [
        CloudVolume.create_new_info(
            num_channels=data.shape[1],
            layer_type="image",
            data_type=str(data.dtype),
            encoding=encoding,
            resolution=[nm * by for nm, by in zip(resolution, factor, strict=True)],
            voxel_offset=[at // by for at, by in zip(offset, factor, strict=True)],
            chunk_size=chunk,
            volume_size=(*data.shape[2:], data.shape[0]),
        )
        for factor, data in scales.items()
    ]
    info = {**infos[0], "scales": [one["scales"][0] for one in infos]}
    path = f"file://{folder}"
    CloudVolume(path, info=info, progress=False).commit_info()
    for index, data in enumerate(scales.values()):
        level = CloudVolume(path, mip=index, progress=False, compress=False)
        level[:] = data.transpose(2, 3, 0, 1)
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
