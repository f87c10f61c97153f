"""Open h5 files safely, and verify their content."""

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
# Errors that h5py raises if a filter cannot decode a chunk.
_DECODE_ERRORS = (OSError, RuntimeError)
# Errors that h5py raises for damaged files.
_READ_ERRORS = (OSError, RuntimeError, KeyError, TypeError, ValueError, MemoryError)
# A dataset is damaged if it has more than _LARGE bytes, and more than _MAX_RATIO times
# the bytes that are stored for it.
_LARGE, _MAX_RATIO = 2**27, 10_000


def main_dataset(file: h5py.File) -> h5py.Dataset:
    """Return the images or fields of a set, (num_pairs, ...)."""
    return next(
        main
        for key in ("img", "main", "field")
        if isinstance(main := file.get(key), h5py.Dataset)
    )


def pair_checksum(file: h5py.File, index: int) -> int:
    """Compute the CRC-32 of a pair's bytes: its images or field, then its defects."""
    main, masks = main_dataset(file), own_dataset(file, DEFECTS_KEY)
    checksum = zlib.crc32(np.ascontiguousarray(main[index]).tobytes())
    # A mask of another shape does not belong to these images, and may be huge.
    if masks is not None and masks.shape == main.shape:
        checksum = zlib.crc32(np.ascontiguousarray(masks[index]).tobytes(), checksum)
    return checksum


def stored_checksums(file: h5py.File) -> np.ndarray | None:
    """Read the checksums that a set states, (num_pairs,); None if it states none.

    Raises:
        DatasetError: their number is wrong, or they are not whole numbers.
    """
    found = own_dataset(file, CHECKSUM_KEY)
    if found is None:
        return None
    num_pairs = len(main_dataset(file))
    if found.shape != (num_pairs,) or found.dtype.kind not in "iu":
        raise DatasetError(
            f"{file.filename}: {found.dtype} {found.shape} checksums for {num_pairs} "
            "pairs, expected one whole number per pair"
        )
    return np.asarray(found)


def checksums_of(path: Path) -> np.ndarray:
    """Return the checksums of a set, (num_pairs,); computed for files of the original.

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
    """Compute the checksums of a file that has none, once per state of the file."""
    logger.info("%s: has no checksums; the whole file is read to compute them", path)
    with opened(path) as file:
        pairs = range(len(main_dataset(file)))
        return np.array([pair_checksum(file, index) for index in pairs], np.uint32)


def difference(file: h5py.File, index: int, expected: int) -> str | None:
    """Say how a pair differs from what was written; None if it does not."""
    try:
        found = pair_checksum(file, index)
    except _DECODE_ERRORS as error:
        return f"pair {index} cannot be read: {error}"
    if found == expected:
        return None
    return (
        f"pair {index} is not what was written: its checksum is {found:08x}, expected "
        f"{int(expected):08x}"
    )


def check_pair(file: h5py.File, index: int) -> None:
    """Refuse a pair whose checksum is wrong; a pair without a checksum passes.

    Raises:
        DatasetError: the pair is not what was written.
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
    """Check all pairs of a set against their checksums.

    Returns:
        One line per damaged pair, or one line that says why the checksums cannot be
        used. [] for files of the original, which have no checksums.
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
    """Open an h5 file for reading.

    Raises:
        DatasetError: there is no such file, or the `with` block cannot read it.
    """
    if not path.is_file():
        raise DatasetError(f"{path}: no such file")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except DatasetError:
        raise
    except _READ_ERRORS as error:
        raise DatasetError(f"{path}: not a readable h5 file: {error}") from error


def own_dataset(file: h5py.File, key: str) -> h5py.Dataset | None:
    """Return a dataset of a file; None if there is none of that name.

    Raises:
        DatasetError: its values lie in another file. This is refused because a data
            set from a stranger could so read any file of this machine.
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
    """Refuse a dataset that does not hold numbers, or claims an impossible size.

    Args:
        main: all pairs of a set, (num_pairs, ...).

    Raises:
        DatasetError: the dataset is refused.
    """
    where, shape = f"{main.file.filename}: {main.name}", main.shape
    if len(shape) < 4 or main.dtype.kind not in "fiu":
        raise DatasetError(
            f"{where} is {main.dtype} {shape}, expected numbers (num_pairs, 2, ... W)"
        )
    size = math.prod(shape) * main.dtype.itemsize
    stored = main.id.get_storage_size()
    if size > _LARGE and size > _MAX_RATIO * stored:
        raise DatasetError(
            f"{where} says that it has {size / 2**30:.3g} GiB, but {stored} bytes are "
            "stored: it is damaged"
        )


def whole_numbers(
    numbers: h5py.Dataset | None, shape: tuple[int, ...]
) -> np.ndarray | None:
    """Read a dataset of whole numbers as int64; None if there is no dataset.

    Raises:
        DatasetError: it has another shape, or does not hold whole numbers.
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
    """Return the attributes of a file as Python objects, with JSON text parsed."""
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
