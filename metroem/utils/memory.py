"""Memory: what a process does with what it has freed, and when there is too little."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from metroem.errors import DatasetError, ResourceError, first_line

# glibc's names for what mallopt sets.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for what it allocates next.

    glibc gives large blocks back to the system at once, and each step of a training
    on a CPU gets all its activations anew, page by page: steps take 30 % longer
    (4 x 192 px, 2 cores, 2026-11).

    Returns:
        Whether it could be set; elsewhere than on glibc nothing happens.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return False
    return bool(set_option(_MMAP_MAX, 0) and set_option(_TRIM_THRESHOLD, _NEVER))


@contextmanager
def enough_memory(what: str, advice: str) -> Iterator[None]:
    """Say what to lower where memory does not suffice.

    Args:
        what: is done, for the message.
        advice: what to lower.

    Raises:
        ResourceError: of this process, or of one that reads samples for it.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(_out_of_memory(what, advice, error)) from error
    except (RuntimeError, DatasetError) as error:
        # torch raises it wherever this process is, also where it reads a file.
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
