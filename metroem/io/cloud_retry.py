"""Limit how long storage is waited for, and choose which requests are tried again.

cloud-files tries everything seven times, up to a minute apart, even what can only fail
again. boto3 tries five times within each of those, and nothing limits web servers.
Here permanent errors are raised at once; others are retried for `TIMEOUT_S` seconds.
"""

import functools
import os
from typing import Any

import boto3
import botocore.session
from botocore.config import Config
from cloudfiles import connectionpools, interfaces
from requests import PreparedRequest, Response
from requests.adapters import HTTPAdapter
from tenacity import RetryCallState, retry_if_exception, stop_before_delay
from tenacity.wait import wait_random_exponential

from metroem.io.chunk_checks import check_chunks
from metroem.io.cloud_errors import (
    NO_CREDENTIALS,
    BrokenFileError,
    asked_pause,
    name_failed_files,
    range_ignored,
    status_of,
)
from metroem.io.volume_info import check_infos

# What `set_timeouts` changes are private parts of this version; setup.py bounds it.
TESTED_WITH = "cloud-files==6.4.3"
# Seconds until storage that does not answer, or hangs up, is given up. Threads of
# cloud-files may begin another chunk before they learn of it: twice that at most.
TIMEOUT_S = 12.0
_CONNECT_S = 4.0
# Statuses of 400 and above that say "later", not "no".
_LATER = {408, 429}


def prepare_storage() -> None:
    """Change how cloud-files and cloud-volume fail; call before a volume is opened.

    Waiting is limited, errors name their file, a 403 is an error, chunks that do not
    fit are refused, and plain AWS keys will do.
    """
    if "AWS_ACCESS_KEY_ID" in os.environ:
        # cloud-files looks it up, though long-lived keys come without one.
        os.environ.setdefault("AWS_SESSION_TOKEN", "")
    set_timeouts()
    name_failed_files()
    check_chunks()
    check_infos()


def set_boto_timeouts() -> None:
    """Let boto3 wait no longer than `TIMEOUT_S`, and leave retries to cloud-files."""
    session = botocore.session.get_session()
    session.set_default_client_config(
        Config(
            connect_timeout=_CONNECT_S,
            read_timeout=TIMEOUT_S,
            retries={"max_attempts": 0},
        )
    )
    boto3.setup_default_session(botocore_session=session)


@functools.cache
def set_timeouts() -> None:
    """Make cloud-files fail at once where it is final, else after `TIMEOUT_S`."""
    set_boto_timeouts()
    interfaces.HttpInterface.adaptor = _HttpAdapter()
    # The one request to S3 that cloud-files does not try again.
    s3: Any = interfaces.S3Interface
    s3.exists = interfaces.retry(s3.exists)
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
                retrying.stop |= lambda state: stop_before_delay(TIMEOUT_S)(state)
                retrying.retry &= retry_if_exception(is_retryable)


def is_retryable(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, (*NO_CREDENTIALS, KeyError, BrokenFileError)):
        return False
    status = status_of(error)
    return status is None or status >= 500 or status in _LATER


class _HttpAdapter(HTTPAdapter):
    """Gives every request a time limit, which cloud-files does not.

    A 403 is an error: cloud-files answers it as if nothing were stored there. So is
    the whole file, which may be huge, where a range of it was asked for.
    """

    def send(self, request: PreparedRequest, *args: Any, **kwargs: Any) -> Response:
        kwargs["timeout"] = kwargs.get("timeout") or (_CONNECT_S, TIMEOUT_S)
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
            raise range_ignored()
        return response


def _pause(state: RetryCallState) -> float:
    """Seconds until the next try, which the storage may have asked for."""
    own = wait_random_exponential(TIMEOUT_S / 24, 5 * TIMEOUT_S)(state)
    error = state.outcome.exception() if state.outcome else None
    return max(own, asked_pause(error) or 0)
