"""List and check the versions of files that MetroEM writes; see docs/versions.md.

A version rises when earlier programs would misread the changed file. Additions do not
raise it. Files without a version are from the original or from the first release; they
are read.
"""

from typing import Any

from metroem.errors import MetroEMError

SETS = 1  # image sets and field sets
STATE = 2  # the state that a training resumes from; 1.0.0 wrote 1
FIGURES = 1  # JSON of `evaluate`
PREDICTIONS = 1  # fields that `evaluate` keeps


def check_version(
    found: Any, known: int, where: str, error: type[MetroEMError]
) -> None:
    """Refuse a file whose version is newer than this program knows.

    Args:
        found: version that the file states.
        known: newest version that this program reads, 1 or more.
        where: the file, for the message.
        error: class of the error to raise.

    Raises:
        MetroEMError: of class `error`: the version is newer, or not a whole number.
    """
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise error(
            f"{where}: format version {found!r}, expected a whole number, 1 to "
            f"{known}; the file is damaged: make it again"
        )
    if found > known:
        raise error(
            f"{where}: format version {found}, this MetroEM reads up to {known}; it "
            "was written by a newer one: upgrade metroem"
        )
