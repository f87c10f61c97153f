"""Write files atomically, and lock them so that one run at a time writes them."""

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

from metroem.errors import StorageError, disk_error
from metroem.utils import cli
from metroem.utils.stop_request import delayed_signals

logger = logging.getLogger(__name__)

# Seconds to wait for a lock: a run that is just ending removes its lock in this time.
_TIMEOUT_S = 0.1
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Explain why a file cannot be written, if the disk is the cause.

    Args:
        path: file or folder that the `with` block writes.

    Raises:
        StorageError: the disk is full, fails, or refuses to be written to.
    """
    try:
        yield
    except OSError as error:
        if for_user := disk_error(error, path):
            raise for_user from error
        raise


def make_folder(path: Path) -> None:
    """Make a folder and its parents, unless they exist.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise folder_error(error, path) from error


def folder_error(error: OSError, path: Path) -> StorageError:
    """Make the error that says why a folder cannot be made."""
    return disk_error(error, path) or StorageError(
        f"{path}: this folder cannot be made ({error.strerror}); name another"
    )


def try_writing(folder: Path, flag: str | None = None) -> None:
    """Check that files can be written to a folder, before hours of work begin.

    Args:
        folder: made if it is missing.
        flag: the flag that chooses another folder, for the message.

    Raises:
        StorageError: no file can be written there.
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
    """Write a file under a temporary name, and rename it at the end if all went well.

    Args:
        path: final path of the file; its folder must exist.

    Yields:
        Temporary path to write to. After the block it is synced and renamed; after an
        error it is deleted.

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
    """Delete the temporary files that killed runs of `atomic_write` left behind.

    Call it only where no other run can be writing the same file.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.tmp-*"):
        left.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file, or replace it, atomically; see `atomic_write` for its errors."""
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def lock_path(path: Path) -> Path:
    """Name the lock file that a run holds while it writes a file or folder."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold a lock, so that no other run writes at the same time.

    The block runs without a lock where none can be made: in a folder that this account
    cannot write to, and on storage that has no locks (a warning says so).

    Args:
        path: the lock file; made if missing, and removed at the end.

    Raises:
        StorageError: another run holds the lock, or it cannot be made or written.
    """
    # A signal in the middle of one of filelock's calls would leave it unknown whether
    # the lock is held, and could break all processes that are forked later.
    with delayed_signals():
        held = FileLock(path, timeout=_TIMEOUT_S, mode=0o666, fallback_to_soft=False)
    is_held = False
    try:
        with delayed_signals():
            try:
                held.acquire()
                is_held = True
            except Timeout:
                raise StorageError(_lock_message(path)) from None
            except OSError as error:
                if not _can_run_without_lock(error, path.parent):
                    raise folder_error(error, path.parent) from error
        if is_held:
            with writing(path):
                path.write_text(json.dumps(_about_this_run()) + "\n")
        yield
    finally:
        if is_held:
            with delayed_signals():
                # Delete it before release: else another run could lock a file being
                # deleted.
                path.unlink(missing_ok=True)
                held.release()


def _can_run_without_lock(error: OSError, folder: Path) -> bool:
    """Whether a run may continue without a lock; warns if other runs may write, too."""
    if error.errno in _NO_LOCKS:
        logger.warning(
            "%s: this storage has no locks (%s); see to it that no other run "
            "writes here",
            *(folder, error.strerror),
        )
        return True
    # In a folder that can be written to, the same errors are real: for example, another
    # account left its lock file in a folder like /tmp.
    return error.errno in _READ_ONLY and not os.access(folder, os.W_OK)


def _about_this_run() -> dict[str, str | int]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": cli.command_line(),
    }


def _lock_message(path: Path) -> str:
    """Say which run holds a lock."""
    try:
        about = json.loads(path.read_bytes())
        who = (
            f"process {about['pid']} on {about['host']}, since {about['since']} "
            f"({about['command']})"
        )
    except (OSError, ValueError, KeyError, TypeError):
        who = "another run that has just started"
    return (
        f"{path}: in use by {who}; wait until it ends, or stop it. A run that died "
        "holds no lock, so there is nothing to delete"
    )
