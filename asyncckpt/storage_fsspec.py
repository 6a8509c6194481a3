"""Checkpoint files at any fsspec URL: S3 and GCS first, memory:// for tests, the rest as well as their filesystem does.

`FsspecStorage` is what `open_storage` returns for a URL with a protocol. Its job is to make fsspec's filesystems keep
the promises of `Storage`, each trap named where it is avoided. The bytes of S3 go through s3_obstore.py, or, where that
cannot do exactly what the options say, through s3fs: large files by s3_upload.py.
"""

from __future__ import annotations

import datetime
import errno
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from inspect import Parameter, signature
from typing import Any, Literal, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.core import url_to_fs
from fsspec.utils import get_protocol

from asyncckpt.client_errors import OUT_OF_RANGE, Operation, errno_of, named_client_errors, s3_error
from asyncckpt.client_requests import ANSWER_S, MIN_RATE, guard_gcsfs, guard_s3fs
from asyncckpt.parallel import Arrivals, for_each
from asyncckpt.retries import CLEANING_S, again, may_pass
from asyncckpt.s3_obstore import ObstoreBucket
from asyncckpt.s3_settings import UntranslatableError, is_aws
from asyncckpt.s3_upload import S3Upload, abort_uploads
from asyncckpt.storage import RETRY_S, TEMP_PREFIX, beside, check_path, redact, secrets_of

MIB = 1 << 20
READ_BYTES = 8 * MIB  # of one request
READ_GAP_BYTES = 64 << 10  # a guess: fetching this much for nothing is cheaper than one more request
S3_CONNECTIONS = 64  # eight files of eight parts
DELETE_KEYS = 1000  # of one DeleteObjects request, the limit of S3
HONOURS_CREATE = ("s3fs", "gcsfs")  # others look first: exclusive against one writer only, which is what a run has

T = TypeVar("T")


