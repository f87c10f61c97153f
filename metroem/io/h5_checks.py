"""Open h5 files safely, and verify what they hold."""

import json
import logging
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from metroem.errors import DatasetError

logger = logging.getLogger(__name__)

CHECKSUM_KEY = "checksum"
DEFECTS_KEY = "defects"
# What h5py raises where a filter cannot undo what is stored.
_BROKEN = (OSError, RuntimeError)
# What h5py raises for files that are damaged.
_UNREADABLE = (OSError, RuntimeError, KeyError, TypeError, ValueError, MemoryError)
# What has more bytes than this may have so many times those that are stored.
_LARGE, _MOST_PACKED = 2**27, 10_000


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
    except _BROKEN as error:
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


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """An h5 file to read from.

    Raises:
        DatasetError: there is none, or what is read of it cannot be.
    """
    if not path.is_file():
        raise DatasetError(f"{path}: no such file")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except DatasetError:
        raise
    except _UNREADABLE as error:
        raise DatasetError(f"{path}: not a readable h5 file: {error}") from error


def own_dataset(file: h5py.File, key: str) -> h5py.Dataset | None:
    """A dataset of a file; None if it has none of that name.

    Raises:
        DatasetError: its values lie in another file. Whoever made a data set could
            otherwise name any file of the machine that reads it.
    """
    found = file.get(key)
    if not isinstance(found, h5py.Dataset):
        return None
    others = {found.file.filename} - {file.filename}
    others.update(name for name, *_ in found.external or ())
    if found.is_virtual:
        others.update(source.file_name for source in found.virtual_sources())
    others -= {"."}  # a virtual dataset's own file
    if others:
        raise DatasetError(
            f"{file.filename}: {key} lies in other files, {sorted(others)}; expected a "
            "file that holds its own values, as h5repack writes it"
        )
    return found


def check_stored(main: h5py.Dataset) -> None:
    """Refuse what holds no numbers, or cannot be as large as it says.

    Args:
        main: all pairs of a set, (num_pairs, ...).

    Raises:
        DatasetError: so.
    """
    where, shape = f"{main.file.filename}: {main.name}", main.shape
    if len(shape) < 4 or main.dtype.kind not in "fiu":
        raise DatasetError(
            f"{where} is {main.dtype} {shape}, expected numbers (num_pairs, 2, ... W)"
        )
    size = math.prod(shape) * main.dtype.itemsize
    stored = main.id.get_storage_size()
    if size > _LARGE and size > _MOST_PACKED * stored:
        raise DatasetError(
            f"{where} says that it has {size / 2**30:.3g} GiB, but {stored} bytes are "
            "stored: it is damaged"
        )


def whole_numbers(
    numbers: h5py.Dataset | None, shape: tuple[int, ...]
) -> np.ndarray | None:
    """What a file says of each pair, int64; None if it does not say it.

    Raises:
        DatasetError: it is of another shape, or no whole numbers.
    """
    if numbers is None:
        return None
    if numbers.shape != shape or numbers.dtype.kind not in "iu":
        raise DatasetError(
            f"{numbers.file.filename}: {numbers.name} is {numbers.dtype} "
            f"{numbers.shape}, expected whole numbers {shape}"
        )
    return np.asarray(numbers).astype(np.int64)


def attributes_of(file: h5py.File) -> dict[str, Any]:
    """The attributes of a file as python has them; JSON is read where it is some."""
    return {key: _plain(value) for key, value in file.attrs.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
