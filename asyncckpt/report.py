"""What is known of a run, from its storage and from the events beside it, and whether its checkpoints are in order.

`look_at` gathers it, `findings` judges. Storage alone tells which steps there are, how large, how old and with what
metrics; what training waited for, how long a save took and what failed only events tell (event_file.py). It never
writes. How it looks is report_page.py's affair; called by cli/report.py.
"""

from __future__ import annotations

import ast
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from asyncckpt import events
from asyncckpt.errors import CheckpointError
from asyncckpt.event_file import FOLDER, EventLog, Started, log_files, read_logs
from asyncckpt.events import Event
from asyncckpt.lookup import saved_in
from asyncckpt.overview import Glance, list_run, look
from asyncckpt.policy import CommittedStep, KeepBest, KeepEvery, KeepLast, KeepPolicy, KeepYounger
from asyncckpt.restore import open_step
from asyncckpt.steps import is_data_of_ranks
from asyncckpt.storage import Storage

MAX_EVENT_BYTES = 64 << 20
"""About 250,000 events, read in about 8 s (measured on one core). Of more, those of the lowest ranks are read."""
DEEP_TREE, WIDE_TREE = 4, 12  # levels, and children of each, that a page can show
Level = Literal["bad", "look", "note"]
_POLICY = re.compile(r"(KeepLast|KeepEvery|KeepBest|KeepYounger)\(([^()]*)\)")
_POLICIES: Mapping[str, type[KeepPolicy]] = {
    kind.__name__: kind for kind in (KeepLast, KeepEvery, KeepBest, KeepYounger)
}


@dataclass(slots=True)
class Save:
    """One that was committed, by all ranks whose events there are. Seconds, bytes; NaN: not known.

    cost_s: what the training loop lost, on the rank that lost most. write_s: of the slowest rank.
    """

    step: int
    sequence: int
    time_s: float
    num_bytes: int
    cost_s: float = math.nan
    durable_s: float = math.nan
    write_s: float = math.nan

    @property
    def rate(self) -> float:
        """Bytes per second of writing, all ranks together."""
        return self.num_bytes / self.write_s if self.write_s > 0 else math.nan


@dataclass(slots=True)
class Fault:
    """kind: failed (phase: of what), delayed, skipped, damaged, partial, interrupted, unguarded, merged."""

    kind: str
    step: int
    time_s: float
    text: str
    phase: str = ""
    ranks: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Start:
    """Of a process on the lowest rank. resumed_from: the step that it restored first. busy_s: from the first of its
    events to the last."""

    time_s: float
    resumed_from: int | None
    busy_s: float


@dataclass(slots=True)
class Subtree:
    """name: below its parent. num_bytes, num_keys: all of it. children: the largest first; the rest as one."""

    name: str
    num_bytes: int = 0
    num_keys: int = 0
    children: list[Subtree] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Report:
    """steps: in order of commit. saves: in order of time; without events those that storage still has. pruned: {step:
    when retention dropped it}. kept_for: {step: why}, as far as the policy is known. biggest: of the newest step.
    num_left_out: event files that were not read, being too many."""

    url: str
    made_s: float
    steps: Sequence[Glance]
    saves: Sequence[Save]
    faults: Sequence[Fault]
    starts: Sequence[Start]
    ranks: Sequence[int]
    pruned: Mapping[int, float]
    policy: str
    kept_for: Mapping[int, list[str]]
    tree: Subtree | None
    has_events: bool
    num_unreadable: int
    num_left_out: int

    @property
    def committed(self) -> list[Glance]:
        return [step for step in self.steps if step.kind == "committed"]

    @property
    def last_good(self) -> Glance | None:
        return next((step for step in reversed(self.committed) if step.head is not None and not step.damage), None)

    @property
    def busy_s(self) -> float:
        """For which the processes ran."""
        return sum(start.busy_s for start in self.starts)

    @property
    def cost_share(self) -> float:
        """Of that time, what training lost to saves; NaN: not known."""
        return known_sum(save.cost_s for save in self.saves) / self.busy_s if self.busy_s > 0 else math.nan