class FsspecStorage:
    """A `Storage` on an fsspec filesystem; see there for every contract.

    storage_options reach the filesystem, over two settings of ours: no listing cache, no instance shared with others.
    num_threads: requests in flight for one file that is written, and for all that are read; each of the latter holds up
    to 8 MiB. retry_timeout: seconds after which a request that fails is not tried again. `write_file` sends a file to
    S3 as it lies in memory; elsewhere its views are joined first, so `max_file_bytes` is what one call may add to it.
    """

    part_bytes = 16 * MIB
    """Of one part of a large file on S3. Measured against radosgw: 16 MiB x 8 in flight reach the server's limit."""

    def __init__(
        self,
        url: str,
        storage_options: Mapping[str, Any] | None = None,
        *,
        num_threads: int | None = None,
        transfer: Literal["auto", "obstore", "fsspec"] = "auto",
        retry_timeout: float = RETRY_S,
    ) -> None:
        self.url = redact(url)
        self._full_url = url
        self._options = dict(storage_options or {})
        self._secrets = secrets_of(url, self._options)
        self._num_threads = num_threads or 8
        self._transfer = transfer
        self._retry_s = retry_timeout
        self._bucket: ObstoreBucket | None
        self._is_decided = False
        self.client_reason = ""
        self._open()
        if transfer == "obstore" and not self._obstore():
            raise ValueError(f"{self.url}: obstore cannot move these bytes: {self.client_reason}")
        # gs: one upload session is sequential, so several files are in flight; each is joined in memory first.
        self.max_file_bytes = {"s3fs": 128 << 30, "gcsfs": 128 * MIB}.get(self._client, 64 * MIB)

    def __repr__(self) -> str:
        return f"<FsspecStorage {self.url} by {self.client}>"

    @property
    def client(self) -> str:
        return "obstore" if self._bucket else self._client

    def write_file(self, path: str, size: int, views: Iterator[memoryview]) -> None:
        try:
            self._put_file(path, size, views)
        except BaseException:
            if self._client != "s3fs":  # there it never came to be
                with suppress(Exception):
                    self._filesystem.rm_file(self._full(path))
            raise

    def _put_file(self, path: str, size: int, views: Iterator[memoryview]) -> None:
        full, what = self._full(path), self._what("write", path)
        if bucket := self._obstore():
            sending = {"part_bytes": self.part_bytes, "num_in_flight": self._num_threads}
            bucket.write(self._filesystem.split_path(full)[1], size, views, what, **sending)
            return
        if self._client == "s3fs":
            upload = S3Upload(self._filesystem, full, what, part_bytes=self.part_bytes, num_in_flight=self._num_threads)
            upload.write(size, views)
            return
        pieces = list(views)
        # gcsfs sends a memoryview without a copy; other filesystems are only known to take bytes.
        data = pieces[0] if len(pieces) == 1 and self._client == "gcsfs" else b"".join(pieces)
        if len(data) != size:
            raise ValueError(f"the views hold {len(data)} bytes, {size} were announced")
        self._pipe_and_check(full, data, what)

    def replace_file(self, path: str, size: int, views: Iterator[memoryview]) -> None:
        if self._client in ("s3fs", "gcsfs") or get_protocol(self._full_url) == "memory":
            self._put_file(path, size, views)  # one object, there when its last byte is
            return
        temporary, what = beside(path), self._what("replace", path)
        self.write_file(temporary, size, views)
        try:
            self._ask(what, "mv", self._full(temporary), self._full(path))
        except BaseException:
            with suppress(Exception):
                self._filesystem.rm_file(self._full(temporary))
            raise

    def create(self, path: str, data: bytes) -> None:
        full = self._full(path)
        try:
            self._create(full, data, self._what("create", path))
        except FileExistsError:
            # A client that tries again after a lost answer meets its own first try.
            if self.read_file(path) != data:
                raise

    def replace(self, path: str, data: bytes) -> None:
        self._pipe(self._full(path), data, self._what("replace", path))

    def read_file(self, path: str) -> bytes:
        # By default s3fs reads large objects in chunks: no single moment of a file that is replaced, and never retried.
        whole = {"max_concurrency": 1} if self._client == "s3fs" else {}
        data: bytes = self._ask(self._what("read", path), "cat_file", self._full(path), **whole)
        return data

    def read_into(
        self, path: str, ranges: Sequence[tuple[int, memoryview]], filled: Callable[[int], None] | None = None
    ) -> None:
        full, what, bucket = self._full(path), self._what("read", path), self._obstore()
        arrivals = Arrivals(ranges, filled) if filled else None

        def read(request: _Request) -> None:
            start, end, pieces = request
            with self._reading:
                chunk = self._fetch(bucket, full, start, end, what)
                for offset, view, _ in pieces:
                    view[:] = chunk[offset - start : offset - start + len(view)]
            if arrivals:
                for _, view, index in pieces:
                    arrivals.add(index, len(view))

        # Other filesystems are not known to take several calls at once.
        for_each(read, _requests(ranges), self._num_threads if self._client in ("s3fs", "gcsfs") else 1)

    def list_files(self, prefix: str = "") -> Mapping[str, int]:
        folder = self._full(prefix.rstrip("/")) if prefix else self._root
        self._filesystem.invalidate_cache()
        try:
            found = self._ask(self._what("list", prefix), "find", folder, detail=True)
        except FileNotFoundError:
            if self._client in ("s3fs", "gcsfs"):  # there it is the bucket that is missing
                raise
            found = {}
        files = {}
        for name, info in found.items():
            path = name[len(self._root) + 1 :]
            is_file = info.get("type", "file") == "file" and not name.endswith("/")
            if is_file and name.startswith(f"{folder}/") and not path.rpartition("/")[2].startswith(TEMP_PREFIX):
                files[path] = info.get("size") or 0
        return files

    def modified_s(self, path: str) -> float:
        what = self._what("look at", path)
        try:
            made: datetime.datetime | str = self._ask(what, "modified", self._full(path))
        except NotImplementedError as exc:
            raise OSError(errno.ENOTSUP, f"{what}: {self._client} does not tell the time of a file") from exc
        if isinstance(made, str):
            made = datetime.datetime.fromisoformat(made)
        return (made if made.tzinfo else made.replace(tzinfo=datetime.UTC)).timestamp()

    def delete(self, paths: Iterable[str]) -> None:
        """Not by `fs.rm`: it takes names for patterns, so that a `run[1]` deletes in `run1`, and on S3 hides errors."""
        names = [self._full(path) for path in paths]
        failures = self._delete_s3(names) if self._client == "s3fs" else self._delete_each(names)
        if failures:
            reasons = "; ".join(str(failure) for failure in failures[:3])
            message = f"{self._what('delete at', '')}: {len(failures)} of {len(names)} files failed: {reasons}"
            raise OSError(failures[0].errno, message) from ExceptionGroup("delete", failures)

    def sweep(self, may_go: Callable[[str], bool]) -> None:
        """GCS forgets an upload after a week, and the rest has none."""
        if self._client == "s3fs":
            with named_client_errors(self._what("sweep", "")):
                abort_uploads(self._filesystem, self._root, may_go)

    def check_writable(self) -> None:
        probe = self._full(TEMP_PREFIX + secrets.token_hex(8))
        self._pipe(probe, b"asyncckpt", self._what("write to", ""))
        with suppress(Exception):  # who may not delete may still write
            self._filesystem.rm_file(probe)

    def is_create_exclusive(self) -> bool:
        """S3 and GCS themselves are not asked; what else speaks their protocols may ignore the condition (rclone,
        s3rver, emulators)."""
        if self._client not in HONOURS_CREATE:
            return str(get_protocol(self._full_url)) == "memory"
        if self._is_the_real_one():
            return True
        probe, what = self._full(TEMP_PREFIX + secrets.token_hex(8)), self._what("probe", "")
        with named_client_errors(what):
            try:
                self._pipe(probe, b"1", what, mode="create")  # meets its own first try, if that one's answer is lost
                self._pipe(probe, b"2", what, mode="create")
            except OSError as exc:
                if errno_of(exc) != errno.EEXIST:
                    raise
                return True
            finally:
                with suppress(Exception):  # who may not delete may still write
                    self._filesystem.rm_file(probe)
        return False

    def _is_the_real_one(self) -> bool:
        filesystem = self._filesystem
        if self._client == "gcsfs":
            return bool(filesystem._location.endswith(".googleapis.com"))
        return is_aws(filesystem.s3.meta.endpoint_url)

    @property
    def _filesystem(self) -> Any:
        if self._pid != os.getpid():  # a filesystem's loop and connections belong to the process that made them
            self._open()
        return self._opened

    def _obstore(self) -> ObstoreBucket | None:
        """Who moves the bytes if not fsspec; decided at the first file, as credentials may take a while to find."""
        filesystem = self._filesystem
        with self._deciding:
            if not self._is_decided:
                with named_client_errors(self._what("open", "")):
                    try:
                        self._bucket = ObstoreBucket.open(filesystem, self._root, self._retry_s)
                    except UntranslatableError as exc:
                        self.client_reason = redact(str(exc), self._secrets)
                self._is_decided = True
            return self._bucket

    def _open(self) -> None:
        self._pid = os.getpid()
        self._bucket = None
        self._deciding = threading.Lock()
        self._reading = threading.BoundedSemaphore(self._num_threads)
        with named_client_errors(self._what("open", "")):
            self._opened, root = _open_filesystem(self._full_url, self._options)
        self._root = str(root).rstrip("/")
        self._client = type(self._opened).__module__.partition(".")[0]
        self._is_decided = self._client != "s3fs" or self._transfer == "fsspec"
        self.client_reason = "transfer='fsspec'" if self._transfer == "fsspec" else ""
        if self._client != "s3fs":
            self.client_reason = f"obstore moves the bytes of s3:// alone, this is {get_protocol(self._full_url)}://"
        if self._client == "s3fs":
            self._opened.config_kwargs = {
                # botocore keeps 10: a part that waits for a connection looks like one that nobody reads.
                "max_pool_connections": S3_CONNECTIONS,
                "retries": {"total_max_attempts": 1},
                **self._opened.config_kwargs,
            }
            guard_s3fs(self._opened, self._retry_s)
        if self._client == "gcsfs":
            guard_gcsfs(self._opened, self._retry_s)

    def _ask(self, what: str, method: str, *arguments: Any, num_bytes: int = READ_BYTES, **options: Any) -> Any:
        """What a method of the filesystem gives, tried again while that may help; `what` begins the message of errors.

        num_bytes: to be moved by it. s3fs and gcsfs try each request again, and have its deadline; see guard_s3fs.
        """
        options |= self._deadline(num_bytes)
        return self._again(what, lambda: getattr(self._filesystem, method)(*arguments, **options))

    def _deadline(self, num_bytes: int) -> dict[str, float]:
        """An argument for the rest of fsspec's clients: else a peer that is gone is waited for without end."""
        if not isinstance(self._filesystem, AsyncFileSystem) or self._client in ("s3fs", "gcsfs"):
            return {}
        return {"timeout": ANSWER_S + num_bytes / MIN_RATE}

    def _again(self, what: str, request: Callable[[], T]) -> T:
        with named_client_errors(what):
            return again(request, self._retry_s)

    def _fetch(self, bucket: ObstoreBucket | None, full: str, start: int, end: int, what: str) -> memoryview:
        """The bytes [start, end). EOFError if the file ends before."""
        filesystem = self._filesystem

        def fetch() -> memoryview:
            if bucket:
                chunk = bucket.read(filesystem.split_path(full)[1], start, end)
            else:
                chunk = memoryview(filesystem.cat_file(full, start=start, end=end, **self._deadline(end - start)))
            if len(chunk) != end - start and (len(chunk) > end - start or filesystem.size(full) >= end):
                raise OSError(errno.EIO, f"{len(chunk)} bytes came, {end - start} were asked for")
            return chunk

        try:
            chunk = self._again(what, fetch)
        except OSError as exc:
            if exc.errno == OUT_OF_RANGE:
                raise EOFError(f"{what}: the file is shorter than the {end} bytes asked for") from exc
            raise
        if len(chunk) != end - start:
            raise EOFError(f"{what}: the file ends at byte {start + len(chunk)}, byte {end - 1} was asked for")
        return chunk

    def _full(self, path: str) -> str:
        return f"{self._root}/{check_path(path)}"

    def _what(self, operation: str, path: str) -> Operation:
        return Operation(f"{operation} {path} at {self.url}" if path else f"{operation} {self.url}", self._secrets)

    def _create(self, full: str, data: bytes, what: str) -> None:
        filesystem = self._filesystem
        if get_protocol(self._full_url) == "memory":
            # Its own create looks first and stores afterwards, so that two threads can both win.
            from fsspec.implementations.memory import MemoryFile

            mine = MemoryFile(filesystem, full, data)
            if filesystem.store.setdefault(full, mine) is not mine:
                raise FileExistsError(errno.EEXIST, f"{what}: the file exists")
            return
        # Also where create is honoured: some servers behind the S3 protocol ignore the condition (rclone, s3rver).
        if self._ask(what, "exists", full):
            raise FileExistsError(errno.EEXIST, f"{what}: the file exists")
        self._pipe(full, data, what, **({"mode": "create"} if self._client in HONOURS_CREATE else {}))

    def _pipe_and_check(self, full: str, data: bytes | memoryview, what: str) -> None:
        self._pipe(full, data, what)
        stored = self._ask(what, "size", full)
        if stored != len(data):
            raise OSError(errno.EIO, f"{what}: {stored} bytes were stored, {len(data)} were sent")

    def _pipe(self, full: str, data: bytes | memoryview, what: str, **options: Any) -> None:
        """One object in one call. Never through `open(full, "wb")`: an exception in its block publishes the half."""
        if self._client == "s3fs":
            options["chunksize"] = 5 << 30  # one PUT: radosgw ignores the condition of a create on a multipart upload
        if self._client == "gcsfs":
            options["chunksize"] = 32 * MIB
        try:
            self._ask(what, "pipe_file", full, data, num_bytes=len(data), **options)
        except FileNotFoundError:
            if self._client in ("s3fs", "gcsfs"):  # no such bucket
                raise
            self._ask(what, "makedirs", full.rpartition("/")[0], exist_ok=True)
            self._ask(what, "pipe_file", full, data, num_bytes=len(data), **options)

    def _delete_s3(self, names: Sequence[str]) -> list[OSError]:
        failures: list[OSError] = []
        filesystem, what = self._filesystem, self._what("delete at", "")
        for start in range(0, len(names), DELETE_KEYS):
            batch = [filesystem.split_path(name)[:2] for name in names[start : start + DELETE_KEYS]]
            left = [key for _, key in batch]

            def delete(bucket: str = batch[0][0], left: list[str] = left) -> list[OSError]:
                """What is refused; what only failed is left, and an error."""
                request = {"Objects": [{"Key": key} for key in left], "Quiet": True}
                answer = sync(filesystem.loop, filesystem._call_s3, "delete_objects", Bucket=bucket, Delete=request)
                errors = {str(error["Key"]): s3_error(error) for error in answer.get("Errors", ())}
                left[:] = [key for key, error in errors.items() if may_pass(error)]
                if left:
                    raise errors[left[0]]
                return list(errors.values())

            try:
                with named_client_errors(what):
                    failures += again(delete, min(self._retry_s, CLEANING_S))
            except OSError as exc:
                failures.append(exc)
        return failures

    def _delete_each(self, names: Sequence[str]) -> list[OSError]:
        def delete(name: str) -> OSError | None:
            try:
                self._ask(name, "rm_file", name)
            except FileNotFoundError:
                return None
            except OSError as exc:
                return exc
            return None

        with ThreadPoolExecutor(self._num_threads) as pool:
            return [failure for failure in pool.map(delete, names) if failure]


