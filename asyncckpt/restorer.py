"""A restore on all ranks: which step, and that nothing is changed before every rank has found that it can read it.

One step is opened, compared and read by restore.py, and verified by verify.py. Errors leave here with the step, the
URL, the rank, and what became of the state. Called by manager.py, on the training thread.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, TypeVar

from torch.distributed.checkpoint.planner import LoadPlanner

from asyncckpt import events
from asyncckpt.arguments import check_step
from asyncckpt.errors import (
    UNCHANGED,
    CheckpointError,
    DamagedStepError,
    RestoreError,
    StateMismatchError,
    StepNotFoundError,
    located,
)
from asyncckpt.fetch import SAVED_AGAIN, Download, Select, fetch_files, given_files
from asyncckpt.index import RunIndex
from asyncckpt.lookup import look
from asyncckpt.ranks import Ranks
from asyncckpt.restore import PASS_OVER, Index, OpenStep, Restoring, open_step, prepare, read, read_index
from asyncckpt.selection import EVERYTHING, Selection
from asyncckpt.state import for_restore, take_restored
from asyncckpt.storage import Storage
from asyncckpt.train_state import TrainState
from asyncckpt.verify import VerifyReport, data_files, file_problems, verify_step

_DONE, _DAMAGED, _IMPOSSIBLE = 0, 1, 2
_HALF_RESTORED = "The state may be half overwritten: restore a whole step into it before training on."
Target = TrainState | dict[str, Any]
T = TypeVar("T")


@dataclass(slots=True)
class Restorer:
    """One call of a manager's `restore`, `restore_latest` or `verify`, and what it has come to so far.

    all_steps: what the manager says there are. emit: given an event's class, the step, and its values. join: waits for
    saves in flight.
    _walks: goes on with another step. _skipped: {step: why}. _changed: {step: this rank's keys that it overwrites}, of
    each step that was begun to be read.
    """

    storage: Storage
    ranks: Ranks
    index: RunIndex
    all_steps: Callable[[], list[int]]
    emit: Callable[..., None]
    join: Callable[[], None]
    _: KW_ONLY
    load_planner: LoadPlanner | None
    safe_globals: Iterable[Any]
    read_once: bool
    strict: bool = False
    selection: Selection = EVERYTHING
    _walks: bool = field(default=False, init=False)
    _verifies: bool = field(default=False, init=False)
    _skipped: dict[int, str] = field(default_factory=dict, init=False)
    _changed: dict[int, set[str]] = field(default_factory=dict, init=False)

    @property
    def url(self) -> str:
        return self.storage.url

    def verify(self, step: int) -> VerifyReport:
        self._check_known(step)
        self.join()  # a step saved again has its old `.metadata` until the writer comes to it
        try:
            with self._reading(step):
                return verify_step(self.storage, str(step))
        except CheckpointError as exc:
            exc.outcome = exc.outcome or UNCHANGED
            located(exc, step, self.url, self.ranks.rank)
            raise

    def files(self, step: int) -> Mapping[str, int]:
        with self._reading_files(step):
            return {file.name: file.size for file in given_files(self.storage, open_step(self.storage, str(step)))}

    def fetch(self, step: int, folder: str | os.PathLike[str], select: Select) -> None:
        started = time.perf_counter()
        with self._reading_files(step):
            num_bytes = fetch_files(self.storage, str(step), folder, select)
        self._tell_fetched(step, started, num_bytes)

    @contextlib.contextmanager
    def _reading_files(self, step: int) -> Iterator[None]:
        self._check_known(step)
        if self.index.is_foreign(step):
            known = self.all_steps()
            raise StepNotFoundError(
                f"step {step} at {self.url} is a checkpoint of another writer (stock DCP or torch_xla), which has no "
                f"files of ours; restore reads it. Steps of ours are {known or 'none'}",
                known=known, step=step, url=self.url,
            )  # fmt: skip
        try:
            with self._reading(step):
                yield
        except CheckpointError as exc:
            located(exc, step, self.url, self.ranks.rank)
            raise

    def fetch_latest(self, folder: str | os.PathLike[str], select: Select) -> int | None:
        return self._walk(lambda step: self._fetch_on_all_ranks(step, folder, select))

    def _fetch_on_all_ranks(self, step: int, folder: str | os.PathLike[str], select: Select) -> None:
        started = time.perf_counter()
        self.ranks.step = step
        for _ in range(3):  # as in `restore`
            with contextlib.ExitStack() as stack:
                # Two agreements, so that no rank's folder has files of a step that another rank finds damaged.
                sequences, loaded = self._on_all_ranks(step, self._load, folder, select, stack)
                if loaded is not None and len(set(sequences)) == 1:
                    self._on_all_ranks(step, self._publish, loaded[0])
                    self._tell_fetched(step, started, loaded[1])
                    return
        raise RestoreError(f"step {step} at {self.url} {SAVED_AGAIN}", outcome=UNCHANGED)

    def _tell_fetched(self, step: int, started: float, num_bytes: int) -> None:
        self.emit(
            events.Restored, step, num_bytes=num_bytes, restore_s=time.perf_counter() - started,
            skipped_steps=tuple(self._skipped), skip_reasons=tuple(self._skipped.values()),
        )  # fmt: skip

    def _publish(self, step: int, download: Download) -> tuple[int, None]:
        download.publish()
        return 0, None

    def _load(
        self, step: int, folder: str | os.PathLike[str], select: Select, stack: contextlib.ExitStack
    ) -> tuple[int, tuple[Download, int] | None]:
        """(sequence number of the save, what was read of it and its bytes), or (-1, None): another run saved it anew"""
        try:
            with self._reading(step):
                opened = open_step(self.storage, str(step))
        except StepNotFoundError as exc:
            raise self._gone(str(step)) from exc
        _check_listed(opened, [*opened.lacking.values(), *opened.lost])
        download = stack.enter_context(Download(self.storage, opened, folder, select))
        try:
            with self._reading(step):
                return opened.sequence, (download, download.load())
        except DamagedStepError:
            if self._was_replaced(opened):
                return -1, None
            raise

    def restore_latest(self, state: Target, *, verify: bool) -> int | None:
        self._verifies = verify
        return self._walk(lambda step: self.restore(step, state))

    def _walk(self, take: Callable[[int], None]) -> int | None:
        """The step committed last that `take` finds whole."""
        self._walks = True
        for step, _ in reversed(self.index.by_commit()):
            try:
                take(step)
            except DamagedStepError as exc:
                self._skipped[step] = exc.what.rstrip(" .")
                last_error = exc
            else:
                return step
        if self._skipped:
            reasons = "".join(f"\n  step {step}: {reason}" for step, reason in self._skipped.items())
            raise DamagedStepError(
                f"no step at {self.url} is whole, tried {list(self._skipped)}{reasons}", url=self.url,
                outcome="The state may be half overwritten: do not train on." if self._changed else UNCHANGED,
            ) from last_error  # fmt: skip
        return None

    def restore(self, step: int, state: Target) -> None:
        started = time.perf_counter()
        self.ranks.step = step
        for _ in range(3):  # once more if another run saves the step anew while we read it
            # Two agreements, so that nothing is changed on any rank while one has found that it cannot restore.
            sequences, restoring = self._on_all_ranks(step, self._prepare, state, self._shared_index(step))
            if len(set(sequences)) > 1:
                continue
            ignored, strict = self._unasked_by_all(restoring.unasked)
            if strict and ignored:
                raise StateMismatchError(
                    f"step {step} at {self.url} has {len(ignored)} keys that are in no rank's state dict\n  "
                    + "\n  ".join(f"not in the state dict: {key!r}" for key in ignored),
                    step=step, url=self.url, outcome=self._outcome,
                )  # fmt: skip
            if self._verifies and min(self._on_all_ranks(step, self._verify_share, restoring.step)[0]) < 0:
                continue
            self._changed[step] = restoring.overwrites
            num_bytes, _ = self._on_all_ranks(step, self._read, state, restoring)
            if self.selection.takes is not None and not restoring.leaves and not any(num_bytes):
                raise StateMismatchError(
                    f"keys= takes nothing of any rank's state dict from step {step} at {self.url}",
                    step=step, url=self.url, outcome=self._outcome,
                )  # fmt: skip
            if min(num_bytes) >= 0:
                self.emit(
                    events.Restored, step, num_bytes=num_bytes[self.ranks.rank],
                    restore_s=time.perf_counter() - started, checksums=restoring.checksums,
                    ignored_keys=ignored, missing_keys=restoring.missing,
                    skipped_steps=tuple(self._skipped), skip_reasons=tuple(self._skipped.values()),
                )  # fmt: skip
                return
        raise RestoreError(
            f"step {step} at {self.url} was saved again by another run each time it was read. Restore another step, or "
            "end one of the two runs",
            step=step, url=self.url, outcome=self._outcome,
        )  # fmt: skip

    @property
    def _outcome(self) -> str:
        """Of an error raised now."""
        return _HALF_RESTORED if self._changed else UNCHANGED

    def _on_all_ranks(self, step: int, work: Callable[..., tuple[int, T]], *args: Any) -> tuple[list[int], T]:
        """(every rank's number, this rank's other result) of `work(step, *args)`, if it succeeds on every rank. A
        collective call.

        Else every rank raises: the gravest failure, or which rank had it. A failure on this rank that is less grave is
        no reason to raise it: `restore_latest` walks on after damage, and must do so on all ranks or on none.
        """
        number = 0
        failure: Exception | None = None
        try:
            number, result = work(step, *args)
        except Exception as exc:
            failure = located(exc, step, self.url, self.ranks.rank)
            if isinstance(failure, CheckpointError):
                failure.outcome = failure.outcome or self._outcome
            self.emit(events.Failed, step, phase="restore", error=failure)
        outcome = _DONE if failure is None else _DAMAGED if isinstance(failure, DamagedStepError) else _IMPOSSIBLE
        rows = self.ranks.agree([step, outcome, number], phase="restore")
        gravest = max(_IMPOSSIBLE if other != step else theirs for other, theirs, _ in rows)
        if failure is not None and outcome == gravest:
            raise failure
        for rank, (other, theirs, _) in enumerate(rows):
            if other != step or _DONE != theirs == gravest:
                what = f"restores step {other}" if other != step else "could not restore, see its error"
                kind = DamagedStepError if gravest == _DAMAGED else RestoreError
                message = f"rank {rank} {what}, while rank {self.ranks.rank} restores step {step} at {self.url}"
                raise kind(message, step=step, url=self.url, rank=rank, outcome=self._outcome) from failure
        return [row[2] for row in rows], result

    def _unasked_by_all(self, unasked: tuple[str, ...]) -> tuple[tuple[str, ...], bool]:
        """Keys of the checkpoint that no rank asks for: the stages of a pipeline, say, ask for different ones. And
        whether that is an error, as rank 0 has it, so that it is one on all ranks or on none."""
        candidates, strict = self.ranks.broadcast_object((unasked, self.strict), phase="restore")
        if not candidates:
            return (), strict
        asked = self.ranks.gather_objects(set(candidates) - set(unasked), phase="restore")
        ignored = tuple(sorted(set(candidates).difference(*asked)))
        return self.ranks.broadcast_object(ignored, phase="restore"), strict

    def _shared_index(self, step: int) -> Index | None:
        """With `read_once` the manifest as rank 0 read it. None: each rank reads it, and hears what is wrong."""
        if not self.read_once or self.ranks.world_size == 1:
            return None
        rows = self.ranks.agree([step], phase="restore")
        if any(row != [step] for row in rows):
            return None
        index = None
        if self.ranks.is_coordinator:
            with contextlib.suppress(OSError, CheckpointError):
                index = read_index(self.storage, str(step))
        return self.ranks.broadcast_object(index, phase="restore")

    def _prepare(self, step: int, state: Target, index: Index | None) -> tuple[int, Restoring]:
        """(sequence number of the save to be read, how)."""
        self._check_known(step)
        try:
            with self._reading(step):
                opened = open_step(self.storage, str(step), index)
            if self._walks:  # else it is the caller's to say whether the files matter: `fetch` tells
                _check_listed(opened, opened.lost)
            target = for_restore(state, opened.saved, self.ranks.rank, self.ranks.world_size, self.selection)
            restoring = prepare(
                self.storage, opened, target, is_coordinator=self.ranks.is_coordinator,
                load_planner=self.load_planner, safe_globals=self.safe_globals, selection=self.selection,
            )  # fmt: skip
            self._check_overwritten_by(restoring)
        except StepNotFoundError as exc:
            if not self._walks:
                raise
            raise self._gone(str(step)) from exc
        except StateMismatchError as exc:
            if not self._changed:
                raise
            raise RestoreError(
                f"step {step} at {self.url} does not fit the state: {exc.what}",
                outcome=f"The state was half overwritten by steps {list(self._changed)}: do not train on. Make the "
                f"state anew and restore step {step} into it.",
            ) from exc
        except DamagedStepError as exc:
            if self._changed:  # not by this step: restore.py cannot know
                exc.outcome = ""
            raise
        return opened.sequence, restoring

    def _check_overwritten_by(self, restoring: Restoring) -> None:
        """That what earlier tries have changed does not stay."""
        left = sorted(set[str]().union(*self._changed.values()) - restoring.overwrites)
        if left:
            raise StateMismatchError(
                f"{len(left)} of the keys that were overwritten are not in it: {', '.join(left[:8])}"
            )

    def _verify_share(self, step: int, opened: OpenStep) -> tuple[int, None]:
        """Every so-many-th file; (-1: another run saved the step anew, None)."""
        if opened.manifest is None:
            return 0, None
        files = data_files(opened, opened.manifest)[self.ranks.rank :: self.ranks.world_size]
        with self._reading(step):
            problems = list(file_problems(self.storage, opened, opened.manifest, files))
        if problems and self._was_replaced(opened):
            return -1, None
        if problems:
            raise DamagedStepError("; ".join(problems), outcome="" if self._changed else PASS_OVER)
        return 0, None

    def _read(self, step: int, state: Target, restoring: Restoring) -> tuple[int, None]:
        """(bytes read, or -1: another run saved the step anew and deleted the files we were reading)."""
        try:
            with self._reading(step):
                num_bytes = read(self.storage, restoring, self.ranks, read_once=self.read_once)
        except DamagedStepError as exc:
            if isinstance(exc.__cause__, FileNotFoundError) and self._was_replaced(restoring.step):
                return -1, None
            raise
        if num_bytes is None:  # its error comes with the agreement
            return 0, None
        take_restored(state, restoring.target, self.selection)
        return num_bytes, None

    def look(self, step: int, work: Callable[[OpenStep], T], opened: OpenStep | None = None) -> T:
        """What `work` makes of a step. Not collective. opened: the step that was looked at last."""
        self._check_known(step)
        sequence = self.index.sequence_of(step) or 0
        if opened is not None and (opened.folder, opened.sequence) != (str(step), sequence):
            opened = None
        try:
            with self._reading(step):
                return look(self.storage, str(step), work, opened)
        except CheckpointError as exc:
            located(exc, step, self.url, self.ranks.rank)
            raise

    def _was_replaced(self, opened: OpenStep) -> bool:
        """Whether another run has saved the step anew, and so deletes the files of this save. DamagedStepError: it has
        dropped the step."""
        try:
            now = open_step(self.storage, opened.folder)
        except StepNotFoundError as exc:
            raise self._gone(opened.folder) from exc
        except (CheckpointError, OSError):
            return False
        return now.manifest is not None and now.sequence != opened.sequence

    def _gone(self, step: str) -> DamagedStepError:
        return DamagedStepError(
            f"step {step} at {self.url} was listed and is gone; if another run drops steps there, refresh() lists "
            "them anew",
            outcome="" if self._changed else PASS_OVER,
        )

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """What storage raises, in words."""
        try:
            yield
        except StepNotFoundError as exc:
            raise self._unknown(step) from exc
        except OSError as exc:
            raise RestoreError(
                f"step {step} at {self.url} cannot be read: {exc}. Try again, or take another step if it stays so",
                step=step, url=self.url,
            ) from exc  # fmt: skip

    def _check_known(self, step: int) -> None:
        check_step(step)
        if step not in self.index.all_steps() and not self.index.is_foreign(step):
            self.join()  # it may be in flight
            if step not in self.index.all_steps():
                raise self._unknown(step)

    def _unknown(self, step: int) -> StepNotFoundError:
        known = self.all_steps()
        return StepNotFoundError(
            f"there is no whole step {step} at {self.url}; committed are {known or 'none'}. If another run writes "
            "there, call refresh() first",
            known=known, step=step, url=self.url,
        )  # fmt: skip


def _check_listed(step: OpenStep, wrong: Sequence[str]) -> None:
    if wrong:
        named = "; ".join(list(dict.fromkeys(wrong))[:8])
        raise DamagedStepError(f"step {step.folder} lacks what was saved: {named}", outcome=PASS_OVER)
