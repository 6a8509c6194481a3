"""Every storage passes `StorageTests`; below it, what is particular to each: durability, direct writes, S3's parts."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import fsspec
import numpy as np
import pytest
from aiobotocore.session import AioSession
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ReadTimeoutError
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from gcsfs.retry import HttpError
from google.auth.exceptions import RefreshError
from s3fs.errors import translate_boto_error

from asyncckpt import client_requests, local_file, s3_upload
from asyncckpt.client_errors import named_client_errors
from asyncckpt.storage import TEMP_PREFIX, Storage, open_storage, redact
from asyncckpt.storage_fsspec import FsspecStorage
from asyncckpt.storage_local import LocalStorage
from asyncckpt.testing import Call, FaultyStorage, GatedStorage, RecordingStorage, StorageTests, cut_views
from tests.s3 import open_s3, uploads_left

MIB = 1 << 20
# Shared by the clients of S3 here: each would parse botocore's model of S3 again, 0.2 s.
_session = AioSession()


class TestLocalStorage(StorageTests):
    @pytest.fixture
    def open_storage(self, tmp_path):
        return lambda: open_storage(tmp_path / "new" / "run")


class TestLocalStorageInMemory(StorageTests):
    """A filesystem that has no disk to write to directly."""

    @pytest.fixture
    def open_storage(self):
        if not os.path.isdir("/dev/shm"):
            pytest.skip("no /dev/shm")
        root = Path("/dev/shm") / f"asyncckpt-tests-{os.getpid()}"
        yield lambda: open_storage(str(root))
        shutil.rmtree(root, ignore_errors=True)


class TestMemoryStorage(StorageTests):
    @pytest.fixture
    def open_storage(self, memory_url):
        return lambda: open_storage(memory_url)


class TestS3StorageByS3fs(StorageTests):
    @pytest.fixture
    def open_storage(self, s3_url, s3_options):
        return lambda: open_s3(s3_url, s3_options | {"session": _session}, transfer="fsspec")


class TestS3StorageByObstore(StorageTests):
    @pytest.fixture
    def open_storage(self, s3_url, s3_options):
        return lambda: open_s3(s3_url, s3_options | {"session": _session}, transfer="obstore")


class TestGcsStorage(StorageTests):
    create_is_exclusive = False  # the emulator's, real GCS is; no other server for gs:// can be had here

    @pytest.fixture
    def open_storage(self, gs_url, gs_options):
        return lambda: open_storage(gs_url, gs_options)


class TestStorageWrappers(StorageTests):
    """Wrappers that have nothing to do change nothing."""

    @pytest.fixture
    def open_storage(self, memory_url):
        def wrapped() -> Storage:
            gated = GatedStorage(FaultyStorage(open_storage(memory_url), nth=10**9), matches=lambda call: False)
            return RecordingStorage(gated)

        return wrapped


@pytest.fixture
def local(tmp_path) -> LocalStorage:
    return LocalStorage(str(tmp_path / "run"))


def aligned(size: int) -> memoryview:
    """Random bytes in memory that begins on a page."""
    buffer = memoryview(mmap.mmap(-1, size))
    buffer[:] = os.urandom(size)
    return buffer


# --- choosing a storage


def test_paths_of_every_kind_are_folders(tmp_path, monkeypatch):
    """Absolute, relative, home, PathLike and file://."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for url in (
        tmp_path / "a b",
        f"{tmp_path}/a b",
        "a b",
        "~/a b",
        f"file://{tmp_path}/a b",
        f"local://{tmp_path}/a b",
    ):
        storage = open_storage(url)
        assert isinstance(storage, LocalStorage)
        assert storage.root == str(tmp_path / "a b")
        assert storage.url == str(url)


def test_an_unknown_protocol_names_the_known_ones():
    """And no secret of the URL."""
    with pytest.raises(ValueError, match=r"s33://\*\*\*@b: unknown protocol 's33'; known are .*s3,"):
        open_storage("s33://user:secret@b")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/run@2", "s3://bucket/run@2"),
        ("s3://key:sec/ret+@bucket/run", "s3://***@bucket/run"),
        ("sftp://user@host/run", "sftp://***@host/run"),
        ("https://h/p?X-Sig=abc&y=1#f", "https://h/p?X-Sig=***&y=***"),
        ("/a/folder", "/a/folder"),
    ],
)
def test_redact_hides_user_info_and_query_values(url, shown):
    """And nothing else."""
    assert redact(url) == shown


