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

from cloudfiles import CloudFiles, interfaces
from cloudvolume.datasource.precomputed.image import rx

TRY_AGAIN = (
    "what came is cut short or broken; the same command tries again, and goes on where "
    "it was"
)
_PLACE = "_metroem_place"
_NETWORK = {"google", "botocore", "requests", "urllib3", "cloudvolume"}


class BrokenFileError(Exception):
    """A file that came, and is not what it should be.

    Attributes:
        advice: what to do.
    """

    def __init__(
        self, message: str, advice: str = TRY_AGAIN, *, place: str | None = None
    ) -> None:
        super().__init__(message)
        self.advice = advice
        setattr(self, _PLACE, place)


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
        known = isinstance(error, BrokenFileError) or is_storage_trouble(error)
        if place_of(error) is None and not known:
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


def refuse_packed(cloudpath: str, name: str) -> None:
    """Refuse a file that is not there, but lies there compressed.

    On local disk, cloud-volume keeps chunks as name.gz and finds them. Other storage
    does not find them under the plain name; what is not found is black.

    Raises:
        BrokenFileError: as said.
    """
    # Without threads: those of cloud-files cost 0.1 s each time.
    files = CloudFiles(cloudpath, progress=False, num_threads=0)
    if files.protocol in ("file", "mem"):
        return
    for ending in interfaces.COMPRESSION_EXTENSIONS:
        if files.exists(name + ending):
            raise BrokenFileError(
                f"is not there, but lies there compressed, with {ending} at its end",
                "only local disk finds it so: decompress all such files there, copy "
                "the volume with `cloudfiles cp -r`, or let the web server answer the "
                "plain name with it and `Content-Encoding` (nginx: gzip_static always)",
                place=place_in(cloudpath, name),
            )


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
        decode = given.arguments["decode_fn"]

        def decode_what_came(meta: Any, box: Any, content: Any, *args: Any, **how: Any):
            if content is None:
                refuse_packed(cloudpath, filename)
            elif len(content) == 0:
                raise ValueError("the file is empty")
            return decode(meta, box, content, *args, **how)

        given.arguments["decode_fn"] = decode_what_came
        with reading(place_in(cloudpath, filename)):
            return download_chunk(*given.args, **given.kwargs)

    return named