@dataclass(frozen=True, slots=True)
class Finding:
    level: Level
    text: str


# -- gathering


def look_at(
    storage: Storage,
    others: Sequence[Storage] = (),
    *,
    now_s: float,
    tell: Callable[[int], None] = lambda num_bytes: None,
) -> Report:
    """What there is under a run's URL. OSError where storage cannot be read.

    others: where more event files are. now_s: `time.time()`. tell: see verify.find_damage; of event files alone.
    """
    logs, left_out = _logs(storage, others, tell)
    logs.sort(key=lambda log: (log.rank, log.name))
    run = list_run(storage)  # after the events: a save that they tell of and that is not listed is gone
    steps = list(look(run, run.steps).values())
    saves, faults = _follow(logs)
    first = [log for log in logs if log.rank == logs[0].rank]
    dropped = [event for log in first for event in log.events if isinstance(event, events.Pruned) and event.whole]
    policy = dropped[-1].policy if dropped else ""
    return Report(
        storage.url, now_s, steps,
        saves=sorted([*saves, *_from_storage(steps, saves)], key=lambda save: save.time_s),
        faults=sorted([*_grouped(faults), *_in_storage(steps)], key=_when),
        starts=sorted(map(_start, first), key=lambda start: start.time_s),
        ranks=sorted({log.rank for log in logs}),
        pruned={event.step: event.time_s for event in dropped},
        policy=policy,
        kept_for=_kept_for(steps, policy, now_s),
        tree=_tree(storage, steps),
        has_events=bool(logs),
        num_unreadable=sum(log.num_unreadable for log in logs),
        num_left_out=left_out,
    )  # fmt: skip


def _when(fault: Fault) -> float:
    """What is there now, and of no known time, comes last."""
    return math.inf if math.isnan(fault.time_s) else fault.time_s


def _logs(run: Storage, others: Sequence[Storage], tell: Callable[[int], None]) -> tuple[list[EventLog], int]:
    """(what was read, how many files were not)"""
    logs, left, left_out = [], MAX_EVENT_BYTES, 0
    for storage, sizes in ((run, run.list_files(FOLDER)), *((other, other.list_files()) for other in others)):
        chosen = []
        for path in sorted(log_files(sizes), key=lambda path: int(path.rsplit("/", 1)[-1].split("-")[1])):
            left -= sizes[path]
            if left >= 0:
                chosen.append(path)
            else:
                left_out += 1
        logs += read_logs(storage, log_files(chosen), tell)
    return [log for log in logs if log.events], left_out


def _follow(logs: Iterable[EventLog]) -> tuple[list[Save], list[Fault]]:
    saves: dict[tuple[int, int], Save] = {}
    faults: list[Fault] = []
    for log in logs:
        begun: dict[int, tuple[events.Staged | None, events.Written | None]] = {}
        for event in log.events:
            match event:
                case events.Staged():
                    begun[event.step] = event, None
                case events.Written():
                    begun[event.step] = begun.get(event.step, (None, None))[0], event
                case events.Committed():
                    _add(saves, event, *begun.pop(event.step, (None, None)))
                case events.Failed() if event.phase in ("write", "commit"):
                    begun.pop(event.step, None)
            if fault := _fault(event):
                faults.append(fault)
        faults += [_interrupted(step, log, *phases) for step, phases in begun.items()]
    return list(saves.values()), faults


def _add(
    saves: dict[tuple[int, int], Save],
    committed: events.Committed,
    staged: events.Staged | None,
    written: events.Written | None,
) -> None:
    save = saves.setdefault(
        (committed.step, committed.sequence),
        Save(committed.step, committed.sequence, committed.time_s, committed.num_bytes),
    )
    is_blocking = staged is not None and staged.is_blocking
    save.cost_s = _max(save.cost_s, committed.durable_s if is_blocking else committed.stall_s)
    save.durable_s = _max(save.durable_s, committed.durable_s)
    if written is not None:
        save.write_s = _max(save.write_s, written.write_s)


