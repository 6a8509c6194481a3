"""One save after it was staged, on the writer thread: wait for the copy, write, agree, commit, prune.

Every rank writes its own files; the coordinator alone commits, when all ranks are durable, and alone deletes. The ranks
talk through store keys with deadlines, never collectives. Whatever fails is raised here, on every rank, with the last
committed step untouched; the manager's writer keeps it for the training loop.
"""

from __future__ import annotations

import contextlib
import errno
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import Any, TypeAlias

import torch

from asyncckpt import events
from asyncckpt.chunks import ChunkTable, Key, Placement, merge
from asyncckpt.dcp_metadata import pickle_metadata
from asyncckpt.errors import CheckpointError, CommitError, DamagedStepError, SaveError, WriteError
from asyncckpt.framing import crc32
from asyncckpt.index import RunIndex
from asyncckpt.manifest import FileRecord, Head, Manifest, decode_records, encode_manifest, encode_records
from asyncckpt.plan import PlannedSave
from asyncckpt.policy import CommittedStep, KeepPolicy, needs_metadata, prunable
from asyncckpt.ranks import Ranks
from asyncckpt.restore import join, open_step, read_manifest
from asyncckpt.shard import Regions, Resolved, StagedPayloads, write_items, write_shard
from asyncckpt.steps import DCP_METADATA, belongs_to, manifest_name, may_be_swept, read_listing
from asyncckpt.storage import Storage
from asyncckpt.version import __version__
from stagers import StagedSnapshot

_ANSWER_LOST = (errno.EIO, errno.ETIMEDOUT, errno.ECONNRESET)
"""Errors after which the file that was to be written may be there all the same."""


Part: TypeAlias = tuple[ChunkTable, list[FileRecord]]
"""What one rank wrote."""


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

    @property
    def folder(self) -> str:
        return f"{self.step}/{self.attempt}"


@dataclass(frozen=True, slots=True)
class Leftover:
    """Files of a step folder that nothing refers to any more. groups: deleted one after the other, in this order.

    mend: the step was saved again, so its `.metadata` (`stock`, or made from the manifest) is to be written first:
    until then it speaks of the old data.
    """

    step: int
    groups: list[list[str]]
    mend: bool = False
    stock: bytes | None = None
    whole: bool = False


