"""Storage behind cloud-volume: paths, and what its errors mean."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cloudvolume.exceptions import InfoUnavailableError

from metroem.errors import DatasetError
from metroem.io.patience import NO_CREDENTIALS, limit_patience, status_of

_ENDPOINT = re.compile(r"(?:precomputed://)?s3://(https?://[^/]+)/?(.*)")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def cloud_path(path: str) -> str:
    """A path as cloud-volume opens it: without a scheme it is a local one.

    Raises:
        DatasetError: s3:// followed by the server's address.
    """
    path = path.rstrip("/")
    if match := _ENDPOINT.fullmatch(path):
        raise DatasetError(
            f"{path}: cloud-volume does not take the server's address in the path; "
            f"set AWS_ENDPOINT_URL_S3={match[1]} and give s3://{match[2]}"
        )
    if "://" in path:
        return path
    return f"file://{Path(path).expanduser().resolve()}"


def prepare_storage() -> None:
    """Call before a volume is opened: patience is limited, plain AWS keys will do."""
    if "AWS_ACCESS_KEY_ID" in os.environ:
        # cloud-files looks it up, though long-lived keys come without one.
        os.environ.setdefault("AWS_SESSION_TOKEN", "")
    limit_patience()


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
        raise DatasetError(
            f"{flag} {path}: no volume there (its info file cannot be read); check "
            "the path, and that your credentials may read it"
        ) from error
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{flag} {path}: its info file is broken: {error}"
        ) from error
    except Exception as error:
        if not _is_storage_trouble(error):
            raise
        raise DatasetError(
            f"{flag} {path}: cannot be {doing}: {type(error).__name__}: "
            f"{_one_line(error)}; {_advice(error)}"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(_COLOURS.sub("", str(error)).split())


def _advice(error: Exception) -> str:
    status = status_of(error)
    if isinstance(error, NO_CREDENTIALS):
        return (
            "there are no credentials: put them into ~/.cloudvolume/secrets "
            "(aws-secret.json, google-secret.json), or set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or GOOGLE_APPLICATION_CREDENTIALS"
        )
    if status in (401, 403):
        return "check that your credentials are right and allow it"
    if status == 404:
        return "there is no such bucket; check the path"
    return "check the path, the network and your credentials"


def _is_storage_trouble(error: Exception) -> bool:
    """Whether an error comes from storage, network or credentials."""
    makers = {"google", "botocore", "requests", "urllib3", "cloudfiles", "cloudvolume"}
    return (
        isinstance(error, OSError)
        or type(error).__module__.split(".")[0] in makers
        or (isinstance(error, KeyError) and "AWS_" in str(error))
        or "cannot reshape" in str(error)
    )
