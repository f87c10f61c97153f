"""One run at a time for what it writes, and who that is.

The lock is the kernel's, of this process: one that died holds none, whatever it left,
and neither do processes that it had started. Storage that is shared by machines locks
between them where it is mounted so (NFS does); storage without locks is named in a
warning.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from metroem import cli
from metroem.errors import StorageError
from metroem.io.replace import folder_trouble, writing

logger = logging.getLogger(__name__)

_HELD = {errno.EACCES, errno.EAGAIN}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


def lock_path(path: Path) -> Path:
    """Where the lock of a file or folder lies while a run writes it."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def holding(lock: Path) -> Iterator[None]:
    """Keep other runs from what a lock stands for.

    Where nothing can be written there is nothing to keep them from.

    Args:
        lock: its file; made if it is not there, and removed at the end.

    Raises:
        StorageError: another run holds it, or the disk is full.
    """
    descriptor = _taken(lock)
    if descriptor is None:
        yield
        return
    try:
        with writing(lock):
            _sign(descriptor)
        yield
    finally:
        # While it is held, so that nobody holds a file that has no name.
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _taken(lock: Path) -> int | None:
    """The open file of a lock that is held now; None where there can be none."""
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno in _READ_ONLY:
                return None
            raise folder_trouble(error, lock.parent) from error
        try:
            # Of a process: a lock of an open file would outlive it in its children.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, lock):
                return descriptor
            os.close(descriptor)  # whoever held it has just removed it
        except OSError as error:
            holder = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            if error.errno in _HELD:
                raise StorageError(_refusal(lock, holder)) from None
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "%s: this storage has no locks (%s); see to it that no other run "
                "writes here",
                *(lock.parent, error.strerror),
            )
            return None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Say in the lock who holds it."""
    about = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": cli.command_line(),
    }
    os.ftruncate(descriptor, 0)
    with suppress(PermissionError):  # others of a shared folder lock it, too
        os.fchmod(descriptor, 0o666)
    os.pwrite(descriptor, (json.dumps(about) + "\n").encode(), 0)


def _refusal(lock: Path, holder: bytes) -> str:
    try:
        about = json.loads(holder)
        who = (
            f"process {about['pid']} on {about['host']}, since {about['since']} "
            f"({about['command']})"
        )
    except (ValueError, KeyError, TypeError):
        who = "another run that has just begun"
    return (
        f"{lock}: in use by {who}; wait until it ends, or stop it. A run that died "
        "holds no lock, so there is nothing to delete"
    )