def _fault(event: Event) -> Fault | None:
    def of(kind: str, text: str, phase: str = "") -> Fault:
        return Fault(kind, event.step, event.time_s, text, phase, {event.rank})

    match event:
        case events.Failed():
            return of("failed", str(event.error), event.phase)
        case events.Delayed():
            ranks = ", ".join(map(str, event.ranks))
            return of("delayed", f"ranks {ranks} were late in {event.phase}: {event.waited_s:.0f} s", event.phase)
        case events.Skipped():
            return of("skipped", event.reason)
        case events.Restored() if event.skipped_steps:
            reasons = "; ".join(map(": ".join, zip(map(str, event.skipped_steps), event.skip_reasons, strict=False)))
            return of("damaged", f"step {event.step} was restored in place of newer ones that are damaged: {reasons}")
        case events.Unguarded():
            return of("unguarded", "this storage does not refuse to overwrite a file: let one run alone write there")
        case events.Merged():
            keys = ", ".join(event.keys[:8])
            return of(
                "merged", f"ranks had different values of {len(event.keys)} keys; the lowest rank's are kept: {keys}"
            )
    return None


def _interrupted(step: int, log: EventLog, staged: events.Staged | None, written: events.Written | None) -> Fault:
    last = written or staged
    assert last is not None
    return Fault("interrupted", step, last.time_s, "its process ended before it was committed, or is still at it",
                 ranks={log.rank})  # fmt: skip


def _grouped(faults: Iterable[Fault]) -> Iterator[Fault]:
    """What several ranks report of one save at about the same time is one fault, told by the lowest of them."""
    known: dict[tuple[str, int, str], Fault] = {}
    for fault in sorted(faults, key=lambda fault: fault.time_s):
        key = fault.kind, fault.step, fault.phase
        before = known.get(key)
        if before is not None and fault.time_s - before.time_s < 300 and not before.ranks & fault.ranks:
            if min(fault.ranks) < min(before.ranks):
                before.text = fault.text
            before.ranks |= fault.ranks
            continue
        known[key] = fault
        yield fault


def _from_storage(steps: Sequence[Glance], known: Iterable[Save]) -> Iterator[Save]:
    """Those of which no events tell."""
    told = {(save.step, save.sequence) for save in known}
    for step in steps:
        if step.head is not None and (step.step, step.sequence) not in told:
            yield Save(step.step, step.sequence, step.head.time_s, step.num_bytes)


def _in_storage(steps: Sequence[Glance]) -> Iterator[Fault]:
    newest = max((step.sequence for step in steps if step.kind == "committed"), default=0)
    for step in steps:
        time_s = math.nan if step.head is None else step.head.time_s
        if step.damage:
            yield Fault("damaged", step.step, time_s, step.damage)
        if step.kind == "partial" and step.sequence < newest:
            text = f"{step.num_bytes:,} bytes of a save that was never committed; removed after one of the next saves"
            yield Fault("partial", step.step, time_s, text)


def _start(log: EventLog) -> Start:
    restored = next((event.step for event in log.events if isinstance(event, events.Restored)), None)
    happened = [event for event in log.events if not isinstance(event, Started)]
    busy_s = happened[-1].time_s - _begin(happened[0]) if happened else 0.0
    return Start(log.events[0].time_s, restored, max(0.0, busy_s))


def _begin(event: Event) -> float:
    took_s = event.stall_s if isinstance(event, events.Staged) else 0.0
    return event.time_s - took_s


