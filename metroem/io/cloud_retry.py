"""Set time limits for storage, and choose which failed requests are retried.

By default cloud-files tries each request seven times, up to a minute apart, even after
permanent errors. Each of these tries is up to five of boto3, and web servers have no
time limit. Here permanent errors are raised at once; others are retried for
`TIMEOUT_S` seconds.
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

# `set_timeouts` changes private parts of this version; setup.py bounds it.
TESTED_WITH = "cloud-files==6.4.3"
# Seconds until we give up on storage that does not answer, or breaks connections.
# Threads of cloud-files may start another chunk before they notice: at most twice that.
TIMEOUT_S = 12.0
_CONNECT_S = 4.0
# HTTP statuses from 400 to 499 after which a retry may succeed.
_RETRYABLE_STATUSES = {408, 429}


def prepare_storage() -> None:
    """Change how cloud-files and cloud-volume fail; call before a volume is opened.

    Waiting is limited, errors name their file, a 403 is an error, and broken chunks
    are refused. AWS keys work without a session token.
    """
    if "AWS_ACCESS_KEY_ID" in os.environ:
        # cloud-files requires a session token, which long-lived keys do not have.
        os.environ.setdefault("AWS_SESSION_TOKEN", "")
    set_timeouts()
    name_failed_files()
    check_chunks()
    check_infos()


def set_boto_timeouts() -> None:
    """Limit boto3's waits to `TIMEOUT_S`, and leave retries to cloud-files."""
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
    """Make cloud-files raise permanent errors at once, others after `TIMEOUT_S`."""
    set_boto_timeouts()
    interfaces.HttpInterface.adaptor = _HttpAdapter()
    # The only request to S3 that cloud-files does not retry.
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
    """Whether the same request may succeed a moment later."""
    if isinstance(error, (*NO_CREDENTIALS, KeyError, BrokenFileError)):
        return False
    status = status_of(error)
    return status is None or status >= 500 or status in _RETRYABLE_STATUSES


class _HttpAdapter(HTTPAdapter):
    """HTTP adapter that gives every request a time limit, and refuses wrong answers.

    A 403 is an error; cloud-files would take it for a missing file. A whole file is an
    error if only a range was asked for, since it may be huge.
    """

    def send(self, request: PreparedRequest, *args: Any, **kwargs: Any) -> Response:
        kwargs["timeout"] = kwargs.get("timeout") or (_CONNECT_S, TIMEOUT_S)
        if "Range" in request.headers:  # servers that compress ignore Range
            request.headers["Accept-Encoding"] = "identity"
        response = super().send(request, *args, **kwargs)
        if response.status_code == 403:
            response.close()
            response.raise_for_status()
        if response.status_code == 404:
            _ = response.content  # read it, so that the connection can be reused
        is_empty = response.headers.get("Content-Length") == "0"
        if response.status_code == 200 and "Range" in request.headers and not is_empty:
            response.close()
            raise range_ignored()
        return response


def _pause(state: RetryCallState) -> float:
    """Seconds until the next try: random, but at least what the storage asked for."""
    own = wait_random_exponential(TIMEOUT_S / 24, 5 * TIMEOUT_S)(state)
    error = state.outcome.exception() if state.outcome else None
    return max(own, asked_pause(error) or 0)
