"""Let one run at a time write a file or folder, and say which run that is.

The lock is the kernel's (flock): a process that died holds none, whatever file it left,
and its children hold none either, since filelock closes the lock in them. Machines
that share storage see each other's locks where it is mounted so (NFS is). Storage
without locks is named in a warning.
"""

import errno
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from metroem import cli
from metroem.errors import StorageError
from metroem.io.replace import folder_trouble, writing

logger = logging.getLogger(__name__)

# Seconds. Long enough for a run that ends now to have removed its lock.
_TIMEOUT_S = 0.1
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def lock_path(path: Path) -> Path:
    """Where the lock of a file or folder lies while a run writes it."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def holding(lock: Path) -> Iterator[None]:
    """Keep other runs away while this one writes.

    Where nothing can be written there is nothing to keep them from.

    Args:
        lock: its file; made if it does not exist, and removed at the end.

    Raises:
        StorageError: another run holds it, or the disk is full.
    """
    held = FileLock(lock, timeout=_TIMEOUT_S, mode=0o666, fallback_to_soft=False)
    try:
        held.acquire()
    except Timeout:
        raise StorageError(_refusal(lock)) from None
    except OSError as error:
        if not _is_lockless(error, lock.parent):
            raise folder_trouble(error, lock.parent) from error
        yield
        return
    try:
        with writing(lock):
            lock.write_text(json.dumps(_about_this_run()) + "\n")
        yield
    finally:
        # While it is held, so that no other run holds a file that has no name.
        lock.unlink(missing_ok=True)
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


def _refusal(lock: Path) -> str:
    try:
        about = json.loads(lock.read_bytes())
        who = (
            f"process {about['pid']} on {about['host']}, since {about['since']} "
            f"({about['command']})"
        )
    except (OSError, ValueError, KeyError, TypeError):
        who = "another run that has just begun"
    return (
        f"{lock}: in use by {who}; wait until it ends, or stop it. A run that died "
        "holds no lock, so there is nothing to delete"
    )
