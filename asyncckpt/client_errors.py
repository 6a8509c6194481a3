"""What fsspec and the clients behind it raise (s3fs, botocore, gcsfs, aiohttp), as OSErrors that say what failed.

The one place that knows their exceptions, and without importing them: by class, HTTP status and class name. Used by
storage_fsspec.py and s3_upload.py.
"""

from __future__ import annotations

import errno
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
}


@contextmanager
def named_client_errors(what: str) -> Iterator[None]:
    """Whatever is raised inside leaves as an OSError: `what`, the reason, no credential, the original as its cause."""
    try:
        yield
    except Exception as exc:
        # The errno chooses the class.
        raise OSError(_errno(exc), f"{what}: {redact(_reason(exc))}") from exc


def _errno(exc: BaseException) -> int:
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
    if str(exc).startswith("Forbidden: "):  # gcsfs says 403 in no other way
        return errno.EACCES
    return errno.EIO


def _reason(exc: BaseException) -> str:
    for known in _with_causes(exc):
        if isinstance(response := getattr(known, "response", None), dict):  # botocore; s3fs keeps the message alone
            error = response.get("Error", {})
            return f"{error.get('Code')} {error.get('Message') or ''}".rstrip()
    return (exc.strerror if isinstance(exc, OSError) else None) or str(exc) or type(exc).__name__


def _http_status(exc: BaseException) -> int | None:
    """Of the response that `exc`, or what it was raised from, stands for."""
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
