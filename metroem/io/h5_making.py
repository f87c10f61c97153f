"""h5 files in the making: under a hidden name, on a disk that has room for them.

HDF5 2.0 does not survive a write that fails: the file cannot be closed any more, its
space is not given back, and the process ends in a segmentation fault (2026-11). So
room is kept on the disk before anything is handed to it.
"""

import ctypes
import errno
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from metroem.io.checksums import CHECKSUM_KEY, main_dataset, pair_checksum
from metroem.io.replace import drop_partials, make_folder, replacing

# What HDF5 writes beside the values: what describes a file, and its index of chunks.
_BESIDE, _BESIDE_A_CHUNK = 2**20, 256
_KEEP_SIZE = 1  # of Linux' fallocate: blocks are kept, the file is no longer for it
_NO_SUCH_CALL = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@contextmanager
def replacing_h5(path: Path) -> Iterator[h5py.File]:
    """An h5 file to fill, which takes its name when all went well.

    Checksums are added unless they are in it already. Call `keep_room` before values
    are written.

    Raises:
        StorageError: the disk is full, or may not be written to.
    """
    make_folder(path.parent)
    with replacing(path) as partial:
        with partial.open("wb") as raw:
            _keep(raw.fileno(), _BESIDE)
        with h5py.File(partial, "w") as file:
            yield file
        # After closing, since scaleoffset rounds when a chunk is written out.
        with h5py.File(partial, "r+") as file:
            if CHECKSUM_KEY not in file:
                pairs = range(len(main_dataset(file)))
                checksums = [pair_checksum(file, index) for index in pairs]
                file[CHECKSUM_KEY] = np.array(checksums, np.uint32)
        os.truncate(partial, partial.stat().st_size)  # gives back what was kept
    drop_partials(path)


def keep_room(file: h5py.File) -> None:
    """Make sure that the disk has room for the next pair, and what comes beside it.

    Args:
        file: in the making.

    Raises:
        OSError: the disk is full; nothing was handed to HDF5.
    """
    room = _BESIDE
    for dataset in file.values():
        if not isinstance(dataset, h5py.Dataset) or dataset.chunks is None:
            continue
        chunk = math.prod(dataset.chunks) * dataset.dtype.itemsize
        grid = zip(dataset.shape[1:], dataset.chunks[1:], strict=True)
        of_pair = math.prod(-(-size // step) for size, step in grid)
        of_all = dataset.shape[0] * of_pair
        cache = dataset.id.get_access_plist().get_chunk_cache()[1]
        # HDF5 holds chunks back; it packs them when it writes, none becomes larger.
        waiting = min(max(cache, chunk), of_all * chunk)
        room += waiting + of_pair * chunk + _BESIDE_A_CHUNK * of_all
    descriptor = os.open(file.filename, os.O_RDWR)
    try:
        _keep(descriptor, room)
    finally:
        os.close(descriptor)


def _keep(descriptor: int, num_bytes: int) -> None:
    """Keep room for bytes beyond the end of an open file.

    Raises:
        OSError: there is not so much.
    """
    end = os.fstat(descriptor).st_size
    allocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if allocate is not None:
        large = ctypes.c_int64
        if not allocate(descriptor, _KEEP_SIZE, large(end), large(num_bytes)):
            return
        number = ctypes.get_errno()
        if number not in _NO_SUCH_CALL:
            raise OSError(number, os.strerror(number))
    # Storage that cannot keep room says at least how much it has.
    disk = os.fstatvfs(descriptor)
    if disk.f_bavail * disk.f_frsize < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