@dataclass(slots=True)
class _Verdict:
    """What the ranks agree a save came to. error: "" if it is committed; rank, phase: where it failed."""

    error: str = ""
    phase: str = "write"
    rank: int = 0
    num_bytes: int = 0
    pruned: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Saver:
    """The writer thread's half of a manager. emit: hands an event to the sinks. timeout_s: for the slowest rank. pause:
    see `write_shard`."""

    storage: Storage
    ranks: Ranks
    index: RunIndex
    keep: KeepPolicy | None
    emit: Callable[[events.Event], None]
    timeout_s: float
    pause: Callable[[float], None]
    leftovers: list[Leftover] = field(default_factory=list)
    """Taken on after each commit."""
    _known: dict[int, CommittedStep] = field(default_factory=dict)
    _finished_attempt: str | None = None
    _placement: Placement | None = None
    _reported: Placement | None = None
    """Of this rank's part of the last save, if the coordinator has it: it has committed that save."""
    _regions: Regions = field(default_factory=Regions)
    _is_tidy: bool = False

    def run(self, job: SaveJob) -> Callable[[], None]:
        """Until the step is committed; what is left to be done is the result."""
        part, error = self._write(job)
        if self.ranks.world_size > 1:
            report = b"" if part is None or self.ranks.is_coordinator else encode_records(*part, self._reported)
            self._reported = None
            self.ranks.post(f"{job.attempt}/written", _reply(error, report))
        if self.ranks.is_coordinator:
            verdict, cause = self._decide(job, part, error)
        else:
            verdict, cause = self._await_verdict(job), error
        if verdict.error:
            raise self._failed(job, verdict, cause)
        if not self.ranks.is_coordinator:
            assert part is not None
            self._reported = part[0].placement
            self.index.commit(job.step, job.sequence, [])
            self.index.remove(verdict.pruned)
        durable_s = time.perf_counter() - job.started
        self._emit(
            events.Committed, job.step,
            sequence=job.sequence, num_bytes=verdict.num_bytes, stall_s=job.stall_s, durable_s=durable_s,
        )  # fmt: skip
        return lambda: self._clean_up(job.step, job.sequence)

    # -- this rank's files

    def _write(self, job: SaveJob) -> tuple[Part | None, Exception | None]:
        """(what the coordinator has to know, None), or (None, why not). The staged buffers are free afterwards."""
        waiting = time.perf_counter()
        try:
            if not job.is_borrowed:
                job.snapshot.wait()
            writing = time.perf_counter()
            chunks, files = self._write_shard(job)
            job.snapshot.wait()  # raises if the copy turned out not to be one moment of the state
        except Exception as exc:
            return None, exc
        finally:
            job.snapshot.release()
        self._emit(
            events.Written, job.step,
            num_bytes=sum(file.size for file in files), num_files=len(files),
            copy_s=writing - waiting, write_s=time.perf_counter() - writing,
            client=self.storage.client, client_reason=self.storage.client_reason,
        )  # fmt: skip
        return (chunks, files), None

    def _write_shard(self, job: SaveJob) -> Part:
        """By the places that an earlier save of the same plan found, so that no tensor is looked at one by one."""
        planned, plan, snapshot = job.planned, job.planned.plan, job.snapshot
        if snapshot.memory is None or not planned.resolves_plainly:
            snapshot.wait()
            return write_items(self.storage, job.folder, self.ranks.rank, plan.items, planned.planner(), self._regions)
        self.prepare(job)
        assert plan.layout is not None
        assert plan.places is not None
        staged = StagedPayloads(snapshot.memory, plan.places, snapshot.wait_for, snapshot.wait)
        return write_shard(self.storage, job.folder, plan.layout, staged, planned.objects(), self._regions, self.pause)

    def prepare(self, job: SaveJob) -> None:
        """Find the places, once for each plan. Reads no tensor, so the copy may be still to come."""
        planned, plan, memory = job.planned, job.planned.plan, job.snapshot.memory
        if memory is not None and planned.resolves_plainly and plan.places is None:
            resolved = Resolved.of(plan.items, planned.planner())
            plan.layout = resolved.layout(plan.items, self.ranks.rank, self.storage.max_file_bytes)
            plan.places = resolved.places_in(memory)

    # -- the ranks' verdict on a save

    def _decide(self, job: SaveJob, part: Part | None, error: Exception | None) -> tuple[_Verdict, Exception | None]:
        """On the coordinator: commit if every rank is durable, and tell everybody. (verdict, its cause if known)"""
        verdict = _Verdict()
        try:
            replies = [("" if error is None else _describe(error), b"")]
            if self.ranks.world_size > 1:
                replies = [_parse(data) for data in self.ranks.collect(f"{job.attempt}/written", self.timeout_s)]
            failed = [rank for rank, (text, _) in enumerate(replies) if text]
            if failed:
                verdict.rank, verdict.error = failed[0], replies[failed[0]][0]
                self._discard(job)  # all ranks have stopped writing
            else:
                verdict.phase = "commit"
                assert part is not None
                before = () if self._placement is None else self._placement.parts[1:]
                reports = zip_longest((report for _, report in replies[1:]), before)
                parts = [part, *(decode_records(report, placement) for report, placement in reports)]
                verdict.num_bytes, verdict.pruned = self._commit(job, parts)
        except Exception as exc:
            error, verdict.error = exc, _describe(exc)
            if verdict.phase == "write" and isinstance(exc, TimeoutError):
                verdict.rank = min(self.ranks.missing(f"{job.attempt}/written"), default=0)
        if verdict.error:
            self._is_tidy = False
        if self.ranks.world_size > 1:
            self.ranks.announce(f"{job.attempt}/verdict", json.dumps(asdict(verdict)).encode())
            if self._finished_attempt is not None and not isinstance(error, TimeoutError):
                # Every rank has posted for this save, so it has read the verdict on the one before.
                self.ranks.forget(f"{self._finished_attempt}/written")
                self.ranks.forget(f"{self._finished_attempt}/verdict")
            self._finished_attempt = job.attempt
        return verdict, error

    def _await_verdict(self, job: SaveJob) -> _Verdict:
        try:  # the coordinator may itself wait `timeout_s` for the slowest rank before it speaks
            return _Verdict(**json.loads(self.ranks.await_announcement(f"{job.attempt}/verdict", 2 * self.timeout_s)))
        except TimeoutError as exc:
            return _Verdict(error=_describe(exc), phase="commit", rank=0)

    def _discard(self, job: SaveJob) -> None:
        """Free the space of a failed save as far as possible; what stays goes after the next commit."""
        with contextlib.suppress(OSError):
            self.storage.delete(self.storage.list_files(job.folder))

    # -- the coordinator's part

    def _commit(self, job: SaveJob, parts: Sequence[Part]) -> tuple[int, list[int]]:
        """Make the step visible and choose what retention drops: (bytes of all files, steps to prune)."""
        chunks = merge([table for table, _ in parts], self._placement)
        self._placement = chunks.placement
        files = [file for _, files in parts for file in files]
        before = self.index.files_of(job.step)
        manifest, stock = self._manifest(job, chunks, files)
        names = [f"{job.attempt}/{file.name}" for file in files]
        try:
            self._check_stored(job, files)
            commit_step(self.storage, str(job.step), manifest, None if before.manifests else stock)
        except Exception as exc:
            self._abandon(job, names, exc)
            raise
        self.index.commit(job.step, job.sequence, [*names, DCP_METADATA, manifest_name(job.sequence)])
        if self.keep is not None:  # else nobody takes them out again
            self._known[job.step] = CommittedStep(job.step, job.sequence, manifest.head.time_s, job.metrics)
        if before.manifests:
            before.manifests[job.sequence] = manifest_name(job.sequence)
            self.leftovers.append(Leftover(job.step, before.leftovers(job.sequence), mend=True, stock=stock))
        pruned = self._prunable(job.step)
        for step in pruned:
            self.leftovers.append(Leftover(step, self.index.files_of(step).in_deletion_order(), whole=True))
        self.index.remove(pruned)
        return manifest.num_bytes, pruned

    def _manifest(self, job: SaveJob, chunks: ChunkTable, files: list[FileRecord]) -> tuple[Manifest, bytes]:
        head = Head(
            job.step, job.sequence, job.attempt, uuid.uuid4().hex, self.ranks.world_size, torch.__version__,
            __version__, job.metadata, job.metrics,
        )  # fmt: skip
        return make_manifest(head, job.planned.plan.keys, chunks, files)

    def _check_stored(self, job: SaveJob, files: Sequence[FileRecord]) -> None:
        """That what the manifest will name is still there: a long upload leaves time to remove what came first."""
        sizes = self.storage.list_files(job.folder)
        lost = [file.name for file in files if sizes.get(f"{job.folder}/{file.name}") != file.size]
        if lost:
            raise CommitError(
                f"{len(lost)} of {len(files)} files of {job.folder} were removed or changed after they were written "
                f"({lost[0]}); another run may have taken them for leftovers: two runs must not write to one path",
                step=job.step, url=self.storage.url,
            )  # fmt: skip

    def _abandon(self, job: SaveJob, names: list[str], error: Exception) -> None:
        """Free the space of a save whose commit failed, which may be what the next one lacks; unless only the answer
        was lost: then the manifest may be there, and the step whole."""
        if isinstance(error, CommitError):  # the manifest and `.metadata`, if there are any, are another run's
            self._delete(Leftover(job.step, [names]))
        elif isinstance(error, OSError) and error.errno not in _ANSWER_LOST:
            self._delete(Leftover(job.step, [[manifest_name(job.sequence)], [DCP_METADATA], names]))

    def _prunable(self, newest: int) -> list[int]:
        if self.keep is None:
            return []
        try:
            steps, unreadable = self._by_commit(self.keep)
            return prunable(steps, self.keep, protected=self.index.protected() | unreadable, now_s=time.time())
        except Exception as exc:  # a user's policy failed: the checkpoint is whole all the same
            self._emit(events.Failed, newest, phase="prune", error=exc)
            return []

    def _by_commit(self, keep: KeepPolicy) -> tuple[list[CommittedStep], set[int]]:
        """All steps in order of commit, and those whose manifest does not read: nothing deletes a damaged step."""
        steps, unreadable, reads = [], set(), needs_metadata(keep)
        known, self._known = self._known, {}
        for step, sequence in self.index.by_commit():
            committed = known.get(step)
            if committed is None or committed.sequence != sequence:
                committed = CommittedStep(step, sequence)
                if reads:
                    try:
                        committed = self._read_committed(committed)
                    except (CheckpointError, OSError):
                        unreadable.add(step)
            if step not in unreadable:
                self._known[step] = committed
            steps.append(committed)
        return steps, unreadable

    def _read_committed(self, committed: CommittedStep) -> CommittedStep:
        step = committed.step
        head = read_manifest(self.storage, str(step), self.index.files_of(step)).head
        return replace(committed, time_s=head.time_s, metrics=head.metrics)

    def _delete_leftovers(self) -> None:
        """What fails is tried again after the next commit: a step is whole whether or not an old one is gone."""
        work, self.leftovers = self.leftovers, []
        for leftover in work:
            self._delete(leftover)

    def _delete(self, leftover: Leftover) -> None:
        started = time.perf_counter()
        try:
            current = self.index.sequence_of(leftover.step)  # the step may have been saved or dropped since
            if leftover.mend and current is not None:
                mend_step(self.storage, str(leftover.step), leftover.stock)
            for group in leftover.groups:
                over = [name for name in group if current is None or not belongs_to(name, current)]
                self.storage.delete([f"{leftover.step}/{name}" for name in over])
        except DamagedStepError:
            return  # nothing mends a damaged step, and its older save may be all there is
        except OSError as exc:
            self.leftovers.append(leftover)
            self._emit(events.Failed, leftover.step, phase="prune", error=exc)
            return
        self._emit(
            events.Pruned, leftover.step,
            whole=leftover.whole, num_files=sum(map(len, leftover.groups)), prune_s=time.perf_counter() - started,
        )  # fmt: skip

    def _clean_up(self, step: int, sequence: int) -> None:
        """After the commit of `step`: what retention dropped and, once, what earlier runs and failed saves left."""
        self._delete_leftovers()
        if not self._is_tidy and self.ranks.is_coordinator:
            self._tidy(step, sequence)

    def _tidy(self, step: int, sequence: int) -> None:
        """The step is committed, so every attempt with a lower number is over. By a listing of now: a run that was
        ending may have committed since this one began."""
        self._is_tidy = True
        try:
            steps = read_listing(self.storage.list_files())
            self.leftovers += [
                Leftover(step, groups, mend=files.sequence is not None)
                for step, files in steps.items()
                if (groups := files.leftovers(sequence))
            ]
            self.storage.sweep(lambda path: may_be_swept(path, sequence))
        except OSError as exc:
            self._emit(events.Failed, step, phase="prune", error=exc)
        self._delete_leftovers()

    # -- telling

    def _failed(self, job: SaveJob, verdict: _Verdict, cause: Exception | None) -> SaveError:
        """The error for the training loop; also an event."""
        newest = self.index.by_commit()
        safe = f"the newest committed step is {newest[-1][0]}" if newest else "no step was committed yet"
        kind = CommitError if verdict.phase == "commit" else WriteError
        error = kind(
            f"step {job.step} at {self.storage.url} was not saved: rank {verdict.rank} failed to {verdict.phase}: "
            f"{verdict.error}. Nothing committed is lost; {safe}. Training can go on, the next save is tried as usual.",
            step=job.step, url=self.storage.url, rank=verdict.rank,
        )  # fmt: skip
        error.__cause__ = cause
        self._emit(events.Failed, job.step, phase=verdict.phase, error=error)
        return error

    def _emit(self, kind: type[events.Event], step: int, **values: Any) -> None:
        self.emit(kind(url=self.storage.url, step=step, rank=self.ranks.rank, time_s=time.time(), **values))


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
    path = join(folder, manifest_name(manifest.head.sequence))
    try:
        storage.create(path, encode_manifest(manifest))
    except FileExistsError as exc:
        if stock is not None:  # it has replaced what belongs to the step that is there
            with contextlib.suppress(OSError, DamagedStepError):
                mend_step(storage, folder, None)
        raise CommitError(
            f"another run committed {path} in the meantime. Nothing was overwritten; two runs must not write to one "
            "path: end one of them, or give it a path of its own",
            step=manifest.head.step, url=storage.url,
        ) from exc  # fmt: skip


def mend_step(storage: Storage, folder: str, stock: bytes | None) -> None:
    """Write the `.metadata` that belongs to a step's newest manifest. DamagedStepError: that does not read."""
    if stock is None:
        manifest = open_step(storage, folder).manifest
        if manifest is None:  # not ours any more
            return
        stock = pickle_metadata(manifest.keys, manifest.chunks, manifest.head.attempt, manifest.head.save_id)
    storage.replace(join(folder, DCP_METADATA), stock)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _reply(error: Exception | None, report: bytes) -> bytes:
    return json.dumps("" if error is None else _describe(error)).encode() + b"\n" + report


def _parse(reply: bytes) -> tuple[str, bytes]:
    error, report = reply.split(b"\n", 1)
    return json.loads(error), report
