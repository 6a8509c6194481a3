"""The coordinator's half of a save: make the step visible, keep to the retention policy, and clear away what is over.

Nothing here knows of other ranks: `Saver` (save.py) calls it on the writer thread when all of them are durable. Where
it fails, the last committed step is untouched. `ShardWriter` (dcp.py) uses the functions at the end.

Two runs on one path, by mistake or because one is still ending: neither overwrites or deletes what the other commits.

    one save of a step wins     by the manifest's create, and by a look at the step's folder before it and after it:
                                who finds a manifest there that it does not know withdraws its own
    dead, or only slow?         who takes an attempt for dead marks it before the look that decides, and a writer looks
                                for the mark after its commit: one of the two sees the other, however long either stops
    a step of both              retention deletes the save it knows, and no newer one
"""

from __future__ import annotations

import contextlib
import errno
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Protocol

import torch

from asyncckpt import events
from asyncckpt.chunks import ChunkTable, Key
from asyncckpt.dcp_metadata import pickle_metadata
from asyncckpt.errors import CheckpointError, CommitError, DamagedStepError, StepNotFoundError
from asyncckpt.files import File
from asyncckpt.framing import crc32
from asyncckpt.index import RunIndex
from asyncckpt.manifest import FileRecord, Head, Manifest, encode_manifest
from asyncckpt.plan import PlannedSave
from asyncckpt.policy import CommittedStep, KeepPolicy, needs_metadata, prunable
from asyncckpt.restore import files_below, join, open_step, read_manifest
from asyncckpt.steps import (
    DCP_METADATA,
    DEAD_MARK,
    MAX_NUMBER,
    StepFiles,
    belongs_to,
    manifest_name,
    may_be_swept,
    read_listing,
)
from asyncckpt.storage import Storage
from asyncckpt.version import __version__
from stagers import StagedSnapshot

SWEEP_EVERY = 10
"""Saves. Where the answer to the begin of an upload is lost a client begins another, and knows nothing of the first."""
_ANSWER_LOST = (errno.EIO, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.EPIPE, errno.EBUSY)
"""Errors after which the file that was to be written may be there all the same: of this try, or of one before it."""


class Attempt(Protocol):
    """What a commit has to know of a save: a SaveJob, or a copy (copying.py)."""

    step: int
    sequence: int
    attempt: str
    started: float
    stall_s: float

    @property
    def folder(self) -> str: ...


@dataclass(slots=True)
class SaveJob:
    """started: `time.perf_counter()` at the call. stall_s: what the call took of the training loop, in seconds."""

    step: int
    sequence: int
    attempt: str
    snapshot: StagedSnapshot
    planned: PlannedSave
    metadata: Mapping[str, Any]
    metrics: Mapping[str, float]
    started: float
    stall_s: float = 0.0
    is_borrowed: bool = False
    """The snapshot is copied as it is written."""
    files: Mapping[str, File] = field(default_factory=dict)
    """Of this rank; their values are part of the snapshot."""

    @property
    def folder(self) -> str:
        return f"{self.step}/{self.attempt}"

    @property
    def num_bytes(self) -> int:
        """That are held in memory."""
        return self.snapshot.num_bytes + sum(file.num_plain_bytes for file in self.files.values())


@dataclass(frozen=True, slots=True)
class Leftover:
    """Files of a step folder that nothing refers to any more. groups: deleted one after the other, in this order.

    mend: the step was saved again, so its `.metadata` (`stock` of the save `sequence`, or made from the manifest) is to
    be written first: until then it speaks of the old data. whole: retention drops the step. beside: files
    that go whatever their number: a mark, or data of a save that had the committed one's number and came too late.
    """

    step: int
    groups: list[list[str]]
    mend: bool = False
    stock: bytes | None = None
    sequence: int | None = None
    whole: bool = False
    beside: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Unsure:
    """A commit of ours without an answer: its manifest may be there. names: the data files. crc32: of the manifest."""

    step: int
    sequence: int
    names: list[str]
    crc32: int
    num_bytes: int
    stall_s: float
    started: float


