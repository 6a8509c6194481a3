"""What fsspec and the clients behind it raise (s3fs, botocore, gcsfs, aiohttp), and obstore, as OSErrors that say what
failed.

The one place that knows their exceptions, and without importing them: by class, HTTP status and class name, obstore's
by their text, which is all they have. Used by retries.py, storage_fsspec.py, s3_upload.py and s3_obstore.py.
"""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from asyncckpt.storage import redact

OUT_OF_RANGE = errno.ERANGE
"""The errno of a read that begins behind the end of the file."""

# First match wins. s3fs raises these classes with no errno.
_BY_CLASS: tuple[tuple[type[BaseException], int], ...] = (
    (FileNotFoundError, errno.ENOENT),
    (FileExistsError, errno.EEXIST),
    (PermissionError, errno.EACCES),
    (IsADirectoryError, errno.EISDIR),
    (NotADirectoryError, errno.ENOTDIR),
    (TimeoutError, errno.ETIMEDOUT),  # asyncio's and fsspec's too
    (ConnectionError, errno.ECONNRESET),
)
_BY_STATUS = {
    401: errno.EACCES,
    403: errno.EACCES,
    404: errno.ENOENT,
    408: errno.ETIMEDOUT,
    409: errno.EBUSY,  # S3: another conditional write of this key is under way
    412: errno.EEXIST,  # s3fs makes it EINVAL
    416: OUT_OF_RANGE,
    429: errno.EBUSY,
    503: errno.EBUSY,
}
# S3's own, where the status says less: 400 for all but the skew, and inside of an answer with status 200.
_BY_CODE = {
    "SlowDown": errno.EBUSY,
    "ServiceUnavailable": errno.EBUSY,
    "InternalError": errno.EIO,
    "RequestTimeout": errno.ETIMEDOUT,  # too little of the body came
    "IncompleteBody": errno.EIO,
    "BadDigest": errno.EIO,
    "XAmzContentSHA256Mismatch": errno.EIO,
    "AccessDenied": errno.EACCES,
    "ExpiredToken": errno.EACCES,
    "InvalidToken": errno.EACCES,
    "TokenRefreshRequired": errno.EACCES,
    "RequestTimeTooSkewed": errno.EACCES,
}
# OpenSSL's, rustls' and glibc's.
_NO_WAY = ("certificate verify failed", "invalid peer certificate", "Name or service not known")
_ADVICE = {
    "ExpiredToken": "the credentials are over, and nothing renews fixed ones: give a profile or a role instead",
    "RequestTimeTooSkewed": "this machine's clock or the server's is wrong by minutes: set it",
}
_BY_NAME = {
    "NoCredentialsError": errno.EACCES,
    "PartialCredentialsError": errno.EACCES,
    "CredentialRetrievalError": errno.EACCES,
    "TransportError": errno.ECONNRESET,  # google.auth's, on the way to new credentials
    "GoogleAuthError": errno.EACCES,
    "HTTPClientError": errno.ECONNRESET,  # botocore: timeouts, proxy, TLS
    "ConnectionError": errno.ECONNRESET,  # botocore's own
    "ClientError": errno.ECONNRESET,  # aiohttp's; botocore's has a status
    "RequestException": errno.ECONNRESET,
    "IncompleteReadError": errno.ECONNRESET,
    "ResponseParserError": errno.EIO,  # a body that is no answer
    "JSONDecodeError": errno.EIO,
    "FlexibleChecksumError": errno.EIO,
    "ChecksumError": errno.EIO,
    "PermissionDeniedError": errno.EACCES,  # obstore's
    "UnauthenticatedError": errno.EACCES,
}
# obstore: the status of the answer, S3's own code and message in it, and why there was no answer.
_OBSTORE_STATUS = re.compile(r"Server returned (?:non-2xx status code: |error response: )?(\d{3})\b")
_OBSTORE_CODE = re.compile(r"<Code>([^<]*)</Code>(?:.*?<Message>([^<]*)</Message>)?", re.DOTALL)
_OBSTORE_TRIES = re.compile(r" in ([\d.]+\w+), after (\d+) retries")
_OBSTORE_KIND = re.compile(r"\bkind: (Timeout|Connect|Request|Interrupted|Decode)\b")


class Operation(str):
    """The words for it, and the secrets of the storage that it is done at."""

    __slots__ = ("secrets",)
    secrets: tuple[str, ...]

    def __new__(cls, text: str, secrets: tuple[str, ...]) -> Self:
        operation = super().__new__(cls, text)
        operation.secrets = secrets
        return operation


