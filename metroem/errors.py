"""Define the errors that MetroEM raises for its users.

    MetroEMError (ValueError)
      UsageError        flags or arguments that cannot work
      PyramidError      a pyramid or module directory that cannot be used
      DatasetError      an image set, field set or volume that cannot be used
      FieldError        a displacement field of the wrong form
      CheckpointError   weights or a training state that cannot be used
      StorageError      a disk that is full or may not be written, a run in the way
      ResourceError     too little memory, a process that was killed
      TaskError         tasks of a step that failed

A message names the path or flag, says what was found and what was expected,
and what to do. `metroem.utils.cli.run` prints it and exits with 1; any other
exception is a bug and keeps its traceback.
"""

import errno
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_BROKEN = {errno.EIO, errno.ESTALE}


class MetroEMError(ValueError):
    """An error that the user can fix."""


class UsageError(MetroEMError):
    """Flags or arguments that cannot work."""


class PyramidError(MetroEMError):
    """A pyramid or module directory that cannot be used."""


class DatasetError(MetroEMError):
    """An image set, field set or volume that cannot be used."""


class FieldError(MetroEMError):
    """A displacement field of the wrong form."""


class CheckpointError(MetroEMError):
    """Weights or a training state that cannot be used."""


class StorageError(MetroEMError):
    """A disk that is full or may not be written to, or that another run writes to."""


class ResourceError(MetroEMError):
    """Too little memory, a killed process, or a device that lacks a feature."""


class TaskError(MetroEMError):
    """Tasks of a step that failed; all other tasks of it are done."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class name if it is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def disk_error(error: OSError, path: Path | None = None) -> StorageError | None:
    """Turn an error of the operating system into one about the disk.

    Args:
        error: raised while a file was read or written.
        path: the file, if the error does not name it.

    Returns:
        The error for users; None if the disk is not the cause.
    """
    where = str(path or error.filename or "a file")
    if error.errno in _FULL:
        quota = " (or the quota is used up)" if error.errno == errno.EDQUOT else ""
        return StorageError(
            f"{where}: cannot be written: no space left on the disk{quota}; free some "
            "space, then give the same command again: what is finished is kept"
        )
    if error.errno in _REFUSED:
        return StorageError(
            f"{where}: {error.strerror}; write elsewhere, or get the right to use it"
        )
    if error.errno in _BROKEN:
        return StorageError(
            f"{where}: the storage fails ({error.strerror}); when it works again, "
            "give the same command again"
        )
    return None
