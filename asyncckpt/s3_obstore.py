"""The bytes of s3:// through obstore: objects written from memory as it lies, ranges read on the caller's thread.

obstore runs in Rust with the GIL released: beside a busy Python thread it keeps 200 MiB/s where s3fs falls to 9. Only
its own API is used: `obstore.fsspec` ignores create-if-absent. Naming, listing, deleting, credentials and every option
stay with s3fs, from which `ObstoreBucket.open` takes them over. Called by storage_fsspec.py.
"""

from __future__ import annotations

import asyncio
import errno
import os
import ssl
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from fsspec.asyn import sync

from asyncckpt.client_errors import named_client_errors
from asyncckpt.retries import again
from asyncckpt.s3_settings import UntranslatableError, is_aws, translate
from asyncckpt.s3_upload import MAX_PARTS, abort_uploads_of

if TYPE_CHECKING:
    from obstore.store import S3Store

MIB = 1 << 20
# Views smaller than this are joined with their neighbours. Every piece costs two turns at the GIL, of 5 ms each beside
# a busy Python thread.
DIRECT_BYTES = MIB
COPIED_PARTS = 2  # of joined views, until they are sent: one part that is sent, one that is filled
CREDENTIALS_S = 600.0  # botocore refreshes what has less than this left
CREDENTIALS_TIMEOUT_S = 60.0
COPIES_TIMEOUT_S = 600.0  # every request ends long before
ABORT_S = 30.0
# obstore hangs forever in a child forked after its first use, also with a new store.
_PID = os.getpid()