def test_elsewhere_a_file_is_replaced_by_a_move(tmp_path):
    """A filesystem of which only fsspec's verbs are known: nobody sees the half of a file, under its name."""

    class PlainFileSystem(LocalFileSystem):
        protocol = "asyncckpt-plain"
        seen: ClassVar[list[str]] = []

        def pipe_file(self, path, value, mode="overwrite", **kwargs):
            self.seen.append(os.path.basename(path))
            super().pipe_file(path, value, mode=mode, **kwargs)

    fsspec.register_implementation("asyncckpt-plain", PlainFileSystem, clobber=True)
    storage = open_storage(f"asyncckpt-plain://{tmp_path}/run [1]")
    for data in b"old", b"the new one":
        storage.replace_file("a/file", len(data), iter([memoryview(data)]))
        assert storage.read_file("a/file") == data
    assert PlainFileSystem.seen
    assert all(name.startswith(TEMP_PREFIX) for name in PlainFileSystem.seen)
    assert os.listdir(tmp_path / "run [1]" / "a") == ["file"]


def test_a_protocol_that_the_user_registered_is_known():
    """fsspec's own list does not have it."""
    fsspec.register_implementation("asyncckpt-test", MemoryFileSystem, clobber=True)
    assert isinstance(open_storage("asyncckpt-test://run"), FsspecStorage)


# --- a folder: durability


@pytest.fixture
def fsyncs(monkeypatch) -> list[str]:
    """The kinds of what is synced from now on: "file" or "folder"."""
    synced: list[str] = []
    fsync = os.fsync

    def counted(descriptor: int) -> None:
        fsync(descriptor)
        synced.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")

    monkeypatch.setattr(os, "fsync", counted)
    return synced


def test_write_file_syncs_the_file_and_every_folder_with_a_new_name(local, fsyncs):
    """The root's parent, the root, and the folder above the last come for three new folders; then the file's own."""
    local.write_file("1/file", 3, iter([memoryview(b"abc")]))
    assert fsyncs == ["folder", "folder", "file", "folder"]
    fsyncs.clear()
    local.write_file("1/other", 3, iter([memoryview(b"abc")]))
    assert fsyncs == ["file", "folder"]


@pytest.mark.parametrize("verb", ["create", "replace"])
def test_create_and_replace_sync_the_file_before_its_name(local, fsyncs, verb):
    """One sync each."""
    local.check_writable()
    fsyncs.clear()
    getattr(local, verb)("manifest", b"data")
    assert fsyncs == ["file", "folder"]


def test_delete_syncs_the_folder_before_it_returns(local, fsyncs):
    """So that what is deleted first is gone first, whatever happens."""
    local.create("1/manifest", b"x")
    local.create("1/file", b"x")
    fsyncs.clear()
    local.delete(["1/manifest"])
    assert fsyncs == ["folder"]


@pytest.fixture
def changes(monkeypatch, local) -> list[str]:
    """What is synced or unlinked from now on, relative to the root."""
    seen: list[str] = []
    fsync, unlink = os.fsync, os.unlink

    def seen_fsync(descriptor: int) -> None:
        seen.append("fsync " + os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), local.root))
        fsync(descriptor)

    def seen_unlink(path: str) -> None:
        seen.append("unlink " + os.path.relpath(path, local.root))
        unlink(path)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "unlink", seen_unlink)
    return seen


def test_check_writable_syncs_the_names_of_a_root_that_somebody_else_made(local, changes):
    """A killed run, say, that came no further; nobody else would."""
    os.makedirs(local.root)
    local.check_writable()
    assert {"fsync ..", "fsync ../.."} <= set(changes)


def test_a_folder_that_a_killed_writer_made_is_synced_when_it_gets_another(local, changes):
    """Its name may not be durable yet, and what is committed in it would go with it."""
    os.makedirs(os.path.join(local.root, "1"))
    local.write_file("1/2/file", 3, iter([memoryview(b"abc")]))
    assert changes == ["fsync .", "fsync 1", "fsync 1/2/file", "fsync 1/2"]


def test_delete_syncs_the_folder_above_before_anything_is_gone(local, changes):
    """A killed writer may have deleted a step's `.metadata` and not synced that: its data must not go before it."""
    local.create("1/2/file", b"x")
    changes.clear()
    local.delete(["1/2/file"])
    assert changes == ["fsync 1", "unlink 1/2/file", "fsync 1/2"]


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, name: str, *, which: Callable[[Any], bool], after: bool) -> Iterator[None]:
    """The call of `os` fails with EIO where `which(its first argument)`, before or after it is done."""
    real = getattr(os, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if not which(args[0]):
            return real(*args, **kwargs)
        if after:
            real(*args, **kwargs)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, call)
        yield