@contextmanager
def named_client_errors(what: str) -> Iterator[None]:
    """Whatever is raised inside leaves as an OSError: `what`, the reason, no credential; the original as its cause, if
    that has none either."""
    secrets = what.secrets if isinstance(what, Operation) else ()
    try:
        yield
    except Exception as exc:
        # The errno chooses the class.
        notes = [note for known in _with_causes(exc) for note in getattr(known, "__notes__", ())]
        reason = "; ".join(filter(None, (_reason(exc), _ADVICE.get(_code(exc)), *notes)))
        raise OSError(errno_of(exc) or errno.EIO, f"{what}: {redact(reason, secrets)}") from (
            None if _tells(exc, secrets) else exc
        )


def _tells(exc: BaseException, secrets: tuple[str, ...]) -> bool:
    """Whether a traceback of it would show a secret, or may: obstore's text has the whole answer of the server."""
    todo, seen = [exc], set[int]()
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        text = "\n".join((str(one), repr(one.args), *getattr(one, "__notes__", ())))
        if _is_obstore(one) or redact(text, secrets) != text:
            return True
        todo += (other for other in (one.__cause__, one.__context__, *getattr(one, "exceptions", ())) if other)
    return False


def errno_of(exc: BaseException) -> int | None:
    """What an error means; None: nothing that is known here."""
    if code := _BY_CODE.get(_code(exc)):
        return code
    if _is_no_way(exc):
        return errno.EHOSTUNREACH
    for known, number in _BY_CLASS:
        if isinstance(exc, known):
            return number
    if status := _http_status(exc):
        return _BY_STATUS.get(status) or (errno.EINVAL if status < 500 else errno.EIO)
    if isinstance(exc, OSError) and exc.errno:
        return exc.errno
    for ancestor in type(exc).__mro__:
        if ancestor.__name__ in _BY_NAME:
            return _BY_NAME[ancestor.__name__]
    if _is_obstore(exc) and (kind := _OBSTORE_KIND.search(str(exc))):
        return errno.ETIMEDOUT if kind[1] == "Timeout" else errno.ECONNRESET
    if str(exc).startswith("Forbidden: "):  # gcsfs says 403 in no other way
        return errno.EACCES
    return errno.EIO if _is_obstore(exc) else None


def s3_error(error: Mapping[str, Any]) -> OSError:
    """For one key of an answer to a request about many."""
    code = str(error.get("Code"))
    return OSError(_BY_CODE.get(code, errno.EACCES), f"{error.get('Key')}: {code} {error.get('Message', '')}")


def _is_no_way(exc: BaseException) -> bool:
    """No such host, says a resolver that could be asked, or a certificate that is not trusted: no try will help."""
    text = str(exc)
    if any(words in text for words in _NO_WAY):
        return True
    return any(isinstance(known, socket.gaierror) and known.errno == socket.EAI_NONAME for known in _with_causes(exc))


def _is_obstore(exc: BaseException) -> bool:
    """Also when it raises a builtin."""
    return type(exc).__module__.startswith("obstore") or "\n\nDebug source:\n" in str(exc)


def _code(exc: BaseException) -> str:
    """S3's name of what is wrong, or ""."""
    if _is_obstore(exc):
        found = _OBSTORE_CODE.search(str(exc))
        return found[1] if found else ""
    responses = (getattr(known, "response", None) for known in _with_causes(exc))
    return next((str(r.get("Error", {}).get("Code")) for r in responses if isinstance(r, dict)), "")


def _reason(exc: BaseException) -> str:
    if _is_obstore(exc):
        text = str(exc)
        found = _OBSTORE_TRIES.search(text)
        tries = f"; {int(found[2]) + 1} tries in {found[1]}" if found else ""
        if code := _OBSTORE_CODE.search(text):
            return " ".join(filter(None, code.groups())) + tries
        kind = _OBSTORE_KIND.search(text)
        return text.partition("\n")[0] + (f" ({kind[1]})" if kind else "")
    for known in _with_causes(exc):
        if isinstance(response := getattr(known, "response", None), dict):  # botocore; s3fs keeps the message alone
            error = response.get("Error", {})
            return f"{error.get('Code')} {error.get('Message') or ''}".rstrip()
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    return next(filter(None, map(str, _with_causes(exc))), type(exc).__name__)  # fsspec's of a timeout is empty


def _http_status(exc: BaseException) -> int | None:
    """Of the response that `exc`, or what it was raised from, stands for."""
    if _is_obstore(exc):
        found = _OBSTORE_STATUS.search(str(exc))
        return int(found[1]) if found else None
    for known in _with_causes(exc):
        response = getattr(known, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        elif type(known).__module__ == "aiohttp.http_exceptions":  # says 400 of every answer that it cannot read
            continue
        else:
            status = getattr(known, "code", None) or getattr(known, "status", None)  # gcsfs, aiohttp
        if str(status).isdecimal():
            return int(str(status))
    return None


def _with_causes(exc: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = exc
    while cause is not None:
        yield cause
        inner = cause.__cause__ or getattr(cause, "kwargs", {}).get("error")  # the latter is botocore's
        cause = inner if isinstance(inner, BaseException) else None
