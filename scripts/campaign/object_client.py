"""What the processes of the family "objects" do: a run that saves through a broken line, and a fresh one that checks.

Both are forked from a server that has imported everything and used nothing. `run` tells what it began, what was
reported to it and what it restored; `check` raises if a promise was broken. Called by objects.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from asyncckpt import s3_obstore
from asyncckpt.errors import CheckpointError, DamagedStepError, SaveError
from asyncckpt.events import Committed, Event, Failed
from asyncckpt.storage import Storage
from tests.faults import harness
from tests.faults.harness import KEPT, Place, open_manager, strays
from tests.s3 import Request, uploads_left
from tests.states import assert_same, target_like

SCHEDULE = (0, 1, 0, 2, 1)
"""The steps of a run, in order: 0 is saved again while retention holds it, 1 after it was pruned."""
PART_BYTES = 1 << 20
LIMIT_S = 120.0  # of silence: a client that tries again takes seconds
NEXT = 99
MAY_BE_SAVED = "may be saved or not"
_PRELOAD = [
    "torch", "torch._dynamo", "torch.distributed", "numpy", "pytest", "s3fs", "gcsfs", "obstore", "obstore.store",
    "aiobotocore.session", "scripts.campaign.fork_server", __name__,
]  # fmt: skip


def state_of(step: int, save: int) -> dict[str, Any]:
    """The state that save number `save` stores as `step`: 1.1 MB, two parts."""
    seed = 1000 * step + save
    words = torch.arange(280_000, dtype=torch.int32) * 1_103_515_245 + seed
    return {
        "save": save,
        "model": {
            "large": words.view(torch.float32).reshape(280, 1000),
            "small": [words[: n + 1].clone() for n in range(3)],
        },
        "optimizer": {"param_groups": [{"lr": seed / 7, "name": f"group {seed}"}], "step": step},
    }


@dataclass
class Told:
    """What a run said. committed: the numbers of saves that it reported. failed: {save: error}. begun: all of them.

    refused: why it could not begin. restored: (step, save) at its end, unread: why not. is_over: it was not killed.
    """

    begun: list[int] = field(default_factory=list)
    committed: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    num_raised: int = 0
    refused: str = ""
    unread: str = ""
    restored: tuple[int, int] | None = None
    is_over: bool = False
    requests: list[Request] = field(default_factory=list, repr=False)

    @property
    def uncertain(self) -> list[int]:
        """What nobody was told the end of."""
        open_ended = [save for save, text in self.failed.items() if MAY_BE_SAVED in text]
        in_flight = set(self.begun) - set(self.committed) - set(self.failed)
        return sorted({*open_ended, *in_flight} - set(self.committed))


def start(body: Callable[..., None], *args: Any) -> tuple[Any, Iterator[tuple[str, Any]]]:
    """(the process, what it says until it ends)."""
    return harness.start(_work, body, *args, preload=_PRELOAD, silence_s=LIMIT_S)


def _work(link: Connection, body: Callable[..., None], *args: Any) -> None:
    s3_obstore._PID = os.getpid()  # the server imported it, and nobody there used it
    torch.set_num_threads(1)
    body(link, *args)


# -- the run


def run(link: Connection, place: Place, transfer: str, part_bytes: int) -> None:
    """SCHEDULE, each save once more if it is told that an earlier one failed; then a restore."""
    newest: dict[int, int] = {}

    def report(event: Event) -> None:
        if isinstance(event, Committed):
            link.send(("committed", newest[event.step]))
        elif isinstance(event, Failed) and isinstance(event.error, SaveError):
            link.send(("failed", (newest[event.step], str(event.error)[:2000])))

    try:
        manager = open_manager(place, _with_parts(part_bytes), max_to_keep=KEPT, events=[report], transfer=transfer)
    except CheckpointError as exc:
        link.send(("refused", str(exc)[:2000]))
        return
    for save, step in enumerate(SCHEDULE):
        while True:
            state = state_of(step, save)
            try:
                manager.save_async(step, state)
            except SaveError:
                link.send(("raised", None))
                continue
            newest[step] = save
            link.send(("saving", save))
            state["model"]["large"].view(torch.int32).add_(1)  # training goes on
            break
    try:
        manager.join()
    except SaveError:
        link.send(("raised", None))
    _restore(link, manager)
    manager.close()
    link.send(("over", None))


def _with_parts(part_bytes: int) -> Callable[[Storage], Storage]:
    def wrap(storage: Any) -> Storage:
        if part_bytes:
            storage.part_bytes = part_bytes
        return storage

    return wrap


def _restore(link: Connection, manager: Any) -> None:
    target = target_like(state_of(0, 0))
    try:
        step = manager.restore_latest(target)
    except DamagedStepError:
        raise  # nothing is damaged: a line that breaks is no reason to say so
    except CheckpointError as exc:
        link.send(("unread", str(exc)[:2000]))
        return
    if step is not None:
        assert_same(state_of(step, target["save"]), target)
        link.send(("restored", (step, target["save"])))


def listen(messages: Iterator[tuple[str, Any]]) -> Told:
    """Until the run has ended, or was killed."""
    told = Told()
    for kind, value in messages:
        if kind == "saving":
            told.begun.append(value)
        elif kind == "committed":
            told.committed.append(value)
        elif kind == "failed":
            told.failed[value[0]] = value[1]
        elif kind == "raised":
            told.num_raised += 1
        elif kind == "over":
            told.is_over = True
        else:
            setattr(told, kind, value)
    return told


# -- the check


def write_oracle(folder: Path) -> None:
    """What each save of the schedule must hold, by `torch.save`."""
    folder.mkdir()
    for save, step in [*enumerate(SCHEDULE), (NEXT, NEXT)]:
        torch.save(state_of(step, save), folder / f"{save}.pt")


def check(link: Connection, place: Place, transfer: str, oracle: Path, told: Told) -> None:
    """Every promise, seen by a process that knows nothing of the run; afterwards nothing is left at the place."""
    with open_manager(place, max_to_keep=KEPT, transfer=transfer) as manager:
        found = {step: _restored_save(manager, step, oracle) for step in manager.all_steps()}
        check_found(found, told)
        latest = target_like(state_of(0, 0))
        step = manager.restore_latest(latest)
        assert (step is None) == (not found), (step, found)
        if step is not None:
            assert latest["save"] == found[step] == max(found.values()), (step, latest["save"], found)
        manager.save(NEXT, state_of(NEXT, NEXT))
        found[NEXT] = NEXT
        manager.refresh()
        kept = sorted(sorted(found, key=found.__getitem__)[-KEPT:])
        assert manager.all_steps() == kept, (manager.all_steps(), kept)
        assert (stray := left(place, manager._storage, kept)) == [], stray
        for step in kept:
            assert _restored_save(manager, step, oracle) == found[step]
        manager._storage.delete(list(manager._storage.list_files()))
    link.send(("checked", sorted(found)))


def left(place: Place, storage: Any, kept: Sequence[int]) -> list[str]:
    """All that is no part of these steps, unfinished uploads too."""
    if place.url.startswith("s3://"):
        return strays(Place("", {}), storage, kept) + uploads_left(storage)
    return strays(place, storage, kept)


def check_found(found: dict[int, int], told: Told) -> None:
    """Nothing that was not saved is there, and all that retention holds is."""
    story = f"found {found}, {told}"
    ends = [
        sorted([*told.committed, *some])
        for count in range(len(told.uncertain) + 1)
        for some in combinations(told.uncertain, count)
    ]
    assert set(found.values()) <= {*told.committed, *told.uncertain}, f"there is what was not saved: {story}"
    assert any(_held(saves).items() <= found.items() for saves in ends), f"something is lost: {story}"
    if told.committed:
        assert max(found.values()) >= max(told.committed), f"the newest step is lost: {story}"
    if told.restored:
        assert told.restored[1] == max(found.values()), f"an older step was restored: {story}"


def _held(saves: Sequence[int]) -> dict[int, int]:
    """{step: save} that retention holds after these saves."""
    held: dict[int, int] = {}
    for save in saves:
        held.pop(SCHEDULE[save], None)
        held[SCHEDULE[save]] = save
    return dict(list(held.items())[-KEPT:])


def _restored_save(manager: Any, step: int, oracle: Path) -> int:
    """The number of the save that a step holds, which it must hold bit for bit."""
    target = target_like(state_of(0, 0))
    manager.restore(step, target, strict=True)
    assert_same(torch.load(oracle / f"{target['save']}.pt", weights_only=True), target)
    return int(target["save"])
