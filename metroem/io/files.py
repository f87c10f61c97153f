"""Write files whole or not at all, and let one run at a time write them."""

import errno
import glob
import json
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from metroem.errors import StorageError, disk_trouble
from metroem.utils import cli

logger = logging.getLogger(__name__)

# Seconds. Long enough for a run that ends now to have removed its lock.
_TIMEOUT_S = 0.1
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


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
def atomic_write(path: Path) -> Iterator[Path]:
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


def remove_partial_files(path: Path) -> None:
    """Delete what runs that were killed while they wrote a file left behind.

    Only for whoever keeps others from writing it.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.tmp-*"):
        left.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole, in the place of what was there; raises as `atomic_write`."""
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def lock_path(path: Path) -> Path:
    """Where the lock of a file or folder lies while a run writes it."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Keep other runs away while this one writes.

    Where nothing can be written there is nothing to keep them from.

    Args:
        path: its file; made if it does not exist, and removed at the end.

    Raises:
        StorageError: another run holds it, or the disk is full.
    """
    held = FileLock(path, timeout=_TIMEOUT_S, mode=0o666, fallback_to_soft=False)
    try:
        held.acquire()
    except Timeout:
        raise StorageError(_refusal(path)) from None
    except OSError as error:
        if not _is_lockless(error, path.parent):
            raise folder_trouble(error, path.parent) from error
        yield
        return
    try:
        with writing(path):
            path.write_text(json.dumps(_about_this_run()) + "\n")
        yield
    finally:
        # While it is held, so that no other run holds a file that has no name.
        path.unlink(missing_ok=True)
        held.release()


def _is_lockless(error: OSError, folder: Path) -> bool:
    """Whether a run may go on without a lock; warns where others may write, too."""
    if error.errno in _NO_LOCKS:
        logger.warning(
            "%s: this storage has no locks (%s); see to it that no other run "
            "writes here",
            *(folder, error.strerror),
        )
        return True
    # filelock also refuses a file that another account left in a folder like /tmp.
    return error.errno in _READ_ONLY and not os.access(folder, os.W_OK)


def _about_this_run() -> dict[str, str | int]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": cli.command_line(),
    }


def _refusal(path: Path) -> str:
    try:
        about = json.loads(path.read_bytes())
        who = (
            f"process {about['pid']} on {about['host']}, since {about['since']} "
            f"({about['command']})"
        )
    except (OSError, ValueError, KeyError, TypeError):
        who = "another run that has just begun"
    return (
        f"{path}: in use by {who}; wait until it ends, or stop it. A run that died "
        "holds no lock, so there is nothing to delete"
    )
