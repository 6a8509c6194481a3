"""Bytes at a URL: the one seam between checkpoints and storage.

Paths are relative to the storage's root, with "/" between parts, and never start with "/". Implementations:
`LocalStorage` (storage_local.py) for folders, `FsspecStorage` (storage_fsspec.py) for everything else;
`open_storage(url, options)` chooses. Storages are safe to use from several threads, and not after a fork while another
thread uses them.

Names that start with `.tmp-` belong to the storage: half-made files of `create` and `replace`, and probes. They are
never listed.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol
from urllib.parse import quote, unquote

TEMP_PREFIX = ".tmp-"
RETRY_S = 120.0  # A guess: servers restart within it, and ranks wait for each other five times as long


class Storage(Protocol):
    """Every call blocks; what it wrote is durable on return. Errors are `OSError`s (FileNotFoundError, PermissionError,
    FileExistsError, ...) whose text names the operation and the path, never a credential. Trying again may help with
    errno EBUSY (throttled), EIO, ETIMEDOUT and ECONNRESET."""

    url: str
    """The root as the user wrote it, without credentials: for messages."""
    max_file_bytes: int
    """Files larger than this are slow or impossible here; a single item that is larger still gets one file."""

    @property
    def client(self) -> str:
        """What moves the bytes of files: "os", "obstore", "s3fs", "gcsfs", ...; known when the first was moved."""
        ...

    @property
    def client_reason(self) -> str:
        """Why not obstore, or ""."""
        ...

    def write_file(self, path: str, size: int, views: Iterator[memoryview]) -> None:
        """Write a new file of `size` bytes, the concatenation of `views` (C-contiguous, format "B").

        `path` is fresh: nobody else writes it, and nothing refers to it yet. Missing parents are made. A view stays
        valid and unchanged until this call returns. Views are asked for in order, from one thread, and no further
        ahead than writing needs. If the iterator or a write raises, the file is removed as far as possible and the
        exception propagates. Iterators that yield more or less than `size` bytes are a ValueError.
        """
        ...

    def create(self, path: str, data: bytes) -> None:
        """Write a small file atomically, only if it is absent: FileExistsError otherwise.

        On object stores a file that holds exactly `data` counts as written by this call: the answer to its first try
        may have been lost.
        """
        ...

    def replace(self, path: str, data: bytes) -> None:
        """Write a small file atomically, whether or not it exists: a reader sees the old or the new bytes."""
        ...

    def replace_file(self, path: str, size: int, views: Iterator[memoryview]) -> None:
        """`write_file` of a path that may be there and be read: until all is written a reader sees the old file, or
        none; the same holds if the call fails. Where the filesystem is neither a folder nor S3, GCS or memory, as far
        as its `mv` is atomic."""
        ...

    def read_file(self, path: str) -> bytes: ...

    def read_into(
        self, path: str, ranges: Sequence[tuple[int, memoryview]], filled: Callable[[int], None] | None = None
    ) -> None:
        """Fill each writable view with the file's bytes from its offset. EOFError if the file is too short.

        filled: called once for each index of `ranges` when that view is full, soon, so that its bytes are still in the
        CPU's cache, and from any thread, several at once. What it raises ends the read and passes to the caller
        unchanged. However the call ends, no view is written to and `filled` is not called after it.
        """
        ...

    def list_files(self, prefix: str = "") -> Mapping[str, int]:
        """{path: size in bytes} of every file under the folder `prefix`, as it is now: never from a cache.

        A folder that does not exist has no files. Storage itself missing (bucket) is FileNotFoundError.
        """
        ...

    def modified_s(self, path: str) -> float:
        """`time.time()`, by the clock of the storage, when a file got its bytes."""
        ...

    def delete(self, paths: Iterable[str]) -> None:
        """Delete files in bulk, and on a folder the folders left empty. A missing file is no error; every failure is
        one OSError after all were tried."""
        ...

    def sweep(self, may_go: Callable[[str], bool]) -> None:
        """Remove what killed writers left and no listing shows, where `may_go(path)` says so: uploads that were never
        completed, and empty folders. Half-made files of the storage's own go with or without their folder."""
        ...

    def check_writable(self) -> None:
        """Raise the OSError that a first write would meet (no such bucket, no permission, root is a file), writing at
        most one probe that is removed again; makes the root folder."""
        ...

    def is_create_exclusive(self) -> bool:
        """Whether of two `create`s of one file at the same moment one is refused. Where that is not known, it is tried
        on a probe that is removed again. For writers only."""
        ...