def is_folder(descriptor: int) -> bool:
    return os.path.isdir(f"/proc/self/fd/{descriptor}")


@pytest.mark.parametrize(("call", "after"), [("fsync", False), ("link", False), ("link", True)])
def test_a_create_that_fails_leaves_nothing(local, monkeypatch, call, after):
    """Also where the name was made already: the caller hears that it is not there."""
    local.create("1/other", b"x")
    which = is_folder if call == "fsync" else lambda path: True
    with failing(monkeypatch, call, which=which, after=after), pytest.raises(OSError, match=r"create 1/file.*output"):
        local.create("1/file", b"x")
    assert os.listdir(f"{local.root}/1") == ["other"]


def test_a_create_that_cannot_remove_its_temporary_name_has_succeeded(local, monkeypatch):
    """That is never listed, and goes when it is old enough."""
    with failing(monkeypatch, "unlink", which=lambda path: True, after=False):
        local.create("1/file", b"x")
    assert local.list_files() == {"1/file": 1}


@pytest.mark.parametrize("verb", ["create", "replace"])
def test_what_failed_first_is_what_is_said(local, monkeypatch, verb):
    """Not that the temporary file could not be removed either."""

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    with (
        failing(monkeypatch, "unlink", which=lambda path: True, after=False),
        pytest.raises(OSError, match=f"{verb} file.*No space left"),
    ):
        getattr(local, verb)("file", b"x")


def test_delete_removes_emptied_folders_but_not_the_root(local):
    """Upwards as far as they are empty."""
    local.create("1/a/b/file", b"x")
    local.create("2/file", b"x")
    local.delete(["1/a/b/file"])
    assert os.listdir(local.root) == ["2"]
    local.delete(["2/file"])
    assert os.listdir(local.root) == []


def test_delete_reports_every_failure_after_it_tried_all(local):
    """A folder is no file to unlink."""
    local.create("1/a/file", b"x")
    local.create("1/b", b"x")
    with pytest.raises(OSError, match=r"1 of 2 files.*1/a: Is a directory") as raised:
        local.delete(["1/a", "1/b"])
    assert raised.value.errno == errno.EISDIR
    assert local.list_files() == {"1/a/file": 1}


def test_a_killed_create_leaves_a_file_that_is_not_listed_and_goes_with_its_folder(local):
    """Once it is old enough that nobody can be at work on it."""
    local.create("1/file", b"x")
    leftover = Path(local.root, "1", ".tmp-0123")
    leftover.write_bytes(b"half")
    assert local.list_files() == {"1/file": 1}

    local.delete(["1/file"])
    assert leftover.exists()

    os.utime(leftover, (time.time() - 7200,) * 2)
    local.delete(["1/file"])
    assert os.listdir(local.root) == []


def test_sweep_removes_what_a_killed_writer_left_in_folders(local):
    """Empty folders, and half-made files that are old enough, in the root too; not those of which it is told so."""
    local.create("1/file", b"x")
    for folder in ("1/a/b", "2", "mine"):
        os.makedirs(os.path.join(local.root, folder))
    for leftover in (Path(local.root, "1", ".tmp-0123"), Path(local.root, ".tmp-4567")):
        leftover.write_bytes(b"half")
        os.utime(leftover, (time.time() - 7200,) * 2)
    local.sweep(lambda path: path != "mine")
    assert sorted(os.listdir(local.root)) == ["1", "mine"]
    assert os.listdir(Path(local.root, "1")) == ["file"]


def test_a_refused_create_leaves_no_temporary_file(local):
    """Nor does one that succeeds."""
    local.create("1/file", b"x")
    with pytest.raises(FileExistsError):
        local.create("1/file", b"y")
    assert os.listdir(f"{local.root}/1") == ["file"]


