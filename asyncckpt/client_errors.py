"""What fsspec and the clients behind it raise (s3fs, botocore, gcsfs, aiohttp), and obstore, as OSErrors that say what
failed.

The one place that knows their exceptions, and without importing them: by class, HTTP status and class name, obstore's
by their text, which is all they have. Used by storage_fsspec.py, s3_upload.py and s3_obstore.py.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

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
_BY_NAME = {
    "NoCredentialsError": errno.EACCES,
    "PartialCredentialsError": errno.EACCES,
    "CredentialRetrievalError": errno.EACCES,
    "GoogleAuthError": errno.EACCES,
    "HTTPClientError": errno.ECONNRESET,  # botocore: timeouts, proxy, TLS
    "ConnectionError": errno.ECONNRESET,  # botocore's own
    "ClientError": errno.ECONNRESET,  # aiohttp's; botocore's has a status
    "RequestException": errno.ECONNRESET,
    "PermissionDeniedError": errno.EACCES,  # obstore's
    "UnauthenticatedError": errno.EACCES,
}
# obstore: the status of the answer, S3's own code and message in it, and why there was no answer.
_OBSTORE_STATUS = re.compile(r"Server returned (?:non-2xx status code: |error response: )?(\d{3})\b")
_OBSTORE_CODE = re.compile(r"<Code>([^<]*)</Code>(?:.*?<Message>([^<]*)</Message>)?", re.DOTALL)
_OBSTORE_KIND = re.compile(r"\bkind: (Timeout|Connect|Request|Interrupted|Decode)\b")
_EXPIRED = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "RequestTimeTooSkewed")  # 400, and s3fs's EACCES


@contextmanager
def named_client_errors(what: str) -> Iterator[None]:
    """Whatever is raised inside leaves as an OSError: `what`, the reason, no credential, the original as its cause."""
    try:
        yield
    except Exception as exc:
        # The errno chooses the class.
        # Not from obstore's: its text has the whole answer of the server, which may repeat a session token.
        raise OSError(_errno(exc), f"{what}: {redact(_reason(exc))}") from (None if _is_obstore(exc) else exc)


def _errno(exc: BaseException) -> int:
    for known, number in _BY_CLASS:
        if isinstance(exc, known):
            return number
    if _is_obstore(exc) and (code := _OBSTORE_CODE.search(str(exc))) and code[1] in _EXPIRED:
        return errno.EACCES
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
    return errno.EIO


def _is_obstore(exc: BaseException) -> bool:
    """Also when it raises a builtin."""
    return type(exc).__module__.startswith("obstore") or "\n\nDebug source:\n" in str(exc)


def _reason(exc: BaseException) -> str:
    if _is_obstore(exc):
        text = str(exc)
        if code := _OBSTORE_CODE.search(text):
            return " ".join(filter(None, code.groups()))
        kind = _OBSTORE_KIND.search(text)
        return text.partition("\n")[0] + (f" ({kind[1]})" if kind else "")
    for known in _with_causes(exc):
        if isinstance(response := getattr(known, "response", None), dict):  # botocore; s3fs keeps the message alone
            error = response.get("Error", {})
            return f"{error.get('Code')} {error.get('Message') or ''}".rstrip()
    return (exc.strerror if isinstance(exc, OSError) else None) or str(exc) or type(exc).__name__


def _http_status(exc: BaseException) -> int | None:
    """Of the response that `exc`, or what it was raised from, stands for."""
    if _is_obstore(exc):
        found = _OBSTORE_STATUS.search(str(exc))
        return int(found[1]) if found else None
    for known in _with_causes(exc):
        response = getattr(known, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = getattr(known, "code", None) or getattr(known, "status", None)  # gcsfs, aiohttp
        if str(status).isdecimal():
            return int(str(status))
    return None


def _with_causes(exc: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = exc
    while cause is not None:
        yield cause
        cause = cause.__cause__
