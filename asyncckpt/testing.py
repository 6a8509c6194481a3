"""For tests, ours and yours: what every storage must do, and wrappers that record, break or hold back its calls.

    class TestMyStorage(StorageTests):
        @pytest.fixture
        def open_storage(self, tmp_path):
            return lambda: MyStorage(tmp_path)

Needs pytest; nothing outside tests imports this file.
"""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Self

import pytest

from asyncckpt.storage import Storage

TIMEOUT_S = 60.0
"""How long a wrapper waits for the other side of a test before it raises TimeoutError."""


@dataclass(frozen=True)
class Call:
    """One call of a storage. paths: what it is about; the root is ""."""

    verb: str
    paths: tuple[str, ...]

    @property
    def path(self) -> str:
        """The only path."""
        (path,) = self.paths
        return path


Matches = Callable[[Call], bool]


class RecordingStorage:
    """Passes every call on and keeps it in `calls`, in the order they began. The base of the wrappers below."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.url = inner.url
        self.max_file_bytes = inner.max_file_bytes
        self.calls: list[Call] = []

    @property
    def client(self) -> str:
        return self.inner.client

    @property
    def client_reason(self) -> str:
        return self.inner.client_reason

    def count(self, verb: str) -> int:
        return sum(call.verb == verb for call in self.calls)

    def _around(self, call: Call, run: Callable[[], Any]) -> Any:
        self.calls.append(call)
        return run()

    def write_file(self, path: str, size: int, views: Iterator[memoryview]) -> None:
        self._around(Call("write_file", (path,)), lambda: self.inner.write_file(path, size, views))

    def replace_file(self, path: str, size: int, views: Iterator[memoryview]) -> None:
        self._around(Call("replace_file", (path,)), lambda: self.inner.replace_file(path, size, views))

    def create(self, path: str, data: bytes) -> None:
        self._around(Call("create", (path,)), lambda: self.inner.create(path, data))

    def replace(self, path: str, data: bytes) -> None:
        self._around(Call("replace", (path,)), lambda: self.inner.replace(path, data))

    def read_file(self, path: str) -> bytes:
        data: bytes = self._around(Call("read_file", (path,)), lambda: self.inner.read_file(path))
        return data

    def read_into(
        self, path: str, ranges: Sequence[tuple[int, memoryview]], filled: Callable[[int], None] | None = None
    ) -> None:
        self._around(Call("read_into", (path,)), lambda: self.inner.read_into(path, ranges, filled))

    def list_files(self, prefix: str = "") -> Mapping[str, int]:
        files: Mapping[str, int] = self._around(Call("list_files", (prefix,)), lambda: self.inner.list_files(prefix))
        return files

    def modified_s(self, path: str) -> float:
        return float(self._around(Call("modified_s", (path,)), lambda: self.inner.modified_s(path)))

    def delete(self, paths: Iterable[str]) -> None:
        names = tuple(paths)
        self._around(Call("delete", names), lambda: self.inner.delete(names))

    def sweep(self, may_go: Callable[[str], bool]) -> None:
        self._around(Call("sweep", ("",)), lambda: self.inner.sweep(may_go))

    def check_writable(self) -> None:
        self._around(Call("check_writable", ("",)), self.inner.check_writable)

    def is_create_exclusive(self) -> bool:
        return bool(self._around(Call("is_create_exclusive", ("",)), self.inner.is_create_exclusive))


class FaultyStorage(RecordingStorage):
    """Raises `error` at chosen calls: those of `verb` (None: any) for which `matches` holds; of these the `nth`,
    counted from 1, or each (None).

    moment: "before" the call reaches the inner storage; in the "middle" of a `write_file`, when half of the file was
    handed over (for other verbs like "before"); "after" it succeeded, as when an answer is lost.
    """

    def __init__(
        self,
        inner: Storage,
        verb: str | None = None,
        *,
        nth: int | None = None,
        matches: Matches | None = None,
        error: BaseException | None = None,
        moment: Literal["before", "middle", "after"] = "before",
    ) -> None:
        super().__init__(inner)
        self._verb = verb
        self._nth = nth
        self._matches = matches
        self._error = error or OSError(errno.EIO, "injected fault")
        self._moment = moment
        self._num_matching = 0
        self._lock = threading.Lock()

    def _around(self, call: Call, run: Callable[[], Any]) -> Any:
        self.calls.append(call)
        if not self._is_chosen(call):
            return run()
        if self._moment == "after":
            run()
        raise self._error

    def write_file(self, path: str, size: int, views: Iterator[memoryview]) -> None:
        call = Call("write_file", (path,))
        if self._moment != "middle":
            super().write_file(path, size, views)
            return
        self.calls.append(call)
        self.inner.write_file(path, size, self._half(size, views) if self._is_chosen(call) else views)

    def _half(self, size: int, views: Iterator[memoryview]) -> Iterator[memoryview]:
        left = size // 2
        for view in views:
            if len(view) >= left:
                yield view[:left]
                break
            yield view
            left -= len(view)
        raise self._error

    def _is_chosen(self, call: Call) -> bool:
        if self._verb not in (None, call.verb) or (self._matches and not self._matches(call)):
            return False
        with self._lock:
            self._num_matching += 1
            return self._nth in (None, self._num_matching)


class GatedStorage(RecordingStorage):
    """Holds back each call of `verb` (None: any) for which `matches` holds until the gate is opened; as a context
    manager it opens at the end, so that a failed test does not hang."""

    def __init__(self, inner: Storage, verb: str | None = None, *, matches: Matches | None = None) -> None:
        super().__init__(inner)
        self._verb = verb
        self._matches = matches
        self._changed = threading.Condition()
        self._num_arrived = 0
        self._num_allowed = 0.0

    def wait_reached(self, count: int = 1) -> None:
        """Return once `count` calls, counted from the beginning, have come to the gate."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._num_arrived >= count, TIMEOUT_S):
                raise TimeoutError(f"{self._num_arrived} calls came to the gate, {count} were waited for")

    def let_pass(self, count: float = 1) -> None:
        """Let `count` calls through, in the order they came, now or when they come."""
        with self._changed:
            self._num_allowed += count
            self._changed.notify_all()

    def open(self) -> None:
        """Let every call through from now on."""
        self.let_pass(float("inf"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.open()

    def _around(self, call: Call, run: Callable[[], Any]) -> Any:
        self.calls.append(call)
        if self._verb in (None, call.verb) and (not self._matches or self._matches(call)):
            with self._changed:
                self._num_arrived += 1
                number = self._num_arrived
                self._changed.notify_all()
                if not self._changed.wait_for(lambda: self._num_allowed >= number, TIMEOUT_S):
                    raise TimeoutError(f"the gate stayed closed to {call}")
        return run()


def sample_bytes(size: int) -> bytes:
    """Bytes without a pattern, the same at every run.

    gcp-storage-emulator loses a carriage return at the end of a file, which random ones would meet once in 256 times.
    """
    return random.Random(size).randbytes(size)


def cut_views(data: bytes | memoryview, *lengths: int) -> Iterator[memoryview]:
    """`data` as views of the given lengths, in turn, and one with the rest."""
    rest = memoryview(data)
    for length in lengths:
        yield rest[:length]
        rest = rest[length:]
    yield rest


class StorageTests:
    """What every `Storage` must do; a subclass overrides `open_storage` and what differs."""

    large_file_bytes = (10 << 20) + 4097
    """More than two of whatever the storage sends at a time, where that can be had."""
    create_is_exclusive = True
    """Against writers at the same moment. Where False, `create` still refuses a file that is there."""

    @pytest.fixture
    def open_storage(self) -> Callable[[], Storage]:
        """Opens a storage on one empty root; every call gives another instance on the same root."""
        raise NotImplementedError

    @pytest.fixture
    def storage(self, open_storage: Callable[[], Storage]) -> Storage:
        return open_storage()

    def test_write_file_then_read_file_gives_the_bytes(self, storage: Storage) -> None:
        """Sizes around the alignment, and none at all."""
        sizes = (0, 1, 4095, 4096, 4097, 1 << 20)
        for size in sizes:
            data = sample_bytes(size)
            storage.write_file(f"3/a/{size}", size, iter([memoryview(data)] if size else []))
            assert storage.read_file(f"3/a/{size}") == data
        assert storage.list_files() == {f"3/a/{size}": size for size in sizes}

    def test_write_file_joins_views_of_every_size(self, storage: Storage) -> None:
        """Empty, tiny, odd and large views, on and off the alignment, in several parts."""
        data = sample_bytes(self.large_file_bytes)
        views = cut_views(data, 0, 1, 4095, 3 << 20, 7, 0, 100_000, (5 << 20) + 1, 4096, 13)
        storage.write_file("file", len(data), views)
        assert storage.read_file("file") == data

    def test_write_file_takes_ten_thousand_tiny_views(self, storage: Storage) -> None:
        """A state dict of scalars."""
        data = sample_bytes(70_001)
        storage.write_file("file", len(data), cut_views(data, *[7] * 10_000))
        assert storage.read_file("file") == data

    @pytest.mark.parametrize("announced", [9_999, 10_001])
    def test_write_file_refuses_a_wrong_size_and_leaves_nothing(self, storage: Storage, announced: int) -> None:
        """Too much and too little."""
        with pytest.raises(ValueError, match=str(announced)):
            storage.write_file("a/file", announced, iter([memoryview(bytes(10_000))]))
        assert storage.list_files() == {}

    def test_write_file_raises_what_its_iterator_raises_and_leaves_nothing(self, storage: Storage) -> None:
        """Unchanged, and after more than one part."""
        data = memoryview(bytes(self.large_file_bytes))
        error = OSError("of the caller")

        def views() -> Iterator[memoryview]:
            yield data[: len(data) - 1]
            raise error

        with pytest.raises(OSError, match="of the caller") as raised:
            storage.write_file("a/file", len(data), views())
        assert raised.value is error
        assert storage.list_files() == {}

    @pytest.mark.parametrize("size", [0, 5000, 3 << 20])
    def test_replace_file_writes_a_file_that_is_there_or_not(self, storage: Storage, size: int) -> None:
        """And leaves nothing beside it."""
        old, new = sample_bytes(10_000), sample_bytes(size)
        for data in (old, new):
            storage.replace_file("a/file", len(data), cut_views(data, 0, 100, 4096))
            assert storage.read_file("a/file") == data
        assert storage.list_files() == {"a/file": size}

    def test_a_replace_file_that_fails_leaves_the_old_one(self, storage: Storage) -> None:
        """Whatever the iterator raises, after more than one part, and for a wrong size."""
        storage.replace_file("a/file", 3, iter([memoryview(b"old")]))
        data = memoryview(bytes(self.large_file_bytes))
        error = OSError("of the caller")

        def views() -> Iterator[memoryview]:
            yield data[: len(data) - 1]
            raise error

        with pytest.raises(OSError, match="of the caller") as raised:
            storage.replace_file("a/file", len(data), views())
        assert raised.value is error
        with pytest.raises(ValueError, match="9999"):
            storage.replace_file("a/file", 9_999, iter([data[:10_000]]))
        assert storage.read_file("a/file") == b"old"
        assert storage.list_files() == {"a/file": 3}

    def test_create_refuses_a_file_that_is_there(self, storage: Storage) -> None:
        """And leaves it as it is; the message says what and where."""
        storage.create("3/manifest", b"first")
        with pytest.raises(FileExistsError, match="create 3/manifest"):
            storage.create("3/manifest", b"second")
        assert storage.read_file("3/manifest") == b"first"

    def test_create_has_one_winner_among_eight(self, open_storage: Callable[[], Storage]) -> None:
        """Eight threads with two instances."""
        if not self.create_is_exclusive:
            pytest.skip("this storage's create is not exclusive")
        barrier = threading.Barrier(8)

        def create(number: int, storage: Storage) -> int | None:
            barrier.wait(TIMEOUT_S)
            try:
                storage.create("manifest", b"%d" % number)
            except FileExistsError:
                return None
            return number

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(create, range(8), [open_storage(), open_storage()] * 4))
        (winner,) = [number for number in results if number is not None]
        assert open_storage().read_file("manifest") == b"%d" % winner

    def test_replace_writes_a_file_that_is_there_or_not(self, storage: Storage) -> None:
        """Of any length."""
        for data in (b"one", b"a longer one", b""):
            storage.replace("3/.metadata", data)
            assert storage.read_file("3/.metadata") == data
        assert storage.list_files() == {"3/.metadata": 0}

    def test_replace_never_shows_a_mixture(self, open_storage: Callable[[], Storage]) -> None:
        """Readers beside a writer see one of the two contents."""
        contents = {b"a" * 100_000, b"b" * 50_000}
        writer = open_storage()
        writer.replace("file", min(contents))
        done = threading.Event()

        def read() -> set[bytes]:
            storage, seen = open_storage(), set()
            while not done.is_set():
                seen.add(storage.read_file("file"))
            return seen

        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(read) for _ in range(2)]
            try:
                for _ in range(5):
                    for data in contents:
                        writer.replace("file", data)
            finally:
                done.set()
            for reader in readers:
                assert reader.result() <= contents

    def test_read_into_fills_ranges_in_any_order(self, storage: Storage) -> None:
        """Neighbours, gaps, overlaps, empty ranges, and one larger than a request."""
        size = 17 << 20
        data = sample_bytes(size)
        storage.write_file("file", size, iter([memoryview(data)]))
        bounds = [(5, 9), (0, 5), (4, 8), (9, 9), (100_000, 300_000), (size - 1, size), (1, size)]
        buffers = [bytearray(end - start) for start, end in bounds]
        storage.read_into("file", [(start, memoryview(b)) for (start, _), b in zip(bounds, buffers, strict=True)])
        assert all(buffer == data[start:end] for (start, end), buffer in zip(bounds, buffers, strict=True))

    def test_read_into_says_once_of_each_view_that_it_is_full(self, storage: Storage) -> None:
        """Of neighbours, overlaps, an empty one, one larger than a request and one of many pieces."""
        size = 17 << 20
        data = sample_bytes(size)
        storage.write_file("file", size, iter([memoryview(data)]))
        bounds = [(1, size), (0, 5), (5, 9), (7, 7), (4, 8), *((at, at + 100) for at in range(500_000, 700_000, 100))]
        ranges = [(start, memoryview(bytearray(end - start))) for start, end in bounds]
        full: list[int] = []

        def filled(index: int) -> None:
            start, end = bounds[index]
            assert ranges[index][1] == data[start:end]
            full.append(index)

        storage.read_into("file", ranges, filled)
        assert sorted(full) == list(range(len(bounds)))

    def test_read_into_ends_with_what_filled_raises(self, storage: Storage) -> None:
        """The same object, after which no view changes: some parts of the file were never asked for."""
        size = 17 << 20
        data = sample_bytes(size)
        storage.write_file("file", size, iter([memoryview(data)]))
        ranges = [(start, memoryview(bytearray(1 << 20))) for start in range(0, size, 1 << 20)]
        error = RuntimeError("of the caller")

        def filled(index: int) -> None:
            raise error

        with pytest.raises(RuntimeError, match="of the caller") as raised:
            storage.read_into("file", ranges, filled)
        assert raised.value is error
        seen = [bytes(view) for _, view in ranges]
        assert storage.read_file("file") == data  # meanwhile a read that goes on would write
        assert [view == before for (_, view), before in zip(ranges, seen, strict=True)] == [True] * len(seen)

    def test_read_into_behind_the_end_is_an_eof_error(self, storage: Storage) -> None:
        """Partly or wholly."""
        storage.create("a/file", b"0123456789")
        for start, end in (0, 11), (9, 11), (10, 11), (500, 600):
            with pytest.raises(EOFError, match="read a/file"):
                storage.read_into("a/file", [(start, memoryview(bytearray(end - start)))])

    def test_reading_a_missing_file_is_a_file_not_found_error(self, storage: Storage) -> None:
        """By either verb; the message says what."""
        storage.create("other", b"x")
        with pytest.raises(FileNotFoundError, match="read a/nothing"):
            storage.read_file("a/nothing")
        with pytest.raises(FileNotFoundError, match="read a/nothing"):
            storage.read_into("a/nothing", [(0, memoryview(bytearray(1)))])

    def test_list_files_sees_what_another_instance_just_did(self, open_storage: Callable[[], Storage]) -> None:
        """Files made and deleted since the last listing."""
        reader, writer = open_storage(), open_storage()
        assert reader.list_files() == {}
        writer.create("1/a", b"x")
        assert reader.list_files() == reader.list_files("1") == {"1/a": 1}
        writer.create("1/b", b"xy")
        assert reader.list_files("1") == {"1/a": 1, "1/b": 2}
        writer.delete(["1/a"])
        assert reader.list_files("1") == {"1/b": 2}

    def test_list_files_is_of_folders_not_of_name_prefixes(self, storage: Storage) -> None:
        """Step 1 does not list step 10, and what is not there is empty."""
        for path in ("1/a/b/c", "10/a", "top"):
            storage.create(path, b"x")
        assert storage.list_files("1") == storage.list_files("1/") == {"1/a/b/c": 1}
        assert storage.list_files("2") == {}
        assert set(storage.list_files()) == {"1/a/b/c", "10/a", "top"}

    def test_modified_s_tells_when_a_file_was_written(self, storage: Storage) -> None:
        """To within a minute of this clock; of no other file."""
        storage.create("1/a", b"x")
        assert abs(storage.modified_s("1/a") - time.time()) < 60
        with pytest.raises(FileNotFoundError, match="look at 1/nothing"):
            storage.modified_s("1/nothing")

    def test_delete_takes_what_is_there_and_passes_over_the_rest(self, storage: Storage) -> None:
        """A missing file is no error, nor is an empty list."""
        for path in ("1/a", "1/b", "2/a"):
            storage.create(path, b"x")
        storage.delete(["1/a", "1/nothing", "3/nothing/at/all", "2/a"])
        storage.delete([])
        assert storage.list_files() == {"1/b": 1}

    def test_delete_takes_names_literally(self, storage: Storage) -> None:
        """A pattern is a name like any other."""
        for path in ("run1/a", "run[1]/a", "run*/a"):
            storage.create(path, b"x")
        storage.delete(["run[1]/a", "run*/a"])
        assert storage.list_files() == {"run1/a": 1}

    def test_a_deleted_name_can_be_written_again(self, storage: Storage) -> None:
        """Folders that vanished come back."""
        storage.create("1/a/file", b"first")
        storage.delete(["1/a/file"])
        storage.create("1/a/file", b"second")
        assert storage.read_file("1/a/file") == b"second"

    def test_sweep_leaves_every_file_that_is_whole(self, storage: Storage) -> None:
        """Also where all may go."""
        for path in ("1/a/b", "top"):
            storage.create(path, b"x")
        storage.sweep(lambda path: True)
        assert storage.list_files() == {"1/a/b": 1, "top": 1}

    def test_check_writable_leaves_no_trace(self, storage: Storage) -> None:
        """Before and after the first file."""
        storage.check_writable()
        assert storage.list_files() == {}
        storage.create("a", b"x")
        storage.check_writable()
        assert storage.list_files() == {"a": 1}

    def test_paths_out_of_the_root_are_value_errors(self, storage: Storage) -> None:
        """For every verb."""
        verbs: list[Callable[[str], Any]] = [
            lambda path: storage.write_file(path, 0, iter([])),
            lambda path: storage.create(path, b""),
            lambda path: storage.replace(path, b""),
            storage.read_file,
            lambda path: storage.read_into(path, []),
            lambda path: storage.delete([path]),
        ]
        for path in ("", "/etc/passwd", "../up", "a/../../up", "a//b", "./a", "a/"):
            for call in verbs:
                with pytest.raises(ValueError, match="not a path"):
                    call(path)

    def test_threads_may_share_an_instance(self, storage: Storage) -> None:
        """Eight threads write and read their own files."""

        def work(number: int) -> bool:
            data = sample_bytes(300_000 + number)
            storage.write_file(f"{number}/file", len(data), cut_views(data, 100_000))
            storage.create(f"{number}/manifest", b"%d" % number)
            return storage.read_file(f"{number}/file") == data

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(8)))
        assert len(storage.list_files()) == 16