def _kept_for(steps: Sequence[Glance], policy: str, now_s: float) -> dict[int, list[str]]:
    """Why each step that is there is kept, by the policies that can be read off the text of the last one that dropped
    a step; the newest is kept in any case. Empty: nothing is known of a policy."""
    policies = _policies(policy)
    committed = [
        CommittedStep(step.step, step.sequence, step.head.time_s, metrics_of(step))
        for step in steps
        if step.head is not None
    ]
    if not policies or not committed:
        return {}
    why: dict[int, list[str]] = {step.step: [] for step in committed}
    why[committed[-1].step].append("the newest")
    for one in policies:
        for number in one.keep(committed, now_s):
            why[number].append(_in_words(one))
    return why


def in_words(policy: str) -> str:
    """What a policy keeps; one that is not ours shows itself."""
    return "; ".join(map(_in_words, _policies(policy))) or policy


def _policies(text: str) -> list[KeepPolicy]:
    return [made for found in _POLICY.finditer(text) if (made := _policy(*found.groups())) is not None]


def _policy(name: str, arguments: str) -> KeepPolicy | None:
    try:
        call = ast.parse(f"f({arguments})", mode="eval").body
        assert isinstance(call, ast.Call)
        given = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
        return _POLICIES[name](**given)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _in_words(policy: KeepPolicy) -> str:
    match policy:
        case KeepLast(n):
            return "the last" if n == 1 else f"one of the last {n}"
        case KeepEvery(n):
            return f"a multiple of {n}"
        case KeepBest(n, metric, mode):
            return f"one of the {n} with the {'lowest' if mode == 'min' else 'highest'} {metric}"
        case KeepYounger(seconds):
            return f"younger than {seconds / 3600:.3g} h"
    return repr(policy)


def _tree(storage: Storage, steps: Sequence[Glance]) -> Subtree | None:
    """Of the newest step that opens."""
    for step in reversed([step for step in steps if step.kind == "committed" and not step.damage][-3:]):
        try:
            opened = open_step(storage, str(step.step))
        except (CheckpointError, OSError):
            continue
        root = Subtree(f"step {step.step}")
        grown: dict[tuple[str, ...], Subtree] = {(): root}
        for saved in saved_in(opened):
            parts = [part for parts in saved.path for part in str(parts).split(".")]
            _grow(grown, tuple(parts[:DEEP_TREE]), saved.num_bytes)
        for file in opened.manifest.files if opened.manifest is not None else ():
            if not is_data_of_ranks(file.name):
                _grow(grown, ("files", *file.name.split("/")[: DEEP_TREE - 1]), file.size)
        _trim(root)
        return root
    return None


def _grow(grown: dict[tuple[str, ...], Subtree], parts: tuple[str, ...], num_bytes: int) -> None:
    for depth in range(len(parts) + 1):
        node = grown.get(parts[:depth])
        if node is None:
            node = grown[parts[:depth]] = Subtree(parts[depth - 1])
            grown[parts[: depth - 1]].children.append(node)
        node.num_bytes += num_bytes
        node.num_keys += 1


def _trim(node: Subtree) -> None:
    """The largest first, and of many small ones the rest as one."""
    node.children.sort(key=lambda child: -child.num_bytes)
    rest = node.children[WIDE_TREE:] if len(node.children) > WIDE_TREE + 1 else []
    if rest:
        del node.children[WIDE_TREE:]
        total = sum(child.num_bytes for child in rest), sum(child.num_keys for child in rest)
        node.children.append(Subtree(f"{len(rest):,} more", *total))
    for child in node.children:
        _trim(child)


# -- judging


def findings(report: Report) -> list[Finding]:
    """What somebody should know, the worst first."""
    found = [*_of_steps(report), *_of_faults(report), *_of_cost(report), *_of_sources(report)]
    return sorted(found, key=lambda finding: ("bad", "look", "note").index(finding.level))


