"""Say which file in storage failed, and what to do about it.

Errors of cloud-files, boto3 and the decoders seldom name the file. Here errors of
storage keep their type and get the file's address. Errors of decoding become a
`BrokenFileError`.
"""

import email.utils
import errno
import functools
import inspect
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

from botocore.exceptions import (
    ClientError,
    NoCredentialsError,
    PartialCredentialsError,
)
from cloudfiles import CloudFiles, interfaces
from cloudvolume.datasource.precomputed.image import rx
from cloudvolume.exceptions import InfoUnavailableError
from google.auth.exceptions import DefaultCredentialsError

from metroem.errors import DatasetError
from metroem.io.cloud_paths import HOW_TO_WRITE, local_folder

# `name_failed_files` changes private parts of these; setup.py bounds their versions.
TESTED_WITH = ("cloud-files==6.4.3", "cloud-volume==12.15.2")
NO_CREDENTIALS = (
    NoCredentialsError,
    PartialCredentialsError,
    DefaultCredentialsError,
)
TRY_AGAIN = (
    "the data received are cut short or broken; the same command tries again, and "
    "resumes where it stopped"
)
_FILE = "_metroem_file"
_NETWORK = {"google", "botocore", "requests", "urllib3", "cloudvolume"}
_IMAGES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp", ".npy", ".npz", ".mrc")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class BrokenFileError(Exception):
    """A file that was read, but whose content is broken or not as expected.

    Attributes:
        advice: what the user can do.
    """

    def __init__(
        self, message: str, advice: str = TRY_AGAIN, *, file: str | None = None
    ) -> None:
        super().__init__(message)
        self.advice = advice
        setattr(self, _FILE, file)


class InfoError(Exception):
    """A volume that cannot be read, by its info; the message follows its path."""


def failed_file(error: BaseException) -> str | None:
    """Return the address of the file that an error is about; None if not known."""
    return getattr(error, _FILE, None)


def _name_file(error: BaseException, file: str) -> None:
    if failed_file(error) is None:
        setattr(error, _FILE, file)


def file_address(cloudpath: str, name: str) -> str:
    """Join the path of a volume and the name of a file in it, for messages."""
    return f"{cloudpath.removeprefix('precomputed://')}/{name}"


@contextmanager
def reading(file: str) -> Iterator[None]:
    """Add the file's address to errors of storage, decompression and decoding.

    Args:
        file: address of the file that is read. An error that already has one keeps it.

    Raises:
        BrokenFileError: the file cannot be decoded.
        Exception: the error of the storage, with the file's address.
    """
    try:
        yield
    except (MemoryError, json.JSONDecodeError, InfoError):
        raise
    except Exception as error:
        known = isinstance(error, BrokenFileError) or _is_storage_error(error)
        if failed_file(error) is None and not known:
            what = f"{type(error).__name__}: {error}"
            raise BrokenFileError(what, file=file) from error
        _name_file(error, file)
        raise


@contextmanager
def storage_errors(flag: str, path: str, *, doing: str = "read") -> Iterator[None]:
    """Turn errors of storage into one line that says what to do.

    Args:
        flag: the flag that gave the path.
        path: path of the volume.
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
        file = file_address(path, "info")
        raise DatasetError(
            f"{flag} {path}: its info file is broken: {file}: {error}"
        ) from error
    except Exception as error:
        file = failed_file(error)
        if file is None and not _is_storage_error(error):
            raise
        kind = "" if isinstance(error, BrokenFileError) else f"{type(error).__name__}: "
        raise DatasetError(
            f"{flag} {path}: cannot be {doing}: {f'{file}: ' if file else ''}{kind}"
            f"{_one_line(error)}; {_advice(error)}"
        ) from error


def _nothing_at(path: str) -> str:
    """Say what lies at a path that holds no volume, and what to do."""
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
            "check that your credentials are right and allow it. (Stores also answer "
            "like this if nothing is stored there and you may not list the bucket)"
        )
    if status == 404:
        return "there is no such bucket; check the path"
    if status in (429, 503):
        pause = asked_pause(error)
        when = "later" if pause is None else f"in {pause:.0f} s, as it asks"
        return f"the storage is busy: give the same command again {when}; it resumes"
    return "check the path, the network and your credentials"


def range_ignored(file: str | None = None) -> BrokenFileError:
    """Make the error for a server that sends whole files when asked for a part."""
    return BrokenFileError(
        "the server ignores Range: it sends the whole file where a part was asked for",
        "sharded volumes are read in parts, which nginx, Apache and S3 send "
        "(`python -m http.server` does not): use one of them, or copy the volume to "
        "local disk",
        file=file,
    )


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an error; None if it has none."""
    if isinstance(error, ClientError):
        return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    # Errors of requests have it on the response, Google's as an attribute.
    status = getattr(getattr(error, "response", None), "status_code", None)
    found = status or getattr(error, "code", None)
    return found if isinstance(found, int) else None


