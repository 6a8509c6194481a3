"""S3 through obstore: how many requests and copies, faults on the way, and when it is not used."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator

import fsspec
import numpy as np
import pytest
import torch

from asyncckpt import CheckpointManager, Written, s3_settings
from asyncckpt.s3_obstore import DIRECT_BYTES, _Copies, _pieces
from asyncckpt.storage import open_storage
from asyncckpt.testing import cut_views, sample_bytes
from tests.s3 import MIB, S3Proxy, open_s3, uploads_left

LARGE = 12 * MIB  # three parts


@pytest.fixture
def through(s3_url, s3_options, s3_server):
    """Opens a storage behind a proxy; `config` goes to botocore. Nothing is tried again unless `retry_timeout` says."""

    def opened(proxy: S3Proxy, *, retry_timeout=0.0, **config):
        options = s3_options | {"client_kwargs": {"endpoint_url": proxy.endpoint}}
        options["config_kwargs"] = options["config_kwargs"] | config
        storage = open_storage(s3_url, options, retry_timeout=retry_timeout)
        storage.part_bytes = 5 * MIB
        return storage

    return opened


@pytest.fixture
def bare(s3_url, s3_options):
    """The same storage with nothing in between."""
    return open_s3(s3_url, s3_options)


def write(storage, size=LARGE, path="file"):
    data = sample_bytes(size)
    storage.write_file(path, size, iter([memoryview(data)]))
    return data


# --- requests


def test_a_small_file_is_one_request(through, s3_server):
    """Of up to one part, however many views."""
    with S3Proxy(s3_server.endpoint) as proxy:
        data = os.urandom(5 * MIB)
        through(proxy).write_file("file", 5 * MIB, cut_views(data, 9, MIB))
        assert proxy.operations == ["PUT object"]


def test_a_large_file_is_its_parts_and_three_requests(through, s3_server):
    """The last of which checks the size."""
    with S3Proxy(s3_server.endpoint) as proxy:
        storage = through(proxy)
        write(storage)
        assert storage.client == "obstore"
        assert proxy.operations == ["POST new upload", *["PUT part"] * 3, "POST upload", "HEAD object"]


def test_parts_in_flight_are_bounded(through, s3_server):
    """One view of many parts is not sent all at once."""

    def held_until_the_second(request):
        if request.operation == "PUT part" and request.number == 2:
            proxy.gate.set()
        return "hold" if request.operation == "PUT part" else ""

    with S3Proxy(s3_server.endpoint, held_until_the_second) as proxy:
        storage = through(proxy)
        storage._num_threads = 2
        write(storage, 60 * MIB)
        assert 2 <= proxy.most_in_flight <= 3


def test_a_read_fetches_what_is_asked_for_and_little_else(through, bare, s3_server):
    """Large ranges by 8 MiB, near ones in one request, and no request of another kind."""
    data = write(bare, 20 * MIB)
    bounds = [(0, 17 * MIB), *((18 * MIB + at, 18 * MIB + at + 900) for at in range(0, 100_000, 1000))]
    buffers = [bytearray(end - start) for start, end in bounds]
    with S3Proxy(s3_server.endpoint) as proxy:
        through(proxy).read_into(
            "file", [(start, memoryview(b)) for (start, _), b in zip(bounds, buffers, strict=True)]
        )
        assert proxy.operations == ["GET object"] * 4
        assert proxy.num_bytes <= 1.02 * sum(map(len, buffers))
    assert all(buffer == data[start:end] for (start, end), buffer in zip(bounds, buffers, strict=True))


# --- copies


def test_a_large_view_is_sent_from_where_it_lies():
    """And what is small is joined with its neighbours, in order."""
    source = np.frombuffer(os.urandom(9 * MIB), np.uint8)
    views = list(cut_views(memoryview(source), 10, 20, 3 * MIB, 7, 500, DIRECT_BYTES))
    pieces = [np.frombuffer(piece, np.uint8) for piece in _pieces(views, 2 * MIB, _Copies(MIB))]
    assert b"".join(pieces) == source.tobytes()
    copied = [len(piece) for piece in pieces if not np.shares_memory(piece, source)]
    assert copied == [30, 507]
    assert max(map(len, pieces)) == 2 * MIB


def test_copies_wait_until_earlier_ones_are_sent(monkeypatch):
    """So that they stay bounded."""
    monkeypatch.setattr("asyncckpt.s3_obstore.COPIES_TIMEOUT_S", 0.01)
    copies = _Copies(3 * MIB)
    views = [memoryview(bytes(MIB)), memoryview(bytes(MIB))]
    first = copies.join(views)
    with pytest.raises(TimeoutError):
        copies.join(views)
    del first
    assert len(copies.join(views)) == 2 * MIB


def test_many_small_views_arrive(bare):
    """More than may be copied at a time."""
    bare.write_file("file", 60 * MIB, iter([memoryview(bytes(range(256)) * 256)] * 960))
    assert bare.list_files() == {"file": 60 * MIB}
    out = memoryview(bytearray(65536))
    bare.read_into("file", [(59 * MIB, out)])
    assert out == bytes(range(256)) * 256


# --- faults on the way


@pytest.mark.parametrize("fault", ["503", "reset", "drop"])
def test_a_part_that_fails_once_is_sent_again(through, bare, s3_server, fault):
    """And the file is whole."""

    def breaks(request):
        return fault if (request.operation, request.number) == ("PUT part", 2) else ""

    with S3Proxy(s3_server.endpoint, breaks) as proxy:
        data = write(through(proxy, retry_timeout=60))
        assert proxy.operations.count("PUT part") == 4
    assert bare.read_file("file") == data


@pytest.mark.parametrize(("fault", "number"), [("503", errno.EBUSY), ("500", errno.EIO), ("reset", errno.ECONNRESET)])
@pytest.mark.parametrize("part", [1, 3])
def test_a_part_that_keeps_failing_leaves_neither_object_nor_upload(through, bare, s3_server, fault, number, part):
    """Also where it is the last: there obstore itself forgets the upload."""

    def breaks(request):
        return fault if request.operation == "PUT part" and request.number >= part else ""

    with S3Proxy(s3_server.endpoint, breaks) as proxy:
        with pytest.raises(OSError, match="write a/file at s3://") as raised:
            write(through(proxy), path="a/file")
        assert raised.value.errno == number
    assert uploads_left(bare) == []
    assert bare.list_files() == {}


def test_a_server_that_stops_reading_is_a_timeout_error(through, bare, s3_server, monkeypatch):
    """After the deadline of the request; nothing is left."""
    monkeypatch.setattr(s3_settings, "REQUEST_S", 0.2)

    def stalls(request):
        return "stall" if request.operation == "PUT part" else ""

    with S3Proxy(s3_server.endpoint, stalls) as proxy:
        with pytest.raises(TimeoutError, match="write file at s3://"):
            write(through(proxy, read_timeout=0.3))
        proxy.gate.set()
    assert uploads_left(bare) == []
    assert bare.list_files() == {}


def test_a_lost_answer_to_complete_is_taken_for_what_it_was(through, bare, s3_server):
    """The object is there and whole."""

    def breaks(request):
        return "drop" if request.operation == "POST upload" else ""

    with S3Proxy(s3_server.endpoint, breaks) as proxy:
        data = write(through(proxy))
    assert bare.read_file("file") == data
    assert uploads_left(bare) == []


@pytest.mark.parametrize("error", [RuntimeError("of the caller"), KeyboardInterrupt()], ids=repr)
def test_what_the_iterator_raises_ends_the_upload(bare, error):
    """The same object comes out; no object, no parts."""

    def views() -> Iterator[memoryview]:
        yield memoryview(bytes(LARGE))
        raise error

    with pytest.raises(type(error)) as raised:
        bare.write_file("file", 2 * LARGE, views())
    assert raised.value is error
    assert uploads_left(bare) == []
    assert bare.list_files() == {}


@pytest.mark.parametrize("fault", ["cut", "503", "drop"])
def test_a_range_that_fails_once_is_fetched_again(through, bare, s3_server, fault):
    """Also when it ends in the middle of its bytes."""
    data = write(bare)
    out = memoryview(bytearray(len(data)))

    def breaks(request):
        return fault if (request.operation, request.number) == ("GET object", 1) else ""

    with S3Proxy(s3_server.endpoint, breaks) as proxy:
        through(proxy, retry_timeout=60).read_into("file", [(0, out)])
    assert out == data


def test_a_range_that_keeps_failing_says_what_failed(through, bare, s3_server):
    """And S3's own words."""
    write(bare)
    with S3Proxy(s3_server.endpoint, lambda request: "503" if request.operation == "GET object" else "") as proxy:
        with pytest.raises(OSError, match=r"read file at s3://.*: SlowDown Please reduce your request rate") as raised:
            through(proxy).read_into("file", [(0, memoryview(bytearray(10)))])
        assert raised.value.errno == errno.EBUSY