def _of_steps(report: Report) -> Iterator[Finding]:
    committed, good = report.committed, report.last_good
    if good is None:
        text = "There is no whole checkpoint. A run that ends now begins anew."
        yield Finding("bad", text)
        return
    damaged = [step for step in committed if step.damage]
    if committed[-1].damage:
        yield Finding(
            "bad",
            f"The newest step, {committed[-1].step}, is damaged; the newest one that is whole is {good.step}. "
            "restore_latest takes that.",
        )
        damaged = damaged[:-1]
    if damaged:
        yield Finding("look", f"{_count(len(damaged), 'older step')} damaged: {_some(step.step for step in damaged)}.")
    dead = [fault for fault in report.faults if fault.kind == "partial"]
    if dead:
        yield Finding("note", f"{_count(len(dead), 'save')} left behind half done; the next saves remove that.")


def _of_faults(report: Report) -> Iterator[Finding]:
    last_s = max((save.time_s for save in report.saves), default=-math.inf)
    failed = [fault for fault in report.faults if fault.kind == "failed" and fault.phase not in ("prune", "close")]
    since = [fault for fault in failed if fault.time_s > last_s]
    if since:
        yield Finding(
            "bad", f"{_count(len(since), 'failure')} since the last good save, the last in {since[-1].phase}."
        )
    if earlier := failed[: len(failed) - len(since)]:
        steps = _some(fault.step for fault in earlier)
        yield Finding("look", f"{_count(len(earlier), 'failure')} before the last good save, at step {steps}.")
    number = Counter(fault.kind for fault in report.faults)
    for kind, text in (
        ("interrupted", "{} cut off by the end of the process: training went back to the one before"),
        ("skipped", "{} due and not taken"),
    ):
        if number[kind]:
            yield Finding("look", text.format(_count(number[kind], "save was", "saves were")) + ".")
    if any(fault.kind == "damaged" and fault.ranks for fault in report.faults):
        yield Finding("look", "A restore had to pass over damaged steps.")
    if number["delayed"]:
        yield Finding("look", f"{_count(number['delayed'], 'time')} ranks kept the others waiting.")
    if any(fault.phase == "prune" for fault in report.faults):
        yield Finding("look", "Old steps could not be deleted: they take space until a later save manages to.")
    if number["unguarded"]:
        yield Finding("note", "This storage does not refuse to overwrite: let one run alone write there.")


def _of_cost(report: Report) -> Iterator[Finding]:
    if report.cost_share > 0.05 and report.busy_s > 60:  # of a minute it says little: there is a first save in it
        yield Finding(
            "look",
            f"Saving takes {100 * report.cost_share:.0f} % of the time. Save less often, or by save_async and the "
            "OverlappingAsyncStager.",
        )


def _of_sources(report: Report) -> Iterator[Finding]:
    if not report.has_events:
        yield Finding(
            "note",
            "No events were found, so of waiting, times and faults nothing is known. For those of the next run: "
            "CheckpointManager(url, events=[EventFile(url)]).",
        )
    if report.num_unreadable:
        yield Finding("note", f"{_count(report.num_unreadable, 'line')} of event files could not be read.")
    if report.num_left_out:
        yield Finding("note", f"There are too many events: {_count(report.num_left_out, 'file')} left out.")
    gap_s = _usual_gap_s(report)
    if report.saves and report.made_s - report.saves[-1].time_s > max(60.0, 5 * gap_s):
        yield Finding("note", "Saves used to come more often than that: the run has ended, or has stopped saving.")


def _usual_gap_s(report: Report) -> float:
    times = [save.time_s for save in report.saves]
    return statistics.median(b - a for a, b in pairwise(times)) if len(times) > 2 else math.inf


def metrics_of(step: Glance) -> dict[str, float]:
    """Those that can be drawn: JSON knows whole numbers that no float holds."""
    known = {} if step.head is None else step.head.metrics
    return {name: float(value) for name, value in known.items() if value == 0 or 1e-300 < abs(value) < 1e300}


def known_sum(values: Iterable[float]) -> float:
    """NaN: none is known."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) if known else math.nan


def _max(one: float, other: float) -> float:
    return other if math.isnan(one) else max(one, other)


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _some(steps: Iterable[int]) -> str:
    numbers = sorted(set(steps))
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
