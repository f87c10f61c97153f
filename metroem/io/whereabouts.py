"""Where storage failed: the file that was read or written when an error came.

cloud-files, boto3 and the decoders seldom say. What they raise keeps its type and
gets a place; what cannot be made sense of becomes a `BrokenFileError`.
"""

import functools
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cloudfiles import interfaces
from cloudvolume.datasource.precomputed.image import rx

_PLACE = "_metroem_place"
_NETWORK = {"google", "botocore", "requests", "urllib3", "cloudvolume"}


class BrokenFileError(Exception):
    """A file that came, and is not what it should be."""


class InfoError(Exception):
    """A volume that cannot be read as it says itself; the words follow its path."""


def place_of(error: BaseException) -> str | None:
    """The file that an error is about, as far as is known."""
    return getattr(error, _PLACE, None)


def place_in(cloudpath: str, name: str) -> str:
    """The address of a file of a volume, for messages."""
    return f"{cloudpath.removeprefix('precomputed://')}/{name}"


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Give a place to what storage, decompression or decoding raise.

    Args:
        place: what is read; of places within each other the inner one counts.

    Raises:
        BrokenFileError: what came cannot be decoded.
        Exception: what storage raised, with a place.
    """
    try:
        yield
    except (MemoryError, json.JSONDecodeError, InfoError):
        raise
    except Exception as error:
        if place_of(error) is None and not is_storage_trouble(error):
            broken = BrokenFileError(f"{type(error).__name__}: {error}")
            setattr(broken, _PLACE, place)
            raise broken from error
        _give_place(error, place)
        raise


def is_storage_trouble(error: BaseException) -> bool:
    """Whether an error comes from storage, network or credentials."""
    return (
        isinstance(error, OSError)
        or type(error).__module__.split(".")[0] in _NETWORK
        or (isinstance(error, KeyError) and "AWS_" in str(error))
    )


@functools.cache
def name_places() -> None:
    """Let cloud-files and cloud-volume say which file failed, from now on."""
    for interface in (
        interfaces.S3Interface,
        interfaces.HttpInterface,
        interfaces.GoogleCloudStorageInterface,
    ):
        for name in ("get_file", "put_file"):
            setattr(interface, name, _naming(getattr(interface, name)))
    rx.download_chunk = _naming_chunks(rx.download_chunk)


def _give_place(error: BaseException, place: str) -> None:
    if place_of(error) is None:
        setattr(error, _PLACE, place)


def _naming(call: Callable[..., Any]) -> Callable[..., Any]:
    """A method of an interface of cloud-files, whose errors get the file's place."""

    @functools.wraps(call)
    def named(self: Any, file_path: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(self, file_path, *args, **kwargs)
        except Exception as error:
            key, path = self.get_path_to_file(file_path), self._path
            whole = "://" in key  # as those of web servers are
            _give_place(
                error, key if whole else f"{path.protocol}://{path.bucket}/{key}"
            )
            raise

    return named


def _naming_chunks(download_chunk: Callable[..., Any]) -> Callable[..., Any]:
    """cloud-volume's download of one chunk, for which an empty file is no chunk.

    With fill_missing it takes one for a chunk that is not there, which is black.
    """
    signature = inspect.signature(download_chunk)

    @functools.wraps(download_chunk)
    def named(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        cloudpath, filename = (
            str(given.arguments[name]) for name in ("cloudpath", "filename")
        )
        given.arguments["decode_fn"] = _not_empty(given.arguments["decode_fn"])
        with reading(place_in(cloudpath, filename)):
            return download_chunk(*given.args, **given.kwargs)

    return named


def _not_empty(decode: Callable[..., Any]) -> Callable[..., Any]:
    def decode_what_came(meta: Any, box: Any, content: Any, *args: Any, **named: Any):
        if content is not None and len(content) == 0:
            raise ValueError("the file is empty")
        return decode(meta, box, content, *args, **named)

    return decode_what_came
