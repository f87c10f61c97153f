"""Checksums of pairs: what each was when it was written, and whether it still is."""

import logging
import zlib
from functools import lru_cache
from pathlib import Path

import h5py
import numpy as np

from metroem.errors import DatasetError
from metroem.io.h5_open import opened, own_dataset

logger = logging.getLogger(__name__)

CHECKSUM_KEY = "checksum"
DEFECTS_KEY = "defects"
# What h5py raises where a filter cannot undo what is stored.
_UNREADABLE = (OSError, RuntimeError)


def main_dataset(file: h5py.File) -> h5py.Dataset:
    """The images or the fields of a set, (num_pairs, ...)."""
    return next(
        main
        for key in ("img", "main", "field")
        if isinstance(main := file.get(key), h5py.Dataset)
    )


def pair_checksum(file: h5py.File, index: int) -> int:
    """CRC-32 of the bytes of a pair, of its images or field and then its defects."""
    main, masks = main_dataset(file), own_dataset(file, DEFECTS_KEY)
    checksum = zlib.crc32(np.ascontiguousarray(main[index]).tobytes())
    # Another shape is no mask of these images, and may be of any size.
    if masks is not None and masks.shape == main.shape:
        checksum = zlib.crc32(np.ascontiguousarray(masks[index]).tobytes(), checksum)
    return checksum


def stored_checksums(file: h5py.File) -> np.ndarray | None:
    """(num_pairs,) what a set says of its pairs; None for files of the original.

    Raises:
        DatasetError: another number of them, or no whole numbers.
    """
    found = own_dataset(file, CHECKSUM_KEY)
    if found is None:
        return None
    num_pairs = len(main_dataset(file))
    if found.shape != (num_pairs,) or found.dtype.kind not in "iu":
        raise DatasetError(
            f"{file.filename}: {found.dtype} {found.shape} checksums for {num_pairs} "
            "pairs, expected one whole number a pair"
        )
    return np.asarray(found)


def checksums_of(path: Path) -> np.ndarray:
    """(num_pairs,) what a set says of its pairs; files of the original are read for it.

    Raises:
        DatasetError: the file cannot be read.
    """
    with opened(path) as file:
        found = stored_checksums(file)
    if found is not None:
        return found
    state = path.stat()
    return _computed(path, state.st_size, state.st_mtime_ns, state.st_ino)


@lru_cache
def _computed(path: Path, *_state: int) -> np.ndarray:
    """The checksums of a file without any, once for each state of the file."""
    logger.info("%s: has no checksums, it is read as a whole to know its data", path)
    with opened(path) as file:
        pairs = range(len(main_dataset(file)))
        return np.array([pair_checksum(file, index) for index in pairs], np.uint32)


def difference(file: h5py.File, index: int, expected: int) -> str | None:
    """How a pair is not what was written, in words; None if it is."""
    try:
        found = pair_checksum(file, index)
    except _UNREADABLE as error:
        return f"pair {index} cannot be read: {error}"
    if found == expected:
        return None
    return (
        f"pair {index} is not what was written: its checksum is {found:08x}, expected "
        f"{int(expected):08x}"
    )


def check_pair(file: h5py.File, index: int) -> None:
    """Refuse a pair that is not what was written; one without a checksum passes.

    Raises:
        DatasetError: so.
    """
    checksums = stored_checksums(file)
    if checksums is None:
        return
    if why := difference(file, index, checksums[index]):
        raise DatasetError(
            f"{file.filename}: {why}. The file was damaged after it was written: copy "
            "it again from where it came, or delete it and make it again (its "
            "attribute `command` says how)"
        )


def verify(path: Path) -> list[str]:
    """What is wrong with the bytes of a set, one line a pair; [] if nothing.

    Files of the original have no checksums: [] for them.
    """
    with opened(path) as file:
        try:
            checksums = stored_checksums(file)
        except DatasetError as error:
            return [str(error)]
        if checksums is None:
            return []
        found = (difference(file, i, sum_) for i, sum_ in enumerate(checksums))
        return [f"{path.name}: {why}" for why in found if why]
