"""Deadlines and tries of every request of s3fs and gcsfs: peers that vanish, stall, trickle and lie."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from asyncckpt import client_requests, retries
from asyncckpt.storage import open_storage
from asyncckpt.storage_fsspec import FsspecStorage
from tests.s3 import MIB, Fault, GcsProxy, Request, S3Proxy, open_s3, uploads_left


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines that a test can wait for; the server on loopback answers in some milliseconds."""
    monkeypatch.setattr(client_requests, "ANSWER_S", 1.0)
    monkeypatch.setattr(client_requests, "COMPLETE_S", 1.0)
    monkeypatch.setattr(client_requests, "STALL_S", 0.2)
    monkeypatch.setattr(client_requests, "MIN_RATE", 64 * MIB)


@pytest.fixture
def s3_behind(s3_url: str, s3_options: dict[str, Any], s3_server: Any) -> Any:
    """Opens a storage on s3fs behind a proxy."""

    @contextmanager
    def opened(fault: Callable[[Request], Fault], retry_timeout: float) -> Iterator[tuple[FsspecStorage, S3Proxy]]:
        with S3Proxy(s3_server.endpoint, fault) as proxy:
            options = s3_options | {"client_kwargs": {"endpoint_url": proxy.endpoint}}
            options["config_kwargs"] = options["config_kwargs"] | {"read_timeout": 30}
            yield open_s3(s3_url, options, transfer="fsspec", retry_timeout=retry_timeout), proxy

    return opened


def write(storage: Any, path: str, size: int = 12 * MIB) -> None:
    storage.write_file(path, size, iter([memoryview(bytes(size))]))


CALLS: dict[str, Callable[[Any], Any]] = {
    "list": lambda s: s.list_files(),
    "replace": lambda s: s.replace("new", b"x"),
    "create": lambda s: s.create("new", b"x"),
    "read": lambda s: s.read_file("old"),
    "ranges": lambda s: s.read_into("old", [(1, memoryview(bytearray(2)))]),
    "write": lambda s: write(s, "new"),
    "delete": lambda s: s.delete(["old"]),
    "sweep": lambda s: s.sweep(lambda path: True),
    "probe": lambda s: s.check_writable(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.usefixtures("hasty")
def test_every_call_ends_where_the_peer_never_answers(s3_behind: Any, call: str) -> None:
    """The connection stays open, as when the peer vanished: TimeoutError, with what was asked."""
    with s3_behind(lambda request: "stall", 0) as (storage, _), pytest.raises(TimeoutError, match=r"s3://.*/run"):
        CALLS[call](storage)


@pytest.mark.parametrize("call", ["list", "read", "ranges", "write"])
@pytest.mark.usefixtures("hasty")
def test_an_answer_that_comes_byte_by_byte_is_given_up(s3_behind: Any, bare_old: None, call: str) -> None:
    """No silence of it is longer than the limit on silence, and the whole would take minutes."""
    with s3_behind(lambda request: "trickle", 0) as (storage, _), pytest.raises(TimeoutError, match="not over in time"):
        CALLS[call](storage)


FAULTS: list[Fault] = ["503", "429", "500", "502", "drop", "cut", "reset", "garbage", "stall"]
ONE_OF_EACH = list(zip(CALLS, FAULTS, strict=True))


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        pytest.param(call, fault, marks=() if (call, fault) in ONE_OF_EACH else pytest.mark.slow)
        for call in CALLS
        for fault in FAULTS
    ],
)
@pytest.mark.usefixtures("hasty")
def test_a_request_that_fails_is_sent_again(s3_behind: Any, bare_old: None, call: str, fault: Fault) -> None:
    """The first of each kind; the call succeeds, and no request but the one is repeated."""
    with s3_behind(lambda request: fault if request.number == 1 else "", 60) as (storage, _):
        CALLS[call](storage)
        assert "new" not in storage.list_files() or storage.read_file("new") in (b"x", bytes(12 * MIB))


