"""Versions of the files that MetroEM writes; docs/versions.md says what has which.

A version rises when a file changes so that earlier programs would misread it; what
is only added leaves it as it is. Files without one are of the original or of the
first release, and are read.
"""

from typing import Any

from metroem.errors import MetroEMError

SETS = 1  # image sets and field sets
STATE = 2  # what a training is resumed from; 1 was that of 1.0.0
FIGURES = 1  # JSON of `evaluate`


def check_version(
    found: Any, known: int, where: str, error: type[MetroEMError]
) -> None:
    """Refuse a file of a newer version than this program knows.

    Args:
        found: version that the file states.
        known: the newest that is read, from 1.
        where: the file.
        error: raised.

    Raises:
        MetroEMError: `error`: the version is newer, or is none.
    """
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise error(
            f"{where}: format version {found!r}, expected a whole number, 1 to "
            f"{known}; the file is damaged: make it anew"
        )
    if found > known:
        raise error(
            f"{where}: format version {found}, this MetroEM reads up to {known}; it "
            "was written by a newer one: upgrade metroem"
        )
