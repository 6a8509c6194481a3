"""What happened, as frozen values: one class per phase, handed to every sink in the order it happened.

A sink is any callable that takes an event. It runs on the thread where the phase ended (the class says which) and
should return quickly: one that blocks holds up the training loop, or the saves behind it, and loses none. What it
raises is logged and never harms a save; sys.exit() in one on the writer thread is raised by the next call of `save`,
`join` or `close`, and the save goes on. On that thread a sink may ask the manager (`all_steps`), and what waits for
saves (`save`, `join`, `close`) is a RuntimeError. The default sink, `log_events`, logs one line at INFO per commit, and
failures as errors, to the logger "asyncckpt".
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

logger = logging.getLogger("asyncckpt")


@dataclass(frozen=True, kw_only=True)
class Event:
    """url: the run, without credentials. step: the step concerned; -1: none. rank: the rank that reports.

    time_s: `time.time()` at the end of the phase, in seconds.
    """

    url: str
    step: int
    rank: int
    time_s: float


@dataclass(frozen=True, kw_only=True)
class Staged(Event):
    """`save`/`save_async` took a snapshot and is about to return (training thread).

    wait_s: seconds waited for a free place in the queue. stage_s: seconds in state_dict(), copying and planning.
    stall_s: both, and all else the call did: what the training loop lost. num_bytes: tensor bytes staged on this rank.
    is_blocking: by `save`, which has yet to wait for the commit: the training loop loses `durable_s` of that.
    """

    num_bytes: int
    wait_s: float
    stage_s: float
    stall_s: float
    is_blocking: bool = False


@dataclass(frozen=True, kw_only=True)
class Written(Event):
    """This rank's files are durable (writer thread).

    copy_s: seconds the writer waited for an overlapped copy. write_s: seconds from then to durable. client: what moved
    the bytes ("os", "obstore", "s3fs", ...). client_reason: why not obstore, or "".
    """

    num_bytes: int
    num_files: int
    copy_s: float
    write_s: float
    client: str = ""
    client_reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Committed(Event):
    """The step is whole and visible (writer thread of every rank).

    num_bytes: bytes of all ranks' files. durable_s: seconds from the call of `save` to here. stall_s: as in Staged.
    sequence: the step's place in the order of commits. commit_s: seconds for which rank 0 made it visible; all else
    since `Written` was waiting for other ranks. 0: not known.
    """

    sequence: int
    num_bytes: int
    stall_s: float
    durable_s: float
    commit_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Pruned(Event):
    """Retention deleted a step, or leftovers of a dead save of it were removed (writer thread of rank 0).

    whole: True for a committed step, False for leftovers. policy: what retention keeps, as the policy shows itself
    (`KeepLast(n=3)`).
    """

    whole: bool
    num_files: int
    prune_s: float
    policy: str = ""


@dataclass(frozen=True, kw_only=True)
class Delayed(Event):
    """Ranks are late in a phase while others wait for them; told by the lowest rank that waits (writer thread or one of
    its own), after a sixteenth of the manager's timeout and each time that the wait has doubled.

    phase: as in Failed; "write": their files are not durable; "commit": rank 0 has yet to do it. ranks: the late ones.
    waited_s: seconds until now.
    """

    phase: str
    ranks: tuple[int, ...]
    waited_s: float


@dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """Something failed on this rank. phase: "stage", "write", "commit", "prune", "restore", or the meeting of all ranks
    that did not come about: "save", "plan", "restore", "close", ... Errors of saves are raised too, once; those of
    "prune" are only reported here, as the checkpoint is whole and deletion is tried again, and so are those of "close".
    """

    phase: str
    error: BaseException


@dataclass(frozen=True, kw_only=True)
class Restored(Event):
    """A restore, or a fetch of files, is complete (the thread that called it).

    num_bytes: that this rank took from storage, which with `read_once` is a part of what it got. ignored_keys: keys of
    the checkpoint that the state dict did not ask for. missing_keys: of this rank's state dict that the checkpoint
    lacks, as `allow_missing` allows: they keep their values. skipped_steps: newer steps that `restore_latest` passed
    over as damaged; skip_reasons: why, each as this rank knows it. checksums: what was verified, as in VerifyReport.
    """

    num_bytes: int
    restore_s: float
    ignored_keys: tuple[str, ...] = ()
    missing_keys: tuple[str, ...] = ()
    skipped_steps: tuple[int, ...] = ()
    skip_reasons: tuple[str, ...] = ()
    checksums: str = "manifest"


@dataclass(frozen=True, kw_only=True)
class Merged(Event):
    """Ranks gave different values under the same keys, and the lowest rank's was taken (training thread of rank 0).

    Reported when a save is planned, of objects and of small tensors on the CPU. `PerRank` keeps each rank's own;
    StateDictOptions(flatten_optimizer_state_dict=True) does for the parameter groups in a TrainState.
    """

    keys: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Skipped(Event):
    """A save that was due did not happen, or is not over when the grace period is; or storage cannot do what the design
    asks (training or writer thread)."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Unguarded(Event):
    """This storage does not refuse to overwrite a file: one run alone may write there, or two that commit at the same
    moment may both believe that they did (writer thread of rank 0, before its first commit)."""


Sink = Callable[[Event], None]


def log_events(event: Event) -> None:
    """The default sink."""
    match event:
        case Committed():
            mb_s = event.num_bytes / 1e6 / max(event.durable_s, 1e-9)
            logger.info(
                "step %d committed to %s: %.1f MB, stalled %.3f s, durable after %.2f s (%.0f MB/s)",
                event.step, event.url, event.num_bytes / 1e6, event.stall_s, event.durable_s, mb_s,
            )  # fmt: skip
        case Failed():
            logger.error("step %d at %s: %s failed: %s", event.step, event.url, event.phase, event.error)
        case Merged():
            logger.warning(
                "step %d at %s: ranks have different values of %d keys, of which the lowest rank's is kept: %s. "
                "PerRank keeps each rank's own, flatten_optimizer_state_dict=True those of an optimizer's groups",
                event.step, event.url, len(event.keys), ", ".join(event.keys[:8]),
            )  # fmt: skip
        case Delayed():
            logger.warning(
                "step %d at %s: waited %.0f s for ranks %s, phase %s",
                event.step, event.url, event.waited_s, list(event.ranks), event.phase,
            )  # fmt: skip
        case Skipped():
            logger.warning("step %d at %s skipped: %s", event.step, event.url, event.reason)
        case Unguarded():
            logger.warning("%s does not refuse to overwrite: one run alone may write there", event.url)
        case Restored() if event.ignored_keys or event.missing_keys or event.skipped_steps or event.checksums == "none":
            skipped = zip(event.skipped_steps, event.skip_reasons, strict=False)
            logger.warning(
                "step %d restored from %s; %d keys of the checkpoint were not asked for%s; damaged newer steps: %s%s",
                event.step, event.url, len(event.ignored_keys),
                f"; {len(event.missing_keys)} keys it lacks kept their values, {', '.join(event.missing_keys[:8])}"
                if event.missing_keys else "",
                "; ".join(f"{step} ({reason})" for step, reason in skipped) or "none",
                "; not verified, as what was read carries no checksums" if event.checksums == "none" else "",
            )  # fmt: skip


def emit(sinks: Iterable[Sink], event: Event) -> None:
    """Hand `event` to every sink. A sink that raises is logged: reporting must never harm a save."""
    for sink in sinks:
        try:
            sink(event)
        except Exception:
            logger.exception("event sink %r failed on %r", sink, event)
