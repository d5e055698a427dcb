"""Trying a request to the Hub again: busy and failing servers, broken connections."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import parse_ratelimit_headers

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")
_BUSY = 429
_FAILING = (408, 500, 502, 503, 504)


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How often and how patiently.

    Attributes:
        num_tries: the first one included.
        first_wait_s: seconds before the second try; doubled for each further one.
        longest_wait_s: where the doubling ends.
        longest_asked_wait_s: a server that asks for more patience than this (Retry-After) is given up on.
    """

    num_tries: int = 6
    first_wait_s: float = 1.0
    longest_wait_s: float = 30.0
    longest_asked_wait_s: float = 300.0


def is_busy(error: Exception) -> bool:
    """Whether the server turned the request away unread (429)."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code == _BUSY


def is_broken_connection(error: Exception) -> bool:
    """Whether no whole answer came: refused, cut, timed out."""
    # HTTPError is the base of its HTTP library's errors; huggingface_hub's own come with an answer.
    return isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError)


def is_passing(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (_BUSY, *_FAILING)
    return is_broken_connection(error)


def with_retries(
    call: Callable[[], Answer],
    retries: Retries,
    *,
    what: str,
    may_repeat: Callable[[Exception], bool] = is_passing,
) -> Answer:
    """Call until it succeeds, waiting longer each time.

    Args:
        what: the request in words, for the log.
        may_repeat: which errors are worth another try.

    Raises:
        Exception: the call's last error.
    """
    wait_s = retries.first_wait_s
    for number in range(1, retries.num_tries + 1):
        try:
            return call()
        except Exception as error:
            if not may_repeat(error):
                raise
            asked_s = _asked_wait_s(error)
            if number == retries.num_tries or (asked_s or 0) > retries.longest_asked_wait_s:
                raise
            pause_s = min(wait_s, retries.longest_wait_s) if asked_s is None else asked_s
            logger.info(f"{what}: {_short(error)}; try {number + 1} of {retries.num_tries} in {pause_s:g} s")
        time.sleep(pause_s)
        wait_s *= 2
    raise AssertionError("every try either returned or raised")


def _asked_wait_s(error: Exception) -> float | None:
    """Seconds that the server asks to wait."""
    if not isinstance(error, HfHubHTTPError):
        return None
    headers = error.response.headers
    limit = parse_ratelimit_headers(headers)
    if is_busy(error) and limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    asked = headers.get("Retry-After", "")
    return float(asked) if asked.isdigit() else None


def _short(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError):
        return f"the Hub answered {error.response.status_code}"
    return f"the connection broke ({type(error).__name__})"
