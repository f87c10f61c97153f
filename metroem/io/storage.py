"""Prepare the storage behind cloud-volume, and say what its errors mean."""

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath

from cloudvolume.exceptions import InfoUnavailableError

from metroem.errors import DatasetError
from metroem.io.chunk_checks import check_chunks
from metroem.io.paths import HOW_TO_WRITE, local_folder
from metroem.io.patience import NO_CREDENTIALS, asked_pause, limit_patience, status_of
from metroem.io.volume_info import check_infos
from metroem.io.whereabouts import (
    BrokenFileError,
    InfoError,
    is_storage_trouble,
    name_places,
    place_in,
    place_of,
)

_IMAGES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp", ".npy", ".npz", ".mrc")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def prepare_storage() -> None:
    """Call before a volume is opened.

    Patience is limited, errors say which file they are about, a 403 is one, chunks
    that do not fit are refused, and plain AWS keys will do.
    """
    if "AWS_ACCESS_KEY_ID" in os.environ:
        # cloud-files looks it up, though long-lived keys come without one.
        os.environ.setdefault("AWS_SESSION_TOKEN", "")
    limit_patience()
    name_places()
    check_chunks()
    check_infos()


@contextmanager
def explained(flag: str, path: str, *, doing: str = "read") -> Iterator[None]:
    """Turn what storage raises into one line that says what to do.

    Args:
        flag: where the path came from.
        path: of the volume.
        doing: "read" or "written".

    Raises:
        DatasetError: storage, network or credentials failed.
    """
    try:
        yield
    except InfoUnavailableError as error:
        raise DatasetError(f"{flag} {path}: {_nothing_at(path)}") from error
    except InfoError as error:
        raise DatasetError(f"{flag} {path}: {error}") from error
    except json.JSONDecodeError as error:
        place = place_in(path, "info")
        raise DatasetError(
            f"{flag} {path}: its info file is broken: {place}: {error}"
        ) from error
    except Exception as error:
        place = place_of(error)
        if place is None and not is_storage_trouble(error):
            raise
        kind = "" if isinstance(error, BrokenFileError) else f"{type(error).__name__}: "
        raise DatasetError(
            f"{flag} {path}: cannot be {doing}: {f'{place}: ' if place else ''}{kind}"
            f"{_one_line(error)}; {_advice(error)}"
        ) from error


def _nothing_at(path: str) -> str:
    """What there is where no volume is, and what to do."""
    folder = local_folder(path)
    if folder is not None and not folder.exists():
        return "no such folder; check the path"
    names = [path] if folder is None else sorted(file.name for file in folder.iterdir())
    images = [name for name in names if name.lower().endswith(_IMAGES)]
    if images:
        first = PurePath(images[0]).name
        return f"no volume there, but images ({first} ...); {HOW_TO_WRITE}"
    return (
        "no volume there (its info file cannot be read); check the path, and that your "
        "credentials may read it"
    )


def _one_line(error: Exception) -> str:
    return " ".join(_COLOURS.sub("", str(error)).split())


def _advice(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, then give the same command again"
    status = status_of(error)
    if isinstance(error, BrokenFileError):
        return error.advice
    if isinstance(error, NO_CREDENTIALS):
        return (
            "there are no credentials: put them into ~/.cloudvolume/secrets "
            "(aws-secret.json, google-secret.json), or set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or GOOGLE_APPLICATION_CREDENTIALS"
        )
    if status in (401, 403):
        return (
            "check that your credentials are right and allow it. (Stores answer so, "
            "too, where nothing is, to those who may not list them)"
        )
    if status == 404:
        return "there is no such bucket; check the path"
    if status in (429, 503):
        pause = asked_pause(error)
        when = "later" if pause is None else f"in {pause:.0f} s, as it asks"
        return f"the storage is busy: give the same command again {when}; it goes on"
    return "check the path, the network and your credentials"
