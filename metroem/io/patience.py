"""How long storage is waited for, and what is asked again.

cloud-files tries everything seven times, up to a minute apart, also what can only
fail again; boto3 tries five times within each of those, and web servers may keep
silent for ever, or send a byte now and then. Here what is final ends at once and all
else after `PATIENCE_S`.
"""

import email.utils
import functools
import http.client
import io
import time
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
from google.auth.exceptions import DefaultCredentialsError
from requests import PreparedRequest, Response
from requests.adapters import HTTPAdapter
from tenacity import RetryCallState, retry_if_exception, stop_before_delay
from tenacity.wait import wait_random_exponential
from urllib3.connection import HTTPConnection

from metroem.io.whereabouts import BrokenFileError

# Seconds until storage that does not answer, or hangs up, is given up; once it answers,
# as long again for `LEAST_BYTES_PER_S`. Threads of cloud-files may begin another chunk
# before they learn of it: twice that at most.
PATIENCE_S = 12.0
LEAST_BYTES_PER_S = 100
NO_CREDENTIALS = (
    NoCredentialsError,
    PartialCredentialsError,
    DefaultCredentialsError,
)
_CONNECT_S = 4.0
# Statuses of 400 and above that say "later", not "no".
_LATER = {408, 429}


def limit_boto() -> None:
    """Let boto3 wait no longer, and leave asking again to cloud-files."""
    session = botocore.session.get_session()
    session.set_default_client_config(
        Config(
            connect_timeout=_CONNECT_S,
            read_timeout=PATIENCE_S,
            retries={"max_attempts": 0},
        )
    )
    boto3.setup_default_session(botocore_session=session)


@functools.cache
def limit_patience() -> None:
    """Make storage fail at once where it is final, else after `PATIENCE_S`."""
    limit_boto()
    interfaces.HttpInterface.adaptor = _PatientAdapter()
    # The one request to S3 that cloud-files does not try again.
    s3: Any = interfaces.S3Interface
    s3.exists = interfaces.retry(s3.exists)
    # Those of boto3, requests and Google's client are all of this class.
    HTTPConnection.response_class = _WatchedResponse  # type: ignore[assignment]
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
                retrying.wait = _pause
                retrying.stop |= _is_over
                retrying.retry &= retry_if_exception(_may_pass)


def ranges_ignored(place: str | None = None) -> BrokenFileError:
    """The error of a server that sends whole files where a range is asked for."""
    return BrokenFileError(
        "the server ignores Range: it sends the whole file where a part was asked for",
        "sharded volumes are read in parts, which nginx, Apache and S3 send "
        "(`python -m http.server` does not): use one of them, or copy the volume to "
        "local disk",
        place=place,
    )


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error reports, None if it is of another kind."""
    if isinstance(error, ClientError):
        return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    # requests has it on the response, Google's errors on themselves.
    status = getattr(getattr(error, "response", None), "status_code", None)
    found = status or getattr(error, "code", None)
    return found if isinstance(found, int) else None


class _PatientAdapter(HTTPAdapter):
    """Gives every request a time limit, which cloud-files does not.

    A 403 is an error: cloud-files answers it as if nothing were stored there. So is
    the whole file, which may be huge, where a range of it was asked for.
    """

    def send(self, request: PreparedRequest, *args: Any, **kwargs: Any) -> Response:
        kwargs["timeout"] = kwargs.get("timeout") or (_CONNECT_S, PATIENCE_S)
        if "Range" in request.headers:  # servers that compress send whole files
            request.headers["Accept-Encoding"] = "identity"
        response = super().send(request, *args, **kwargs)
        if response.status_code == 403:
            response.close()
            response.raise_for_status()
        if response.status_code == 404:
            _ = response.content  # read, so that the connection is used again
        is_empty = response.headers.get("Content-Length") == "0"
        if response.status_code == 200 and "Range" in request.headers and not is_empty:
            response.close()
            raise ranges_ignored()
        return response


class _WatchedResponse(http.client.HTTPResponse):
    """An answer that is given up when next to nothing of it comes.

    The time limit of a socket begins anew with each byte.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fp: Any = io.BufferedReader(_Watched(self.fp.detach()))


class _Watched(io.RawIOBase):
    """A stream of bytes that may not become slower than `LEAST_BYTES_PER_S`."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self._waited_s = 0.0
        self._num_bytes = 0
        self._has_begun = False

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def close(self) -> None:
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int | None:
        started = time.monotonic()
        count = self._raw.readinto(buffer)
        if not self._has_begun:  # the socket's own limit is for this
            self._has_begun = True
            return count
        # What the reader does in between is not the storage's fault.
        self._waited_s += time.monotonic() - started
        self._num_bytes += count or 0
        if count and self._waited_s > PATIENCE_S:
            if self._num_bytes < LEAST_BYTES_PER_S * self._waited_s:
                raise TimeoutError(
                    f"{self._num_bytes} bytes in {self._waited_s:.0f} s: too slow"
                )
            self._waited_s, self._num_bytes = 0.0, 0
        return count


def _pause(state: RetryCallState) -> float:
    """Seconds until the next try, which the storage may have asked for."""
    own = wait_random_exponential(PATIENCE_S / 24, 5 * PATIENCE_S)(state)
    error = state.outcome.exception() if state.outcome else None
    return max(own, asked_pause(error) or 0)


def asked_pause(error: BaseException | None) -> float | None:
    """The seconds of Retry-After, None if an error does not say."""
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


def _is_over(state: RetryCallState) -> bool:
    return stop_before_delay(PATIENCE_S)(state)


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, (*NO_CREDENTIALS, KeyError, BrokenFileError)):
        return False
    status = status_of(error)
    return status is None or status >= 500 or status in _LATER
