"""Large files to S3: s3fs's client driven part by part, from memory as it lies.

s3fs's own writers copy every part, wait for the slowest of each batch, never notice a peer that stops reading, and on
leaving `open(..., "wb")` with an exception publish the half that was written. Deadlines and tries of each request are
client_requests.py's. Called by storage_fsspec.py; the names of things in S3 stay in here.
"""

from __future__ import annotations

import asyncio
import errno
import io
from bisect import bisect_right
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from itertools import accumulate
from typing import Any

from fsspec.asyn import sync

from asyncckpt.client_errors import named_client_errors

MAX_PARTS = 9000  # S3 takes 10,000


class S3Upload:
    """Writes one object; `what` begins the message of errors.

    What an iterator of views raises passes unchanged; afterwards no request is in flight and neither an object nor a
    multipart upload is left.
    """

    def __init__(self, filesystem: Any, path: str, what: str, *, part_bytes: int, num_in_flight: int) -> None:
        self._filesystem = filesystem
        bucket, key, _ = filesystem.split_path(path)
        self._target = {"Bucket": bucket, "Key": key}
        self._what = what
        self._part_bytes = part_bytes
        self._num_in_flight = num_in_flight
        self._sending: set[asyncio.Task[Any] | None] = set()
        self._upload: dict[str, str] = {}

    def write(self, size: int, views: Iterable[memoryview]) -> None:
        """`size` bytes, the concatenation of `views`."""
        part_bytes = max(self._part_bytes, -(-size // MAX_PARTS))
        parts = cut(views, size, part_bytes)
        try:
            if size > part_bytes:
                self._write_parts(size, parts)
            else:
                part = next(parts, [])
                next(parts, None)  # runs the check of the total
                self._result(self._start(self._send("put_object", part)))
        except BaseException as exc:
            self._start(self._cancel_sending()).result()  # before the abort: a part that arrives after it would stay
            self._abort(exc)
            raise

    def _write_parts(self, size: int, parts: Iterator[list[memoryview]]) -> None:
        upload = self._upload = {"UploadId": self._call("create_multipart_upload")["UploadId"]}
        etags: dict[int, str] = {}
        in_flight: dict[Future[Any], int] = {}

        def collect(done: Iterable[Future[Any]]) -> None:
            for future in done:
                etags[in_flight.pop(future)] = self._result(future)["ETag"]

        for number, part in enumerate(parts, 1):
            if len(in_flight) >= self._num_in_flight:
                collect(wait(in_flight, return_when=FIRST_COMPLETED).done)
            in_flight[self._start(self._send("upload_part", part, PartNumber=number, **upload))] = number
        while in_flight:
            collect(wait(in_flight, return_when=FIRST_COMPLETED).done)
        self._complete(size, etags, upload)

    def _abort(self, exc: BaseException) -> None:
        if not self._upload:
            return
        try:
            self._call("abort_multipart_upload", **self._upload)
        except FileNotFoundError:  # it was completed, or is gone
            pass
        except OSError as failure:
            exc.add_note(f"parts may be left in the bucket: {failure}")

    def _complete(self, size: int, etags: dict[int, str], upload: dict[str, str]) -> None:
        """Publish the object and check what is there. The answer may be lost, and a second try then finds no upload."""
        lost: OSError | None = None
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in sorted(etags.items())]
        try:
            self._call("complete_multipart_upload", MultipartUpload={"Parts": parts}, **upload)
        except OSError as exc:
            lost = exc
        try:
            stored = self._call("head_object")["ContentLength"]
        except OSError:
            if lost:
                raise lost from None
            raise
        if stored != size:
            self._call("delete_object")
            raise OSError(errno.EIO, f"{self._what}: {stored} bytes were stored, {size} were sent") from lost

    async def _send(self, method: str, part: list[memoryview], **arguments: Any) -> Any:
        """One request with `part` as its body."""
        this = asyncio.current_task()
        self._sending.add(this)
        try:
            return await self._filesystem._call_s3(method, Body=_Body(part), **self._target, **arguments)
        finally:
            self._sending.discard(this)

    async def _cancel_sending(self) -> None:
        """Every `_send` that was started has begun: the loop takes what it is given in order."""
        tasks = [task for task in self._sending if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._result(self._start(self._filesystem._call_s3(method, **self._target, **arguments)))

    def _start(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._filesystem.loop)

    def _result(self, future: Future[Any]) -> Any:
        with named_client_errors(self._what):
            return future.result()


def abort_uploads(filesystem: Any, root: str, may_go: Callable[[str], bool]) -> None:
    """Abort the multipart uploads below `root` whose path, relative to it, may go. Without it their parts are paid for
    and never seen. An upload that ends in the meantime is no error."""
    bucket, prefix, _ = filesystem.split_path(f"{root}/")
    _abort_where(filesystem, bucket, prefix, lambda key: may_go(key.removeprefix(prefix)))


def abort_uploads_of(filesystem: Any, path: str, *, timeout_s: float) -> None:
    """Abort every multipart upload of one object; `timeout_s` for each request."""
    bucket, key, _ = filesystem.split_path(path)
    _abort_where(filesystem, bucket, key, lambda found: found == key, timeout_s)


def _abort_where(
    filesystem: Any, bucket: str, prefix: str, may_go: Callable[[str], bool], timeout_s: float | None = None
) -> None:
    def call(method: str, **arguments: Any) -> Any:
        return sync(filesystem.loop, filesystem._call_s3, method, Bucket=bucket, timeout=timeout_s, **arguments)

    page: dict[str, Any] = {"IsTruncated": True, "NextKeyMarker": "", "NextUploadIdMarker": ""}
    while page.get("IsTruncated"):
        markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
        page = call("list_multipart_uploads", Prefix=prefix, **markers)
        for upload in page.get("Uploads", ()):
            if may_go(upload["Key"]):
                with suppress(FileNotFoundError):
                    call("abort_multipart_upload", Key=upload["Key"], UploadId=upload["UploadId"])


def cut(views: Iterable[memoryview], size: int, part_bytes: int) -> Iterator[list[memoryview]]:
    """Lists of views with `part_bytes` each, the last with what is left. ValueError if all is not `size` bytes."""
    part: list[memoryview] = []
    room, total = part_bytes, 0
    for whole in views:
        view = whole
        total += len(view)
        if total > size:
            raise ValueError(f"the views hold more than the {size} bytes that were announced")
        while len(view) >= room:
            yield [*part, view[:room]]
            view, part, room = view[room:], [], part_bytes
        if len(view):
            part.append(view)
            room -= len(view)
    if total != size:
        raise ValueError(f"the views hold {total} bytes, {size} were announced")
    if part:
        yield part


class _Body(io.RawIOBase):
    """Views as one file to read: botocore takes no memoryview, and rewinds a file when it tries again."""

    def __init__(self, views: list[memoryview]) -> None:
        self._views = views
        self._starts = list(accumulate(map(len, views), initial=0))
        self._position = 0
        self.num_bytes = self._starts[-1]
        self.activity = 0
        """Grows with every read and seek."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.activity += 1
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._starts[-1]}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        self.activity += 1
        end = self._starts[-1] if size < 0 else min(self._position + size, self._starts[-1])
        index = bisect_right(self._starts, self._position) - 1
        pieces: list[memoryview] = []
        while self._position < end:
            start = self._position - self._starts[index]
            piece = self._views[index][start : start + end - self._position]
            pieces.append(piece)
            self._position += len(piece)
            index += 1
        return b"".join(pieces)

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
