"""Every call by which asyncckpt touches a folder, numbered in the order they begin: recorded, and one of them broken.

While `Disk.installed()` holds, the two modules that do local I/O, storage_local.py and local_file.py, see `os` and
`open` through the Disk; the rest of the process sees the real ones. fsync is counted and not carried out: a process
that dies leaves the page cache as it was, and what fsync is worth when the power goes is power.py's affair. folder.py
and power.py call this.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import pytest

from asyncckpt import local_file, storage_local

T = TypeVar("T")
CHANGES = ("open", "mkdir", "pwritev", "ftruncate", "link", "replace", "rename", "unlink", "rmdir")
Kind = Literal[
    "kill", "kill after", "kill within", "fail", "fail after", "cut", "cut and fail", "tear", "remove", "delay"
]


@dataclass(frozen=True)
class Operation:
    """One call. path, other: relative to the root, which is "."; of a descriptor, what it was opened as. size: bytes
    asked for, or the new size. data: what was written, where the Disk keeps it. error: what the system said."""

    name: str
    path: str
    other: str = ""
    offset: int = 0
    size: int = 0
    flags: int = 0
    data: bytes = b""
    error: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.name, self.path, self.other)))

    @property
    def is_change(self) -> bool:
        """Of bytes or names. An open makes a file only if it may."""
        return self.name in CHANGES and (self.name != "open" or bool(self.flags & os.O_CREAT))


@dataclass(frozen=True)
class Fault:
    """What befalls operation `number`.

    kill: SIGKILL before it, after it, or when `fraction` of its bytes are written. fail: it raises `error`, an errno,
    before or after it was done. cut: it moves only `fraction` of its bytes, and says so; the next call may then fail
    with `error`. tear: it moves a part, and fails with `error`. remove: the folder that it works in is deleted before
    it. delay: it waits for `Disk.gate`, unless it is of the main thread, which would open that.
    """

    kind: Kind
    number: int = -1
    error: int = 0
    fraction: float = 0.5

    def at(self, number: int, *, fraction: float) -> Fault:
        return replace(self, number=number, fraction=fraction)


class Disk:
    def __init__(self, root: str, fault: Fault | None = None, *, keep_data: bool = False) -> None:
        self.root = root
        self.fault = fault
        self.operations: list[Operation] = []
        self.gate = threading.Event()
        self._keep_data = keep_data
        self._lock = threading.Lock()

    @contextmanager
    def installed(self) -> Iterator[None]:
        calls = _Os(self)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage_local, "os", calls)
            patch.setattr(storage_local, "open", calls.open_file, raising=False)
            patch.setattr(local_file, "os", calls)
            yield

    def call(self, operation: Operation, run: Callable[[], T], part: Callable[[int], T] | None = None) -> T:
        """part: does the same to so many bytes only."""
        with self._lock:
            number = len(self.operations)
            self.operations.append(operation)
        fault = self.fault
        try:
            if fault and fault.number == number:
                return self._break(fault, operation, run, part)
            if fault and fault.kind == "cut and fail" and fault.number == number - 1:
                _fail(fault.error)
            return run()
        except OSError as exc:
            self.operations[number] = replace(operation, error=str(exc))
            raise

    def _break(self, fault: Fault, operation: Operation, run: Callable[[], T], part: Callable[[int], T] | None) -> T:
        if fault.kind in ("cut", "cut and fail", "tear", "kill within") and part and operation.size > 1:
            done = part(max(1, int(operation.size * fault.fraction)))
            if fault.kind == "kill within":
                die()
            if fault.kind == "tear":
                _fail(fault.error)
            return done
        if fault.kind == "kill":
            die()
        if fault.kind == "remove":
            shutil.rmtree(os.path.join(self.root, os.path.dirname(operation.path)))
        if fault.kind == "delay" and threading.current_thread() is not threading.main_thread():
            assert self.gate.wait(60), "nobody opened the gate"
        if fault.kind in ("fail", "tear"):
            _fail(fault.error)
        done = run()
        if fault.kind == "kill after":
            die()
        if fault.kind == "fail after":
            _fail(fault.error)
        return done

    def relative(self, path: str) -> str:
        return os.path.relpath(path, self.root)

    def kept(self, views: Sequence[memoryview]) -> bytes:
        return b"".join(views) if self._keep_data else b""


class _Os:
    """`os`, for the modules that do local I/O."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._names: dict[int, str] = {}  # what descriptors were opened as
        self.path = _Path(disk)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        operation = Operation("open", self._disk.relative(path), flags=flags)
        descriptor = self._disk.call(operation, lambda: os.open(path, flags, mode))
        self._names[descriptor] = operation.path
        return descriptor

    def open_file(self, path: str, mode: str) -> Any:
        name = self._disk.relative(path)
        file = self._disk.call(Operation("open", name), lambda: open(path, mode))  # noqa: SIM115 (_File closes it)
        return _File(self._disk, name, file)

    def pwritev(self, descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        size = sum(map(len, views))
        operation = Operation("pwritev", self._names[descriptor], "", offset, size, data=self._disk.kept(views))

        def part(length: int) -> int:
            # Any number of bytes may come out of a write: past O_DIRECT, which takes none but multiples.
            buffered = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY)
            try:
                return os.pwritev(buffered, _first(views, length), offset)
            finally:
                os.close(buffered)

        return self._disk.call(operation, lambda: os.pwritev(descriptor, views, offset), part)

    def preadv(self, descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        operation = Operation("preadv", self._names[descriptor], "", offset, sum(map(len, views)))
        return self._disk.call(
            operation,
            lambda: os.preadv(descriptor, views, offset),
            lambda length: os.preadv(descriptor, _first(views, length), offset),
        )

    def ftruncate(self, descriptor: int, size: int) -> None:
        self._disk.call(
            Operation("ftruncate", self._names[descriptor], size=size), lambda: os.ftruncate(descriptor, size)
        )

    def fsync(self, descriptor: int) -> None:
        self._disk.call(Operation("fsync", self._names[descriptor]), lambda: None)

    def fstat(self, descriptor: int) -> os.stat_result:
        return self._disk.call(Operation("fstat", self._names[descriptor]), lambda: os.fstat(descriptor))

    def stat(self, path: str) -> os.stat_result:
        return self._on("stat", path)

    def mkdir(self, path: str) -> None:
        self._on("mkdir", path)

    def rmdir(self, path: str) -> None:
        self._on("rmdir", path)

    def unlink(self, path: str) -> None:
        self._on("unlink", path)

    def link(self, path: str, other: str) -> None:
        self._on("link", path, other)

    def replace(self, path: str, other: str) -> None:
        self._on("replace", path, other)

    def rename(self, path: str, other: str) -> None:
        self._on("rename", path, other)

    def walk(self, path: str, **options: Any) -> list[tuple[str, list[str], list[str]]]:
        return self._disk.call(Operation("walk", self._disk.relative(path)), lambda: list(os.walk(path, **options)))

    @contextmanager
    def scandir(self, path: str) -> Iterator[list[_Entry]]:
        operation = Operation("scandir", self._disk.relative(path))
        entries = self._disk.call(operation, lambda: sorted(os.scandir(path), key=lambda entry: entry.name))
        yield [_Entry(self._disk, entry) for entry in entries]

    def _on(self, name: str, *paths: str) -> Any:
        operation = Operation(name, *map(self._disk.relative, paths))
        return self._disk.call(operation, lambda: getattr(os, name)(*paths))


class _Path:
    """`os.path`"""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def __getattr__(self, name: str) -> Any:
        return getattr(os.path, name)

    def isdir(self, path: str) -> bool:
        """An error is no folder, as with the real one."""
        try:
            return self._disk.call(Operation("isdir", self._disk.relative(path)), lambda: os.path.isdir(path))
        except OSError:
            return False


class _Entry:
    """Of a folder. Names and kinds came with the listing; the size is a call of its own."""

    def __init__(self, disk: Disk, entry: os.DirEntry[str]) -> None:
        self._disk = disk
        self._entry = entry
        self.name = entry.name
        self.path = entry.path
        self.is_dir = entry.is_dir
        self.is_file = entry.is_file

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        operation = Operation("stat", self._disk.relative(self.path))
        return self._disk.call(operation, lambda: self._entry.stat(follow_symlinks=follow_symlinks))


class _File:
    """Of `open`, which storage_local.py uses to read small files."""

    def __init__(self, disk: Disk, name: str, file: Any) -> None:
        self._disk = disk
        self._name = name
        self._file = file

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def read(self) -> bytes:
        data: bytes = self._disk.call(Operation("read", self._name), self._file.read)
        return data


def _fail(error: int) -> None:
    raise OSError(error, os.strerror(error))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _first(views: Sequence[memoryview], length: int) -> list[memoryview]:
    found = []
    for view in views:
        found.append(view[:length])
        length -= len(found[-1])
    return [view for view in found if view]
