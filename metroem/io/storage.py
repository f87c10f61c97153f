"""Storage behind cloud-volume: paths, patience, and what its errors mean.

cloud-files tries everything seven times, up to a minute apart, also what can only
fail again; boto3 tries five times within each of those, and web servers may keep
silent for ever. Here what is final ends at once and all else after `PATIENCE_S`.
"""

import errno
import functools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import (
    ClientError,
    NoCredentialsError,
    PartialCredentialsError,
)
from cloudfiles import connectionpools, interfaces
from cloudvolume.exceptions import InfoUnavailableError
from google.auth.exceptions import DefaultCredentialsError
from requests import PreparedRequest, Response
from requests.adapters import HTTPAdapter
from tenacity import retry_if_exception, stop_before_delay

from metroem.errors import DatasetError

# Seconds until storage that does not answer, or hangs up, is given up. Threads of
# cloud-files may begin another chunk before they learn of it: twice that at most.
PATIENCE_S = 12.0
_CONNECT_S = 4.0
_ENDPOINT = re.compile(r"(?:precomputed://)?s3://(https?://[^/]+)/?(.*)")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_NO_CREDENTIALS = (
    NoCredentialsError,
    PartialCredentialsError,
    DefaultCredentialsError,
)
# Statuses of 400 and above that say "later", not "no".
_LATER = {408, 429}


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
    _limit_patience()


@functools.cache
def _limit_patience() -> None:
    """Make storage fail at once where it is final, else after `PATIENCE_S`."""
    session = botocore.session.get_session()
    session.set_default_client_config(
        Config(
            connect_timeout=_CONNECT_S,
            read_timeout=PATIENCE_S,
            retries={"max_attempts": 0},
        )
    )
    boto3.setup_default_session(botocore_session=session)
    interfaces.HttpInterface.adaptor = _PatientAdapter()
    for owner in (
        interfaces.S3Interface,
        interfaces.HttpInterface,
        interfaces.GoogleCloudStorageInterface,
        connectionpools.S3ConnectionPool,
        connectionpools.GCloudBucketPool,
    ):
        for member in vars(owner).values():
            retrying: Any = getattr(member, "retry", None)
            if retrying is not None:
                retrying.stop |= stop_before_delay(PATIENCE_S)
                retrying.retry &= retry_if_exception(_may_pass)


class _PatientAdapter(HTTPAdapter):
    """Gives every request a time limit, which cloud-files does not."""

    def send(self, request: PreparedRequest, *args: Any, **kwargs: Any) -> Response:
        kwargs["timeout"] = kwargs.get("timeout") or (_CONNECT_S, PATIENCE_S)
        return super().send(request, *args, **kwargs)


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
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, then give the same command again"
    status = _status(error)
    if isinstance(error, _NO_CREDENTIALS):
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


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, (*_NO_CREDENTIALS, KeyError)):
        return False
    status = _status(error)
    return status is None or status >= 500 or status in _LATER


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error reports, None if it is of another kind."""
    if isinstance(error, ClientError):
        return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    # requests has it on the response, Google's errors on themselves.
    status = getattr(getattr(error, "response", None), "status_code", None)
    found = status or getattr(error, "code", None)
    return found if isinstance(found, int) else None


def _is_storage_trouble(error: Exception) -> bool:
    """Whether an error comes from storage, network or credentials."""
    makers = {"google", "botocore", "requests", "urllib3", "cloudfiles", "cloudvolume"}
    return (
        isinstance(error, OSError)
        or type(error).__module__.split(".")[0] in makers
        or (isinstance(error, KeyError) and "AWS_" in str(error))
        or "cannot reshape" in str(error)
    )