def test_create_works_where_there_are_no_hard_links(local, monkeypatch):
    """As on exFAT."""

    def link(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    local.create("file", b"x")
    with pytest.raises(FileExistsError):
        local.create("file", b"y")
    assert local.read_file("file") == b"x"


def test_list_files_does_not_follow_links(local, tmp_path):
    """Neither out of the root nor in circles."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_bytes(b"x")
    local.create("file", b"x")
    os.symlink(tmp_path / "outside", f"{local.root}/link")
    os.symlink(local.root, f"{local.root}/circle")
    assert local.list_files() == {"file": 1}


def test_check_writable_says_that_the_root_is_a_file(tmp_path):
    """Or that something above it is."""
    (tmp_path / "file").write_bytes(b"")
    for root in ("file", "file/run"):
        with pytest.raises(NotADirectoryError, match="write to"):
            LocalStorage(str(tmp_path / root)).check_writable()


def test_check_writable_says_that_it_has_no_permission(tmp_path):
    """As an ordinary user."""
    if os.geteuid():
        pytest.skip("needs root to become somebody else")
    for folder in (tmp_path, *tmp_path.parents):
        if not os.stat(folder).st_mode & 1:
            folder.chmod(0o711)
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError, match="write to"):
            LocalStorage(str(tmp_path / "run")).check_writable()
    finally:
        os.seteuid(0)


# --- a folder: direct writes


@pytest.fixture
def writes(monkeypatch) -> list[tuple[int, list[int]]]:
    """(offset, lengths of the pieces) of every write from now on."""
    seen: list[tuple[int, list[int]]] = []
    pwritev = os.pwritev

    def recorded(descriptor: int, views: list[memoryview], offset: int) -> int:
        seen.append((offset, [len(view) for view in views]))
        return pwritev(descriptor, views, offset)

    monkeypatch.setattr(os, "pwritev", recorded)
    return seen


def test_a_large_aligned_view_is_written_from_where_it_is(local, writes):
    """In slices, and only what does not fill 4 KiB through a block."""
    data = aligned(33 * MIB + 5)
    local.write_file("file", len(data), iter([data]))
    assert sorted(writes) == [(0, [16 * MIB]), (16 * MIB, [16 * MIB]), (32 * MIB, [MIB, 4096])]
    assert local.read_file("file") == data


def test_headers_and_payloads_meet_on_the_alignment(local, writes):
    """Payloads that the layout put on 4 KiB are not copied; they leave in one write with what is around them."""
    header, payload, trailer = os.urandom(4096 + 100), aligned(2 * MIB), os.urandom(50)
    views = [header, bytes(-len(header) % 4096), payload, trailer, bytes(4096 - len(trailer)), payload, trailer]
    local.write_file("file", sum(map(len, views)), map(memoryview, views))
    assert writes == [(0, [8192, 2 * MIB, 4096, 2 * MIB, 4096])]
    assert local.read_file("file") == b"".join(views)


def test_a_file_of_many_blocks_and_pieces_arrives(local, monkeypatch):
    """With few and small blocks, every one is used again and again."""
    monkeypatch.setattr(local_file, "BLOCK_BYTES", 16 << 10)
    monkeypatch.setattr(local_file, "BATCH_BYTES", 64 << 10)
    monkeypatch.setattr(local_file, "MAX_PIECES", 3)
    data = aligned(4 * MIB)
    lengths = [int(length) for length in np.random.default_rng(0).choice([1, 4095, 4096, 70_000, 200_000], size=60)]
    local.write_file("file", len(data), cut_views(data, *lengths))
    assert local.read_file("file") == data


@pytest.mark.parametrize("shift", [0, 1, 512])
def test_views_off_the_alignment_arrive_too(local, shift):
    """Memory and file position out of step."""
    data = aligned(6 * MIB)[shift:]
    local.write_file("file", len(data) + 1, iter([memoryview(b"x"), data]))
    assert local.read_file("file") == b"x" + data


def test_a_write_that_the_filesystem_refuses_to_make_directly_goes_through_the_cache(local, monkeypatch):
    """The kernel's own EINVAL, for views that are aligned to nothing."""
    monkeypatch.setattr(local_file, "ALIGNMENT", 1)
    data = aligned(20 * MIB)[3:]
    local.write_file("file", len(data), cut_views(data, 5 * MIB + 1, 9))
    assert local.read_file("file") == data


def test_a_filesystem_that_refuses_direct_files_gets_buffered_ones(tmp_path):
    """ramfs does."""
    with mounted(tmp_path, "ramfs") as folder:
        storage = LocalStorage(str(folder))
        data = aligned(5 * MIB)
        storage.write_file("a/file", len(data), cut_views(data, 7))
        assert storage.read_file("a/file") == data


def test_short_writes_are_continued(local, monkeypatch):
    """However little the kernel takes at a time."""
    pwritev = os.pwritev
    monkeypatch.setattr(
        os, "pwritev", lambda descriptor, views, offset: pwritev(descriptor, [views[0][:100_001]], offset)
    )
    data = aligned(2 * MIB + 17)
    local.write_file("file", len(data), iter([data]))
    assert local.read_file("file") == data


def test_short_reads_are_continued(local, monkeypatch):
    """However little the kernel gives at a time, also in the middle of a view."""
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, views, offset: preadv(descriptor, [views[0][:70_001]], offset))
    data = os.urandom(300_000)
    local.create("file", data)
    out = memoryview(bytearray(len(data)))
    local.read_into("file", [(0, out[:100_000]), (100_000, out[100_000:])])
    assert out == data


