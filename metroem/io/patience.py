"""How long storage is waited for, and what is asked again.

cloud-files tries everything seven times, up to a minute apart, also what can only
fail again; boto3 tries five times within each of those, and web servers may keep
silent for ever. Here what is final ends at once and all else after `PATIENCE_S`.
"""

import functools
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

# Seconds until storage that does not answer, or hangs up, is given up. Threads of
# cloud-files may begin another chunk before they learn of it: twice that at most.
PATIENCE_S = 12.0
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


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error reports, None if it is of another kind."""
    if isinstance(error, ClientError):
        return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    # requests has it on the response, Google's errors on themselves.
    status = getattr(getattr(error, "response", None), "status_code", None)
    found = status or getattr(error, "code", None)
    return found if isinstance(found, int) else None


class _PatientAdapter(HTTPAdapter):
    """Gives every request a time limit, which cloud-files does not."""

    def send(self, request: PreparedRequest, *args: Any, **kwargs: Any) -> Response:
        kwargs["timeout"] = kwargs.get("timeout") or (_CONNECT_S, PATIENCE_S)
        return super().send(request, *args, **kwargs)


def _pause(state: RetryCallState) -> float:
    return wait_random_exponential(PATIENCE_S / 24, 5 * PATIENCE_S)(state)


def _is_over(state: RetryCallState) -> bool:
    return stop_before_delay(PATIENCE_S)(state)


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, (*NO_CREDENTIALS, KeyError)):
        return False
    status = status_of(error)
    return status is None or status >= 500 or status in _LATER
