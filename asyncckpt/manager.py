"""`CheckpointManager`: the order of calls, and what the training thread and the ranks see of it.

A save, top to bottom: `should_save` -> a free place in the queue -> `snapshot` -> agreement and plan -> the writer
thread (save.py), which writes, commits and prunes. A restore: no copy in flight -> restorer.py. Nothing here moves
bytes, and the writer thread never calls back into this file.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner

from asyncckpt import events
from asyncckpt.arguments import check_arguments, check_retry_timeout, check_step, finite_metrics, json_metadata
from asyncckpt.commit import Committer, SaveJob
from asyncckpt.dcp_log import log_to_dcp
from asyncckpt.errors import CheckpointError, SaveError, located
from asyncckpt.events import log_events
from asyncckpt.exits import at_exit
from asyncckpt.files import File, check_across_ranks, checked, take_files, with_files
from asyncckpt.index import RunIndex
from asyncckpt.lookup import read_value, tree_of
from asyncckpt.plan import SavePlanning
from asyncckpt.policy import KeepAny, KeepLast, KeepPolicy, SaveEvery, SavePolicy, uses_clock
from asyncckpt.preemption import GracePeriod, SavePace, SigtermHandler, in_ms, why_too_late
from asyncckpt.ranks import Ranks
from asyncckpt.restore import OpenStep
from asyncckpt.restorer import Restorer
from asyncckpt.save import Saver
from asyncckpt.selection import KeyFilter, Selection
from asyncckpt.state import State, for_save, num_bytes_of
from asyncckpt.steps import StepFiles, attempt_name, new_token, read_listing, summarise
from asyncckpt.storage import RETRY_S, open_storage
from asyncckpt.sync_point import SyncPoint
from asyncckpt.train_state import TrainState
from asyncckpt.verify import VerifyReport
from asyncckpt.writer import BackgroundWriter
from stagers import AsyncStager, BlockingAsyncStager, OverlappingAsyncStager, StagedSnapshot, StagingError

_NO_STEP = -1
PREEMPTION, CLOCK = "SIGTERM", "clock"
_STAGED, _FAILED, _FAILED_BEFORE = 0, 1, 2
_NEW_STRUCTURE, _NEW_NAMES = 1, 2  # bits: what a rank's save has that its last one had not


class CheckpointManager:
    """Saves and restores the checkpoints of one training run, under one URL.

    The constructor is a collective call: with torch.distributed initialised, every rank of `process_group` makes it,
    and later every `save`, `save_async` and `restore`, with the same steps. All methods belong to the thread that made
    the manager. It holds page-locked (or pageable) host memory of one state per save in flight.

    One run at a time writes to a path; any number may read. A second one that writes by mistake overwrites and deletes
    nothing that the other commits, but for steps that its own retention drops: one of two that save a step gets a
    CommitError, and may go on after `refresh()`. A child of fork() must make its own manager. A process that ends
    without `close` finishes the saves in flight, for as long as storage does something every `timeout` seconds.

    path: a folder or any fsspec URL (`s3://`, `gs://`, `memory://`, ...); made when the first step is saved.
    save_interval: steps between saves; step 0 counts. save_policy: replaces it; see policy.py.
    max_to_keep: whole steps to keep, by order of commit; 0 keeps all. keep: a policy whose steps are kept as well.
    max_pending_async: saves taken and not yet committed, the one being written among them.
    num_of_threads: transfers in flight on this rank; None lets storage choose.
    process_group: who takes part; the world by default. No message is ever sent over it.
    chkpt_on_preemption: after SIGTERM the next step saves, whatever the interval, on all ranks the same one. Neither
        on_busy="skip" nor a save policy by the clock keeps it from that.
    grace_period: seconds from SIGTERM until the process is killed; None: not known, and that save is always tried. If
        it could not be committed in time on all ranks, judged by the last saves, it is skipped, an event says so, and
        saves in flight are finished. A C call in which SIGTERM comes is not seen: take your longest step off.
    stager: default `BlockingAsyncStager()`: right for any training loop. `OverlappingAsyncStager()` returns at once,
        but then a parameter may be edited by hand only after `wait_staged()`. The manager closes it.
    on_busy: when the queue is full, "wait" for a place (a stall, reported) or "skip" the save (an event says so).
    storage_options: given to the fsspec filesystem as they are.
    transfer: who moves the bytes of an s3:// path: "auto", "obstore" or "fsspec"; see `open_storage`.
    events: sinks, called with every event; see events.py.
    save_planner, load_planner: DCP planners in place of the default ones; copied for each use.
    safe_globals: classes that objects in a checkpoint may be made of, besides those torch's `weights_only` allows.
    timeout: seconds for which ranks wait for each other in any phase.
    retry_timeout: seconds after which a request to an object store that fails is not tried again; 0: never.
    read_once: on restore, what several ranks want alike is read by one of them and passed on to the others: for storage
        that is slower than the network between ranks. Rank 0's word counts.

    Raises ValueError for wrong arguments, CheckpointError if the path cannot be listed. Source of the first seven
    arguments and their meaning: torch_xla.experimental.distributed_checkpoint.CheckpointManager.
    """

    def __init__(
        self,
        path: str,
        save_interval: int = 1,
        max_to_keep: int = 0,
        max_pending_async: int = 1,
        num_of_threads: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        chkpt_on_preemption: bool = True,
        *,
        stager: AsyncStager | None = None,
        save_policy: SavePolicy | None = None,
        keep: KeepPolicy | None = None,
        on_busy: Literal["wait", "skip"] = "wait",
        storage_options: Mapping[str, Any] | None = None,
        transfer: Literal["auto", "obstore", "fsspec"] = "auto",
        events: Iterable[events.Sink] = (),
        save_planner: SavePlanner | None = None,
        load_planner: LoadPlanner | None = None,
        safe_globals: Iterable[Any] = (),
        timeout: float = 600.0,
        retry_timeout: float = RETRY_S,
        grace_period: float | None = None,
        read_once: bool = False,
    ) -> None:
        check_arguments(save_interval, max_to_keep, max_pending_async, num_of_threads, on_busy, timeout, grace_period)
        check_retry_timeout(retry_timeout)
        self._storage = open_storage(
            path, storage_options, num_threads=num_of_threads, transfer=transfer, retry_timeout=retry_timeout
        )
        self._sinks = (log_events, log_to_dcp, *events)
        self._policy = save_policy or SaveEvery(save_interval)
        self._on_busy = on_busy
        self._safe_globals = tuple(safe_globals)
        self._load_planner = load_planner
        self._stager = stager or BlockingAsyncStager()
        self._index = RunIndex()
        self._opened: OpenStep | None = None
        self._is_preempted = False
        self._preempted_at: int | None = None
        self._grace, self._pace = GracePeriod(grace_period), SavePace()
        self._sigterm: SigtermHandler | None = None
        if chkpt_on_preemption:
            self._sigterm = SigtermHandler(self._on_sigterm)
        self._writer = BackgroundWriter(max_pending_async)
        try:
            self._ranks = Ranks.join(process_group, timeout_s=timeout, tell=partial(_tell, self._sinks, self.url))
            kept = _union(KeepLast(max_to_keep) if max_to_keep else None, keep)
            committer = Committer(
                self._storage, self._index, kept, self._emit_in_background, self._ranks.rank, self._ranks.world_size
            )
            self._saver = Saver(committer, self._ranks, timeout, self._writer.pause)
            self._list_steps()
            self._read_once = bool(self._ranks.agree([read_once], phase="construct")[0][0])
        except BaseException:
            self._uninstall_sigterm()
            raise
        # Within a grace period so that a rank that does not answer can be told of, and asked again.
        self._sync_point = SyncPoint(self._ranks, timeout_s=min(60.0, timeout, (grace_period or math.inf) / 3))
        self._ask_again()  # if SIGTERM came meanwhile
        self._planning = SavePlanning(self._ranks, save_planner, self._safe_globals)
        self._file_names = frozenset[str]()  # of this rank's last save, which no other rank has
        self._max_pending = max_pending_async
        self._last_step: int | None = None
        self._last_time = time.monotonic()
        self._is_requested = False
        self._is_writable = False
        self._is_closed = False
        self._is_released = False
        self._pid = os.getpid()
        self._owner = threading.current_thread()
        at_exit(self, _close_at_exit)
        weakref.finalize(self, self._writer.end).atexit = False  # else the idle thread would stay

    def __repr__(self) -> str:
        if os.getpid() != self._pid:
            return f"<CheckpointManager {self.url} of process {self._pid}>"
        return f"<CheckpointManager {self.url} {len(self.all_steps())} steps, {self._writer!r}>"

    def __enter__(self) -> CheckpointManager:
        return self

    def __getstate__(self) -> None:
        raise TypeError(f"the CheckpointManager of {self.url} cannot be copied or sent to a process: make one there")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._close(meet=error is None)
        except CheckpointError as exc:
            if error is None:
                raise
            error.add_note(f"Closing the checkpoint manager failed too: {exc}")

    @property
    def url(self) -> str:
        """The run's URL, without credentials."""
        return self._storage.url

    # -- saving

    def should_save(self, step: int) -> bool:
        """Whether `save` and `save_async` take this step: the policy wants it, or a preemption asked for it."""
        check_step(step)
        if self._sync_point.reached(step):
            self._is_requested = True
            self._is_preempted |= PREEMPTION in self._sync_point.reasons
        if (failure := self._sync_point.take_failure()) is not None:
            self._emit_now(events.Skipped, step, reason=failure)
            self._ask_again()
        return self._is_requested or self._wants(step)

    def _wants(self, step: int) -> bool:
        """The policy's answer. One that reads the clock is asked on rank 0, which has all ranks agree on a step."""
        by_clock = uses_clock(self._policy)
        if by_clock and not self._ranks.is_coordinator:
            return False
        wanted = self._policy.should_save(step, self._last_step, time.monotonic() - self._last_time)
        if wanted and by_clock and self._ranks.world_size > 1:
            # What would be skipped is not asked for: each request holds up all ranks for a moment.
            if self._on_busy == "wait" or not self._writer.is_full:
                self._sync_point.request(CLOCK)
            return False
        return wanted

    def save_async(
        self,
        step: int,
        state_dict: State,
        force: bool = False,
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        files: Mapping[str, File | bytes] | None = None,
    ) -> bool:
        """Take a checkpoint if this step is due, and return once the state is copied. True: it was taken.

        To be called at every step. Blocks for a place in the queue, for the copy, and for the other ranks' word.
        state_dict: a TrainState, or a nested dict of tensors, DTensors, plain values and `PerRank`; a top-level
        Stateful stands for its state_dict(). It is the state at this call that is saved (see `stager`).
        force: save at this step in any case. metrics: numbers for keep policies; NaN counts as missing.
        metadata: JSON values for the manifest. Of both, rank 0's are kept.
        files: this rank's files of the step, by names that no other rank gives, with "/" for folders: copied with the
        state, made and written in the background, listed by `files` and brought back by `fetch`.
        Raises what an earlier save failed with, once (SaveError); UnsafeObjectError, StagingError and ValueError for a
        state that cannot be saved: nothing was written.
        """
        return self._save(step, state_dict, force, metrics, metadata, files, borrow=False) is not None

    def save(
        self,
        step: int,
        state_dict: State,
        force: bool = False,
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        files: Mapping[str, File | bytes] | None = None,
    ) -> bool:
        """`save_async`, and wait until the step is committed; the copy is made while it is written."""
        snapshot = self._save(step, state_dict, force, metrics, metadata, files, borrow=True)
        if snapshot is None:
            return False
        try:
            self._writer.drain()
        except BaseException:  # Ctrl-C: the save goes on, and the caller with the state
            snapshot.wait()
            raise
        self._writer.raise_failures()
        return True

    def _save(
        self,
        step: int,
        state: State,
        force: bool,
        metrics: Mapping[str, float] | None,
        metadata: Mapping[str, Any] | None,
        files: Mapping[str, File | bytes] | None,
        *,
        borrow: bool,
    ) -> StagedSnapshot | None:
        """The snapshot of a save that was taken, which is the writer's. borrow: the caller waits for the writer."""
        started = time.perf_counter()
        self._check_open()
        if self._ranks.world_size == 1:
            self._writer.raise_failures()
        if isinstance(state, TrainState):
            state.step = step + 1
        due = self.should_save(step)
        if not due and not force:
            return None
        is_for_sigterm = self._is_preempted and self._preempted_at is None
        if is_for_sigterm and not force and (reason := self._why_too_late(step, state, files)):
            self._emit_now(events.Skipped, step, reason=reason)
            self._preempted_at, self._is_requested = step, False
            return None
        if self._on_busy == "skip" and not force and not is_for_sigterm and self._is_any_busy(step):
            self._emit_now(events.Skipped, step, reason="an earlier save is still being written")
            self._is_requested = False
            return None
        wait_s = self._writer.acquire()
        try:
            job = self._stage(step, state, started, metrics, metadata, files, borrow)
        except BaseException:
            self._writer.release()
            raise
        job.stall_s = time.perf_counter() - started
        stage_s = job.stall_s - wait_s
        try:
            self._emit_now(
                events.Staged, step,
                num_bytes=job.num_bytes, wait_s=wait_s, stage_s=stage_s, stall_s=job.stall_s,
                is_blocking=borrow,
            )  # fmt: skip
        finally:  # a sink may call sys.exit(), and be interrupted by Ctrl-C: what is staged is saved all the same
            self._writer.submit(self._pace.timed(job.num_bytes, stage_s, lambda: self._saver.run(job)))
        self._last_step, self._last_time, self._is_requested = step, time.monotonic(), False
        if self._is_preempted and self._preempted_at is None:
            self._preempted_at = step
        return job.snapshot

    def _why_too_late(self, step: int, state: State, files: Mapping[str, File | bytes] | None) -> str:
        """Why a save at this step would be too late, or "": the same word on all ranks. A collective call."""
        self._ranks.step = step
        rows = self._ranks.agree([step, self._grace.is_running], phase="preempt")
        if not any(row[1] for row in rows):
            return ""
        # The ranks came one by one; only what each says now is of one moment.
        needed_s = self._pace.needed_s(num_bytes_of(state, files, self._ranks.rank))
        return why_too_late(self._ranks.agree([in_ms(self._grace.left_s()), in_ms(needed_s)], phase="preempt"))

    def _is_any_busy(self, step: int) -> bool:
        busy = self._ranks.agree([step, self._writer.is_full], phase="busy")
        return any(row[1] for row in busy)

    def _stage(
        self,
        step: int,
        state: State,
        started: float,
        metrics: Mapping[str, float] | None,
        metadata: Mapping[str, Any] | None,
        files: Mapping[str, File | bytes] | None,
        borrow: bool,
    ) -> SaveJob:
        """Copy the state, agree with the other ranks that all have, and plan. A collective call."""
        self._ranks.step = step
        snapshot, failure, given = None, None, dict[str, File]()
        status = _FAILED_BEFORE if self._writer.has_failures else _STAGED
        if status == _STAGED:
            try:
                facts = json_metadata(metadata), finite_metrics(metrics)
                given = checked(files)
                view = self._view(step, state)
                snapshot = self._snapshot(view, given, borrow)
            except Exception as exc:
                status, failure = _FAILED, located(exc, step, self.url, self._ranks.rank)
        try:
            structure = getattr(snapshot, "structure", None)
            is_new = not self._planning.is_current(structure)
            sequence, token = self._index.take_sequence(), new_token()
            if not self._ranks.is_coordinator:  # rank 0's hold, and messages that are alike are short
                sequence = token = 0
            changes = is_new * _NEW_STRUCTURE + (given.keys() != self._file_names) * _NEW_NAMES
            rows = self._ranks.agree([status, step, changes, sequence, token], phase="save")
            self._raise_disagreement(step, rows, failure)
            assert snapshot is not None
            if any(row[2] & _NEW_NAMES for row in rows):
                check_across_ranks(self._ranks, given)
                self._file_names = frozenset(given)
            staged = take_files(snapshot.state_dict, given)
            replan = any(row[2] & _NEW_STRUCTURE for row in rows)
            planned = self._planning.plan(view, snapshot.state_dict, structure, replan=replan)
            if replan and planned.plan.differing:
                self._emit_now(events.Merged, step, keys=planned.plan.differing)
        except BaseException:
            if snapshot is not None:
                with contextlib.suppress(StagingError):
                    snapshot.wait()
                snapshot.release()
            raise
        _, _, _, sequence, token = rows[0]
        return SaveJob(
            step, sequence, attempt_name(sequence, token), snapshot, planned, *facts, started,
            is_borrowed=borrow, files=staged,
        )  # fmt: skip

    def _view(self, step: int, state: State) -> dict[str, Any]:
        """What is to be saved, not yet copied."""
        if self._index.is_foreign(step):
            raise SaveError(
                f"step {step} at {self.url} holds a checkpoint of another writer (stock DCP or torch_xla), which "
                "nothing here overwrites. Save under another path, or move that checkpoint away.",
                step=step, url=self.url,
            )  # fmt: skip
        self._check_writable(step)
        view = for_save(state, self._ranks.rank)
        if isinstance(state, TrainState) and isinstance(self._stager, OverlappingAsyncStager):
            for optimizer in state.optimizers:
                self._stager.watch(optimizer)
        return view

    def _snapshot(self, view: dict[str, Any], files: Mapping[str, File], borrow: bool) -> StagedSnapshot:
        stage = self._stager.borrow if borrow else self._stager.snapshot
        try:
            snapshot = stage(with_files(view, files))
        except StagingError:
            self._planning.check(view, None)  # may say better what is wrong with it
            raise
        try:
            self._planning.check(view, snapshot.structure)
        except BaseException:
            snapshot.release()
            raise
        return snapshot

    def _raise_disagreement(self, step: int, rows: list[list[int]], failure: Exception | None) -> None:
        """Raise on every rank if one of them cannot go on, so that all leave this call alike."""
        if failure is not None:
            self._emit_now(events.Failed, step, phase="stage", error=failure)
            raise failure
        for rank, row in enumerate(rows):
            if row[1] != step:
                raise SaveError(
                    f"rank {rank} saves step {row[1]} while rank {self._ranks.rank} saves step {step} at {self.url}. "
                    "Nothing was written. Call save on all ranks with the same steps.",
                    step=step, url=self.url, rank=rank,
                )  # fmt: skip
            if row[0] == _FAILED:
                raise SaveError(
                    f"step {step} at {self.url} was not saved: rank {rank} could not stage its state, see its error. "
                    "Nothing was written.",
                    step=step, url=self.url, rank=rank,
                )  # fmt: skip
        failed = [rank for rank, row in enumerate(rows) if row[0] == _FAILED_BEFORE]
        if failed:
            # An earlier save failed. Ranks hear of that at different moments: one that has not yet waits for it here.
            self._writer.join(besides=1)
            self._writer.raise_failures()
            raise SaveError(
                f"step {step} at {self.url} was not saved: rank {failed[0]} has only now heard that an earlier save "
                "failed, see its error. Nothing was written. Training can go on, the next save is tried as usual.",
                step=step, url=self.url, rank=failed[0],
            )  # fmt: skip

    def _check_writable(self, step: int) -> None:
        """At the first save, so that a run that only reads needs no permission to write."""
        if self._is_writable or not self._ranks.is_coordinator:
            return
        try:
            self._storage.check_writable()
        except OSError as exc:
            raise SaveError(
                f"{self.url} cannot be written to: {exc}. Nothing was written. "
                "Check that the folder or bucket exists, and the permissions.",
                step=step, url=self.url,
            ) from exc  # fmt: skip
        self._is_writable = True

    def prewarm(self, state_dict: State, *, files: Mapping[str, File | bytes] | None = None) -> None:
        """Make the first save cost no more than a later one: allocate and page-lock the buffers of all saves in flight,
        plan, and try whether the path can be written to. A collective call. Raises what `save` would.
        """
        self._check_open()
        view = with_files(for_save(state_dict, self._ranks.rank), checked(files))
        self._stager.prewarm(view, num_snapshots=self._max_pending)
        job = self._stage(_NO_STEP, state_dict, time.perf_counter(), None, None, files, borrow=True)
        try:
            self._saver.prepare(job)
        finally:
            job.snapshot.release()

    def wait_staged(self) -> None:
        """Block until every copy in flight is complete: any tensor may then be edited by hand."""
        self._stager.synchronize_staging()

    def join(self) -> None:
        """Wait until every save taken is committed. Raises what failed."""
        self._check_process()
        self._writer.check_may_wait()
        self._drain()
        self._writer.join()
        self._writer.raise_failures()

    def reached_preemption(self, step: int) -> bool:
        """Whether a preemption notice has come and its save was taken, at this step or before, or would have been too
        late (`grace_period`): time to leave the loop.

        To be asked after `save` or `save_async`, which must be called at every step to hear of it.
        """
        if self._sigterm is None:
            raise ValueError("reached_preemption needs a manager made with chkpt_on_preemption=True")
        check_step(step)
        return self._preempted_at is not None and step >= self._preempted_at

    # -- steps

    def all_steps(self) -> list[int]:
        """The committed steps, sorted. No I/O: as of the constructor, `refresh()`, and this run's own commits."""
        self._check_process()
        return self._index.all_steps()

    def latest_step(self) -> int | None:
        """The highest committed step number, or None."""
        return max(self.all_steps(), default=None)

    def files(self, step: int) -> Mapping[str, int]:
        """{name: size in bytes} of the files that were given to `save` for a step, by all ranks.

        Reads the step's manifest. Not collective. Raises StepNotFoundError, also for a checkpoint of another writer;
        DamagedStepError; RestoreError: the step cannot be read.
        """
        self._check_process()
        return self._restorer().files(step)

    def refresh(self) -> None:
        """List the steps in storage again. A collective call; for jobs that follow another run."""
        self._check_open()
        self._writer.join()
        self._ranks.step = _NO_STEP
        self._ranks.agree([], phase="refresh")
        self._list_steps()

    def protect(self, step: int) -> None:
        """Keep a step from retention, for the life of this manager. Rank 0's word counts."""
        check_step(step)
        self._index.protect(step)

    def verify(self, step: int) -> VerifyReport:
        """Read every byte of a step and compare it with its checksums; blocks for as long as that takes.

        Not collective: each call reads the whole step, so one rank's is enough. What else lies in the step's folder,
        the data of a save that died, is no damage. Memory: 64 MiB. Raises DamagedStepError that lists what differs;
        StepNotFoundError; RestoreError: the step cannot be read.
        """
        self._check_process()
        return self._restorer().verify(step)

    # -- restoring

    def restore(
        self,
        step: int,
        state_dict: TrainState | dict[str, Any],
        *,
        strict: bool = False,
        keys: KeyFilter | None = None,
        allow_missing: bool | KeyFilter = False,
    ) -> None:
        """Read a step into the tensors of `state_dict`, in place, and into its containers for other values.

        A collective call. Any number of ranks may restore what any other number saved. The layout of DTensors is the
        target's. Checksums are verified.
        state_dict: what `save` takes; a fresh optimizer in it must be primed (`prime_optimizer`), a TrainState does so.
        strict: keys of the checkpoint that every rank's `state_dict` lacks are an error, too, instead of an event. Rank
        0's word counts.
        keys: restore only those of `state_dict` and leave the rest as it is: a pattern, several ("model.layers.*"), or
        a function that is asked about each key; see selection.py. Of a TrainState anything of the model, of what else
        it has each part or none of it. Ranks may differ. strict then is about the keys that are taken.
        allow_missing: True, or for which keys: what the checkpoint lacks of them keeps its value (events.Restored has
        the names), instead of being an error.
        Raises StepNotFoundError; StateMismatchError that lists all missing keys and all differing shapes and dtypes:
        nothing was changed; UnsafeObjectError and DamagedStepError: where they come of what was read, and not of the
        manifest or a missing file, `state_dict` may be half overwritten, and they say so.
        """
        self._check_open()
        self.wait_staged()
        self._restorer(strict, keys, allow_missing).restore(step, state_dict)

    def restore_latest(
        self,
        state_dict: TrainState | dict[str, Any],
        *,
        verify: bool = False,
        strict: bool = False,
        keys: KeyFilter | None = None,
        allow_missing: bool | KeyFilter = False,
    ) -> int | None:
        """Restore the step committed last, or, where that is damaged, the one before it, and so on; the step restored.

        None: there is no step, and nothing was changed. A step whose manifest is damaged or whose files are not all
        there in their length is passed over before anything is changed. Other damage shows when the bytes are read,
        into the state; then an older step is taken only if it overwrites every key that was changed, else RestoreError
        says that the state is unusable, and so does DamagedStepError if no step is whole.
        verify: read every file of a step first, each on one rank, so that a damaged step changes nothing: twice the
        bytes from storage. strict, keys, allow_missing: as in `restore`.
        """
        self._check_open()
        self._writer.join()
        self.wait_staged()
        return self._restorer(strict, keys, allow_missing).restore_latest(state_dict, verify=verify)

    def tree(self, step: int) -> dict[str, Any]:
        """The nested dicts and lists that were saved, with a `Saved` (key, path, shape, dtype, num_bytes, num_chunks)
        for each value; each rank's own values under `<key>/rank_<k>`. Not collective; reads the manifest.

        Raises StepNotFoundError, DamagedStepError; RestoreError: the step cannot be read.
        """
        tree: dict[str, Any] = self._look(step, tree_of)
        return tree

    def read(
        self,
        step: int,
        key: str = "",
        index: Any = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Any:
        """A value of a step: a tensor, whole however it was sharded, or `index` of it; an object; or the nested dicts
        and lists below `key`, "" for all. Not collective; nothing of the running state is touched.

        The manifest is read once for calls about one step. key: the path in the nested dicts, joined by dots.
        index: as one indexes a tensor: ints, slices (steps above 0), Ellipsis, None, tuples of them. Only the blocks of
        4 MiB are read that hold what is asked for, and they are verified. dtype, device: of the tensors, which are
        converted (only what is floating-point) and moved after they were read; else as saved, on the CPU.
        Raises KeyNotFoundError that names similar keys; StepNotFoundError; DamagedStepError; UnsafeObjectError;
        IndexError, ValueError, TypeError for an index that a tensor of that shape does not take.
        """
        value = partial(read_value, safe_globals=self._safe_globals, dtype=dtype, device=device)
        return self._look(step, lambda opened: value(self._storage, opened, key, index))

    def _look(self, step: int, work: Callable[[OpenStep], Any]) -> Any:
        """The manifest of the step that was looked at last is kept."""
        self._check_process()

        def noted(opened: OpenStep) -> Any:
            self._opened = opened
            return work(opened)

        return self._restorer().look(step, noted, self._opened)

    def fetch(
        self, step: int, folder: str | os.PathLike[str], select: Callable[[str], bool] = lambda name: True
    ) -> None:
        """Bring the files of a step, those whose names `select` wants, into a local folder, each under its name.

        Not collective: each rank may want others. The folder is made; what it has under these names is replaced, or
        kept where it is the same. Nothing in it changes before all files are there with their checksums.
        Raises StepNotFoundError; DamagedStepError: a file is missing or differs; RestoreError: the step cannot be read,
        or the folder not be written to.
        """
        self._check_open()
        self._restorer().fetch(step, folder, select)

    def fetch_latest(
        self, folder: str | os.PathLike[str], select: Callable[[str], bool] = lambda name: True
    ) -> int | None:
        """`fetch` from the step committed last or, where that is damaged, from the one before it, and so on; the step.

        A collective call: all ranks get files of the same step, though they may select others, and into one folder or
        several. None: there is no step. Damaged is a step of which any file, with tensors or given, is missing or cut,
        or one that a rank selects differs from its checksum. DamagedStepError: no step is whole; nothing was changed.
        """
        self._check_open()
        self._writer.join()
        return self._restorer().fetch_latest(folder, select)

    def _restorer(
        self, strict: bool = False, keys: KeyFilter | None = None, allow_missing: bool | KeyFilter = False
    ) -> Restorer:
        """For one call."""
        return Restorer(
            self._storage, self._ranks, self._index, self.all_steps, self._emit_now, self._writer.join,
            load_planner=self._load_planner, safe_globals=self._safe_globals, read_once=self._read_once,
            strict=strict, selection=Selection.of(keys, allow_missing),
        )  # fmt: skip

    # -- the rest

    def close(self) -> None:
        """Finish every save taken, then let go of threads, buffers and the signal handler; idempotent.

        A collective call. Raises what failed in the background, once. A rank that does not come in time, or died, is
        reported (events.Failed, phase "close") and not waited for any longer: what was committed is committed.
        Ctrl-C ends the waiting and loses nothing: saves in flight go on, and a second `close`, or the end of the
        process, waits for them. In a forked child it does nothing, and in the middle of a save (a signal handler) it
        is a CheckpointError.
        """
        self._close(meet=True)

    def _close(self, *, meet: bool) -> None:
        """meet: wait for the other ranks, so that none ends the store while another still reads from it."""
        if self._is_released or os.getpid() != self._pid:
            return
        self._writer.check_may_wait()
        self._is_closed = True
        self._drain()
        self._writer.close()
        self._is_released = True
        try:
            self._saver.committer.look_again()
            if meet:
                self._ranks.step = _NO_STEP
                with contextlib.suppress(CheckpointError):  # one is gone: what was committed is committed
                    self._ranks.agree([], phase="close")
        finally:
            self._sync_point.close()
            self._stager.close()
            self._ranks.close()
            self._uninstall_sigterm()
        self._writer.raise_failures()

    def _drain(self) -> None:
        """Wait for the saves in flight. The end of the grace period is told, not obeyed: they may yet succeed."""
        if self._grace.seconds is None:
            return
        while not self._writer.drain(max(0.0, min(1.0, self._grace.left_s()))):  # SIGTERM may come only now
            if self._grace.left_s() <= 0:
                self._emit_now(
                    events.Skipped, self._last_step or 0,
                    reason=f"the grace period of {self._grace.seconds:g} s is over and this save still goes on: it is "
                    f"lost if the process is killed now. Committed are {self.all_steps() or 'none'}",
                )  # fmt: skip
                return

    def _close_at_exit(self) -> None:
        """Whatever hangs must not keep the process from ending."""
        if self._owner is not threading.main_thread() and not self._owner.daemon:
            self._owner.join()  # Python waits for it, too, but only afterwards; it may still be saving
        why = f"storage has done nothing for {self._ranks.timeout_s:g} s (timeout)"
        try:
            if self._writer.outlast(self._ranks.timeout_s):
                self._close(meet=False)
                return
        except KeyboardInterrupt:
            why = "Ctrl-C"
        error = SaveError(
            f"the process ends before all saves are committed at {self.url}: {why}. Committed steps are safe: "
            f"{self.all_steps() or 'none'}",
            url=self.url, rank=self._ranks.rank,
        )  # fmt: skip
        self._emit_now(events.Failed, self._last_step or 0, phase="exit", error=error)

    def _check_open(self) -> None:
        self._check_process()
        if self._is_closed:
            raise ValueError(f"the CheckpointManager of {self.url} is closed; make a new one")

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise CheckpointError(
                f"this process was forked from process {self._pid}, whose CheckpointManager of {self.url} this is: its "
                "threads stayed there. Nothing was done. Make a manager of your own here, or leave it to that process.",
                url=self.url,
            )  # fmt: skip

    def _list_steps(self) -> None:
        """One listing, by the coordinator, told to all."""
        steps: dict[int, StepFiles] = {}
        summary: Any = None
        if self._ranks.is_coordinator:
            try:
                steps = read_listing(self._storage.list_files())
                summary = summarise(steps)
            except OSError as exc:
                summary = exc
        summary = self._ranks.broadcast_object(summary, phase="list")
        if isinstance(summary, OSError):
            raise CheckpointError(
                f"the steps at {self.url} cannot be listed: {summary}. Nothing was changed. "
                "Check the path, that the bucket exists, and the permissions.",
                url=self.url,
            ) from summary
        self._index.load(summary, steps)

    def _on_sigterm(self) -> None:
        self._grace.begin()
        sync_point = getattr(self, "_sync_point", None)  # None: the constructor is still busy, and will ask
        # A later signal, on another rank, means the same preemption.
        if sync_point is not None and not self._is_preempted:
            sync_point.request(PREEMPTION)

    def _ask_again(self) -> None:
        """For a save that SIGTERM asked for in vain: nobody could hear it, or a rank did not answer in time."""
        if self._sigterm is not None and self._sigterm.received:
            self._on_sigterm()

    def _uninstall_sigterm(self) -> None:
        if self._sigterm is not None:
            self._sigterm.uninstall()

    def _emit(self, event: events.Event) -> None:
        events.emit(self._sinks, event)

    def _emit_in_background(self, event: events.Event) -> None:
        """On the writer thread: sys.exit() in a sink ends no save there; it is raised where failures of saves are."""
        try:
            self._emit(event)
        except BaseException as exc:
            self._writer.keep_failure(exc)

    def _emit_now(self, kind: Callable[..., events.Event], step: int, **values: Any) -> None:
        self._emit(kind(url=self.url, step=step, rank=self._ranks.rank, time_s=time.time(), **values))


def _tell(sinks: Iterable[events.Sink], url: str, kind: Callable[..., events.Event], **values: Any) -> None:
    """No method: the thread that calls it must not keep the manager and its buffers alive."""
    events.emit(sinks, kind(url=url, time_s=time.time(), **values))


def _close_at_exit(manager: CheckpointManager) -> None:
    with contextlib.suppress(CheckpointError):  # it was an event; raised, it would keep others from draining
        manager._close_at_exit()


def _union(first: KeepPolicy | None, second: KeepPolicy | None) -> KeepPolicy | None:
    return KeepAny(first, second) if first and second else first or second
