"""Zarr and N5 written by hand for tests, without the package that is tested."""

import bz2
import gzip
import itertools
import json
import lzma
import struct
import zlib
from pathlib import Path

import crc32c
import numpy as np
import zstandard

COMPRESS = {
    None: bytes,
    "gzip": gzip.compress,
    "zlib": zlib.compress,
    "bz2": bz2.compress,
    "bzip2": bz2.compress,
    "lzma": lzma.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "crc32c": lambda raw: raw + crc32c.crc32c(raw).to_bytes(4, "little"),
}
NM = {"x": 8, "y": 8, "z": 40}


def put(path: Path, content) -> None:
    """Write bytes, or an object as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        content if isinstance(content, bytes) else json.dumps(content).encode()
    )


def in_axes(volume: np.ndarray, axes: str) -> np.ndarray:
    """(x, y, z, c) with its axes in another order; t is 1 long."""
    whole = volume[..., None]
    dropped = tuple("xyzct".index(axis) for axis in "zct" if axis not in axes)
    kept = [axis for axis in "xyzct" if axis in axes]
    return whole.squeeze(dropped).transpose([kept.index(axis) for axis in axes])


def blocks(array: np.ndarray, chunks: tuple[int, ...], fill=0):
    """Index, whole chunk (padded) and size within the array of each chunk."""
    counts = [-(-size // step) for size, step in zip(array.shape, chunks, strict=True)]
    for index in itertools.product(*map(range, counts)):
        part = array[
            tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, chunks, strict=True))
        ]
        whole = np.full(chunks, fill, array.dtype)
        whole[tuple(map(slice, part.shape))] = part
        yield index, whole, part


def chunks_of(axes: str, size: dict[str, int] | None = None) -> tuple[int, ...]:
    """Chunks of 32 x 16 x 2, one channel and time each, in the order of the axes."""
    return tuple(
        ({"x": 32, "y": 16, "z": 2, "c": 1, "t": 1} | (size or {}))[a] for a in axes
    )


def write_zarr2(
    folder: Path,
    array: np.ndarray,
    chunks: tuple[int, ...],
    *,
    compressor: str | None = None,
    order: str = "C",
    separator: str | None = ".",
    fill=0,
    **more,
) -> None:
    """Write one array of Zarr 2, in the byte order of its dtype."""
    about = {
        "zarr_format": 2,
        "shape": array.shape,
        "chunks": chunks,
        "dtype": array.dtype.str,
        "compressor": compressor and {"id": compressor, "level": 1},
        "fill_value": fill,
        "order": order,
        "filters": None,
    }
    if separator is not None:
        about["dimension_separator"] = separator
    put(folder / ".zarray", about | more)
    for index, whole, _ in blocks(array, chunks):
        name = (separator or ".").join(map(str, index))
        put(folder / name, COMPRESS[compressor](whole.tobytes(order)))


def write_zarr3(
    folder: Path,
    array: np.ndarray,
    chunks: tuple[int, ...],
    *,
    codecs: tuple[str, ...] = (),
    order: tuple[int, ...] | None = None,
    encoding: str = "default",
    separator: str = "/",
    fill=0,
    **more,
) -> None:
    """Write one array of Zarr 3, in the byte order of its dtype."""
    endian = "big" if array.dtype.str.startswith(">") else "little"
    about = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": array.shape,
        "data_type": array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
        "chunk_key_encoding": {
            "name": encoding,
            "configuration": {"separator": separator},
        },
        "fill_value": fill,
        "codecs": [
            *([{"name": "transpose", "configuration": {"order": order}}] * bool(order)),
            {"name": "bytes", "configuration": {"endian": endian}},
            *({"name": name} for name in codecs),
        ],
        "attributes": {},
    }
    put(folder / "zarr.json", about | more)
    for index, whole, _ in blocks(array, chunks):
        content = whole.transpose(order or range(whole.ndim)).tobytes()
        for name in codecs:
            content = COMPRESS[name](content)
        first = ["c"] if encoding == "default" else []
        put(folder / separator.join([*first, *map(str, index)]), content)


def write_n5(
    folder: Path,
    array: np.ndarray,
    chunks: tuple[int, ...],
    *,
    compression: str = "raw",
    **more,
) -> None:
    """Write one array of N5: big-endian, the first axis fastest, no padding."""
    about = {
        "dimensions": array.shape,
        "blockSize": chunks,
        "dataType": array.dtype.name,
        "compression": {"type": compression},
    }
    put(folder / "attributes.json", about | more)
    compress = COMPRESS[None if compression == "raw" else compression]
    for index, _, part in blocks(array, chunks):
        head = struct.pack(f">HH{part.ndim}I", 0, part.ndim, *part.shape)
        values = part.astype(part.dtype.newbyteorder(">")).tobytes("F")
        put(folder / "/".join(map(str, index)), head + compress(values))


def multiscales(
    paths: list[str],
    axes: str = "zyx",
    *,
    factors: list[int] | None = None,
    start: list[list[float]] | None = None,
    unit: str = "nanometer",
    nm: float = 1,
) -> list[dict]:
    """The multiscales of an OME-Zarr whose voxels are NM large.

    Args:
        paths: folder of each mip.
        axes: names, in order.
        factors: how many times coarser in x and y each mip is; by two each.
        start: (mip, axis) translations, in `unit`; none if left out.
        unit: of the sizes.
        nm: that `unit` is long.
    """
    types = {"c": "channel", "t": "time"}
    datasets = []
    for mip, path in enumerate(paths):
        factor = (factors or [2**m for m in range(len(paths))])[mip]
        scale = [
            NM[a] * (factor if a in "xy" else 1) / nm if a in NM else 1 for a in axes
        ]
        steps = [{"type": "scale", "scale": scale}]
        if start is not None:
            steps.append({"type": "translation", "translation": start[mip]})
        datasets.append({"path": path, "coordinateTransformations": steps})
    named = [
        {"name": a, "type": types[a]}
        if a in types
        else {"name": a, "type": "space", "unit": unit}
        for a in axes
    ]
    return [{"version": "0.4", "axes": named, "datasets": datasets}]
