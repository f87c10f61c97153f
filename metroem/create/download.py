"""What downloads of images and of fields check alike."""

import shlex
import sys
from pathlib import Path

from metroem.errors import UsageError


def check_range(z_start: int, z_end: int, parallel: int) -> None:
    """Refuse a range of sections without any, or no reader.

    Raises:
        UsageError: as said.
    """
    if z_end <= z_start:
        raise UsageError(
            f"--z_end {z_end}: must be above --z_start {z_start}; it is one past the "
            f"last src section, so --z_end {z_start + 1} makes one pair"
        )
    if parallel < 1:
        raise UsageError(f"--parallel {parallel}: must be >= 1 (reads at a time)")


def check_offset(flag: str, value: int, mip: int) -> None:
    """Refuse a corner between the pixels of a mip.

    Raises:
        UsageError: as said.
    """
    if value % (1 << mip):
        below = value - value % (1 << mip)
        raise UsageError(
            f"{flag} {value}: must be a multiple of 2^{mip} = {1 << mip}, since mip "
            f"{mip} is asked for; use {below} or {below + (1 << mip)}"
        )


def command_line() -> str:
    """The command that is running, as typed."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
