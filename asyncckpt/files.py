"""Files in a step, beside its tensors or instead of them: what a user gives, its copy, and its bytes to storage.

A file is a value, copied with the state when `save` is called, and a format that makes the file of the copy later, on
the writer thread. Decides nothing about steps; how files are named in a manifest is manifest.py's to say, and fetch.py
brings them back. Called by manager.py, which stages them, and save.py, which writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from asyncckpt.errors import SaveError
from asyncckpt.framing import crc32
from asyncckpt.manifest import FileRecord, check_file_name, check_folders
from asyncckpt.parallel import for_each
from asyncckpt.ranks import Ranks
from asyncckpt.shard import PARALLEL_FILES, Checksum, in_views
from asyncckpt.storage import Storage
from stagers import StateDict


class FileContent(Protocol):
    """The bytes of a file, known in number before one of them is made."""

    @property
    def size(self) -> int: ...

    def views(self) -> Iterable[memoryview]:
        """Exactly `size` bytes in order, format "B", that stay as they are until the file is written. May be called
        again."""
        ...


@dataclass(frozen=True, slots=True)
class BytesFile:
    """A file of these bytes."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def views(self) -> Iterator[memoryview]:
        yield memoryview(self.data)


@dataclass(frozen=True, slots=True)
class File:
    """value: what is copied at the call of `save`: tensors, nested dicts and lists of them, plain objects. format:
    called with the copy on a thread of the writer's, so it must not need the GIL for long; what it gives is written."""

    value: Any
    format: Callable[[Any], FileContent]

    @property
    def num_plain_bytes(self) -> int:
        """Of a value that is bytes, which is held as it is."""
        return len(self.value) if isinstance(self.value, bytes) else 0


class _Files:
    """The key under which files stand in what is staged; no key of a user's is equal to it."""

    def __repr__(self) -> str:
        return "files"


_FILES = _Files()


# -- at the call of `save`


def checked(files: Mapping[str, File | bytes] | None) -> dict[str, File]:
    """ValueError or TypeError for what cannot be a file; nothing was copied."""
    found: dict[str, File] = {}
    for name, given in dict[str, Any](files or {}).items():
        file = File(given, BytesFile) if isinstance(given, bytes) else given
        if not isinstance(file, File):
            kind = type(given).__name__
            raise TypeError(f"the file {name!r} is a {kind}: give a File, or bytes. Nothing was written.")
        found[check_file_name(name)] = file
    check_folders(found)
    return found


def with_files(state_dict: StateDict, files: Mapping[str, File]) -> StateDict:
    """What is to be copied: both, so that a tensor in both is copied once, and all are of one moment."""
    if not files:
        return state_dict
    values: dict[Any, Any] = {_FILES: {name: file.value for name, file in files.items()}}
    return {**state_dict, **values}


def take_files(staged: StateDict, files: Mapping[str, File]) -> dict[str, File]:
    """The copies of the files, out of a copy of `with_files(...)`, of which the state dict stays."""
    copies: Mapping[str, Any] = dict[Any, Any].pop(staged, _FILES, {})
    return {name: replace(file, value=copies[name]) for name, file in files.items()}


def check_across_ranks(ranks: Ranks, names: Iterable[str]) -> None:
    """SaveError, on every rank, if two give a file of one name. A collective call."""
    given = ranks.gather_objects(sorted(names), phase="save")
    clash = _clash(given) if ranks.is_coordinator else ""
    if clash := ranks.broadcast_object(clash, phase="save"):
        raise SaveError(f"{clash}. Nothing was written. Give each rank's files names of their own.", step=ranks.step)


def _clash(given: Sequence[Iterable[str]]) -> str:
    giver: dict[str, int] = {}
    for rank, names in enumerate(given):
        for name in names:
            if (other := giver.setdefault(name, rank)) != rank:
                return f"ranks {other} and {rank} both give the file {name!r}"
    try:
        check_folders(giver)
    except ValueError as exc:
        return f"of the files of all ranks {exc}"
    return ""


# -- on the writer thread


def write_files(
    storage: Storage,
    folder: str,
    files: Mapping[str, File],
    pause: Callable[[float], None] = lambda seconds: None,
) -> list[FileRecord]:
    """Write files whose values stay as they are into `folder`, durable on return: what the manifest has to say of them.

    pause: as in `write_shard`. OSError: storage failed. SaveError: a file could not be made.
    """
    records: dict[str, FileRecord] = {}

    def write(name: str) -> None:
        content, checksum = _content(name, files[name]), Checksum()
        storage.write_file(f"{folder}/{name}", content.size, _views(content, checksum, pause))
        records[name] = FileRecord(name, content.size, checksum.value)

    for_each(write, files, PARALLEL_FILES)
    return [records[name] for name in files]


def _content(name: str, file: File) -> FileContent:
    try:
        return file.format(file.value)
    except Exception as exc:
        raise SaveError(f"the file {name!r} could not be made: {type(exc).__name__}: {exc}") from exc


def _views(content: FileContent, checksum: Checksum, pause: Callable[[float], None]) -> Iterator[memoryview]:
    """In pieces that are checksummed right before they are handed to storage; `pause` is a sign of life."""
    for view in content.views():
        for piece in in_views(view):
            checksum.value = crc32(piece, checksum.value)
            pause(0.0)
            yield piece
