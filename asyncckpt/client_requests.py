"""The requests of s3fs and gcsfs: each with a deadline, and tried again by our policy alone.

Either client sends all of its requests through one method, which `guard_s3fs` and `guard_gcsfs` replace on a filesystem
of ours. So also what they send by themselves (pages of a listing, HEADs, chunks of an upload) ends, whatever the peer
does: vanish, stop reading, never answer, or send one byte a second. Called by storage_fsspec.py.
"""

from __future__ import annotations

import asyncio
import errno
import io
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from asyncckpt.retries import CLEANING_S, again_async

# Of one request, besides its bytes. A guess: S3 answers in less than a second, GCS too.
ANSWER_S = 60.0
COMPLETE_S = 300.0  # S3 may put a large upload together for minutes, and sends spaces meanwhile
MIN_RATE = 128 << 10  # bytes a second of one of eight requests at a time: a line of 1 MiB/s. A guess
# botocore limits the time to connect and to wait for the answer, but not for a peer that stops reading the body.
STALL_S = 30.0  # of silence, while a part is sent. A guess
GCS_READ_BYTES = 8 << 20  # of an answer: its size is not known before, storage_fsspec.py asks for so much at a time

# Of which any answer of S3 has one. botocore takes a page of HTML with status 200 for an answer in which nothing is
# set: an empty listing, an object that was stored.
_ANSWERS = {
    "put_object": ("ETag",),
    "upload_part": ("ETag",),
    "create_multipart_upload": ("UploadId",),
    "complete_multipart_upload": ("ETag", "Key", "Location"),
    "head_object": ("ETag", "LastModified"),
    "get_object": ("ETag", "LastModified"),
    "list_objects_v2": ("Name", "IsTruncated", "KeyCount"),
    "list_multipart_uploads": ("Bucket", "IsTruncated"),
}
_CLEANING = ("abort_multipart_upload", "delete_object", "delete_objects", "list_multipart_uploads")


def guard_s3fs(filesystem: Any, retry_s: float) -> None:
    """For a filesystem whose `config_kwargs` keep botocore from trying again."""
    call = filesystem._call_s3
    silence_s = STALL_S + (filesystem.config_kwargs.get("read_timeout") or filesystem.read_timeout)

    async def call_s3(method: str, *arguments: Any, **options: Any) -> Any:
        body = options.get("Body")

        async def once() -> Any:
            if isinstance(body, io.IOBase):
                body.seek(0)
            limit_s = COMPLETE_S if method == "complete_multipart_upload" else ANSWER_S + _num_bytes(body) / MIN_RATE
            async with _within(limit_s, method) as deadline:
                request = call(method, *arguments, **options)
                answer = await (_watched(request, body, silence_s) if hasattr(body, "activity") else request)
                if method in _ANSWERS and not any(name in answer for name in _ANSWERS[method]):
                    raise OSError(errno.EIO, f"what answered {method} is not S3")
                if method == "get_object":
                    length = answer.get("ContentLength") or 0
                    deadline.reschedule(asyncio.get_running_loop().time() + ANSWER_S + length / MIN_RATE)
                    answer["Body"] = _Received(await _read(answer["Body"]))
                return answer

        return await again_async(once, min(retry_s, CLEANING_S) if method in _CLEANING else retry_s)

    filesystem.retries = 1
    filesystem._call_s3 = call_s3


def guard_gcsfs(filesystem: Any, retry_s: float) -> None:
    request = type(filesystem)._request.__wrapped__  # without gcsfs's own six tries, the first of them after a second

    async def send(method: str, path: str, *arguments: Any, **options: Any) -> Any:
        num_bytes = GCS_READ_BYTES if "alt=media" in path else _num_bytes(options.get("data"))
        limit_s = ANSWER_S + num_bytes / MIN_RATE

        async def once() -> Any:
            async with _within(limit_s, method):
                return await request(filesystem, method, path, *arguments, **options)

        return await again_async(once, min(retry_s, CLEANING_S) if method == "DELETE" else retry_s)

    filesystem._request = send


@asynccontextmanager
async def _within(limit_s: float, what: str) -> AsyncIterator[asyncio.Timeout]:
    """Inside, a request; TimeoutError if it is not over in time."""
    deadline = asyncio.timeout(limit_s)
    try:
        async with deadline:
            yield deadline
    except TimeoutError as exc:
        if deadline.expired():
            raise TimeoutError(f"{what} was not over in time (at least {limit_s:.0f} s)") from exc
        raise


async def _watched(request: Coroutine[Any, Any, Any], body: Any, silence_s: float) -> Any:
    """What is limited here is silence, not a rate: eight parts over a slow line are slow, and fine."""
    sending = asyncio.ensure_future(request)
    try:
        activity = -1
        while not sending.done():
            if body.activity == activity:
                raise TimeoutError(f"the server took nothing of a part for {silence_s:.0f} s")
            activity = body.activity
            await asyncio.wait({sending}, timeout=silence_s)
        return await sending
    finally:
        sending.cancel()
        await asyncio.wait({sending})


def _num_bytes(body: Any) -> int:
    return getattr(body, "num_bytes", None) or (len(body) if hasattr(body, "__len__") else 0)


async def _read(body: Any) -> bytes:
    try:
        data: bytes = await body.read()
        return data
    finally:
        body.close()


class _Received:
    """A body that is here, as s3fs takes it."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read(self) -> bytes:
        return self._data

    def close(self) -> None:
        pass
