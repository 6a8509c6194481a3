"""Steps from one run to another, verified on the way: the bytes of every file are compared with the CRC32 that the save
computed before they are committed at the target, by the same protocol as a save.

A copy keeps keys, times, metrics and who saved it; it takes the next sequence number of the target, so that steps
copied in order of commit stay in it. Nothing of a committed step is ever overwritten. A step of another writer is
copied as it is, then verified there as far as its items carry checksums. Called by the command line.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from asyncckpt.commit import Committer, make_manifest
from asyncckpt.errors import CheckpointError, DamagedStepError
from asyncckpt.framing import crc32
from asyncckpt.index import RunIndex
from asyncckpt.manifest import FileRecord, Head, Manifest
from asyncckpt.overview import Run
from asyncckpt.parallel import for_each
from asyncckpt.restore import open_step, read_manifest
from asyncckpt.steps import DCP_METADATA, DEAD_MARK, StepFiles, attempt_name, attempt_sequence, summarise
from asyncckpt.storage import Storage
from asyncckpt.stream import file_views
from asyncckpt.verify import find_damage

FILES_AT_ONCE = 4
"""With what `file_views` reads ahead of each the memory of a copy, beside what the target holds: 112 MiB."""

Tell = Callable[[int], None]


class CopyError(CheckpointError):
    """A step was not copied; what is at the target is as it was."""


@dataclass(frozen=True, slots=True)
class Copied:
    """num_bytes, num_files: that were sent. num_kept: files of an interrupted copy that were found whole, and not sent
    again. checksums: what all was compared with, as in VerifyReport."""

    step: int
    result: Literal["copied", "there already"]
    num_files: int = 0
    num_bytes: int = 0
    num_kept: int = 0
    seconds: float = 0.0
    checksums: str = ""


@dataclass(slots=True)
class _Copy:
    """An Attempt, for the committer."""

    step: int
    sequence: int
    attempt: str
    started: float
    stall_s: float = 0.0

    @property
    def folder(self) -> str:
        return f"{self.step}/{self.attempt}"


@dataclass(slots=True)
class Copier:
    """Copies steps to one target. run: the target, as it is listed. resume: go on with copies that were interrupted;
    for who knows that no other copy of these steps is under way."""

    source: Storage
    run: Run
    resume: bool = False
    _index: RunIndex = field(default_factory=RunIndex)

    def __post_init__(self) -> None:
        self._index.load(summarise(self.run.steps), self.run.steps)

    @property
    def target(self) -> Storage:
        return self.run.storage

    def copy(self, step: int, tell: Tell = lambda num_bytes: None) -> Copied:
        """tell: hears of bytes of the source's files, also of those that need not be sent. Raises CopyError: the target
        has another step of that number; DamagedStepError: what came is not what was saved; StepNotFoundError, OSError.
        The target is then as it was but for files of an attempt that is not committed."""
        started = time.perf_counter()
        opened = open_step(self.source, str(step))
        if opened.manifest is None:
            return self._copy_foreign(step, started, tell)
        if lost := [*opened.lacking.values(), *opened.lost]:
            raise DamagedStepError(f"step {step} at {self.source.url} was not copied: {lost[0]}", url=self.source.url)
        there = self.run.steps.get(step, StepFiles())
        if there.is_foreign:
            raise self._refused(step, "a checkpoint of another writer")
        if there.sequence is not None:
            if read_manifest(self.target, str(step), there).head.save_id != opened.manifest.head.save_id:
                raise self._refused(step, "another save")
            return Copied(step, "there already", seconds=time.perf_counter() - started, checksums="manifest")
        job, present = self._attempt(step, opened.manifest.head, there, started)
        sent = self._send_all(opened.data_folder, job, opened.manifest, present, tell)
        self._commit(job, opened.manifest)
        return Copied(
            step, "copied", len(sent), sum(file.size for file in sent), len(opened.manifest.files) - len(sent),
            time.perf_counter() - started, "manifest",
        )  # fmt: skip

    def _refused(self, step: int, what: str) -> CopyError:
        return CopyError(
            f"step {step} at {self.target.url} is {what}, and nothing overwrites it. Copy to another place, or delete "
            "that step first",
            step=step, url=self.target.url,
        )  # fmt: skip

    def _attempt(self, step: int, head: Head, there: StepFiles, started: float) -> tuple[_Copy, set[str]]:
        """(where the data go, names of files that an earlier copy may have sent). One that is taken up is of the same
        save by its name, and newer than every commit: the order of commits is that of the numbers."""
        mark = f"{crc32(head.save_id.encode()):08x}"
        newest = max(self._index.by_commit(), key=lambda one: one[1], default=(0, 0))[1]
        for attempt, names in sorted(there.attempts.items(), reverse=True) if self.resume else ():
            is_mine = re.fullmatch(rf"[0-9]+-{mark}[0-9a-f]{{8}}", attempt) is not None
            if is_mine and attempt_sequence(attempt) > newest and f"{attempt}/{DEAD_MARK}" not in names:
                return _Copy(step, attempt_sequence(attempt), attempt, started), {
                    name.removeprefix(f"{attempt}/") for name in names
                }
        sequence = self._index.take_sequence()
        name = attempt_name(sequence, int(mark + secrets.token_hex(4), 16))
        return _Copy(step, sequence, name, started), set()

    def _send_all(self, folder: str, job: _Copy, manifest: Manifest, present: set[str], tell: Tell) -> list[FileRecord]:
        """The files that were sent; not those that are whole at the target."""
        sent: list[FileRecord] = []

        def send(file: FileRecord) -> None:
            path = f"{job.folder}/{file.name}"
            if file.name in present and self._is_whole(path, file):
                tell(file.size)
                return
            views = _checked(self.source, f"{folder}/{file.name}", file, tell)
            self.target.write_file(path, file.size, views)
            sent.append(file)

        try:
            for_each(send, manifest.files, FILES_AT_ONCE)
        except DamagedStepError:  # no other try will do better
            with suppress(OSError):
                self.target.delete(self.target.list_files(job.folder))
            raise
        return sent

    def _is_whole(self, path: str, file: FileRecord) -> bool:
        """By its bytes: a folder's file system may keep the length of a file, and not what was in it."""
        if self.run.sizes.get(path) != file.size:
            return False
        try:
            for _ in _checked(self.target, path, file, lambda num_bytes: None):
                pass
        except (DamagedStepError, OSError, EOFError):
            return False
        return True

    def _commit(self, job: _Copy, manifest: Manifest) -> None:
        head = replace(manifest.head, sequence=job.sequence, attempt=job.attempt)
        made, stock = make_manifest(head, manifest.keys, manifest.chunks, manifest.files)
        told: list[Any] = []
        Committer(self.target, self._index, None, told.append, 0, head.world_size).commit_made(job, made, stock)

    # -- of other writers

    def _copy_foreign(self, step: int, started: float, tell: Tell) -> Copied:
        """All files of the folder, `.metadata` last: it is what readers look for."""
        files = {path: size for path, size in self.source.list_files(str(step)).items() if path.startswith(f"{step}/")}
        stock = f"{step}/{DCP_METADATA}"
        there = {path: size for path, size in self.run.sizes.items() if path.startswith(f"{step}/")}
        if there:
            if there != files:
                raise self._refused(step, "there with other files")
            report, problems = find_damage(self.target, str(step))
            if problems:
                raise self._refused(step, f"there and damaged ({problems[0]})")
            return Copied(step, "there already", seconds=time.perf_counter() - started, checksums=report.checksums)
        order = sorted(path for path in files if path != stock)
        try:
            for_each(lambda path: self._send_plain(path, files[path], tell), order, FILES_AT_ONCE)
            self._send_plain(stock, files[stock], tell)
            checksums = self._verified(step)
        except BaseException:
            with suppress(OSError):
                self.target.delete([stock])
                self.target.delete(order)
            raise
        seconds = time.perf_counter() - started
        return Copied(step, "copied", len(files), sum(files.values()), 0, seconds, checksums)

    def _verified(self, step: int) -> str:
        """Which checksums the items of a foreign step had to be compared with."""
        report, problems = find_damage(self.target, str(step))
        if problems:
            raise DamagedStepError(
                f"step {step} of {self.source.url}, of another writer, is damaged and was not copied: {problems[0]}",
                step=step, url=self.source.url,
            )  # fmt: skip
        return report.checksums

    def _send_plain(self, path: str, size: int, tell: Tell) -> None:
        self.target.write_file(path, size, _pieces(self.source, path, size, tell))


def _checked(storage: Storage, path: str, file: FileRecord, tell: Tell) -> Iterator[memoryview]:
    """The bytes of a file, and DamagedStepError at their end if they are not those that were saved."""
    value = 0
    for view in _pieces(storage, path, file.size, tell):
        value = crc32(view, value)
        yield view
    if value != file.crc32:
        raise DamagedStepError(
            f"{path} at {storage.url} has CRC32 {value:08x}, its manifest says {file.crc32:08x}. The step was not "
            "copied. Copy another one; asyncckpt verify tells what is hit",
            url=storage.url,
        )


def _pieces(storage: Storage, path: str, size: int, tell: Tell) -> Iterator[memoryview]:
    """A file in order, some pieces read ahead. A writer may keep what it gets."""
    try:
        for view in file_views(storage, path, size):
            yield view
            tell(len(view))
    except EOFError as exc:
        raise DamagedStepError(f"{path} at {storage.url} was cut short: {exc}", url=storage.url) from exc
