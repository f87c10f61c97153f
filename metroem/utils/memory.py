"""Keep freed memory for later use, and say what to lower when memory runs out."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from metroem.errors import DatasetError, ResourceError, first_line

# glibc's numbers for two parameters of mallopt.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make this process keep the memory that it frees, and use it again.

    By default glibc returns large blocks to the system at once. Each training step on
    a CPU then gets all its activations again, page by page, and takes 30 % longer
    (4 x 192 px, 2 cores, 2026-11).

    Returns:
        Whether it could be set. Without glibc nothing happens.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return False
    return bool(set_option(_MMAP_MAX, 0) and set_option(_TRIM_THRESHOLD, _NEVER))


@contextmanager
def enough_memory(what: str, advice: str) -> Iterator[None]:
    """Say what to lower if the `with` block runs out of memory.

    Args:
        what: the work that is done, for the message.
        advice: what to lower.

    Raises:
        ResourceError: this process, or a data-loading process, ran out of memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(_out_of_memory(what, advice, error)) from error
    except (RuntimeError, DatasetError) as error:
        # torch raises this from a signal handler: at any line, also while a file is
        # read, where it becomes a DatasetError.
        text = str(error)
        if "DataLoader worker" in text:
            raise ResourceError(
                f"{what}: a process that reads samples was killed or died "
                f"({first_line(error)[:200]}), most likely for want of memory: lower "
                f"--num_workers, or {advice}"
            ) from error
        if "can't allocate memory" in text:
            raise ResourceError(_out_of_memory(what, advice, error)) from error
        raise


def _out_of_memory(what: str, advice: str, error: BaseException) -> str:
    return f"{what}: out of memory ({first_line(error)[:200]}); {advice}"
