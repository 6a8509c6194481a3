"""A disk, and what may be found on it after the power went. A model: it says what a file system is allowed to do.

Operations (syscalls.py) are applied to it in order; `found` then gives a tree of names and bytes that a disk could hold
if the power went just then. Its rules:

- fsync of a file makes its bytes and its size durable, and no name. fsync of a folder makes the names in it durable as
  they are then, and the bytes of no file. That is all that POSIX promises; ext4, XFS and btrfs do more.
- What is not synced may be there or not. A change of a name is one change: the name is the old or the new file, or is
  not there, never a mixture. Where a rename replaces a file, the new name and the end of the old name are two changes.
- A file that was written and not synced has its old or its new size, and each of its blocks of 4 KiB is new, old, or
  zeros. What was synced is never damaged by what came later, but for blocks that were written again.
- A folder whose name is lost is lost with all that is in it, synced or not.

`Way` names how the unsynced is chosen. It knows no disk that lies about a flush, and no damage: that is families
"damage" and "hostile". power.py calls it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from scripts.campaign.syscalls import Operation

BLOCK_BYTES = 4096
Tree: TypeAlias = "dict[str, Tree | bytes]"
Way: TypeAlias = Literal["synced", "all", "zeros", "empty", "nameless", "mixed", "journal"]
"""synced: nothing that is not synced. all: everything. zeros, empty: all names, but unsynced files are zeros, or as at
their last sync. nameless: all bytes, but synced names only. mixed: each change of a name and each block by a throw of
its own. journal, as of a journalling file system: names in the order in which they changed, up to a point after the
last sync of anything; bytes from the front."""


@dataclass(eq=False)
class _File:
    now: bytearray = field(default_factory=bytearray)
    synced: bytes = b""


@dataclass(frozen=True, eq=False)
class _Change:
    """node: what the name is now; None: it is gone. number: of the change, among all of the disk."""

    name: str
    node: _File | _Folder | None
    number: int


@dataclass(eq=False)
class _Folder:
    synced: dict[str, _File | _Folder] = field(default_factory=dict)
    changes: list[_Change] = field(default_factory=list)

    def names(self, is_there: Callable[[_Change], bool]) -> dict[str, _File | _Folder]:
        names = dict(self.synced)
        for change in filter(is_there, self.changes):
            if change.node is None:
                names.pop(change.name, None)
            else:
                names[change.name] = change.node
        return names


class DiskModel:
    def __init__(self) -> None:
        self._top = _Folder()
        self._num_changes = 0
        self._num_synced = 0  # a journal is written in order, so a sync of anything writes all before it

    def apply(self, operation: Operation) -> None:
        """One that succeeded. Paths are relative to the top of the disk; what is above it was there before."""
        path = operation.path
        if operation.error or path.startswith(".."):
            return
        if operation.name == "open" and operation.flags & os.O_CREAT:
            if self._node(path) is None:
                self._set(path, _File())
            if operation.flags & os.O_TRUNC:
                self._file(path).now.clear()
        elif operation.name == "mkdir":
            self._set(path, _Folder())
        elif operation.name == "pwritev":
            _write(self._file(path).now, operation.offset, operation.data)
        elif operation.name == "ftruncate":
            _truncate(self._file(path).now, operation.size)
        elif operation.name == "fsync":
            self._sync(path)
        elif operation.name == "link":
            self._set(operation.other, self._node(path))
        elif operation.name in ("replace", "rename"):
            self._set(operation.other, self._node(path))
            self._set(path, None)
        elif operation.name in ("unlink", "rmdir"):
            self._set(path, None)

    def found(self, way: Way, draw: random.Random) -> Tree:
        """What is on the disk when the power is back."""
        end = draw.randint(self._num_synced, self._num_changes) if way == "journal" else 0
        throw: dict[int, bool] = {}

        def is_there(change: _Change) -> bool:
            if way == "journal":
                return change.number < end
            if way == "mixed":
                return throw.setdefault(change.number, draw.random() < 0.5)
            return way not in ("synced", "nameless")

        def tree_of(folder: _Folder) -> Tree:
            return {
                name: tree_of(node) if isinstance(node, _Folder) else bytes_of(node)
                for name, node in folder.names(is_there).items()
            }

        contents: dict[_File, bytes] = {}

        def bytes_of(file: _File) -> bytes:
            if file not in contents:  # one file may have two names
                contents[file] = _bytes_found(file, way, draw)
            return contents[file]

        return tree_of(self._top)

    def _sync(self, path: str) -> None:
        node = self._node(path)
        if isinstance(node, _Folder):
            node.synced = node.names(lambda change: True)
            node.changes.clear()
        elif node is not None:
            node.synced = bytes(node.now)
        self._num_synced = self._num_changes

    def _node(self, path: str) -> _File | _Folder | None:
        node: _File | _Folder | None = self._top
        for name in Path(path).parts:
            assert isinstance(node, _Folder), path
            node = node.names(lambda change: True).get(name)
        return node

    def _file(self, path: str) -> _File:
        node = self._node(path)
        assert isinstance(node, _File), path
        return node

    def _set(self, path: str, node: _File | _Folder | None) -> None:
        folder = self._node(os.path.dirname(path))
        assert isinstance(folder, _Folder), path
        folder.changes.append(_Change(os.path.basename(path), node, self._num_changes))
        self._num_changes += 1


def write_tree(tree: Tree, folder: Path) -> None:
    folder.mkdir()
    for name, node in tree.items():
        if isinstance(node, bytes):
            (folder / name).write_bytes(node)
        else:
            write_tree(node, folder / name)


def _bytes_found(file: _File, way: Way, draw: random.Random) -> bytes:
    now, synced = bytes(file.now), file.synced
    if now == synced or way in ("all", "nameless"):
        return now
    if way in ("synced", "empty"):
        return synced
    if way == "zeros":
        return synced.ljust(len(now), b"\0")[: len(now)]
    if way == "journal":
        return now[: draw.randint(0, len(now))] if not synced else draw.choice((now, synced))
    blocks = [_block(draw.choice((now, synced, b"")), start) for start in range(0, len(now), BLOCK_BYTES)]
    return b"".join(blocks)[: draw.choice((len(now), len(synced)))]


def _block(content: bytes, start: int) -> bytes:
    return content[start : start + BLOCK_BYTES].ljust(BLOCK_BYTES, b"\0")


def _write(content: bytearray, offset: int, data: bytes) -> None:
    _truncate(content, max(len(content), offset + len(data)))
    content[offset : offset + len(data)] = data


def _truncate(content: bytearray, size: int) -> None:
    del content[size:]
    content.extend(bytes(size - len(content)))