def _open_filesystem(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """A filesystem of our own, and the root's path in it."""
    protocol = get_protocol(url)
    kind = fsspec.get_filesystem_class(protocol)
    settings: dict[str, Any] = {"skip_instance_cache": True}
    parameters = signature(kind.__init__).parameters.values()
    if any(p.kind is Parameter.VAR_KEYWORD or p.name == "use_listings_cache" for p in parameters):
        settings["use_listings_cache"] = False  # cached listings never expire: new objects stay unseen
    settings |= options
    if protocol in ("gs", "gcs") and (settings.get("endpoint_url") or os.environ.get("STORAGE_EMULATOR_HOST")):
        # The class registered for gs:// asks every new bucket for its layout by gRPC, which no emulator speaks: it
        # retries for 81 s, at every call.
        from gcsfs.core import GCSFileSystem

        return GCSFileSystem(**settings), GCSFileSystem._strip_protocol(url)
    filesystem, root = url_to_fs(url, **settings)
    return filesystem, root


_Request = tuple[int, int, list[tuple[int, memoryview, int]]]


def _requests(ranges: Sequence[tuple[int, memoryview]]) -> Iterator[_Request]:
    """(start, end, [(offset, view, index)]): large views cut, near ones fetched together, in the order of the file."""
    pieces = [
        (offset + at, view[at : at + READ_BYTES], index)
        for index, (offset, view) in enumerate(ranges)
        for at in range(0, len(view), READ_BYTES)
    ]
    pieces.sort(key=lambda piece: piece[0])
    request: _Request | None = None
    for piece in pieces:
        start, end = piece[0], piece[0] + len(piece[1])
        if request and start <= request[1] + READ_GAP_BYTES and end <= request[0] + READ_BYTES:
            request[2].append(piece)
            request = (request[0], max(end, request[1]), request[2])
            continue
        if request:
            yield request
        request = (start, end, [piece])
    if request:
        yield request