def test_a_full_disk_is_enospc_and_leaves_nothing(tmp_path):
    """For every verb that writes."""
    with mounted(tmp_path, "tmpfs", "-o", "size=1m") as folder:
        storage = LocalStorage(str(folder))
        data = bytes(4 * MIB)
        for verb, write in (
            ("write", lambda: storage.write_file("a/file", len(data), iter([memoryview(data)]))),
            ("create", lambda: storage.create("a/file", data)),
            ("replace", lambda: storage.replace("a/file", data)),
        ):
            with pytest.raises(OSError, match=f"{verb} a/file at .*No space left") as raised:
                write()
            assert raised.value.errno == errno.ENOSPC
            assert storage.list_files() == {}
            assert [name for _, _, names in os.walk(folder) for name in names] == []


def test_write_file_returns_only_after_every_write_has_ended(local, monkeypatch):
    """The memory is the caller's again, also when the call fails."""
    reached, gate, ended = threading.Event(), threading.Event(), threading.Event()
    pwritev = os.pwritev

    def held(descriptor: int, views: list[memoryview], offset: int) -> int:
        reached.set()
        gate.wait(60)
        written = pwritev(descriptor, views, offset)
        ended.set()
        return written

    monkeypatch.setattr(os, "pwritev", held)
    data = aligned(17 * MIB)

    def views() -> Iterator[memoryview]:
        yield data
        assert reached.wait(60)
        threading.Timer(0, gate.set).start()
        raise RuntimeError("of the caller")

    with pytest.raises(RuntimeError, match="of the caller"):
        local.write_file("file", 2 * len(data), views())
    assert ended.is_set()
    assert local.list_files() == {}


@contextmanager
def mounted(tmp_path: Path, kind: str, *options: str) -> Iterator[Path]:
    folder = tmp_path / "mount"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", kind, *options, "none", folder], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a {kind}: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


# --- S3


@pytest.fixture
def s3(s3_url, s3_options) -> FsspecStorage:
    """By s3fs alone."""
    return open_s3(s3_url, s3_options | {"session": _session}, transfer="fsspec")


@pytest.fixture
def s3_calls(s3, monkeypatch) -> list[str]:
    """The names of the S3 operations called from now on."""
    calls: list[str] = []
    call_s3 = s3._filesystem._call_s3

    async def recorded(method: str, *args: Any, **kwargs: Any) -> Any:
        calls.append(method)
        return await call_s3(method, *args, **kwargs)

    monkeypatch.setattr(s3._filesystem, "_call_s3", recorded)
    return calls