@pytest.fixture
def bare_old(s3_url: str, s3_options: dict[str, Any]) -> None:
    open_s3(s3_url, s3_options).replace("old", b"old")


@pytest.mark.slow
def test_a_permanent_refusal_takes_as_many_requests_as_the_deadline_holds(
    s3_behind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No client multiplies them; the error says how many, and how long."""
    monkeypatch.setattr(retries, "FIRST_S", 0.05)
    monkeypatch.setattr(retries, "CAP_S", 0.05)
    with s3_behind(lambda request: "503", 6.0) as (storage, proxy):
        with pytest.raises(OSError, match=r"replace file at s3://.*SlowDown.*; \d+ tries in \d\.\d s") as raised:
            storage.replace("file", b"x")
        assert raised.value.errno == errno.EBUSY
        assert f"{len(proxy.requests)} tries" in str(raised.value)


def test_one_try_is_one_request(s3_behind: Any) -> None:
    """botocore and s3fs try nothing again by themselves."""
    with s3_behind(lambda request: "500", 0) as (storage, proxy):
        with pytest.raises(OSError, match="InternalError"):
            storage.read_file("file")
        assert len(proxy.requests) == 1


@pytest.mark.parametrize("fault", ["503", "429", "500", "drop", "cut", "reset"])
def test_gcs_tries_again_too(gs_url: str, gs_options: dict[str, Any], gcs_server: Any, fault: Fault) -> None:
    """Each first request of its kind, without the second that gcsfs would wait."""
    with GcsProxy(gcs_server.endpoint, lambda request: fault if request.number == 1 else "") as proxy:
        storage = open_storage(gs_url, gs_options | {"endpoint_url": proxy.endpoint}, retry_timeout=60)
        storage.replace("old", b"old")
        storage.create("new", b"x")
        write(storage, "large", 2 * MIB)
        assert storage.list_files() == {"old": 3, "new": 1, "large": 2 * MIB}
        assert storage.read_file("old") == b"old"
        storage.delete(["old", "new"])
        assert storage.list_files() == {"large": 2 * MIB}


@pytest.mark.usefixtures("hasty")
def test_gcs_ends_where_the_peer_never_answers(gs_url: str, gs_options: dict[str, Any], gcs_server: Any) -> None:
    """Whatever is asked; aiohttp would wait for five minutes."""
    with GcsProxy(gcs_server.endpoint, lambda request: "stall") as proxy:
        storage = open_storage(gs_url, gs_options | {"endpoint_url": proxy.endpoint}, retry_timeout=0)
        for call in ("list", "replace", "read", "write"):
            with pytest.raises(TimeoutError, match=r"gs://.*/run"):
                CALLS[call](storage)


def test_a_short_answer_is_not_the_end_of_the_file(s3_behind: Any, bare_old: None) -> None:
    """The server says that half of the range is all there is: it is believed when the file's size says so, too."""
    shorten = lambda request: "short" if (request.operation, request.number) == ("GET object", 1) else ""  # noqa: E731
    out = memoryview(bytearray(3))
    with s3_behind(shorten, 60) as (storage, _):
        storage.read_into("old", [(0, out)])
        assert out == b"old"
        with pytest.raises(EOFError):
            storage.read_into("old", [(0, memoryview(bytearray(4)))])


def test_keys_that_a_server_failed_to_delete_are_asked_for_again(
    s3_behind: Any, bare_old: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those alone; what it refuses is an error."""
    asked = []
    with s3_behind(lambda request: "", 60) as (storage, _):
        call_s3 = storage._filesystem._call_s3

        async def failing(method: str, **options: Any) -> Any:
            if method != "delete_objects":
                return await call_s3(method, **options)
            keys = [item["Key"] for item in options["Delete"]["Objects"]]
            asked.append([key.rpartition("/")[2] for key in keys])
            errors = [{"Key": keys[0], "Code": "InternalError"}] if len(asked) == 1 else []
            return {"Errors": [*errors, {"Key": keys[-1], "Code": "AccessDenied"}] if len(asked) < 3 else []}

        monkeypatch.setattr(storage._filesystem, "_call_s3", failing)
        with pytest.raises(PermissionError, match="AccessDenied"):
            storage.delete(["a", "b", "c"])
    assert asked[:2] == [["a", "b", "c"], ["a"]]


def test_no_such_host_fails_at_once_and_says_so() -> None:
    """The resolver was asked; a try later would not help, and the path may be mistyped."""
    options = {"key": "k", "secret": "s", "endpoint_url": "http://no-such-host.invalid:1"}
    with pytest.raises(OSError, match="list s3://bucket/run") as raised:
        open_storage("s3://bucket/run", options, retry_timeout=600).list_files()
    assert raised.value.errno in (errno.EHOSTUNREACH, errno.ECONNRESET)


def test_a_certificate_that_is_not_trusted_fails_at_once(tmp_path: Path) -> None:
    """It will be no better in a minute."""
    import ssl
    import threading

    key, cert = tmp_path / "key", tmp_path / "cert"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-subj", "/CN=h"]
    subprocess.run(make, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    context.wrap_socket(listener.accept()[0], server_side=True)
                except ssl.SSLError:
                    continue
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        options = {"key": "k", "secret": "s", "endpoint_url": f"https://127.0.0.1:{listener.getsockname()[1]}"}
        with pytest.raises(OSError, match="certificate"):
            open_storage("s3://bucket/run", options, retry_timeout=600).list_files()
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("transfer", ["obstore", "fsspec"])
def test_credentials_that_end_are_renewed_from_where_they_came(
    s3_url: str, s3_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transfer: str
) -> None:
    """Here a program that gives them for half a minute: obstore is told how long, and asks again."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import datetime, json
open({str(tmp_path / "calls")!r}, "a").write("x")
end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=30)
print(json.dumps({{"Version": 1, "AccessKeyId": {s3_server.key!r}, "SecretAccessKey": {s3_server.secret!r},
                  "Expiration": end.isoformat()}}))
""")
    (tmp_path / "config").write_text(f"[profile me]\ncredential_process = {sys.executable} {program}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "me")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    storage = open_s3(s3_url, {}, transfer=transfer)
    write(storage, "first")
    before, num_writes = (tmp_path / "calls").stat().st_size, 0
    while (tmp_path / "calls").stat().st_size == before:  # obstore asks every 0.1 s at most
        num_writes += 1
        assert num_writes < 20
        write(storage, f"more-{num_writes}")
    assert storage.client == ("obstore" if transfer == "obstore" else "s3fs")


@pytest.mark.slow
def test_thousands_of_uploads_of_dead_saves_are_swept_and_no_other_run_s(
    s3_url: str, s3_options: dict[str, Any]
) -> None:
    """A listing holds 1,000; another run lives below the same prefix."""
    storage = open_s3(s3_url, s3_options)
    bucket, prefix, _ = storage._filesystem.split_path(s3_url)
    dead = [f"{prefix}/{n}/{n:08d}-{n:016x}/__0_0.distcp" for n in range(2500)]
    others = [f"{prefix}/other/1/00000001-aa/__0_0.distcp", f"{prefix}/7/3/00000001-aa/__0_0.distcp", f"{prefix}2/1/x"]
    others += [f"{prefix}/9999/00009999-{'a' * 16}/__0_0.distcp"]

    def begin(key: str) -> None:
        storage._filesystem.call_s3("create_multipart_upload", Bucket=bucket, Key=key)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(begin, [*dead, *others]))
    from asyncckpt.steps import may_be_swept

    storage.sweep(lambda path: may_be_swept(path, 5000))
    assert sorted(uploads_left(storage)) == sorted(others)
