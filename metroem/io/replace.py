"""Files that are there whole or not at all."""

import glob
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metroem.errors import StorageError, disk_trouble


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say for people why a file cannot be written.

    Args:
        path: of the file (or folder) that is written within.

    Raises:
        StorageError: the operating system refused.
    """
    try:
        yield
    except OSError as error:
        if trouble := disk_trouble(error, path):
            raise trouble from error
        raise


def make_folder(path: Path) -> None:
    """Make a folder, and those that it lies in, unless it is there.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise folder_trouble(error, path) from error


def folder_trouble(error: OSError, path: Path) -> StorageError:
    """Why a folder cannot be made, for people."""
    return disk_trouble(error, path) or StorageError(
        f"{path}: this folder cannot be made ({error.strerror}); name another"
    )


def try_writing(folder: Path, flag: str | None = None) -> None:
    """Make sure, before hours of work, that a folder takes files.

    Args:
        folder: made if it is missing.
        flag: that names another one.

    Raises:
        StorageError: it takes none.
    """
    try:
        make_folder(folder)
        with writing(folder):
            tempfile.TemporaryFile(dir=folder).close()
    except StorageError as error:
        if flag is None:
            raise
        raise StorageError(f"{error} ({flag} names another folder)") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside a file, which takes its place when all went well.

    Args:
        path: of the file; its folder is there.

    Yields:
        Where to write it; without an error it is synced and renamed after.

    Raises:
        StorageError: the disk is full, or may not be written to.
    """
    here = f"{os.getpid()}-{threading.get_ident()}"
    partial = path.with_name(f".{path.name}.tmp-{here}")
    try:
        with writing(path):
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def drop_partials(path: Path) -> None:
    """Delete what runs that were killed while they wrote a file left behind.

    Only for whoever keeps others from writing it.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.tmp-*"):
        left.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole, in the place of what was there; raises as `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(content)
