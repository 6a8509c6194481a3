"""One save after it was staged, on the writer thread: wait for the copy, write, agree, commit, prune.

Every rank writes its own files; the coordinator alone commits (commit.py), when all ranks are durable, and alone
deletes. The ranks talk through store keys with deadlines, never collectives. Whatever fails is raised here, on every
rank, with the last committed step untouched; the manager's writer keeps it for the training loop.

The verdict on a save is one key of the store, and each word in it needs the one before:

    (nothing)  -> a failure     by the coordinator: a rank failed; by any rank that has waited `timeout_s`: it gives up
    (nothing)  -> _COMMITTING   by the coordinator, before it commits
    _COMMITTING -> the end      by the coordinator: committed, or failed to
    _COMMITTING -> unknown      by any other rank that has waited `timeout_s` once more

So a coordinator that was stopped and comes back late finds that the save was given up, and does not commit it; had it
begun to, it hears that the others do not know how it ended. Neither is silent.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import TypeAlias

from asyncckpt import events
from asyncckpt.chunks import ChunkTable, Placement, merge
from asyncckpt.commit import Committer, SaveJob
from asyncckpt.errors import CheckpointError, CommitError, SaveError, WriteError
from asyncckpt.files import write_files
from asyncckpt.manifest import FileRecord, decode_records, encode_records
from asyncckpt.ranks import Ranks
from asyncckpt.shard import Regions, Resolved, StagedPayloads, write_items, write_shard
from asyncckpt.storage import Storage

_COMMITTING = b"committing"
_UNKNOWN = "may be saved or not (refresh() tells)"


Part: TypeAlias = tuple[ChunkTable, list[FileRecord]]
"""What one rank wrote; the files that a user gave come last."""


@dataclass(slots=True)
class _Verdict:
    """What the ranks agree a save came to. error: "" if it is committed; rank, phase: where it failed.

    untold: (step, sequence) of earlier commits that ended as "unknown" to the other ranks.
    """

    error: str = ""
    phase: str = "write"
    rank: int = 0
    outcome: str = "was not saved"
    num_bytes: int = 0
    commit_s: float = 0.0
    pruned: list[int] = field(default_factory=list)
    untold: list[tuple[int, int]] = field(default_factory=list)

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def decode(word: bytes) -> _Verdict:
        return _Verdict(**json.loads(word))


@dataclass(slots=True)
class Saver:
    """The writer thread's half of a manager. timeout_s: for the slowest rank. pause: see `write_shard`."""

    committer: Committer
    ranks: Ranks
    timeout_s: float
    pause: Callable[[float], None]
    _attempts: list[str] = field(default_factory=list)
    """Of earlier saves that the store has something of."""
    _untold: list[tuple[int, int]] = field(default_factory=list)
    _placement: Placement | None = None
    _reported: Placement | None = None
    """Of this rank's part of the last save, if the coordinator has it: it has committed that save."""
    _regions: Regions = field(default_factory=Regions)

    @property
    def storage(self) -> Storage:
        return self.committer.storage

    def run(self, job: SaveJob) -> Callable[[], None]:
        """Until the step is committed; what is left to be done is the result."""
        part, error = self._write(job)
        try:
            verdict, cause = self._reach_verdict(job, part, error)
        except CheckpointError as exc:  # the store is gone: nobody hears us, and of the others only rank 0 can commit
            outcome = "was not saved" if self.ranks.is_coordinator else _UNKNOWN
            verdict, cause = _Verdict(_describe(exc), "commit", outcome=outcome), error or exc
        if verdict.error:
            self.committer.is_tidy = False
            raise self._failed(job, verdict, cause)
        if not self.ranks.is_coordinator:
            assert part is not None
            self._reported = part[0].placement
            for step, sequence in [*verdict.untold, (job.step, job.sequence)]:
                self.committer.index.commit(step, sequence, [])
            self.committer.index.remove(verdict.pruned)
        durable_s = time.perf_counter() - job.started
        self.committer.tell(
            events.Committed, job.step,
            sequence=job.sequence, num_bytes=verdict.num_bytes, stall_s=job.stall_s, durable_s=durable_s,
            commit_s=verdict.commit_s,
        )  # fmt: skip
        return lambda: self.committer.clean_up(job.step, job.sequence) if self.ranks.is_coordinator else None

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
            files += write_files(self.storage, job.folder, job.files, self.pause)
        except Exception as exc:
            return None, exc
        finally:
            job.snapshot.release()
        self.committer.tell(
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

    def _reach_verdict(
        self, job: SaveJob, part: Part | None, error: Exception | None
    ) -> tuple[_Verdict, Exception | None]:
        """(verdict, its cause if known)"""
        report = b"" if part is None or self.ranks.is_coordinator else encode_records(*part, self._reported)
        self._reported = None
        self.ranks.post(job.attempt, _reply(error, report))
        self._attempts.append(job.attempt)
        if self.ranks.is_coordinator:
            return self._decide(job, part, error)
        return self._await_verdict(job), error

    def _decide(self, job: SaveJob, part: Part | None, error: Exception | None) -> tuple[_Verdict, Exception | None]:
        """On the coordinator: commit if every rank is durable and nobody has given up, and tell everybody."""
        key = job.attempt
        try:
            posts = self.ranks.collect(key, self.timeout_s, unless=key, on_wait=lambda s: self._tell_delay(job, s))
        except TimeoutError as exc:
            return _Verdict.decode(self._give_up(job)), exc
        self._forget_older()
        replies = [_parse(post) for post in posts]
        failed = [rank for rank, (text, _) in enumerate(replies) if text]
        if failed:
            self.committer.discard(job)  # all ranks have stopped writing
            verdict = _Verdict(replies[failed[0]][0], rank=failed[0])
            return _Verdict.decode(self.ranks.claim(key, verdict.encode())), error
        word = self.ranks.claim(key, _COMMITTING)
        if word != _COMMITTING:
            return _Verdict.decode(word), None
        self._untold = [*self._untold, *self.committer.look_again()]
        verdict = _Verdict(phase="commit", untold=self._untold)
        try:
            assert part is not None
            chunks, files = self._merged(part, [report for _, report in replies[1:]])
            started = time.perf_counter()
            verdict.num_bytes, verdict.pruned = self.committer.commit(job, chunks, files)
            verdict.commit_s = time.perf_counter() - started
        except Exception as exc:
            error, verdict.error = exc, _describe(exc)
            if self.committer.is_unsure(job):
                verdict.outcome = _UNKNOWN
        return self._tell_end(job, verdict), error

    def _merged(self, mine: Part, reports: Sequence[bytes]) -> Part:
        """What all ranks wrote. reports: of the others."""
        before = () if self._placement is None else self._placement.parts[1:]
        parts = [mine, *(decode_records(report, placement) for report, placement in zip_longest(reports, before))]
        chunks = merge([table for table, _ in parts], self._placement)
        self._placement = chunks.placement
        data = [file for table, files in parts for file in files[: len(table.placement.files)]]
        return chunks, data + [file for table, files in parts for file in files[len(table.placement.files) :]]

    def _tell_end(self, job: SaveJob, verdict: _Verdict) -> _Verdict:
        """Of the commit; what it came to in the end."""
        try:
            word = self.ranks.claim(job.attempt, verdict.encode(), over=_COMMITTING)
        except CheckpointError as exc:  # the store is gone
            word = _Verdict(_describe(exc), "commit").encode()
        if word == verdict.encode():
            self._untold = []
            self.committer.retire(verdict.pruned)
        elif not verdict.error:
            self._untold = [*self._untold, (job.step, job.sequence)]
            return replace(_Verdict.decode(word), outcome="is saved, but no other rank knows (refresh() tells)")
        return verdict

    def _await_verdict(self, job: SaveJob) -> _Verdict:
        def wait(beyond: bytes = b"") -> bytes:
            return self.ranks.await_announcement(
                job.attempt, self.timeout_s, beyond=beyond, on_wait=lambda s: self._tell_delay(job, s)
            )

        try:
            word = wait()
        except TimeoutError:
            word = self._give_up(job)
        if word == _COMMITTING:
            try:
                word = wait(beyond=_COMMITTING)
            except TimeoutError:
                waited = f"rank {self.ranks.rank} waited {self.timeout_s:g} s for the end of it"
                word = self.ranks.claim(
                    job.attempt, _Verdict(waited, "commit", outcome=_UNKNOWN).encode(), over=_COMMITTING
                )
        self._forget_older()
        return _Verdict.decode(word)

    def _give_up(self, job: SaveJob) -> bytes:
        """The word that holds: ours, unless somebody was faster."""
        late, waited = self.ranks.missing(job.attempt), f"{self.timeout_s:g} s after rank {self.ranks.rank}"
        verdict = _Verdict(f"it had not begun to {waited} was durable", "commit")
        if late:
            verdict = _Verdict(f"ranks {late} of {self.ranks.world_size} were not durable {waited} was", rank=late[0])
        return self.ranks.claim(job.attempt, verdict.encode())

    def _forget_older(self) -> None:
        """When every rank has posted for this save: it has then read the verdicts before."""
        for attempt in self._attempts[:-1]:
            self.ranks.forget(attempt)
        del self._attempts[:-1]

    def _tell_delay(self, job: SaveJob, waited_s: float) -> None:
        """By the lowest of the ranks that wait: the coordinator, or, where it keeps them waiting, another."""
        me = self.ranks.rank
        if any(self.ranks.has_posted(job.attempt, lower) for lower in range(1, me)):
            return
        not_durable = self.ranks.missing(job.attempt)
        phase, late = ("write", not_durable) if not_durable else ("commit", [0])
        if (late[0] == 0) == (me > 0):
            self.committer.tell(events.Delayed, job.step, phase=phase, ranks=tuple(late), waited_s=waited_s)

    # -- telling

    def _failed(self, job: SaveJob, verdict: _Verdict, cause: Exception | None) -> SaveError:
        """The error for the training loop; also an event."""
        newest = self.committer.index.by_commit()
        safe = f"the newest committed step is {newest[-1][0]}" if newest else "no step was committed yet"
        kind = CommitError if verdict.phase == "commit" else WriteError
        error = kind(
            f"step {job.step} at {self.storage.url} {verdict.outcome}: rank {verdict.rank} failed to {verdict.phase}: "
            f"{verdict.error}. Nothing committed is lost; {safe}. Training can go on, the next save is tried as usual.",
            step=job.step, url=self.storage.url, rank=verdict.rank,
        )  # fmt: skip
        error.__cause__ = cause
        self.committer.tell(events.Failed, job.step, phase=verdict.phase, error=error)
        return error


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:10_000]  # it goes through the store


def _reply(error: Exception | None, report: bytes) -> bytes:
    return json.dumps("" if error is None else _describe(error)).encode() + b"\n" + report


def _parse(reply: bytes) -> tuple[str, bytes]:
    error, report = reply.split(b"\n", 1)
    return json.loads(error), report
