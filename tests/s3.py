"""For tests of S3: storages with small parts, what uploads are open, and a proxy that counts and breaks requests."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
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


Fault = Literal[
    "503", "500", "502", "429", "403", "skew", "expired", "garbage", "short", "trickle",
    "token", "stall", "reset", "half", "drop", "cut", "hold", "delay",
    "kill", "kill half", "kill answered", "",
]  # fmt: skip
DELAY_S = 0.3
_REFUSALS = {
    "503": ("SlowDown", "Please reduce your request rate."),
    "500": ("InternalError", "We encountered an internal error."),
    "502": ("BadGateway", "Bad gateway."),
    "skew": ("RequestTimeTooSkewed", "The difference between the request time and the current time is too large."),
    "429": ("TooManyRequests", "Please reduce your request rate."),
    "403": ("AccessDenied", "Access Denied"),
    "token": ("ExpiredToken", "expired"),
    "expired": ("ExpiredToken", "The provided token has expired."),
}
_STATUS = {"skew": "403", "token": "400", "expired": "400"}


@dataclass
class Request:
    """operation: as "PUT part". number: of this operation, from 1. num_bytes: of the answer's body. num_sent: of its
    own."""

    operation: str
    number: int
    num_bytes: int = 0
    num_sent: int = 0


class S3Proxy:
    """Between a client and an S3 server, for the time of a `with`; signatures hold, as clients sign this one's name.

    `fault(request)` says what becomes of each: "503", "500": that answer, unseen by the server; "token": a refusal that
    repeats the client's session token; "stall": its body is not read and nothing is answered; "reset": the connection
    is reset in the middle of its body; "half": so it is, and the server has the first half; "drop": the server answers,
    the client never hears; "cut": of the answer only half comes; "hold": it waits for `gate`; "delay": for DELAY_S; "":
    it passes.

    "502", "429", "403", "expired" (credentials) and "skew" (of clocks) are as "503"; "garbage": an answer that is none;
    "short": its length says that half of it is all; "trickle": it comes byte by byte, until `gate`. "kill", "kill
    half", "kill answered": `kill()`, which ends the client, is called when the request is there, when the server has
    the first half of its body, when the server has answered.
    """

    takes_halves = True
    """Whether the server knows half of a body from a whole one."""

    def __init__(
        self,
        endpoint: str,
        fault: Callable[[Request], Fault] = lambda request: "",
        kill: Callable[[], None] = lambda: None,
    ) -> None:
        address = urlsplit(endpoint)
        self._kill = kill
        self._threads: list[threading.Thread] = []
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
                thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def wait_idle(self) -> None:
        """Until all that was sent by clients who are gone has been passed on, or dropped."""
        for thread in list(self._threads):
            thread.join(60)
            assert not thread.is_alive(), "a client of the proxy is still connected"

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
        if fault == "kill":
            self._kill()
            raise EOFError
        if fault == "delay":
            time.sleep(DELAY_S)
        if b"100-continue" in head.lower():
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:"))
        if fault == "stall":
            self.gate.wait(60)
            raise EOFError
        request.num_sent = length = _length(head)
        if fault in ("reset", "half", "kill half"):
            half = _take(from_client, length // 2)
            if fault != "reset" and self.takes_halves:
                server.sendall(head + half)
            if fault == "kill half":
                self._kill()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
            raise EOFError
        body = _take(from_client, length)
        if fault == "garbage":
            client.sendall(_answer("200", b"<html><body>It works!</body></html>", head))
            return
        if fault in _REFUSALS:
            client.sendall(self._refusal(fault, head))
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
            content = b"" if no_body else _content(answers, answer)
        finally:
            with self._lock:
                self._num_in_flight -= 1
        request.num_bytes = len(content)
        if fault == "kill answered":
            self._kill()
        if fault in ("drop", "kill answered"):
            raise EOFError
        if fault == "trickle":
            self._trickle(client, answer + content)
        if fault == "short":
            content = content[: len(content) // 2]
            answer = re.sub(rb"(?i)(\r\ncontent-length: *)\d+", rb"\g<1>%d" % len(content), answer)
        client.sendall(answer + content[: len(content) // 2 if fault == "cut" else None])
        if fault == "cut":
            raise EOFError

    def _trickle(self, client: socket.socket, data: bytes) -> None:
        for at in range(len(data)):
            client.sendall(data[at : at + 1])
            if self.gate.wait(0.05):
                break
        raise EOFError

    def _count(self, head: bytes) -> Request:
        method, target, _ = head.partition(b"\r\n")[0].decode().split(" ")
        with self._lock:
            operation = self._operation(method, target)
            request = Request(operation, self.operations.count(operation) + 1)
            self.requests.append(request)
        return request

    @staticmethod
    def _operation(method: str, target: str) -> str:
        url = urlsplit(target)
        query = parse_qs(url.query, keep_blank_values=True)
        what = "object" if url.path.strip("/").count("/") else "bucket"
        if "partNumber" in query:
            what = "part"
        elif query.keys() & {"uploads", "uploadId"}:
            what = "uploads" if method == "GET" else "new upload" if "uploads" in query else "upload"
        return f"{method} {what}"

    @staticmethod
    def _refusal(fault: str, head: bytes) -> bytes:
        (code, message), extra, status = _REFUSALS[fault], b"", _STATUS.get(fault, fault)
        if fault == "token":
            token = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"x-amz-security-token:"))
            extra = b"<Token-0>" + token + b"</Token-0>"
        body = f"<Error><Code>{code}</Code><Message>{message}</Message>".encode() + extra + b"</Error>"
        return _answer(status, body, head)


class GcsProxy(S3Proxy):
    """The same before the JSON API of GCS; its emulator stores what came of a body."""

    takes_halves = False

    @staticmethod
    def _operation(method: str, target: str) -> str:
        url = urlsplit(target)
        place = url.path.partition("/b/")[2].split("/")[1:]  # behind the bucket
        what = "bucket" if not place else "upload" if url.path.startswith("/upload") else "object"
        return f"{method} {'list' if place == ['o'] and what == 'object' else what}"

    @staticmethod
    def _refusal(fault: str, head: bytes) -> bytes:
        status = _STATUS.get(fault, fault)
        return _answer(
            status, json.dumps({"error": {"code": int(status), "message": _REFUSALS[fault][1]}}).encode(), head
        )


def _answer(status: str, body: bytes, head: bytes) -> bytes:
    """To a request that begins with `head`."""
    answer = f"HTTP/1.1 {status} x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    return answer if head.startswith(b"HEAD ") else answer + body


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
        raise ValueError("this proxy knows no requests in chunks")
    return 0


def _content(answers: Any, head: bytes) -> bytes:
    if head.startswith(b"HTTP/1.0") and b"content-length:" not in head.lower():
        return bytes(answers.read())
    if b"transfer-encoding: chunked" in head.lower():
        return b"".join(_chunks(answers))
    return _take(answers, _length(head))


def _chunks(stream: Any) -> Iterator[bytes]:
    """As they come, with their lengths."""
    length = -1
    while length != 0:
        line = stream.readline()
        length = int(line, 16)
        yield line + _take(stream, length + 2)


def _take(stream: Any, length: int) -> bytes:
    data: bytes = stream.read(length)
    if len(data) != length:
        raise EOFError
    return data