@dataclass(slots=True)
class Committer:
    """emit: hands an event to the sinks."""

    storage: Storage
    index: RunIndex
    keep: KeepPolicy | None
    emit: Callable[[events.Event], None]
    rank: int
    world_size: int
    leftovers: list[Leftover] = field(default_factory=list)
    """Taken on after each commit."""
    is_tidy: bool = False
    """Whether no earlier run and no failed save may have left anything."""
    _known: dict[int, CommittedStep] = field(default_factory=dict)
    _unsure: list[_Unsure] = field(default_factory=list)
    _told: set[int | None] = field(default_factory=set)
    """The errnos with which deleting failed, of which an event told."""
    _is_guarded: bool | None = None
    """Whether storage refuses to overwrite; None: not asked."""

    # -- the commit

    def commit(self, job: SaveJob, chunks: ChunkTable, files: Sequence[FileRecord]) -> tuple[int, list[int]]:
        """Make the step visible and choose what retention drops: (bytes of all files, steps to prune).

        chunks, files: of all ranks. The steps are for `retire`, when the other ranks know.
        """
        manifest, stock = self._manifest(job, chunks, files)
        self.commit_made(job, manifest, stock)
        return manifest.num_bytes, self._prunable(job.step)

    def commit_made(self, job: Attempt, manifest: Manifest, stock: bytes) -> None:
        """Make a step visible of which the manifest and the stock `.metadata` are made."""
        before = self.index.files_of(job.step)
        is_first, files = not before.manifests, manifest.files
        names = [f"{job.attempt}/{file.name}" for file in files]
        self._ask_if_guarded(job)
        try:
            self._check_stored(job, files)
            if is_first:
                self.storage.replace(join(str(job.step), DCP_METADATA), stock)
            self._create(job, manifest, names, has_stock=is_first)
        except Exception as exc:
            self._abandon(job, names, exc)
            raise
        self._confirm(job, files, has_stock=is_first)
        self.index.commit(job.step, job.sequence, [*names, DCP_METADATA, manifest_name(job.sequence)])
        if self.keep is not None:  # else nobody takes them out again
            self._known[job.step] = CommittedStep(job.step, job.sequence, manifest.head.time_s, manifest.head.metrics)
        if not is_first:
            before.manifests[job.sequence] = manifest_name(job.sequence)
            groups = before.leftovers(job.sequence)
            self.leftovers.append(Leftover(job.step, groups, mend=True, stock=stock, sequence=job.sequence))

    def _manifest(self, job: SaveJob, chunks: ChunkTable, files: Sequence[FileRecord]) -> tuple[Manifest, bytes]:
        head = Head(
            job.step, job.sequence, job.attempt, uuid.uuid4().hex, self.world_size, torch.__version__,
            __version__, job.metadata, job.metrics,
        )  # fmt: skip
        return make_manifest(head, job.planned.plan.keys, chunks, files)

    def _ask_if_guarded(self, job: Attempt) -> None:
        """Once, at the first commit: nobody who only reads asks."""
        if self._is_guarded is not None:
            return
        with contextlib.suppress(OSError):  # asked again at the next commit
            self._is_guarded = self.storage.is_create_exclusive()
            if not self._is_guarded:
                self.tell(events.Unguarded, job.step)

    def _check_stored(self, job: Attempt, files: Sequence[FileRecord]) -> None:
        """That what the manifest names is there, as a long upload leaves time to remove what came first; and that no
        other run has committed the step. CommitError."""
        sizes = self.storage.list_files(str(job.step))
        stored = read_listing(sizes).get(job.step, StepFiles())
        lost = [file.name for file in files if sizes.get(f"{job.folder}/{file.name}") != file.size]
        if lost or f"{job.folder}/{DEAD_MARK}" in sizes:
            raise CommitError(
                f"{len(lost)} of {len(files)} files of {job.folder} were removed or changed after they were written"
                f"{f' ({lost[0]})' if lost else ', and the others will be'}; another run may have taken them for "
                "leftovers: two runs must not write to one path",
                step=job.step, url=self.storage.url,
            )  # fmt: skip
        if theirs := [name for number, name in stored.manifests.items() if not self._knows(job, number)]:
            raise CommitError(
                f"another run committed {job.step}/{theirs[0]} in the meantime, which stays as it is: two runs must "
                "not write to one path. End one of them, or give it a path of its own; refresh() takes up what the "
                "other has saved",
                step=job.step, url=self.storage.url,
            )  # fmt: skip

    def _knows(self, job: Attempt, sequence: int) -> bool:
        """Whether a manifest of a step that is being saved was there when this run last looked, or is its own."""
        own = {job.sequence, *(one.sequence for one in self._unsure)}
        dropped = (name for leftover in self.leftovers if leftover.step == job.step for name in chain(*leftover.groups))
        known = self.index.sequence_of(job.step) or 0
        return sequence <= known or sequence in own or manifest_name(sequence) in dropped

    def _create(self, job: Attempt, manifest: Manifest, names: list[str], *, has_stock: bool) -> None:
        """The commit. If it fails, an answer may have been lost all the same: look whether the manifest is there, now
        and, if that does not tell, again before the next commit."""
        try:
            create_manifest(self.storage, str(job.step), manifest, has_stock=has_stock)
        except OSError as exc:
            unsure = _Unsure(
                job.step, job.sequence, names, crc32(encode_manifest(manifest)), manifest.num_bytes,
                job.stall_s, job.started,
            )  # fmt: skip
            try:
                if self._is_there(unsure):
                    return
            except OSError:
                self._unsure.append(unsure)
            else:
                if exc.errno in _ANSWER_LOST:  # it may still come
                    self._unsure.append(unsure)
            raise

    def _abandon(self, job: Attempt, names: list[str], error: Exception) -> None:
        """Free the space of a save whose commit failed, which may be what the next one lacks; unless only the answer
        was lost: then the manifest may be there, and the step whole."""
        if isinstance(error, CommitError):  # the manifest and `.metadata`, if there are any, are another run's
            self._delete(Leftover(job.step, [names]))
        elif isinstance(error, OSError) and error.errno not in _ANSWER_LOST and not self.is_unsure(job):
            self._delete(Leftover(job.step, [[manifest_name(job.sequence)], [DCP_METADATA], names]))

    def _confirm(self, job: Attempt, files: Sequence[FileRecord], *, has_stock: bool) -> None:
        """After the commit: take it back if another run was faster, or has removed our files. It was not yet told."""
        try:
            self._check_stored(job, files)
        except OSError:  # the step is committed whether or not this look succeeds
            return
        except CommitError:
            names = [f"{job.attempt}/{file.name}" for file in files]
            stock = [DCP_METADATA] if has_stock else []
            self._delete(Leftover(job.step, [[manifest_name(job.sequence)], stock, names]))
            with contextlib.suppress(OSError, CheckpointError):  # it may have been the other's, before
                mend_step(self.storage, str(job.step))
            raise

    # -- commits without an answer

    def look_again(self) -> list[tuple[int, int]]:
        """For manifests of which the last look did not tell whether they are there: (step, sequence) of those that are,
        and count as committed from now on. Not while a save is written."""
        found = []
        unsure, self._unsure = self._unsure, []
        for one in unsure:
            try:
                is_there = self._is_there(one)
            except OSError:
                self._unsure.append(one)
                continue
            if is_there and (self.index.sequence_of(one.step) or 0) < one.sequence:
                self.index.commit(one.step, one.sequence, [*one.names, DCP_METADATA, manifest_name(one.sequence)])
                found.append((one.step, one.sequence))
                self.tell(
                    events.Committed, one.step, sequence=one.sequence, num_bytes=one.num_bytes,
                    stall_s=one.stall_s, durable_s=time.perf_counter() - one.started,
                )  # fmt: skip
        return found

    def is_unsure(self, job: Attempt) -> bool:
        return any(one.sequence == job.sequence for one in self._unsure)

    def _is_there(self, unsure: _Unsure) -> bool:
        """Whether the commit took place: the manifest is there, and of this run."""
        try:
            stored = self.storage.read_file(f"{unsure.step}/{manifest_name(unsure.sequence)}")
        except FileNotFoundError:
            return False
        return crc32(stored) == unsure.crc32

    # -- retention

    def _prunable(self, newest: int) -> list[int]:
        if self.keep is None:
            return []
        try:
            steps = self._by_commit(self.keep)
            return prunable(steps, self.keep, protected=self.index.protected(), now_s=time.time())
        except Exception as exc:  # a user's policy failed: the checkpoint is whole all the same
            self.tell(events.Failed, newest, phase="prune", error=exc)
            return []

    def _by_commit(self, keep: KeepPolicy) -> list[CommittedStep]:
        """All steps in order of commit, but those whose manifest does not read: nothing deletes a damaged one, and none
        counts as one to keep. Read are those of earlier runs, where the policy asks for more than numbers, or where a
        killed writer may have left half a manifest, as files are not created in one go."""
        steps, reads = [], needs_metadata(keep) or not self._is_guarded
        known, self._known = self._known, {}
        for step, sequence in self.index.by_commit():
            committed = known.get(step)
            if committed is None or committed.sequence != sequence:
                committed = CommittedStep(step, sequence)
                if reads:
                    try:
                        committed = self._read_committed(committed)
                    except (CheckpointError, OSError):
                        continue
            self._known[step] = committed
            steps.append(committed)
        return steps

    def _read_committed(self, committed: CommittedStep) -> CommittedStep:
        step = committed.step
        head = read_manifest(self.storage, str(step), self.index.files_of(step)).head
        return replace(committed, time_s=head.time_s, metrics=head.metrics)

    def retire(self, steps: Sequence[int]) -> None:
        for step in steps:
            files = self.index.files_of(step)
            self.leftovers.append(Leftover(step, files.in_deletion_order(), whole=True))
            self.is_tidy &= not files.has_unfinished  # it judges them
        self.index.remove(steps)

    # -- what is over

    def discard(self, job: SaveJob) -> None:
        """Free the space of a failed save as far as possible; what stays goes after the next commit."""
        with contextlib.suppress(OSError):
            self.storage.delete(self.storage.list_files(job.folder))

    def clean_up(self, step: int, sequence: int) -> None:
        """After the commit of `step`: what retention dropped and, once, what earlier runs and failed saves left."""
        self.delete_leftovers()
        if not self.is_tidy:
            self._tidy(step, sequence)
        elif sequence % SWEEP_EVERY == 0:
            self._sweep(step, sequence)

    def delete_leftovers(self) -> None:
        """What fails is tried again after the next commit: a step is whole whether or not an old one is gone. So is all
        behind it: storage that refuses, or is slow to fail, would keep the next save waiting for each of them."""
        work, self.leftovers = self.leftovers, []
        for number, leftover in enumerate(work, 1):
            if not self._delete(leftover):
                self.leftovers[:0] = work[number:]  # before the one that failed
                return
        self._told.clear()

    def _delete(self, leftover: Leftover) -> bool:
        """Whether it is done with."""
        started = time.perf_counter()
        try:
            current = self.index.sequence_of(leftover.step)  # the step may have been saved or dropped since
            groups, is_theirs = leftover.groups, self._is_theirs(leftover, current)
            if is_theirs:  # so is `.metadata`, which it may not have lived to write: it would speak of what goes now
                groups = [[name for name in group if name != DCP_METADATA] for group in groups]
                mend_step(self.storage, str(leftover.step))
            elif leftover.mend and current is not None:
                mend_step(self.storage, str(leftover.step), leftover.stock, leftover.sequence)
            over = [[name for name in group if current is None or not belongs_to(name, current)] for group in groups]
            for group in filter(None, [*over, leftover.beside]):
                self.storage.delete([f"{leftover.step}/{name}" for name in group])
        except DamagedStepError:
            return True  # nothing mends a damaged step, and its older save may be all there is
        except OSError as exc:
            self.leftovers.append(leftover)
            self._tell_undeleted(leftover.step, exc)
            return False
        if num_files := sum(map(len, [*groups, leftover.beside])):
            self.tell(
                events.Pruned, leftover.step,
                whole=leftover.whole, num_files=num_files, prune_s=time.perf_counter() - started,
                policy=repr(self.keep) if leftover.whole else "",
            )  # fmt: skip
        return True

    def _is_theirs(self, leftover: Leftover, current: int | None) -> bool:
        """Whether another run has saved the step again since this one knew it."""
        if not leftover.mend and not leftover.whole:
            return False
        found = files_below(self.storage.list_files(str(leftover.step)), str(leftover.step)).sequence
        return found not in (None, current) and manifest_name(found) not in chain(*leftover.groups)

    def _tidy(self, step: int, sequence: int) -> None:
        """The step is committed, so every attempt with a lower number is over. By a listing of now: a run that was
        ending may have committed since this one began; or it may be about to, so they are marked first, and of the
        marked ones go those that have no manifest then."""
        try:
            steps = read_listing(self.storage.list_files())
            dead = {(number, name) for number, files in steps.items() for name in files.unfinished(sequence)}
            if dead:
                steps = self.mark(dead)
            self._take_on(steps, sequence, dead)
            self.is_tidy = True
        except OSError as exc:  # the next commit tries again
            self._tell_undeleted(step, exc)
        self.delete_leftovers()
        self._sweep(step, sequence)

    def mark(self, dead: Iterable[tuple[int, str]]) -> dict[int, StepFiles]:
        """Tell the writers of attempts, if they live, that these are taken for dead: (step, attempt). What is there
        then is the result."""
        for number, name in dead:
            self.storage.replace(f"{number}/{name}/{DEAD_MARK}", b"")
        return read_listing(self.storage.list_files())

    def _take_on(
        self, steps: Mapping[int, StepFiles], newest_committed: int, marked: Collection[tuple[int, str]]
    ) -> None:
        """What is left over in `steps`, listed after the marks were made, and of marked attempts those that have no
        manifest."""
        for number, files in steps.items():
            names = {name for at, name in marked if at == number}
            if leftover := self._leftover(number, files, newest_committed, names):
                self.leftovers.append(leftover)

    def bury(self, dead: Collection[tuple[int, str]]) -> None:
        """Delete attempts that the caller takes for dead, whatever their numbers; none that was committed meanwhile.
        OSError: a mark could not be made, and nothing was deleted."""
        steps = self.mark(dead)
        self._take_on({number: steps[number] for number, _ in dead if number in steps}, MAX_NUMBER + 1, dead)
        self.delete_leftovers()

    def _leftover(self, step: int, files: StepFiles, newest_committed: int, marked: set[str]) -> Leftover | None:
        """What is left over in a step's folder; of attempts without a manifest only those that were marked as dead
        before. The mark of one that was committed meanwhile goes, too."""
        # The newest is one of another run's: which takes it back, if it did not know of the other.
        if len(files.manifests) > 1 and files.sequence != self.index.sequence_of(step):
            return None
        unfinished = files.unfinished(newest_committed)
        groups = files.leftovers(newest_committed, {*unfinished} - marked)
        beside = [f"{name}/{DEAD_MARK}" for name in marked.difference(unfinished) if name in files.attempts]
        if files.has_rivals:
            with contextlib.suppress(OSError, DamagedStepError):
                beside += files.beside(read_manifest(self.storage, str(step), files).head.attempt)
        is_whole = files.sequence is not None
        if not groups and not beside and (not is_whole or DCP_METADATA in files.other):
            return None
        return Leftover(step, groups, mend=is_whole, beside=beside)

    def _sweep(self, step: int, sequence: int) -> None:
        try:
            self.storage.sweep(lambda path: may_be_swept(path, sequence))
        except OSError as exc:
            self._tell_undeleted(step, exc)

    # -- telling

    def _tell_undeleted(self, step: int, error: OSError) -> None:
        """Once for each reason until all that is over is gone, not at each save."""
        if error.errno not in self._told:
            self.tell(events.Failed, step, phase="prune", error=error)
        self._told.add(error.errno)

    def tell(self, kind: type[events.Event], step: int, **values: Any) -> None:
        self.emit(kind(url=self.storage.url, step=step, rank=self.rank, time_s=time.time(), **values))


