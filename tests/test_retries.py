"""Which errors are tried again, for how long, and what is said when it was in vain."""

from __future__ import annotations

import errno
import itertools
import math
import random
import socket
from typing import Any

import aiohttp
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, SSLError
from botocore.parsers import ResponseParserError
from google.auth.exceptions import RefreshError, TransportError

from asyncckpt import retries
from asyncckpt.client_errors import named_client_errors
from asyncckpt.retries import again, may_pass


def answer(code: str, status: int) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")


@pytest.mark.parametrize(
    "error",
    [
        answer("SlowDown", 503), answer("TooManyRequests", 429), answer("InternalError", 500), answer("x", 502),
        answer("RequestTimeout", 400), answer("BadDigest", 400), answer("InternalError", 200), answer("x", 409),
        ConnectionResetError(errno.ECONNRESET, "m"), BrokenPipeError(errno.EPIPE, "m"), TimeoutError(),
        aiohttp.ClientPayloadError(), ResponseParserError(), TransportError("m"), OSError(errno.EIO, "m"),
        EndpointConnectionError(endpoint_url="http://h"), socket.gaierror(socket.EAI_AGAIN, "m"),
    ],
    ids=repr,
)  # fmt: skip
def test_what_may_pass_is_tried_again(error: Exception) -> None:
    """Throttling, a server's own failures, answers that are lost or make no sense, connections."""
    if isinstance(error, socket.gaierror):
        error = EndpointConnectionError(endpoint_url="http://h", error=error)
    assert may_pass(error)


@pytest.mark.parametrize(
    "error",
    [
        answer("AccessDenied", 403), answer("ExpiredToken", 400), answer("RequestTimeTooSkewed", 403),
        answer("NoSuchKey", 404), answer("PreconditionFailed", 412), answer("InvalidPart", 400), RefreshError("m"),
        SSLError(endpoint_url="https://h", error="certificate verify failed: self-signed certificate"),
        EndpointConnectionError(endpoint_url="http://h", error=socket.gaierror(socket.EAI_NONAME, "m")),
        OSError(errno.ENOSPC, "m"), OSError(errno.EROFS, "m"), RuntimeError("m"), ValueError("m"), KeyboardInterrupt(),
    ],
    ids=repr,
)  # fmt: skip
def test_what_no_try_helps_fails_at_once(error: BaseException) -> None:
    """Refusals, what is not there, a host that does not exist, a certificate that is not trusted, and our own bugs."""
    num_tries = 0

    def request() -> None:
        nonlocal num_tries
        num_tries += 1
        raise error

    with pytest.raises(type(error)):
        again(request, 60)
    assert num_tries == 1


def failing(times: float) -> Any:
    numbers = itertools.count()

    def request() -> str:
        if (number := next(numbers)) < times:
            raise OSError(errno.EBUSY, f"busy {number}")
        return "answer"

    return request


def test_a_request_is_tried_until_it_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often, before the deadline."""
    monkeypatch.setattr(retries, "FIRST_S", 0.0)
    assert again(failing(50), 60) == "answer"


def test_the_last_error_passes_and_says_how_often_and_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the message, with what was done."""
    monkeypatch.setattr(retries, "FIRST_S", 0.001)
    monkeypatch.setattr(retries, "CAP_S", 0.001)
    words = r"read a/file at s3://b: busy \d+; \d+ tries in 0\.\d s"
    with pytest.raises(OSError, match=words) as raised, named_client_errors("read a/file at s3://b"):
        again(failing(math.inf), 0.1)
    assert raised.value.errno == errno.EBUSY


def test_what_was_given_up_within_is_not_tried_from_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines do not add up: a request is part of a listing, which is tried again where a request is not."""
    monkeypatch.setattr(retries, "FIRST_S", 0.001)
    monkeypatch.setattr(retries, "CAP_S", 0.001)
    calls = []

    def listing() -> str:
        calls.append("listing")
        return str(again(failing(math.inf), 0.05))

    with pytest.raises(OSError, match="busy"):
        again(listing, 600)
    assert calls == ["listing"]


def test_without_a_deadline_nothing_is_tried_again() -> None:
    """retry_timeout=0; nor does the message speak of tries."""
    with pytest.raises(OSError, match=r"read: busy 0$"), named_client_errors("read"):
        again(failing(2), 0)


def test_waiting_draws_nothing_from_the_stream_of_a_training_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A background thread that did would make runs differ, and change what they save as their state."""
    monkeypatch.setattr(retries, "FIRST_S", 0.001)
    random.seed(7)
    before = random.getstate()
    again(failing(5), 60)
    assert random.getstate() == before


def test_waits_are_spread_from_nothing_to_a_bound_that_doubles_up_to_a_cap() -> None:
    """Full jitter."""

    class State:
        attempt_number = 1

    def most(attempt: int) -> float:
        State.attempt_number = attempt
        return max(retries._wait_s(State) for _ in range(2000))  # type: ignore[arg-type]

    assert [most(n) for n in (1, 2, 3)] == [pytest.approx(retries.FIRST_S * bound, rel=0.1) for bound in (1, 2, 4)]
    assert most(100) == pytest.approx(retries.CAP_S, rel=0.1)


@pytest.mark.parametrize(
    ("code", "words"),
    [("RequestTimeTooSkewed", "this machine's clock"), ("ExpiredToken", "nothing renews fixed ones")],
)
def test_an_error_that_a_user_can_mend_says_how(code: str, words: str) -> None:
    """Clocks and credentials."""
    with pytest.raises(PermissionError, match=f"write f: {code}.*{words}"), named_client_errors("write f"):
        raise answer(code, 403)