class ObstoreBucket:
    """One bucket, for the process that imported this file."""

    def __init__(self, store: S3Store, filesystem: Any, bucket: str, retry_s: float) -> None:
        self._store = store
        self._filesystem = filesystem
        self._bucket = bucket
        self._retry_s = retry_s

    @classmethod
    def open(cls, filesystem: Any, root: str, retry_s: float) -> ObstoreBucket:
        """For what an s3fs filesystem has at `root`. UntranslatableError if obstore cannot do just the same.

        retry_s: until when it tries a request again.
        """
        if os.getpid() != _PID:
            raise UntranslatableError("this process was forked, and obstore would hang")
        bucket, prefix, _ = filesystem.split_path(f"{root}/file")
        if any(part in ("", ".", "..") for part in prefix.split("/")):
            raise UntranslatableError("the path has a part that obstore would not keep as it is")
        client = filesystem.s3
        endpoint = client.meta.endpoint_url
        settings = translate(
            filesystem.storage_options,
            _config(client),
            bucket=bucket,
            endpoint=endpoint,
            region=_region_of(filesystem, bucket) if is_aws(endpoint) else client.meta.region_name or "us-east-1",
            verify=_verify(client),
            retry_s=retry_s,
            environ=os.environ,
        )
        if not settings["skip_signature"]:
            settings["credential_provider"] = _credentials(filesystem, client)
        from obstore.store import S3Store

        return cls(S3Store(**settings), filesystem, bucket, retry_s)

    def write(
        self, key: str, size: int, views: Iterable[memoryview], what: str, *, part_bytes: int, num_in_flight: int
    ) -> None:
        """A new object of `size` bytes, the concatenation of `views`; `what` begins the message of errors.

        What the iterator raises passes unchanged; afterwards neither an object nor a multipart upload is left.
        """
        import obstore

        part_bytes = max(part_bytes, -(-size // MAX_PARTS))
        source = _Source(views, size)
        if size <= part_bytes:
            data = _joined(list(source))
            with named_client_errors(what):
                again(lambda: obstore.put(self._store, key, data, use_multipart=False), self._retry_s)
            return
        try:
            self._write_parts(key, source, what, part_bytes, num_in_flight)
        except BaseException as exc:
            # obstore aborts what fails in the middle, but not what fails when all parts are under way.
            self._abort(key, what, exc)
            raise

    def read(self, key: str, start: int, end: int) -> memoryview:
        """The bytes [start, end), fewer if the object ends before; in memory of obstore's own."""
        import obstore

        return memoryview(obstore.get_range(self._store, key, start=start, end=end))

    def _write_parts(self, key: str, source: _Source, what: str, part_bytes: int, num_in_flight: int) -> None:
        import obstore

        pieces = _pieces(source, part_bytes, _Copies(COPIED_PARTS * part_bytes))
        failure: OSError | None = None
        try:
            with named_client_errors(what):
                obstore.put(
                    self._store, key, pieces,
                    use_multipart=True, chunk_size=part_bytes, max_concurrency=num_in_flight,
                )  # fmt: skip
        except OSError as exc:
            failure = exc
        if source.error:
            raise source.error
        if failure and not source.is_drained:
            raise failure
        # The answer to the completion may be lost, and a second try then finds no upload.
        try:
            with named_client_errors(what):
                stored = obstore.head(self._store, key)["size"]
        except OSError as exc:
            raise failure or exc from None
        if stored != source.size:
            with named_client_errors(what):
                obstore.delete(self._store, key)
            raise OSError(errno.EIO, f"{what}: {stored} bytes were stored, {source.size} were sent") from failure

    def _abort(self, key: str, what: str, exc: BaseException) -> None:
        try:
            with named_client_errors(what):
                abort_uploads_of(self._filesystem, f"{self._bucket}/{key}", timeout_s=ABORT_S)
        except FileNotFoundError:  # no such bucket
            pass
        except OSError as failure:
            exc.add_note(f"parts may be left in the bucket: {failure}")


class _Source:
    """A caller's views, of `size` bytes together (else ValueError), and how their iterator ended."""

    def __init__(self, views: Iterable[memoryview], size: int) -> None:
        self.size = size
        self.is_drained = False
        self.error: BaseException | None = None
        self._views = views

    def __iter__(self) -> Iterator[memoryview]:
        total = 0
        try:
            for view in self._views:
                total += len(view)
                if total > self.size:
                    raise ValueError(f"the views hold more than the {self.size} bytes that were announced")  # noqa: TRY301
                yield view
            if total != self.size:
                raise ValueError(f"the views hold {total} bytes, {self.size} were announced")  # noqa: TRY301
        except GeneratorExit:  # nobody asks for more
            raise
        except BaseException as exc:
            self.error = exc
            raise
        self.is_drained = True


class _Copies:
    """Joined views, at most `room` bytes of them alive at a time."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._changed = threading.Condition()  # reentrant: `_give_back` may run wherever memory is freed

    def join(self, views: Sequence[memoryview]) -> Any:
        """One buffer; waits for room, which comes when obstore has sent earlier ones and drops them."""
        size = sum(map(len, views))
        with self._changed:
            if not self._changed.wait_for(lambda: self._room >= size, COPIES_TIMEOUT_S):
                raise TimeoutError(f"no part was sent for {COPIES_TIMEOUT_S:.0f} s")
            self._room -= size
        joined = np.frombuffer(b"".join(views), np.uint8)  # an array, because bytes take no finalizer
        weakref.finalize(joined, self._give_back, size).atexit = False
        return joined

    def _give_back(self, size: int) -> None:
        with self._changed:
            self._room += size
            self._changed.notify_all()


def _pieces(views: Iterable[memoryview], part_bytes: int, copies: _Copies) -> Iterator[Any]:
    """What obstore is given, in order: large views as they are, small ones joined.

    None is larger than a part: obstore would send all parts of one piece at once.
    """
    small: list[memoryview] = []
    num_small = 0
    for view in views:
        if len(view) < DIRECT_BYTES:
            small.append(view)
            num_small += len(view)
        if small and (len(view) >= DIRECT_BYTES or num_small >= DIRECT_BYTES):
            yield copies.join(small)
            small, num_small = [], 0
        if len(view) >= DIRECT_BYTES:
            yield from (view[at : at + part_bytes] for at in range(0, len(view), part_bytes))
    if num_small:
        yield copies.join(small)


def _joined(views: Sequence[memoryview]) -> bytes | memoryview:
    return views[0] if len(views) == 1 else b"".join(views)


def _config(client: Any) -> dict[str, Any]:
    """Every value of a botocore client's configuration, in words."""
    from botocore import UNSIGNED

    config = {name: value for name, value in vars(client.meta.config).items() if not name.startswith("_")}
    if config.get("signature_version") is UNSIGNED:
        config["signature_version"] = "unsigned"
    if kind := config.get("http_session_cls"):
        config["http_session_cls"] = kind.__name__
    return config


def _verify(client: Any) -> Any:
    """What its TLS trusts: True for what every program here does, False for everybody, or a path."""
    verify = getattr(getattr(client._endpoint, "http_session", None), "_verify", True)
    system = ssl.get_default_verify_paths()
    known = {os.path.realpath(path) for path in (system.cafile, system.openssl_cafile) if path}
    return True if isinstance(verify, str) and os.path.realpath(verify) in known else verify


def _region_of(filesystem: Any, bucket: str) -> str:
    """s3fs follows AWS to a bucket's region, obstore must be told. One request."""
    try:
        answer = sync(filesystem.loop, filesystem._call_s3, "head_bucket", Bucket=bucket)
    except OSError as exc:
        answer = getattr(exc.__cause__, "response", None)  # also a refusal says it
        if not isinstance(answer, dict):
            raise
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    if region := headers.get("x-amz-bucket-region"):
        return str(region)
    raise UntranslatableError(f"S3 does not say which region {bucket} is in")


def _credentials(filesystem: Any, client: Any) -> Callable[[], dict[str, Any]]:
    """A provider that asks s3fs's own, from wherever they come, so that they are refreshed."""
    credentials = client._request_signer._credentials
    if credentials is None:
        raise UntranslatableError("s3fs found no credentials")

    def provide() -> dict[str, Any]:
        asked = asyncio.run_coroutine_threadsafe(credentials.get_frozen_credentials(), filesystem.loop)
        frozen = asked.result(CREDENTIALS_TIMEOUT_S)
        later = datetime.now(UTC) + timedelta(seconds=CREDENTIALS_S)
        # Of what botocore renews; it has no other name.
        expires_at = getattr(credentials, "_expiry_time", None) or later
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": min(expires_at, later).astimezone(UTC),
        }

    return provide