def open_storage(
    url: str | os.PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    *,
    num_threads: int | None = None,
    transfer: Literal["auto", "obstore", "fsspec"] = "auto",
    retry_timeout: float = RETRY_S,
) -> Storage:
    """The storage for a URL or a local path. ValueError for a protocol that fsspec does not know.

    storage_options: reach the fsspec filesystem unchanged; a folder needs none. num_threads: transfers in flight per
    file; None chooses. transfer: who moves the bytes of s3:// files: "obstore", "fsspec" (s3fs), or "auto": obstore
    where it does exactly what options, environment and credentials mean to s3fs. ValueError if "obstore" cannot.
    retry_timeout: seconds after which a request that fails is not tried again; 0: never. On a folder nothing is.
    """
    if transfer not in ("auto", "obstore", "fsspec"):
        raise ValueError(f'transfer must be "auto", "obstore" or "fsspec", not {transfer!r}')
    # Imported here: both import this file, and fsspec and the clients behind it are slow to import.
    from fsspec import available_protocols, get_filesystem_class
    from fsspec.utils import get_protocol

    from asyncckpt.storage_fsspec import FsspecStorage
    from asyncckpt.storage_local import LocalStorage

    url = os.fspath(url)
    protocol = get_protocol(url)
    if protocol in ("file", "local"):
        if transfer == "obstore":
            raise ValueError(f"{url}: obstore moves the bytes of s3:// alone")
        return LocalStorage(url, num_threads=num_threads)
    try:
        get_filesystem_class(protocol)  # where a package is missing, an ImportError says which
    except ValueError as exc:
        known = ", ".join(available_protocols())
        raise ValueError(f"{redact(url)}: unknown protocol {protocol!r}; known are {known}") from exc
    return FsspecStorage(url, storage_options, num_threads=num_threads, transfer=transfer, retry_timeout=retry_timeout)


def check_path(path: str) -> str:
    """`path` as it is. ValueError unless it stays below the root: no empty part, no "." or "..", not absolute."""
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"{path!r} is not a path relative to the storage's root")
    return path


def beside(path: str) -> str:
    """A new name of the storage's own in the folder of `path`."""
    folder, slash, _ = check_path(path).rpartition("/")
    return f"{folder}{slash}{TEMP_PREFIX}{secrets.token_hex(8)}"


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` with the user info and the query values of the URLs in it, and `secrets`, replaced by "***"."""
    for secret in secrets:
        text = text.replace(secret, "***")
    text = re.sub(r"(?<=://)([^/@\s]*:[^@\s]*|[^/@\s]+)@", "***@", text)  # an S3 secret may hold a "/"
    return re.sub(r"(?<=[?&])([\w.-]+)=[^&\s'\"]+", r"\1=***", text)


_SECRET_NAME = re.compile(
    r"secret|token|passw|key|auth|credential|signature|sas|cookie|header|prox|conn", re.IGNORECASE
)
_MIN_SECRET = 6  # letters; shorter ones stand in too many other words


def secrets_of(url: str, storage_options: Mapping[str, Any]) -> tuple[str, ...]:
    """What no text may repeat, in every form in which clients write it: what the options and the environment give under
    a name of a secret, the password of a URL, the values of its query. The longest first."""
    found = {value for name, value in os.environ.items() if re.search("SECRET|TOKEN|PASSW|KEY", name)}
    todo: list[tuple[Any, bool]] = [(url, False), (storage_options, False)]
    while todo:
        value, is_secret = todo.pop()
        if isinstance(value, Mapping):
            todo += ((inner, is_secret or bool(_SECRET_NAME.search(str(name)))) for name, inner in value.items())
        elif isinstance(value, list | tuple | set):
            todo += ((inner, is_secret) for inner in value)
        elif isinstance(value, str):
            for found_in_url in re.findall(r"://[^/@\s]*?:([^@\s]*)@|[?&][\w.-]+=([^&\s'\"]+)", value):
                # Clients may show the parts of such a value.
                found.update(found_in_url, *(part.split("/") for part in found_in_url))
            found.update([value] if is_secret else [])
    forms = {form for value in found for form in (value, quote(value), quote(value, safe=""), unquote(value))}
    return tuple(sorted((form for form in forms if len(form) >= _MIN_SECRET), key=len, reverse=True))
