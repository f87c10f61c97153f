"""Sharded volumes on local disk for tests."""

import json
from pathlib import Path

import numpy as np
from cloudvolume import CloudVolume, chunks
from cloudvolume.datasource.precomputed.common import compressed_morton_code
from cloudvolume.datasource.precomputed.sharding import ShardingSpecification

from metroem.geometry.grid import Grid

SHAPE = (4, 1, 40, 56)  # Z, C, X, Y: 3 x 4 x 2 chunks
WHOLE = Grid(0, 0, 0, *SHAPE[2:])


def tissue(shape=SHAPE, dtype=np.uint8):
    """(Z, C, X, Y) of random values that are not 0."""
    return np.random.default_rng(0).integers(1, 255, shape).astype(dtype)


def make_sharded(
    folder: Path,
    by_mip: list[np.ndarray],
    *,
    chunk: tuple[int, int, int] = (16, 16, 2),
    packing: str = "raw",
    encoding: str = "raw",
    hash_name: str = "identity",
    bits: tuple[int, int, int] = (1, 1, 1),
    absent: tuple[tuple[int, int, int], ...] = (),
) -> str:
    """Write a volume and return its path.

    Args:
        folder: for the volume.
        by_mip: (Z, C, X, Y) of each mip, 0 first.
        chunk: chunk size in x, y, z.
        packing: of indices and chunks, "raw" or "gzip".
        encoding: of chunks.
        hash_name: of the chunks' numbers.
        bits: preshift, minishards, shards.
        absent: chunks that no shard lists, as counts of chunks along x, y, z.
    """
    sharding = {
        "@type": "neuroglancer_uint64_sharded_v1",
        "hash": hash_name,
        "preshift_bits": bits[0],
        "minishard_bits": bits[1],
        "shard_bits": bits[2],
        "minishard_index_encoding": packing,
        "data_encoding": packing,
    }
    first = by_mip[0]
    info = CloudVolume.create_new_info(
        num_channels=first.shape[1],
        layer_type="image",
        data_type=str(first.dtype),
        encoding=encoding,
        resolution=(4, 4, 40),
        voxel_offset=(0, 0, 0),
        chunk_size=chunk,
        volume_size=(*first.shape[2:], first.shape[0]),
    )
    path = f"file://{folder}"
    volume = CloudVolume(path, info=info, progress=False)
    for mip in range(1, len(by_mip)):
        volume.add_scale((2**mip, 2**mip, 1), chunk_size=chunk)
    for scale in volume.info["scales"]:
        scale["sharding"] = sharding
    folder.mkdir(parents=True)
    (folder / "info").write_text(json.dumps(volume.info))
    spec = ShardingSpecification.from_dict(sharding)
    for scale, data in zip(volume.info["scales"], by_mip, strict=True):
        encoded = _encoded(data.transpose(2, 3, 0, 1), chunk, encoding, absent)
        (folder / scale["key"]).mkdir()
        for name, content in spec.synthesize_shards(encoded).items():
            (folder / scale["key"] / name).write_bytes(content)
    return path


def _encoded(data, chunk, encoding, absent):
    """The chunks of (X, Y, Z, C) by Morton code."""
    size = np.array(chunk)
    grid = -(-np.array(data.shape[:3]) // size)
    found = {}
    for point in np.ndindex(*grid):
        if point not in absent:
            code = int(compressed_morton_code(np.array(point), grid))
            x, y, z = np.array(point) * size
            here = np.s_[x : x + size[0], y : y + size[1], z : z + size[2]]
            found[code] = chunks.encode(np.asfortranarray(data[here]), encoding)
    return found
