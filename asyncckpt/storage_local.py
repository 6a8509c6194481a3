"""Checkpoint files in a folder: their names, made atomically and durable by fsync, their listing and their removal.

`LocalStorage` is what `open_storage` returns for a path or a file:// URL. It knows nothing of checkpoints; how bytes
get in and out of an open file is in local_file.py.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from asyncckpt.local_file import (
    NO_DIRECT_IO,
    O_DIRECT,
    FileWriter,
    advise_sequential,
    named_errors,
    read_ranges,
    write_full,
)
from asyncckpt.storage import TEMP_PREFIX, beside, check_path, redact

TEMP_GRACE_S = 3600.0  # a guess: nothing of ours keeps a temporary name that long
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


class LocalStorage:
    """A `Storage` in a folder; see there for every contract.

    `create` and `replace` write `.tmp-*` in the file's own folder. One that a crash left is never listed; `delete` and
    `sweep` remove those older than an hour from the folders that they come to. Symbolic links below the root are
    neither listed nor followed by `list_files`.
    """

    max_file_bytes = 1 << 40  # ext4 ends at 16 TiB
    client = "os"
    client_reason = ""

    def __init__(self, url: str, *, num_threads: int | None = None) -> None:
        from fsspec.implementations.local import LocalFileSystem  # knows file://, ~ and relative paths

        self.url = redact(url)
        self.root: str = LocalFileSystem._strip_protocol(url)
        self._num_threads = num_threads or 4

    def __repr__(self) -> str:
        return f"<LocalStorage {self.url}>"

    def write_file(self, path: str, size: int, views: Iterator[memoryview]) -> None:
        target, what = self._absolute(path), self._what("write", path)
        with named_errors(what):
            descriptor = self._open_direct(target)
        try:
            with FileWriter(descriptor, size, self._num_threads, what) as writer:
                for view in views:
                    writer.put(view)
                writer.finish()
            with named_errors(what):
                _fsync_folder(os.path.dirname(target))
        except BaseException:
            with suppress(OSError):
                os.unlink(target)
                self._remove_empty(os.path.dirname(path))  # no listing would show it, so nobody else would
            raise
        finally:
            os.close(descriptor)

    def create(self, path: str, data: bytes) -> None:
        with named_errors(self._what("create", path)):
            target = self._absolute(path)
            temporary, made = self._write_temporary(target, data)
            try:
                try:
                    _link(temporary, target)
                finally:
                    with suppress(OSError):  # what stays is never listed, and `sweep` removes it
                        os.unlink(temporary)
                _fsync_folder(os.path.dirname(target))
            except BaseException:
                _unlink_if_same(target, made)  # else it is there, though the caller hears that it is not
                raise

    def replace(self, path: str, data: bytes) -> None:
        with named_errors(self._what("replace", path)):
            target = self._absolute(path)
            temporary, _ = self._write_temporary(target, data)
            try:
                os.replace(temporary, target)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary)
                raise
            _fsync_folder(os.path.dirname(target))

    def replace_file(self, path: str, size: int, views: Iterator[memoryview]) -> None:
        temporary = beside(path)
        self.write_file(temporary, size, views)
        with named_errors(self._what("replace", path)):
            try:
                os.replace(self._absolute(temporary), self._absolute(path))
            except BaseException:
                with suppress(OSError):
                    os.unlink(self._absolute(temporary))
                raise
            _fsync_folder(os.path.dirname(self._absolute(path)))

    def read_file(self, path: str) -> bytes:
        with named_errors(self._what("read", path)), open(self._absolute(path), "rb") as file:
            return file.read()

    def read_into(
        self, path: str, ranges: Sequence[tuple[int, memoryview]], filled: Callable[[int], None] | None = None
    ) -> None:
        target, what = self._absolute(path), self._what("read", path)
        with named_errors(what):
            descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
        try:
            advise_sequential(descriptor)
            read_ranges(descriptor, ranges, self._num_threads, filled or (lambda index: None), what)
        finally:
            os.close(descriptor)

    def list_files(self, prefix: str = "") -> Mapping[str, int]:
        files: dict[str, int] = {}
        folders = [check_path(prefix.rstrip("/")) if prefix else ""]
        with named_errors(self._what("list", prefix)):
            while folders:
                folder = folders.pop()
                for entry in _scan(os.path.join(self.root, folder)):
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(name)
                    elif entry.is_file(follow_symlinks=False) and not entry.name.startswith(TEMP_PREFIX):
                        with suppress(FileNotFoundError):  # deleted since the scan
                            files[name] = entry.stat(follow_symlinks=False).st_size
        return files

    def modified_s(self, path: str) -> float:
        with named_errors(self._what("look at", path)):
            return os.stat(self._absolute(path), follow_symlinks=False).st_mtime

    def delete(self, paths: Iterable[str]) -> None:
        """Durable on return too: what a caller deletes next never vanishes in a crash before what it deleted first. Nor
        before what a killed writer deleted in the folders above, which nobody synced."""
        names = [check_path(path) for path in paths]
        folders = {os.path.dirname(path) for path in names}
        failures: list[OSError] = []
        for folder in {os.path.dirname(folder) for folder in folders} - {""}:
            with _collecting(failures, folder):
                _fsync_folder(os.path.join(self.root, folder))
        for path in names:
            with _collecting(failures, path):
                os.unlink(os.path.join(self.root, path))
        for folder in sorted(folders, key=len, reverse=True):
            with _collecting(failures, folder):
                _fsync_folder(os.path.join(self.root, folder))
            with _collecting(failures, folder):
                self._remove_empty(folder)
        if failures:
            reasons = "; ".join(str(failure) for failure in failures[:3])
            message = f"delete at {self.url}: {len(failures)} of {len(names)} files or their folders failed: {reasons}"
            raise OSError(failures[0].errno, message) from ExceptionGroup("delete", failures)

    def sweep(self, may_go: Callable[[str], bool]) -> None:
        with named_errors(self._what("sweep", "")):
            for full, _, _ in os.walk(self.root, topdown=False):
                folder = os.path.relpath(full, self.root)
                if folder == os.curdir:
                    _remove_leftovers(full)
                elif may_go(folder):
                    self._remove_empty(folder)

    def check_writable(self) -> None:
        with named_errors(self._what("write to", "")):
            probe = os.path.join(self.root, TEMP_PREFIX + secrets.token_hex(8))
            os.close(self._open_new(probe, os.O_EXCL))
            os.unlink(probe)
            _fsync_above(self.root)

    def is_create_exclusive(self) -> bool:
        with named_errors(self._what("probe", "")):
            probe = os.path.join(self.root, TEMP_PREFIX + secrets.token_hex(8))
            os.close(self._open_new(probe, os.O_EXCL))
            try:
                os.link(probe, f"{probe}-2")
                os.unlink(f"{probe}-2")
            except OSError as exc:
                if exc.errno not in _NO_HARD_LINKS:
                    raise
                return False
            finally:
                os.unlink(probe)
        return True

    def _absolute(self, path: str) -> str:
        return os.path.join(self.root, check_path(path))

    def _what(self, operation: str, path: str) -> str:
        return f"{operation} {path} at {self.url}" if path else f"{operation} {self.url}"

    def _open_direct(self, path: str) -> int:
        try:
            return self._open_new(path, os.O_TRUNC | O_DIRECT)
        except OSError as exc:
            if exc.errno not in NO_DIRECT_IO:
                raise
            return self._open_new(path, os.O_TRUNC)

    def _open_new(self, path: str, flags: int) -> int:
        """Open for writing, making the folders above. Tries again where a `delete` elsewhere removed one as empty."""
        for attempt in range(5):
            try:
                self._make_folder(os.path.dirname(path))
                return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flags, 0o666)
            except FileNotFoundError:
                if attempt == 4:
                    raise
        raise AssertionError

    def _make_folder(self, path: str) -> None:
        """Make the folder and those above; a new name is durable once the folder that holds it is synced.

        One that is there already may have been made by a writer that was killed before it synced the name, so that is
        done when it gets a new folder; for the root and above by `check_writable`.
        """
        if os.path.isdir(path):
            return
        parent = os.path.dirname(path)
        if not os.path.isdir(parent):
            self._make_folder(parent)
        elif len(parent) > len(self.root):
            _fsync_folder(os.path.dirname(parent))
        try:
            os.mkdir(path)
        except FileExistsError:  # made by another thread or rank at this moment, or a file
            if not os.path.isdir(path):
                raise NotADirectoryError(errno.ENOTDIR, f"{path} is not a folder") from None
        _fsync_folder(parent)

    def _write_temporary(self, target: str, data: bytes) -> tuple[str, os.stat_result]:
        """The path of a new, durable file beside `target`, and which file it is."""
        path = os.path.join(os.path.dirname(target), TEMP_PREFIX + secrets.token_hex(8))
        descriptor = self._open_new(path, os.O_EXCL)
        try:
            write_full(descriptor, [memoryview(data)] if data else [], 0)
            os.fsync(descriptor)
            return path, os.fstat(descriptor)
        except BaseException:
            with suppress(OSError):
                os.unlink(path)
            raise
        finally:
            os.close(descriptor)

    def _remove_empty(self, folder: str) -> None:
        """Remove `folder` and those above it for as long as they are empty; never the root."""
        while folder:
            full = os.path.join(self.root, folder)
            _remove_leftovers(full)
            try:
                os.rmdir(full)
            except FileNotFoundError:
                pass
            except OSError as exc:
                if exc.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    return
                raise
            folder = os.path.dirname(folder)


def _fsync_above(path: str) -> None:
    """Make the names of a folder and of those above it durable, up to where its file system is mounted; as far as they
    may be read: who made them knows."""
    path = os.path.realpath(path)
    while not os.path.ismount(path):
        path = os.path.dirname(path)
        with suppress(PermissionError):
            _fsync_folder(path)


def _fsync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some network filesystems have no such thing
            raise
    finally:
        os.close(descriptor)


def _link(temporary: str, target: str) -> None:
    """Give the file its name. A link refuses to replace, a rename does not."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        if os.stat(temporary).st_nlink == 1:  # 2: NFS lost the answer to a link that succeeded
            raise
    except OSError as exc:
        if exc.errno not in _NO_HARD_LINKS:
            raise
        # exFAT and some FUSE filesystems: exclusive against one writer only, which is what a run has.
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from exc
        os.rename(temporary, target)


def _unlink_if_same(path: str, made: os.stat_result) -> None:
    """Take back a name that a failed call gave to the file `made`."""
    with suppress(OSError):
        if os.path.samestat(os.stat(path), made):
            os.unlink(path)


def _scan(folder: str) -> list[os.DirEntry[str]]:
    """Its entries; none if it is not there."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def _remove_leftovers(folder: str) -> None:
    for entry in _scan(folder):
        if _is_leftover(entry):
            with suppress(FileNotFoundError):
                os.unlink(entry.path)


def _is_leftover(entry: os.DirEntry[str]) -> bool:
    if not entry.name.startswith(TEMP_PREFIX):
        return False
    try:
        return entry.stat(follow_symlinks=False).st_mtime < time.time() - TEMP_GRACE_S
    except FileNotFoundError:
        return True


@contextmanager
def _collecting(failures: list[OSError], path: str) -> Iterator[None]:
    """A file or folder that is not there is as good as deleted; other errors are kept for later."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as exc:
        failures.append(OSError(exc.errno, f"{path}: {exc.strerror}"))