def test_no_session_token_reaches_an_error(s3_options, s3_server):
    """AWS repeats it in the answer that says it is expired."""
    with S3Proxy(s3_server.endpoint, lambda request: "token") as proxy:
        options = s3_options | {"client_kwargs": {"endpoint_url": proxy.endpoint}, "token": "session-token"}
        storage = open_storage("s3://bucket/run", options, transfer="obstore")
        with pytest.raises(PermissionError, match="ExpiredToken expired") as raised:
            storage.write_file("file", 1, iter([memoryview(b"x")]))
        assert "session-token" not in str(raised.value)
        assert raised.value.__cause__ is None


# --- when it is used


def test_credentials_of_a_profile_are_taken_from_s3fs(s3_url, s3_server, tmp_path, monkeypatch):
    """With no option at all: a file and two variables."""
    (tmp_path / "credentials").write_text(
        f"[me]\naws_access_key_id = {s3_server.key}\naws_secret_access_key = {s3_server.secret}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "me")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    storage = open_s3(s3_url, {}, transfer="obstore")
    data = write(storage)
    assert storage.client == "obstore"
    assert storage.read_file("file") == data


def test_what_obstore_cannot_do_goes_through_s3fs_and_says_why(s3_url, s3_options):
    """Or is refused, where obstore was asked for by name."""
    options = s3_options | {"s3_additional_kwargs": {"ServerSideEncryption": "AES256"}}
    storage = open_s3(s3_url, options)
    assert storage._obstore() is None
    assert (storage.client, storage.client_reason) == ("s3fs", "obstore knows no s3_additional_kwargs")
    with pytest.raises(ValueError, match="obstore cannot move these bytes: obstore knows no s3_additional_kwargs"):
        open_storage(s3_url, options, transfer="obstore")


@pytest.mark.parametrize(("transfer", "client"), [("auto", "obstore"), ("fsspec", "s3fs")])
def test_an_event_says_who_moved_the_bytes(s3_url, s3_options, transfer, client):
    """And the checkpoint is the same."""
    events = []
    state, found = {"w": torch.arange(2 << 20)}, {"w": torch.zeros(2 << 20, dtype=torch.int64)}
    with CheckpointManager(s3_url, storage_options=s3_options, transfer=transfer, events=[events.append]) as manager:
        manager.save(1, state)
        manager.restore(1, found)
    assert torch.equal(found["w"], state["w"])
    assert [event.client for event in events if isinstance(event, Written)] == [client]


def test_what_the_environment_says_to_fsspec_counts_too(s3_url, s3_options, monkeypatch):
    """As every other option."""
    monkeypatch.setitem(fsspec.config.conf, "s3", {"requester_pays": True})
    storage = open_s3(s3_url, s3_options)
    assert storage._obstore() is None
    assert storage.client_reason == "obstore knows no requester_pays"


def test_fsspec_may_be_asked_for(s3_url, s3_options):
    """Then obstore stays out of it."""
    storage = open_s3(s3_url, s3_options, transfer="fsspec")
    write(storage)
    assert storage.client == "s3fs"


@pytest.mark.parametrize("url", ["memory://run", "run", "gs://bucket/run"])
def test_obstore_for_another_protocol_is_a_value_error(url, tmp_path, monkeypatch):
    """In words."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="obstore moves the bytes of s3:// alone"):
        open_storage(url, {"token": "anon"} if url.startswith("gs") else None, transfer="obstore")


def test_an_unknown_transfer_is_a_value_error():
    """With what there is."""
    with pytest.raises(ValueError, match='"auto", "obstore" or "fsspec", not \'boto3\''):
        open_storage("s3://bucket/run", transfer="boto3")


@pytest.mark.slow
def test_a_forked_child_uses_s3fs(s3_url, s3_options):
    """obstore would hang in it, also with a store made there."""
    code = f"""
import os
from asyncckpt.storage import open_storage
storage = open_storage({s3_url!r}, {s3_options!r}, transfer="obstore")
storage.write_file("file", 1, iter([memoryview(b"x")]))
child = os.fork()
if not child:
    out = bytearray(1)
    storage.read_into("file", [(0, memoryview(out))])
    os._exit(0 if out == b"x" and storage.client == "s3fs" and "forked" in storage.client_reason else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
