"""Refuse broken chunks that cloud-volume's decoders accept."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from cloudvolume import chunks


@functools.cache
def check_chunks() -> None:
    """Make cloud-volume refuse such chunks from now on."""
    chunks.decode = _checking(chunks.decode)


def _checking(decode: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(decode)
    def checked(
        content: Any,
        encoding: str,
        shape: Sequence[int],
        dtype: Any = None,
        block_size: Any = None,
        *more: Any,
        **named: Any,
    ):
        if encoding == "compressed_segmentation" and block_size is not None:
            check_segmentation(content, shape, np.dtype(dtype), block_size)
        array = decode(content, encoding, shape, dtype, block_size, *more, **named)
        # Formats that state their own shape would be cropped or repeated to fit.
        if (*array.shape, 1, 1)[:4] != tuple(shape):
            raise ValueError(f"holds {array.shape} voxels, expected {tuple(shape)}")
        return array

    return checked


def check_segmentation(
    content: bytes, shape: Sequence[int], dtype: np.dtype, block_size: Sequence[int]
) -> None:
    """Refuse a chunk of compressed_segmentation that is cut short.

    Its decoder would read beyond the end, and return wrong labels or crash.

    Args:
        content: the encoded chunk.
        shape: number of voxels along x, y, z, and of channels.
        dtype: uint32 or uint64.
        block_size: voxels of a block along x, y, z.

    Raises:
        ValueError: the chunk is cut short.

    Source: neuroglancer, src/sliceview/compressed_segmentation/README.md
    """
    words = np.frombuffer(content[: len(content) // 4 * 4], "<u4").astype(np.int64)
    num_blocks = math.prod(
        -(-size // step) for size, step in zip(shape[:3], block_size, strict=True)
    )
    needed = [shape[3]]  # words that each read requires
    for start in words[: shape[3]]:
        needed.append(start + 2 * num_blocks)
        if max(needed) > len(words):
            break
        header, values = words[start : start + 2 * num_blocks].reshape(-1, 2).T
        num_bits, table = header >> 24, header & 0xFFFFFF
        num_words = -(-num_bits * math.prod(block_size) // 32)
        needed.append((start + values + num_words).max())
        if max(needed) > len(words):
            break
        for bits in np.unique(num_bits):
            here = num_bits == bits
            last = np.zeros(here.sum(), np.int64)  # last table entry that is read
            if bits:
                span = np.arange(num_words[here][0])
                packed = words[start + values[here, None] + span]
                for shift in range(0, 32, bits):
                    entries = packed >> shift & (1 << bits) - 1
                    last = np.maximum(last, entries.max(1))
            ends = start + table[here] + (last + 1) * (dtype.itemsize // 4)
            needed.append(ends.max())
    if max(needed) > len(words):
        raise ValueError(f"has {len(content)} bytes, {4 * max(needed)} are needed")
