"""A filesystem of fsspec whose calls are numbered, `torture://` and a path: files on the disk, by fsspec's own class.

What asyncckpt does to any filesystem that is neither a folder, S3 nor GCS. Its `pipe_file` opens, writes and closes, so
that a file may be cut off where a process dies in it. folder.py calls this.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from scripts.campaign.syscalls import Disk, Operation

PREFIX = "torture://"


class NumberedFileSystem(LocalFileSystem):  # type: ignore[misc]
    """One for the process: the Disk whose operations the calls are."""

    protocol = "torture"
    cachable = False
    disk: ClassVar[Disk]
    _inside: ClassVar[threading.local] = threading.local()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = LocalFileSystem._strip_protocol(path.removeprefix(PREFIX))
        return stripped

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        def part(length: int) -> None:
            Path(path).write_bytes(bytes(value)[:length])

        self._call("pipe_file", path, value, mode, part=part, size=len(value), **kwargs)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> Any:
        return self._call("cat_file", path, start, end, **kwargs)

    def rm_file(self, path: str) -> None:
        self._call("rm_file", path)

    def find(self, path: str, *args: Any, **kwargs: Any) -> Any:
        return self._call("find", path, *args, **kwargs)

    def info(self, path: str, **kwargs: Any) -> Any:
        return self._call("info", path, **kwargs)

    def exists(self, path: str, **kwargs: Any) -> Any:
        return self._call("exists", path, **kwargs)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._call("makedirs", path, exist_ok=exist_ok)

    def _call(self, name: str, path: str, *args: Any, part: Any = None, size: int = 0, **kwargs: Any) -> Any:
        """fsspec's own method; those that it calls in turn are no operations."""
        run = getattr(super(), name)
        if getattr(self._inside, "is_set", False):
            return run(path, *args, **kwargs)
        self._inside.is_set = True
        try:
            operation = Operation(name, self.disk.relative(path), size=size)
            return self.disk.call(operation, lambda: run(path, *args, **kwargs), part)
        finally:
            self._inside.is_set = False


@contextmanager
def numbered(disk: Disk) -> Iterator[None]:
    NumberedFileSystem.disk = disk
    fsspec.register_implementation("torture", NumberedFileSystem, clobber=True)
    yield
