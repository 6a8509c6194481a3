"""For tests of S3: storages with small parts, what uploads are open, and a proxy that counts and breaks requests."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Self
from urllib.parse import parse_qs, urlsplit

from asyncckpt.storage import open_storage
from asyncckpt.storage_fsspec import FsspecStorage

MIB = 1 << 20


def open_s3(url: str, options: dict[str, Any], **arguments: Any) -> FsspecStorage:
    """With the smallest parts that S3 allows."""
    storage = open_storage(url, options, **arguments)
    assert isinstance(storage, FsspecStorage)
    storage.part_bytes = 5 * MIB
    return storage


def uploads_left(storage: FsspecStorage) -> list[str]:
    """Keys of the multipart uploads that are open below the storage's root."""
    bucket, prefix, _ = storage._filesystem.split_path(storage.url)
    answer = storage._filesystem.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix)
    return [upload["Key"] for upload in answer.get("Uploads", [])]


Fault = Literal["503", "500", "token", "stall", "reset", "drop", "cut", "hold", ""]


@dataclass
class Request:
    """operation: as "PUT part". number: of this operation, from 1. num_bytes: of the answer's body."""

    operation: str
    number: int
    num_bytes: int = 0


class S3Proxy:
    """Between a client and an S3 server, for the time of a `with`; signatures hold, as clients sign this one's name.

    `fault(request)` says what becomes of each: "503", "500": that answer, unseen by the server; "token": a refusal that
    repeats the client's session token; "stall": its body is not read and nothing is answered; "reset": the connection
    is reset in the middle of its body; "drop": the server answers, the client never hears; "cut": of the answer only
    half comes; "hold": it waits for `gate`; "": it passes.
    """

    def __init__(self, endpoint: str, fault: Callable[[Request], Fault] = lambda request: "") -> None:
        address = urlsplit(endpoint)
        self._server = (address.hostname or "", address.port or 80)
        self._fault = fault
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._num_in_flight = 0
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests: list[Request] = []
        self.most_in_flight = 0
        self.gate = threading.Event()

    @property
    def operations(self) -> list[str]:
        return [request.operation for request in self.requests]

    @property
    def num_bytes(self) -> int:
        """Of the bodies of all answers to GETs of objects."""
        return sum(request.num_bytes for request in self.requests if request.operation == "GET object")

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.gate.set()
        for connection in (self._listener, *self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError, EOFError, ValueError), socket.create_connection(self._server) as server:
            self._open |= {client, server}
            from_client, from_server = client.makefile("rb"), server.makefile("rb")
            while head := _head(from_client):
                self._pass_on(head, client, from_client, server, from_server)
        with suppress(OSError):
            client.close()

    def _pass_on(
        self, head: bytes, client: socket.socket, from_client: Any, server: socket.socket, answers: Any
    ) -> None:
        request = self._count(head)
        fault = self._fault(request)
        if b"100-continue" in head.lower():
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:"))
        if fault == "stall":
            self.gate.wait(60)
            raise EOFError
        length = _length(head)
        if fault == "reset":
            _take(from_client, length // 2)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
            raise EOFError
        body = _take(from_client, length)
        if fault in ("503", "500", "token"):
            client.sendall(_refusal(fault, head))
            return
        with self._lock:
            self._num_in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._num_in_flight)
        try:
            if fault == "hold":
                self.gate.wait(60)
            server.sendall(head + body)
            answer = _head(answers)
            no_body = request.operation.startswith("HEAD") or b" 204 " in answer[:20]
            content = b"" if no_body else _take(answers, _length(answer))
        finally:
            with self._lock:
                self._num_in_flight -= 1
        request.num_bytes = len(content)
        if fault == "drop":
            raise EOFError
        client.sendall(answer + content[: len(content) // 2 if fault == "cut" else None])
        if fault == "cut":
            raise EOFError

    def _count(self, head: bytes) -> Request:
        method, target, _ = head.partition(b"\r\n")[0].decode().split(" ")
        with self._lock:
            operation = _operation(method, target)
            request = Request(operation, self.operations.count(operation) + 1)
            self.requests.append(request)
        return request


def _operation(method: str, target: str) -> str:
    url = urlsplit(target)
    query = parse_qs(url.query, keep_blank_values=True)
    what = "object" if url.path.strip("/").count("/") else "bucket"
    if "partNumber" in query:
        what = "part"
    elif query.keys() & {"uploads", "uploadId"}:
        what = "uploads" if method == "GET" else "new upload" if "uploads" in query else "upload"
    return f"{method} {what}"


def _refusal(fault: str, head: bytes) -> bytes:
    body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
    status = fault
    if fault == "token":
        token = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"x-amz-security-token:"))
        body = b"<Error><Code>ExpiredToken</Code><Message>expired</Message><Token-0>" + token + b"</Token-0></Error>"
        status = "400"
    return f"HTTP/1.1 {status} x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def _head(stream: Any) -> bytes:
    lines = []
    while (line := stream.readline()) not in (b"\r\n", b""):
        lines.append(line)
    return b"".join([*lines, b"\r\n"]) if lines else b""


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    if b"transfer-encoding:" in head.lower():
        raise ValueError("this proxy knows no chunks")
    return 0


def _take(stream: Any, length: int) -> bytes:
    data: bytes = stream.read(length)
    if len(data) != length:
        raise EOFError
    return data
