"""Trying again: which errors may pass, how long to wait between tries, and when it is enough. The one policy.

Full jitter: each wait is drawn between nothing and a bound that doubles from `FIRST_S` to `CAP_S`, so that many ranks
that were throttled together do not come back together. The unit is one request (a part, a range, a page of a listing):
a large file does not begin again because one of its parts failed. Used by client_requests.py and storage_fsspec.py;
obstore repeats its requests itself, by the same figures (s3_settings.py). A folder is never tried again: what a disk
refuses it refuses again, and after ESTALE (NFS) the next save opens its files anew.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from tenacity import AsyncRetrying, RetryCallState, Retrying, retry_if_exception, stop_before_delay

from asyncckpt.client_errors import errno_of

FIRST_S = 0.1  # a throttled S3 takes up to 5,500 requests a second again at once; a guess
CAP_S = 5.0  # a guess: a server that restarts is met within it
CLEANING_S = 10.0
"""The deadline of what is tried again after a later save: deleting, aborting uploads. A save may wait behind it."""

_MAY_PASS = {
    errno.EBUSY,  # throttled
    errno.EIO,  # the server failed, or what it sent makes no sense
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.EPIPE,
    errno.ENETUNREACH,
    errno.EAGAIN,
}
# Not the module's own: a background thread must not draw from the stream that a training run saves and restores.
_random = random.SystemRandom()

T = TypeVar("T")


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later, and was not given up by a try within this one: a page of a listing
    is tried until the deadline, and not the listing once more."""
    given_up = any(hasattr(known, "num_tries") for known in (error, error.__cause__))  # fsspec's timeout has a cause
    return not given_up and errno_of(error) in _MAY_PASS


def again(request: Callable[[], T], deadline_s: float) -> T:
    """What `request` gives, tried again while its error may pass; then the last error, with a note of the tries."""
    return Retrying(
        stop=stop_before_delay(deadline_s),
        wait=_wait_s,
        retry=retry_if_exception(may_pass),
        retry_error_callback=_give_up,
    )(request)


async def again_async(request: Callable[[], Awaitable[T]], deadline_s: float) -> T:
    return await AsyncRetrying(
        stop=stop_before_delay(deadline_s),
        wait=_wait_s,
        retry=retry_if_exception(may_pass),
        retry_error_callback=_give_up,
    )(request)


def _wait_s(state: RetryCallState) -> float:
    return _random.uniform(0, min(CAP_S, FIRST_S * 2 ** (state.attempt_number - 1)))


def _give_up(state: RetryCallState) -> Any:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert error is not None
    error.num_tries = state.attempt_number  # type: ignore[attr-defined]
    if state.attempt_number > 1:
        error.add_note(f"{state.attempt_number} tries in {state.seconds_since_start or 0:.1f} s")
    raise error
