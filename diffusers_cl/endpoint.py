"""
How the Hub is spoken to: with a timeout, some patience, and faults that are one sentence.

The token stands in the requests' headers and nowhere else: in no file, log line or message.
"""

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub import HfApi, constants, get_token, set_client_factory

# httpx's or, from huggingface_hub 2 on, httpx2's: the errors module has the one in use.
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import parse_ratelimit_headers
from huggingface_hub.utils._http import default_client_factory

from .errors import ConfigError, DataError, RunError, first_line


logger = logging.getLogger(__name__)

# Seconds without an answer after which a request is given up.
REQUEST_TIMEOUT = 60.0
# The client itself never repeats create_repo, whoami, refs, tags and the commit.
ATTEMPTS = 5
FIRST_WAIT = 1.0
LONGEST_WAIT = 300.0
# Conflicts (409, 412) are there too: every attempt starts with a look at what there is.
TRANSIENT = (408, 409, 412, 429, 500, 502, 503, 504)
# What the client raises: RuntimeError for what its upload threads met, ValueError for answers that it cannot read.
CLIENT_ERRORS = (HTTPError, OSError, RuntimeError, ValueError)

Result = TypeVar("Result")


class EndpointError(DataError):
    """The endpoint cannot be reached or has only faults for an answer: the next repo will fare no better."""


@contextmanager
def client_timeout(seconds: float) -> Iterator[None]:
    """Lets the client give up requests that have no answer after so many seconds; by itself it waits for ever."""

    def client():
        client = default_client_factory()
        client.timeout = seconds
        return client

    set_client_factory(client)
    try:
        yield
    finally:
        set_client_factory(default_client_factory)


def clean_token(token: str | None) -> str | None:
    """Returns a token without white space around it; raises a `ConfigError` for what can be none, without quoting it."""
    token = (token or "").strip()
    # httpx quotes a header that it refuses.
    if not re.fullmatch(r"[!-~]*", token):
        raise ConfigError("hub_token has characters that no token has")
    return token or None


def open_api(token: str | None) -> HfApi:
    """
    Returns the client with a token: this one, else `HF_TOKEN`, else the one that is saved on this machine.

    Raises:
        ConfigError: when there is none, or it cannot be one.
    """
    token = clean_token(token or get_token())
    if token is None:
        raise ConfigError("hub_token is not set and no token is saved here: give one, or run `hf auth login`")
    return HfApi(token=token)


def http_error(error: BaseException | None) -> HTTPError | None:
    """Returns the HTTP error that an exception is or comes from: the client wraps those of its upload threads."""
    while error is not None and not isinstance(error, HTTPError):
        error = error.__cause__
    return error


def _seconds_to_wait(error: Exception, attempt: int) -> float | None:
    """Seconds until the next attempt, `None` if there is no use in one."""
    cause = http_error(error)
    wait = FIRST_WAIT * 2**attempt
    if isinstance(cause, HfHubHTTPError):
        if cause.response.status_code not in TRANSIENT:
            return None
        limit = parse_ratelimit_headers(cause.response.headers)
        after = cause.response.headers.get("Retry-After", "")
        if after.isdigit():
            wait = float(after)
        elif limit is not None and limit.remaining == 0:
            wait = limit.reset_in_seconds + 1.0
    # The client reads an answer as JSON before it looks at the status.
    elif cause is None and not isinstance(error, json.JSONDecodeError):
        return None
    return wait if wait <= LONGEST_WAIT else None


def retry(call: Callable[[], Result], what: str) -> Result:
    """
    Returns the result of a call, which is repeated where that may help, `ATTEMPTS` times in all and as late as the
    server asks for. Whatever failed may still have happened: `call` has to look.
    """
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except CLIENT_ERRORS as error:
            wait = _seconds_to_wait(error, attempt)
            if wait is None or attempt == ATTEMPTS - 1:
                raise
            cause = http_error(error) or error
            status = (
                f"HTTP {cause.response.status_code}" if isinstance(cause, HfHubHTTPError) else type(cause).__name__
            )
            logger.warning("%s: %s, again in %g s", what, status, wait)
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def fault(error: Exception, what: str, token: str) -> RunError:
    """
    Returns what the client raised as an error of one sentence, without the token.

    Args:
        error: one of `CLIENT_ERRORS`, or a `RunError`, which is returned as it is.
        what (`str`): the repo that it is about.
        token (`str`).
    """
    if isinstance(error, RunError):
        return error
    if isinstance(error, OfflineModeIsEnabled):
        return ConfigError(f"{what}: HF_HUB_OFFLINE is set, and pushing needs the Hub")
    cause, endpoint = http_error(error), constants.ENDPOINT
    if not isinstance(cause, HfHubHTTPError):
        text = first_line(cause or error).replace(token, "***")
        if isinstance(error, json.JSONDecodeError):
            return EndpointError(f"{what}: {endpoint} gives answers that are not JSON")
        if cause is None:
            return DataError(f"{what}: {text}")
        return EndpointError(f"{what}: {endpoint} cannot be reached ({type(cause).__name__}: {text})")
    status = cause.response.status_code
    # Files may go to another host, which knows no token.
    from_hub = str(cause.response.request.url).startswith(endpoint)
    if status == 401 and from_hub:
        return ConfigError(f"hub_token is not a token that {endpoint} knows; give a valid one, or run `hf auth login`")
    if status == 403 and from_hub:
        return ConfigError(f"hub_token may not write to {what}; allowed: a token with the right to create repos there")
    said = (cause.server_message or "").partition("\n")[0].replace(token, "***")
    kind = EndpointError if status in TRANSIENT else DataError
    return kind(f"{what}: {endpoint} answers {status}" + (f" ({said})" if said else ""))