def asked_pause(error: BaseException | None) -> float | None:
    """Return the seconds that Retry-After asks for; None without that header."""
    if isinstance(error, ClientError):
        headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    else:
        headers = getattr(getattr(error, "response", None), "headers", {})
    asked = str(headers.get("retry-after", ""))
    if asked.isdecimal():
        return float(asked)
    try:
        return email.utils.parsedate_to_datetime(asked).timestamp() - time.time()
    except ValueError:
        return None


def _is_storage_error(error: BaseException) -> bool:
    """Whether an error comes from storage, network or credentials."""
    return (
        isinstance(error, OSError)
        or type(error).__module__.split(".")[0] in _NETWORK
        or (isinstance(error, KeyError) and "AWS_" in str(error))
    )


@functools.cache
def name_failed_files() -> None:
    """Make errors of cloud-files and cloud-volume name the file from now on."""
    for interface in (
        interfaces.S3Interface,
        interfaces.HttpInterface,
        interfaces.GoogleCloudStorageInterface,
    ):
        for name in ("get_file", "put_file"):
            setattr(interface, name, _naming_file(getattr(interface, name)))
    rx.download_chunk = _naming_chunk(rx.download_chunk)


def _naming_file(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of an interface of cloud-files: its errors name the file."""

    @functools.wraps(call)
    def named(self: Any, file_path: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(self, file_path, *args, **kwargs)
        except Exception as error:
            key, path = self.get_path_to_file(file_path), self._path
            is_address = "://" in key  # true for web servers
            _name_file(
                error, key if is_address else f"{path.protocol}://{path.bucket}/{key}"
            )
            raise

    return named


def _naming_chunk(download_chunk: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap cloud-volume's download of one chunk: its errors name the file.

    An empty file is an error as well. With fill_missing, cloud-volume would take it
    for a chunk that does not exist, and return zeros.
    """
    signature = inspect.signature(download_chunk)

    @functools.wraps(download_chunk)
    def named(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        cloudpath, filename = str(given["cloudpath"]), str(given["filename"])
        decode = given["decode_fn"]

        def decode_checked(meta: Any, box: Any, content: Any, *args: Any, **how: Any):
            if content is None:
                refuse_packed(cloudpath, filename)
            elif len(content) == 0:
                raise ValueError("the file is empty")
            return decode(meta, box, content, *args, **how)

        with reading(file_address(cloudpath, filename)):
            return download_chunk(**given | {"decode_fn": decode_checked})

    return named


def refuse_packed(cloudpath: str, name: str) -> None:
    """Refuse a file that exists only under its name with a compression suffix.

    On local disk, cloud-volume stores chunks as name.gz and finds them. Other storage
    does not find them under the plain name, and missing chunks become black.

    Raises:
        BrokenFileError: only the compressed file exists.
    """
    # No threads: starting those of cloud-files costs 0.1 s each time.
    files = CloudFiles(cloudpath, progress=False, num_threads=0)
    if files.protocol in ("file", "mem"):
        return
    for ending in interfaces.COMPRESSION_EXTENSIONS:
        if files.exists(name + ending):
            raise BrokenFileError(
                f"is stored only compressed, with {ending} at the end of its name",
                "only on local disk is it found: decompress all such files there, copy "
                "the volume with `cloudfiles cp -r`, or let the web server answer the "
                "plain name with it and `Content-Encoding` (nginx: gzip_static always)",
                file=file_address(cloudpath, name),
            )
