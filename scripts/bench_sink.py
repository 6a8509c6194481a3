"""An S3 server that costs next to nothing, to measure clients: it discards what is written and reads as zeros.

A process of its own (`Sink` starts and ends one), because a server in the measured process would share its GIL. Bodies
up to `KEEP_BYTES` of a single PUT are kept, so that listings, manifests and `.metadata` work; of everything larger only
the size is known. No authentication, no checks. `mib_s` paces what is written and read, over all connections together.

    with Sink(mib_s=200) as sink:
        storage = open_storage("s3://bench/run", sink.storage_options)
        ... sink.stats() -> {"requests": {"PUT part": 64, ...}, "bytes_in": ..., "bytes_out": ...}
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

MIB = 1 << 20
KEEP_BYTES = MIB
PACE_BYTES = MIB // 4  # taken between two looks at the clock
STATS_PATH = "/-/stats"


class Sink:
    """Runs the server between `__enter__` and `__exit__`."""

    def __init__(self, *, mib_s: float | None = None) -> None:
        self._mib_s = mib_s

    def __enter__(self) -> Self:
        command = [sys.executable, __file__, *(["--mib-s", str(self._mib_s)] if self._mib_s else [])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        self.endpoint = self._process.stdout.readline().strip()
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()  # its end is the server's, also when this process is killed
        self._process.wait(10)
        assert self._process.stdout
        self._process.stdout.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def storage_options(self) -> dict[str, Any]:
        """For fsspec. Any bucket is there."""
        return {
            "key": "k",
            "secret": "s",
            "client_kwargs": {"endpoint_url": self.endpoint},
            # Over plain http botocore would sign the body as well, which it does not over https: 6 s of CPU per GiB.
            "config_kwargs": {"s3": {"payload_signing_enabled": False}},
        }

    def stats(self) -> dict[str, Any]:
        """What was asked of it since the last call."""
        with urllib.request.urlopen(self.endpoint + STATS_PATH) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


class _Pace:
    """Lets `mib_s` pass, of all threads together."""

    def __init__(self, mib_s: float | None) -> None:
        self._seconds_per_byte = 1 / (mib_s * MIB) if mib_s else 0.0
        self._lock = threading.Lock()
        self._free_at = 0.0

    def wait(self, num_bytes: int) -> None:
        if not self._seconds_per_byte:
            return
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - 0.05) + num_bytes * self._seconds_per_byte
            pause = self._free_at - now
        if pause > 0:
            time.sleep(pause)


class _State:
    """What all connections share; the GIL makes each single step atomic, and no more is needed here."""

    def __init__(self, mib_s: float | None) -> None:
        self.pace = _Pace(mib_s)
        self.objects: dict[str, bytes | int] = {}  # the body, or its size alone
        self.uploads: dict[str, tuple[str, dict[str, int]]] = {}
        self.requests: Counter[str] = Counter()
        self.bytes_in = 0
        self.bytes_out = 0
        self.zeros = os.memfd_create("zeros")
        os.truncate(self.zeros, 64 * MIB)

    def stats(self) -> bytes:
        found = {"requests": dict(self.requests), "bytes_in": self.bytes_in, "bytes_out": self.bytes_out}
        self.requests, self.bytes_in, self.bytes_out = Counter(), 0, 0
        return json.dumps(found).encode()


class _Connection:
    def __init__(self, connection: socket.socket, state: _State) -> None:
        self._socket = connection
        self._state = state
        self._waiting = b""  # received and not used
        self._scratch = bytearray(PACE_BYTES)

    def serve(self) -> None:
        with self._socket:
            try:
                while True:
                    self._answer(*self._head())
            except (ConnectionError, EOFError):
                pass

    def _head(self) -> tuple[str, str, dict[str, str]]:
        lines = self._until(b"\r\n\r\n").decode("latin1").split("\r\n")
        method, target, _ = lines[0].split(" ", 2)
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
        }
        return method, target, headers

    def _answer(self, method: str, target: str, headers: dict[str, str]) -> None:
        if headers.get("expect", "").lower() == "100-continue":
            self._socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        url = urlsplit(target)
        path, query = unquote(url.path), {k: v[0] for k, v in parse_qs(url.query, keep_blank_values=True).items()}
        operation = _operation(method, path, query)
        if path == STATS_PATH:
            self._send(200, self._state.stats())
            return
        self._state.requests[operation] += 1
        size, body = self._body(headers)
        handle = getattr(self, "_" + operation.lower().replace(" ", "_"), None)
        if handle is None:
            self._send(501, b"<Error><Code>NotImplemented</Code></Error>")
            return
        handle(path, query, headers, size, body)

    def _body(self, headers: dict[str, str]) -> tuple[int, bytes | None]:
        """Its size, and itself where it is small."""
        if headers.get("transfer-encoding", "").lower() == "chunked":
            lengths = self._chunks()
        else:
            lengths = iter([int(headers.get("content-length", 0))])
        total, kept = 0, bytearray()
        for length in lengths:
            if total + length <= KEEP_BYTES:
                kept += self._take(length)
            else:
                self._discard(length)
            total += length
        self._state.bytes_in += total
        whole = bytes(kept) if len(kept) == total else None
        if "aws-chunked" in headers.get("content-encoding", ""):
            size = int(headers["x-amz-decoded-content-length"])
            return size, _without_aws_chunks(whole) if whole is not None else None
        return total, whole

    def _chunks(self) -> Iterator[int]:
        """Lengths of the chunks of HTTP; the caller takes each chunk before it asks for the next."""
        while length := int(self._until(b"\r\n").partition(b";")[0], 16):
            yield length
            self._until(b"\r\n")
        while self._until(b"\r\n"):
            pass

    def _until(self, mark: bytes) -> bytes:
        """What comes before the mark, which goes too."""
        while mark not in self._waiting:
            data = self._socket.recv(65536)
            if not data:
                raise EOFError
            self._waiting += data
        found, _, self._waiting = self._waiting.partition(mark)
        return found

    def _take(self, length: int) -> bytes:
        while len(self._waiting) < length:
            data = self._socket.recv(length - len(self._waiting))
            if not data:
                raise EOFError
            self._waiting += data
        data, self._waiting = self._waiting[:length], self._waiting[length:]
        return data

    def _discard(self, length: int) -> None:
        held = min(length, len(self._waiting))
        self._waiting = self._waiting[held:]
        length -= held
        while length:
            # MSG_TRUNC: the kernel drops the bytes without copying them.
            flags = socket.MSG_TRUNC | socket.MSG_WAITALL
            taken = self._socket.recv_into(self._scratch, min(length, PACE_BYTES), flags)
            if not taken:
                raise EOFError
            length -= taken
            self._state.pace.wait(taken)

    def _send(self, status: int, body: bytes = b"", **headers: object) -> None:
        names = {"Content-Length": len(body), **{name.replace("_", "-"): value for name, value in headers.items()}}
        head = f"HTTP/1.1 {status} x\r\n" + "".join(f"{name}: {value}\r\n" for name, value in names.items()) + "\r\n"
        self._socket.sendall(head.encode() + body)
        self._state.bytes_out += len(body)

    # --- one method for each operation; see `_operation`

    def _put_object(
        self, path: str, query: dict[str, str], headers: dict[str, str], size: int, body: bytes | None
    ) -> None:
        if headers.get("if-none-match") == "*" and path in self._state.objects:
            self._send(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            return
        self._state.objects[path] = size if body is None else body
        self._send(200, ETag='"e"')

    def _create_upload(self, path: str, query: dict[str, str], *_: Any) -> None:
        name = f"u{len(self._state.uploads)}-{time.monotonic_ns()}"
        self._state.uploads[name] = (path, {})
        bucket, key = _split(path)
        self._xml(
            "InitiateMultipartUploadResult",
            f"<Bucket>{bucket}</Bucket><Key>{escape(key)}</Key><UploadId>{name}</UploadId>",
        )

    def _put_part(
        self, path: str, query: dict[str, str], headers: dict[str, str], size: int, body: bytes | None
    ) -> None:
        self._state.uploads[query["uploadId"]][1][query["partNumber"]] = size
        self._send(200, ETag='"e"')

    def _complete_upload(self, path: str, query: dict[str, str], *_: Any) -> None:
        upload = self._state.uploads.pop(query["uploadId"], None)
        if upload:
            self._state.objects[path] = sum(upload[1].values())
        bucket, key = _split(path)
        body = f"<Location>x</Location><Bucket>{bucket}</Bucket><Key>{escape(key)}</Key><ETag>&quot;e&quot;</ETag>"
        self._xml("CompleteMultipartUploadResult", body)

    def _abort_upload(self, path: str, query: dict[str, str], *_: Any) -> None:
        self._state.uploads.pop(query["uploadId"], None)
        self._send(204)

    def _list_uploads(self, path: str, query: dict[str, str], *_: Any) -> None:
        found = "".join(
            f"<Upload><Key>{escape(_split(of)[1])}</Key><UploadId>{name}</UploadId></Upload>"
            for name, (of, _) in self._state.uploads.items()
            if _split(of)[1].startswith(query.get("prefix", ""))
        )
        self._xml("ListMultipartUploadsResult", f"<IsTruncated>false</IsTruncated>{found}")

    def _list_objects(self, path: str, query: dict[str, str], *_: Any) -> None:
        bucket, prefix, delimiter = path.strip("/"), query.get("prefix", ""), query.get("delimiter", "")
        items: list[str] = []
        folders: set[str] = set()
        for name, stored in sorted(self._state.objects.items(), key=lambda item: item[0]):
            of, key = _split(name)
            if of != bucket or not key.startswith(prefix):
                continue
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
                continue
            size = stored if isinstance(stored, int) else len(stored)
            items.append(
                f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size><ETag>&quot;e&quot;</ETag>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            )
        shown = "".join(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders))
        body = (
            f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(items) + len(folders)}</KeyCount>"
            f"<MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{''.join(items)}{shown}"
        )
        self._xml("ListBucketResult", body)

    def _head_object(self, path: str, *_: Any) -> None:
        stored = self._state.objects.get(path)
        if stored is None and path.strip("/").count("/"):
            self._send(404)
            return
        size = stored if isinstance(stored, int) else len(stored or b"")
        self._send(200, Content_Length=size, ETag='"e"', Last_Modified="Thu, 01 Jan 2026 00:00:00 GMT")

    def _get_object(self, path: str, query: dict[str, str], headers: dict[str, str], *_: Any) -> None:
        stored = self._state.objects.get(path)
        if stored is None:
            self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        size = stored if isinstance(stored, int) else len(stored)
        start, end, status = 0, size, 200
        extra: dict[str, Any] = {}
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("range", "")):
            first, last = wanted.groups()
            start = int(first) if first else max(0, size - int(last))
            end = min(int(last) + 1, size) if first and last else size
            if start >= size:
                self._send(416, b"<Error><Code>InvalidRange</Code></Error>")
                return
            status, extra = 206, {"Content_Range": f"bytes {start}-{end - 1}/{size}"}
        extra |= {"ETag": '"e"', "Last_Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        if isinstance(stored, bytes):
            self._send(status, stored[start:end], **extra)
            return
        self._send(status, Content_Length=end - start, **extra)
        left = end - start
        self._state.bytes_out += left
        while left:  # without a copy in user space
            sent = os.sendfile(self._socket.fileno(), self._state.zeros, 0, min(left, PACE_BYTES))
            self._state.pace.wait(sent)
            left -= sent

    def _delete_object(self, path: str, *_: Any) -> None:
        self._state.objects.pop(path, None)
        self._send(204)

    def _delete_objects(
        self, path: str, query: dict[str, str], headers: dict[str, str], size: int, body: bytes | None
    ) -> None:
        for key in re.findall(r"<Key>(.*?)</Key>", (body or b"").decode()):
            self._state.objects.pop(f"/{path.strip('/')}/{key}", None)
        self._xml("DeleteResult", "")

    def _make_bucket(self, *_: Any) -> None:
        self._send(200)

    def _list_buckets(self, *_: Any) -> None:
        self._xml("ListAllMyBucketsResult", "<Buckets></Buckets>")

    def _xml(self, name: str, body: str) -> None:
        text = f'<?xml version="1.0"?><{name} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{body}</{name}>'
        self._send(200, text.encode(), Content_Type="application/xml")


def _operation(method: str, path: str, query: dict[str, str]) -> str:
    """Its name in `Sink.stats()`."""
    has_key = bool(_split(path)[1])
    match method, has_key:
        case "PUT", True:
            return "PUT part" if "partNumber" in query else "PUT object"
        case "PUT", False:
            return "MAKE bucket"
        case "POST", _:
            return (
                "CREATE upload" if "uploads" in query else "DELETE objects" if "delete" in query else "COMPLETE upload"
            )
        case "DELETE", _:
            return "ABORT upload" if "uploadId" in query else "DELETE object"
        case "HEAD", _:
            return "HEAD object"
        case "GET", True:
            return "GET object"
        case "GET", False:
            return "LIST uploads" if "uploads" in query else "LIST objects" if path.strip("/") else "LIST buckets"
    return method


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.lstrip("/").partition("/")
    return bucket, key


def _without_aws_chunks(body: bytes) -> bytes:
    """What is inside AWS's own chunks; after the last come trailers."""
    out = bytearray()
    while True:
        line, _, body = body.partition(b"\r\n")
        length = int(line.partition(b";")[0], 16)
        if not length:
            return bytes(out)
        out += body[:length]
        body = body[length + 2 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--mib-s", type=float, default=None, help="pace of what is written and read")
    arguments = parser.parse_args()
    state = _State(arguments.mib_s)
    listener = socket.create_server(("127.0.0.1", arguments.port), backlog=256)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    if not sys.stdin.isatty():
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_Connection(connection, state).serve, daemon=True).start()


if __name__ == "__main__":
    main()
