"""Try again what a network or an object store may have refused only for the moment."""

import errno
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from pplug_jax.runtime.console import say

ATTEMPTS = 5
WAIT = 1.0  # seconds before the second attempt, doubled before each further one

_Result = TypeVar("_Result")

PASSING_KINDS = (
    TimeoutError,
    BrokenPipeError,
    ConnectionAbortedError,
    ConnectionRefusedError,
    ConnectionResetError,
)
PASSING_NUMBERS = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EIO,
    errno.ESTALE,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ETIMEDOUT,
}
PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}
# The libraries below us wrap their causes in errors of their own, of which the text alone tells.
PASSING_TEXT = re.compile(
    r"(?i)(^|\b(http|status|code|error)\W{0,3}(code\W{0,3})?)(408|425|429|500|502|503|504)\b"
    r"|too many requests|service unavailable|temporarily|internal server error|bad gateway"
    r"|gateway time-?out|timed out|connection (reset|refused|aborted)|rate ?limit|slow ?down"
    r"|^(unavailable|deadline_exceeded|resource_exhausted|aborted):"
)


def may_pass(error: BaseException) -> bool:
    """Return whether the same call may succeed in a moment."""
    return any(
        isinstance(cause, PASSING_KINDS)
        or (isinstance(cause, OSError) and cause.errno in PASSING_NUMBERS)
        or _status(cause) in PASSING_STATUS
        or PASSING_TEXT.search(str(cause)) is not None
        for cause in causes(error)
    )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that the error carries, wherever its library keeps it."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status_code", "status", "code"):
            try:
                return int(getattr(holder, name))
            except (AttributeError, TypeError, ValueError):
                continue
    return None


def retrying(what: str, call: Callable[[], _Result]) -> _Result:
    """Return what `call` returns, calling it again while its error may pass.

    Args:
        what: names the call in messages, for instance "reading gs://bucket/config.json".
        call: the call.

    Raises:
        Exception: the last of `ATTEMPTS` errors that may pass, or the first of another kind.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return call()
        except Exception as error:
            if not may_pass(error):
                raise
            say(f"warning: {what}: {error}; trying again ({attempt} of {ATTEMPTS - 1})")
            time.sleep(WAIT * 2 ** (attempt - 1))
    return call()
