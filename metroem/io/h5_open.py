"""h5 files opened with care: they may be damaged, or made to do harm."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from metroem.errors import DatasetError

# What h5py raises for files that are damaged.
_UNREADABLE = (OSError, RuntimeError, KeyError, TypeError, ValueError, MemoryError)
# What has more bytes than this may have so many times those that are stored.
_LARGE, _MOST_PACKED = 2**27, 10_000


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