def around_s3(storage: FsspecStorage, monkeypatch: pytest.MonkeyPatch, method: str, act: Callable[..., Any]) -> None:
    """Calls of `method` become `await act(call, **arguments)`, where `call` sends them."""
    call_s3 = storage._filesystem._call_s3

    async def changed(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == method:
            return await act(call_s3, **kwargs)
        return await call_s3(name, *args, **kwargs)

    monkeypatch.setattr(storage._filesystem, "_call_s3", changed)


def test_s3_sends_a_small_file_in_one_put(s3, s3_calls):
    """Of up to one part."""
    s3.write_file("file", 5 * MIB, cut_views(os.urandom(5 * MIB), 9))
    assert s3_calls == ["put_object"]


def test_s3_sends_a_large_file_in_parts_and_checks_its_size(s3, s3_calls):
    """The last part is what is left."""
    s3.write_file("file", 11 * MIB, iter([memoryview(bytes(11 * MIB))]))
    parts = ["upload_part"] * 3
    assert s3_calls == ["create_multipart_upload", *parts, "complete_multipart_upload", "head_object"]


def test_s3_sweep_aborts_uploads_that_nobody_completed(s3, s3_url):
    """Where it may, and not in a neighbour whose name begins alike."""
    bucket, prefix, _ = s3._filesystem.split_path(s3_url)
    for key in (f"{prefix}/1/a", f"{prefix}/1/b", f"{prefix}/2/a", f"{prefix}2/1/a"):
        s3._filesystem.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    s3.sweep(lambda path: path.startswith("1/"))
    assert uploads_left(s3) == [f"{prefix}/2/a", f"{prefix}2/1/a"]


def test_s3_keeps_within_the_number_of_parts_that_s3_takes(s3, s3_calls, monkeypatch):
    """By larger parts."""
    monkeypatch.setattr(s3_upload, "MAX_PARTS", 2)
    s3.write_file("file", 16 * MIB, iter([memoryview(bytes(16 * MIB))]))
    assert s3_calls.count("upload_part") == 2


def test_s3_never_has_more_requests_in_flight_than_asked_for(s3_url, s3_options, monkeypatch):
    """And takes no view before there is room for it."""
    storage = open_storage(s3_url, s3_options, num_threads=2, transfer="fsspec")
    storage.part_bytes = 5 * MIB
    in_flight, most = 0, 0

    async def counted(call: Any, **kwargs: Any) -> Any:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        try:
            return await call("upload_part", **kwargs)
        finally:
            in_flight -= 1

    around_s3(storage, monkeypatch, "upload_part", counted)
    storage.write_file("file", 30 * MIB, iter([memoryview(bytes(30 * MIB))]))
    assert most == 2


def test_s3_aborts_the_upload_when_the_iterator_raises(s3):
    """No object, no parts."""

    def views() -> Iterator[memoryview]:
        yield memoryview(bytes(12 * MIB))
        raise RuntimeError("of the caller")

    with pytest.raises(RuntimeError, match="of the caller"):
        s3.write_file("file", 20 * MIB, views())
    assert uploads_left(s3) == []
    assert s3.list_files() == {}


def test_s3_aborts_the_upload_when_a_part_fails(s3, monkeypatch):
    """After the others have ended, and the message says what failed."""

    async def failing(call: Any, **kwargs: Any) -> Any:
        if kwargs["PartNumber"] == 2:
            raise OSError(errno.EBUSY, "Please reduce your request rate")
        return await call("upload_part", **kwargs)

    around_s3(s3, monkeypatch, "upload_part", failing)
    with pytest.raises(OSError, match=r"write a/file at s3://.*reduce your request rate") as raised:
        s3.write_file("a/file", 20 * MIB, iter([memoryview(bytes(20 * MIB))]))
    assert raised.value.errno == errno.EBUSY
    assert uploads_left(s3) == []
    assert s3.list_files() == {}


def test_s3_cancels_what_is_in_flight_when_a_write_is_interrupted(s3, monkeypatch):
    """As by Ctrl-C: no request of it is left running."""
    running, started = set(), threading.Event()

    async def endless(call: Any, **kwargs: Any) -> Any:
        running.add(kwargs["PartNumber"])
        try:
            started.set()
            await asyncio_forever()
        finally:
            running.discard(kwargs["PartNumber"])

    def views() -> Iterator[memoryview]:
        yield memoryview(bytes(12 * MIB))
        assert started.wait(60)
        raise KeyboardInterrupt

    around_s3(s3, monkeypatch, "upload_part", endless)
    with pytest.raises(KeyboardInterrupt):
        s3.write_file("file", 20 * MIB, views())
    assert running == set()
    assert uploads_left(s3) == []


async def asyncio_forever() -> None:
    import asyncio

    await asyncio.Event().wait()


def test_s3_takes_a_lost_answer_to_complete_for_what_it_was(s3, monkeypatch):
    """The object is there and whole."""

    async def lost(call: Any, **kwargs: Any) -> Any:
        await call("complete_multipart_upload", **kwargs)
        raise FileNotFoundError("NoSuchUpload, says the answer to the second try")

    around_s3(s3, monkeypatch, "complete_multipart_upload", lost)
    s3.write_file("file", 11 * MIB, iter([memoryview(bytes(11 * MIB))]))
    assert s3.list_files() == {"file": 11 * MIB}


def test_s3_takes_its_own_first_try_at_create_for_success(s3, monkeypatch):
    """A client that sends again after a lost answer is told that the object exists."""

    async def sent_twice(call: Any, **kwargs: Any) -> Any:
        await call("put_object", **kwargs)
        return await call("put_object", **kwargs)

    around_s3(s3, monkeypatch, "put_object", sent_twice)
    s3.create("manifest", b"mine")
    with pytest.raises(FileExistsError):
        s3.create("manifest", b"other")
    assert s3.read_file("manifest") == b"mine"


def test_s3_gives_up_on_a_server_that_stops_reading(monkeypatch):
    """A stalled upload is a TimeoutError: no timeout of botocore covers it."""
    monkeypatch.setattr(client_requests, "STALL_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes connections, reads nothing
        options = {
            "key": "k",
            "secret": "s",
            "endpoint_url": f"http://127.0.0.1:{deaf.getsockname()[1]}",
            "config_kwargs": {"read_timeout": 0.2, "s3": {"payload_signing_enabled": False}},
        }
        storage = open_storage("s3://bucket/run", options, transfer="fsspec", retry_timeout=0)
        with pytest.raises(TimeoutError, match="write file at s3://bucket/run: the server took nothing"):
            storage.write_file("file", 16 * MIB, iter([memoryview(bytes(16 * MIB))]))


@pytest.mark.slow
def test_s3_deletes_more_than_one_page_of_files(s3):
    """1500 files; a listing and a delete hold 1000."""
    names = [f"1/file-{number:04d}" for number in range(1500)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: s3.replace(name, b"x"), names))
    assert set(s3.list_files()) == set(names)
    s3.delete(names[:1200])
    assert set(s3.list_files()) == set(names[1200:])


def test_s3_reports_the_keys_that_it_may_not_delete(s3, monkeypatch):
    """s3fs itself does not."""

    async def refused(call: Any, **kwargs: Any) -> Any:
        keys = [item["Key"] for item in kwargs["Delete"]["Objects"]]
        return {"Errors": [{"Key": keys[0], "Code": "AccessDenied", "Message": "no"}]}

    around_s3(s3, monkeypatch, "delete_objects", refused)
    with pytest.raises(PermissionError, match=r"1 of 2 files failed: .*1/a: AccessDenied no"):
        s3.delete(["1/a", "1/b"])


ACTIONS: list[Callable[[Storage], Any]] = [
    lambda s: s.check_writable(),
    lambda s: s.create("file", b"x"),
    lambda s: s.replace("file", b"x"),
    lambda s: s.write_file("file", 1, iter([memoryview(b"x")])),
    lambda s: s.write_file("file", 6 * MIB, iter([memoryview(bytes(6 * MIB))])),
    lambda s: s.list_files(),
    lambda s: s.list_files("1"),
    lambda s: s.delete(["file"]),
]


@pytest.mark.parametrize("transfer", ["obstore", "fsspec"])
def test_s3_without_the_bucket_is_a_file_not_found_error_that_names_it(s3_options, transfer):
    """Whatever is asked of it."""
    storage = open_s3("s3://no-such-bucket/run", s3_options, transfer=transfer)
    for act in ACTIONS:
        with pytest.raises(FileNotFoundError, match="s3://no-such-bucket/run: NoSuchBucket"):
            act(storage)


@pytest.mark.parametrize("transfer", ["obstore", "fsspec"])
def test_s3_with_a_wrong_secret_is_a_permission_error_without_the_secret(s3_url, s3_options, s3_server, transfer):
    """Whatever is asked of it."""
    if s3_server.name == "moto":
        pytest.skip("moto takes any secret")
    storage = open_s3(s3_url, s3_options | {"secret": "wrong-secret"}, transfer=transfer)
    for act in ACTIONS:
        with pytest.raises(PermissionError, match=r"SignatureDoesNotMatch|403") as raised:
            act(storage)
        assert "wrong-secret" not in str(raised.value)


def test_gcs_without_the_bucket_is_a_file_not_found_error(gs_options):
    """Whatever is asked of it."""
    storage = open_storage("gs://no-such-bucket/run", gs_options)
    for act in ACTIONS[:-1]:
        with pytest.raises(FileNotFoundError, match="gs://no-such-bucket/run"):
            act(storage)


def test_nobody_at_the_endpoint_is_a_connection_error():
    """Nothing that a caller must import a client to catch."""
    options = {"key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:1"}
    storage = open_storage("s3://bucket/run", options, retry_timeout=0)
    with pytest.raises(ConnectionError, match="list s3://bucket/run"):
        storage.list_files()


@pytest.mark.slow
def test_s3_works_in_a_forked_child(s3_url, s3_options):
    """The filesystem is opened anew: the old one's loop lives in the parent."""
    code = f"""
import os
from asyncckpt.storage import open_storage
storage = open_storage({s3_url!r}, {s3_options!r})
storage.create("file", b"x")
child = os.fork()
if not child:
    os._exit(0 if storage.read_file("file") == b"x" else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def a_client_error(code: str, status: int) -> ClientError:
    response = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(response, "PutObject")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (translate_boto_error(a_client_error("AccessDenied", 403)), PermissionError),
        (translate_boto_error(a_client_error("ExpiredToken", 400)), PermissionError),
        (translate_boto_error(a_client_error("NoSuchKey", 404)), FileNotFoundError),
        (translate_boto_error(a_client_error("PreconditionFailed", 412)), FileExistsError),
        (translate_boto_error(a_client_error("SlowDown", 503)), errno.EBUSY),
        (translate_boto_error(a_client_error("InternalError", 500)), errno.EIO),
        (translate_boto_error(a_client_error("Unheard", 400)), errno.EINVAL),
        (NoCredentialsError(), PermissionError),
        (ReadTimeoutError(endpoint_url="http://h"), ConnectionError),
        (EndpointConnectionError(endpoint_url="http://h"), ConnectionError),
        (HttpError({"code": 403, "message": "m"}), PermissionError),
        (HttpError({"code": "429", "message": "m"}), errno.EBUSY),
        (HttpError({"code": 500, "message": "m"}), errno.EIO),
        (OSError("Forbidden: https://h/o\nm"), PermissionError),
        (RefreshError("m"), PermissionError),
        (aiohttp.ServerDisconnectedError(), ConnectionError),
        (FSTimeoutError(), TimeoutError),
        (OSError(errno.ENOSPC, "m"), errno.ENOSPC),
        (RuntimeError("m"), errno.EIO),
    ],
    ids=repr,
)
def test_every_client_s_error_becomes_an_os_error(error, expected):
    """By class where there is one, else by errno; with the text, the cause and what was done."""
    with pytest.raises(OSError, match=r"write a/file: .") as raised, named_client_errors("write a/file"):
        raise error
    assert raised.value.__cause__ is error
    assert raised.value.errno == expected if isinstance(expected, int) else isinstance(raised.value, expected)


def test_no_credential_of_a_url_reaches_the_message():
    """Whoever puts it into an exception."""
    with pytest.raises(OSError, match="read x") as raised, named_client_errors("read x"):
        raise RuntimeError("GET https://user:password@host/o?X-Amz-Signature=deadbeef&part=1")
    assert "password" not in str(raised.value)
    assert "deadbeef" not in str(raised.value)


# --- wrappers


def test_faulty_storage_breaks_the_nth_call_of_a_verb(memory_url):
    """The others pass."""
    storage = FaultyStorage(open_storage(memory_url), "create", nth=2, error=TimeoutError("injected"))
    storage.create("a", b"x")
    storage.replace("b", b"x")
    with pytest.raises(TimeoutError, match="injected"):
        storage.create("c", b"x")
    storage.create("c", b"x")
    assert set(storage.list_files()) == {"a", "b", "c"}
    assert storage.count("create") == 3


def test_faulty_storage_breaks_calls_that_match(memory_url):
    """Each of them."""
    storage = FaultyStorage(open_storage(memory_url), matches=lambda call: any("bad" in path for path in call.paths))
    storage.create("good", b"x")
    for act in (lambda: storage.create("bad", b""), lambda: storage.delete(["good", "bad"])):
        with pytest.raises(OSError, match="injected fault"):
            act()
    assert storage.list_files() == {"good": 1}


def test_faulty_storage_breaks_a_write_in_the_middle(s3_url, s3_options):
    """The storage inside has begun, and cleans up."""
    inner = open_s3(s3_url, s3_options)
    storage = FaultyStorage(inner, "write_file", moment="middle")
    with pytest.raises(OSError, match="injected fault"):
        storage.write_file("file", 24 * MIB, cut_views(bytes(24 * MIB), 11 * MIB))
    assert uploads_left(inner) == []
    assert inner.list_files() == {}


def test_faulty_storage_loses_an_answer(memory_url):
    """The call succeeded."""
    storage = FaultyStorage(open_storage(memory_url), "create", moment="after")
    with pytest.raises(OSError, match="injected fault"):
        storage.create("a", b"x")
    assert storage.list_files() == {"a": 1}


def test_gated_storage_holds_calls_until_they_are_let_pass(memory_url):
    """In the order they came; other verbs pass."""
    inner = RecordingStorage(open_storage(memory_url))
    with ThreadPoolExecutor(2) as pool, GatedStorage(inner, "create") as storage:
        first = pool.submit(storage.create, "a", b"x")
        storage.wait_reached()
        second = pool.submit(storage.create, "b", b"x")
        storage.wait_reached(2)
        assert storage.list_files() == {}
        storage.let_pass()
        first.result(60)
        assert inner.calls == [Call("list_files", ("",)), Call("create", ("a",))]
        storage.open()
        second.result(60)
    assert set(inner.list_files()) == {"a", "b"}