def make_manifest(
    head: Head, keys: Mapping[str, Key], chunks: ChunkTable, files: Sequence[FileRecord]
) -> tuple[Manifest, bytes]:
    """The manifest of a step and the stock `.metadata` that belongs to it."""
    stock = pickle_metadata(keys, chunks, head.attempt, head.save_id)
    return Manifest(head, keys, chunks, files, len(stock), crc32(stock)), stock


def commit_step(storage: Storage, folder: str, manifest: Manifest, stock: bytes | None) -> None:
    """Create the manifest: the commit. All it names must be durable.

    stock: the `.metadata`, written first, so that it is there when the step is. None where the step is committed
    already: until the new manifest is there the old save is the step, so its `.metadata` is replaced afterwards.
    """
    if stock is not None:
        storage.replace(join(folder, DCP_METADATA), stock)
    create_manifest(storage, folder, manifest, has_stock=stock is not None)


def create_manifest(storage: Storage, folder: str, manifest: Manifest, *, has_stock: bool) -> None:
    """has_stock: the `.metadata` was written."""
    path = join(folder, manifest_name(manifest.head.sequence))
    try:
        storage.create(path, encode_manifest(manifest))
    except FileExistsError as exc:
        if has_stock:  # it has replaced what belongs to the step that is there
            with contextlib.suppress(OSError, DamagedStepError):
                mend_step(storage, folder)
        raise CommitError(
            f"another run committed {path} in the meantime. Nothing was overwritten; two runs must not write to one "
            "path: end one of them, or give it a path of its own",
            step=manifest.head.step, url=storage.url,
        ) from exc  # fmt: skip


def mend_step(storage: Storage, folder: str, stock: bytes | None = None, sequence: int | None = None) -> None:
    """Write the `.metadata` that belongs to a step's newest manifest. DamagedStepError: that does not read, or a file
    that it names is missing or cut.

    stock: the `.metadata` of the save `sequence`; None: made here. Looks afterwards, as another run may have saved or
    dropped the step meanwhile: the last to write is right in the end.
    """
    while True:
        if stock is None:
            try:
                step = open_step(storage, folder)
            except StepNotFoundError:
                return
            if step.lacking or step.lost:
                raise DamagedStepError(f"{join(storage.url, folder)} lacks files of its newest save", url=storage.url)
            manifest = step.manifest
            if manifest is None:  # not ours any more
                return
            stock = pickle_metadata(manifest.keys, manifest.chunks, manifest.head.attempt, manifest.head.save_id)
            sequence = manifest.head.sequence
        storage.replace(join(folder, DCP_METADATA), stock)
        newest = files_below(storage.list_files(folder), folder).sequence
        if newest is None:  # alone it would read as a foreign checkpoint
            storage.delete([join(folder, DCP_METADATA)])
        if newest in (None, sequence):
            return
        stock = None
