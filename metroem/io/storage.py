"""Storage behind cloud-volume: paths, and what its errors mean."""

import errno
import json
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

import cloudfiles.paths
from cloudvolume.exceptions import InfoUnavailableError

from metroem.errors import DatasetError, UsageError
from metroem.io.chunk_checks import check_chunks
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

_ENDPOINT = re.compile(r"(?:\w+://)?s3://(https?://[^/]+)/?(.*)")
# As neuroglancer has it: gs://bucket/em/|zarr2:
_FORMAT_LAST = re.compile(r"(.+?)/*\|([\w-]+):")
# What cloud-volume takes for the first folder of a path, less the rest of its name.
_FIRST_FOLDER = re.compile(r"[\w~.-]*\w")
_READ = ("precomputed", "zarr", "zarr2", "zarr3", "n5")
_IMAGES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp", ".npy", ".npz", ".mrc")
_WRITE = (
    "make a CloudVolume of them: metroem.io.volume_write.write_volume takes them as an "
    "array (docs/troubleshooting.md shows how)"
)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def split_format(path: str) -> tuple[str, str]:
    """The format that a path names, "" if it names none, and the path without it."""
    if match := _FORMAT_LAST.fullmatch(path):
        path = f"{match[2].removeprefix('neuroglancer-')}://{match[1]}"
    form, separator, place = path.partition("://")
    known = separator and form in cloudfiles.paths.ALLOWED_FORMATS
    return (form, place) if known else ("", path)


def local_folder(path: str) -> Path | None:
    """The folder on this machine that a path means; None for other storage."""
    place = split_format(path)[1].removeprefix("file://")
    return None if "://" in place else Path(place).expanduser().absolute()


def cloud_path(path: str) -> str:
    """A path as cloud-volume opens it: without a scheme it is a local one.

    Raises:
        DatasetError: s3:// followed by the server's address, or a local folder that
            cloud-volume takes for another.
    """
    path = path.rstrip("/")
    if match := _ENDPOINT.fullmatch(path):
        raise DatasetError(
            f"{path}: cloud-volume does not take the server's address in the path; "
            f"set AWS_ENDPOINT_URL_S3={match[1]} and give s3://{match[2]}"
        )
    form, place = split_format(path)
    if "://" not in place and form != "precomputed":
        place = f"file://{Path(place).expanduser().resolve()}"
    if (folder := local_folder(place)) is not None:
        first, *others = folder.parts[1:] or ("",)
        if not others or not _FIRST_FOLDER.fullmatch(first):
            raise DatasetError(
                f"{path}: cloud-volume takes it for another path, since its first "
                f"folder, {first!r}, is all of it or has other characters than letters "
                f"and digits; link to it from a path that is not there yet and begins "
                f"otherwise (ln -s {shlex.quote(str(folder))} PATH), and give file://"
                "PATH, all of it"
            )
    return f"{form}://{place}" if form else place


def check_source(flag: str, path: str) -> None:
    """Refuse a path that cannot be that of a volume that is read.

    Args:
        flag: where the path came from.
        path: from `cloud_path`.

    Raises:
        DatasetError: another format, an unknown scheme, or a file.
    """
    form, place = split_format(path)
    if form not in ("", *_READ):
        kind = "a segmentation for proofreading" if form == "graphene" else "not read"
        raise DatasetError(
            f"{flag} {path}: {form}:// is {kind}; expected images, fields or a mask as "
            f"{', '.join(_READ)}"
        )
    _check_scheme(flag, path)
    folder = local_folder(path)
    if folder is not None and folder.is_file():
        raise DatasetError(
            f"{flag} {path}: is a file; expected a CloudVolume, which is a folder with "
            f"an info file. If it holds images, {_WRITE}"
        )


def check_destination(flag: str, path: str) -> None:
    """Refuse to write anything but a precomputed volume, or where nobody can.

    Raises:
        DatasetError: see `cloud_path`; or an unknown scheme.
        UsageError: another format, or a web server.
    """
    form, place = split_format(path)
    if form not in ("", "precomputed"):
        raise UsageError(
            f"{flag} {path}: {form} is not written, only read; expected a path of a "
            "precomputed volume: gs://, s3:// or a local folder"
        )
    if place.startswith(("http://", "https://")):
        raise UsageError(
            f"{flag} {path}: web servers take no files; give a local path, gs:// or "
            "s3://"
        )
    _check_scheme(flag, path)
    if "://" in path:
        cloud_path(path)


def _check_scheme(flag: str, path: str) -> None:
    scheme, separator, _ = split_format(path)[1].partition("://")
    cloudfiles.paths.update_aliases_from_file()
    known = cloudfiles.paths.ALLOWED_PROTOCOLS
    if separator and scheme not in known:
        raise DatasetError(
            f"{flag} {path}: {scheme}:// is not known; expected one of "
            f"{', '.join(known)}, or a local folder"
        )


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
        return f"no volume there, but images ({PurePath(images[0]).name} ...); {_WRITE}"
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
