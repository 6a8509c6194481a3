"""What the ranks of the family "ranks" do: a job that saves while something happens to one of them, and a fresh one,
of another size, that checks. Called by ranks.py through tests/processes.py.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from asyncckpt import s3_obstore
from asyncckpt.errors import CheckpointError
from asyncckpt.events import Committed, Event
from asyncckpt.testing import Call, RecordingStorage
from scripts.campaign.object_client import NEXT, SCHEDULE, Told, check_found, left
from tests.faults.harness import KEPT, Place, age_temporary_files, open_manager
from tests.processes import Link
from tests.states import raw_bytes

RankFault = Literal["kill", "fail", "stop", "lose all", ""]


@dataclass(frozen=True)
class Point:
    """fault: at the storage call `number` (from 0) of `rank`, before or after it is done."""

    fault: RankFault
    rank: int
    number: int
    is_after: bool


@dataclass(frozen=True)
class Ended:
    """What a rank came to. errors: (save, class, text, rank it names)."""

    errors: list[tuple[int, str, str, int | None]]
    num_calls: int


class BrokenStorage(RecordingStorage):
    """Something happens to this rank at one call."""

    def __init__(self, inner: Any, point: Point | None, link: Link) -> None:
        super().__init__(inner)
        self._point = point if point and point.rank == link.rank else None
        self._link = link
        self._lock = threading.Lock()

    def _around(self, call: Call, run: Callable[[], Any]) -> Any:
        with self._lock:
            number = len(self.calls)
            self.calls.append(call)
        if self._point is None or number != self._point.number:
            return run()
        if not self._point.is_after:
            self._happen(call)
            return run()
        result = run()
        self._happen(call)
        return result

    def _happen(self, call: Call) -> None:
        assert self._point is not None
        self._link.send(("reached", str(call)[:200]))
        if self._point.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._point.fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self._point.fault == "lose all":
            threading.Event().wait()  # for the end
        if self._point.fault == "fail":
            raise OSError(errno.EIO, "as the campaign wants it")


def state_of(step: int, save: int) -> dict[str, Any]:
    """What all ranks hold together: a matrix that they share out, unevenly, and what each has."""
    words = torch.arange(25_000, dtype=torch.int32) * 1_103_515_245 + 1000 * step + save
    return {
        "save": save,
        "shared": words.view(torch.float32).reshape(25, 1000),
        "alike": words[:100].clone(),
        "n": [step],
    }


def write_oracle(folder: Path) -> None:
    folder.mkdir()
    for save, step in [*enumerate(SCHEDULE), (NEXT, NEXT)]:
        torch.save(state_of(step, save), folder / f"{save}.pt")


def _divided(state: dict[str, Any]) -> dict[str, Any]:
    """This rank's part of it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return state | {"shared": distribute_tensor(state["shared"], mesh, [Shard(0)], src_data_rank=None)}


# -- the job that saves


def save_all(link: Link, place: Place, point: Point | None, timeout_s: float) -> Ended:
    """SCHEDULE, to its end or the first error of a job that cannot go on."""
    s3_obstore._PID = os.getpid()  # the server imported it, and nobody there used it
    newest: dict[int, int] = {}
    storages: list[BrokenStorage] = []

    def wrap(storage: Any) -> Any:
        storages.append(BrokenStorage(storage, point, link))
        return storages[0]

    def report(event: Event) -> None:
        if isinstance(event, Committed):
            link.send(("committed", newest[event.step]))

    errors: list[tuple[int, str, str, int | None]] = []

    def attempt(save: int, call: Callable[[], Any]) -> bool:
        try:
            call()
        except CheckpointError as exc:
            errors.append((save, type(exc).__name__, str(exc)[:2000], exc.rank))
            return False
        return True

    opened: list[Any] = []
    if not attempt(
        -1, lambda: opened.append(open_manager(place, wrap, max_to_keep=KEPT, events=[report], timeout=timeout_s))
    ):
        return Ended(errors, len(storages[0].calls))
    (manager,) = opened
    for save, step in enumerate(SCHEDULE):
        newest[step] = save
        link.send(("saving", save))
        state = _divided(state_of(step, save))

        def save_it(step: int = step, state: dict[str, Any] = state) -> None:
            manager.save_async(step, state)
            manager.join()

        if not attempt(save, save_it) and point and point.fault != "fail":
            break
    attempt(len(SCHEDULE) - 1, manager.close)
    return Ended(errors, len(storages[0].calls))


# -- the job that checks


def check_all(link: Link, place: Place, oracle: Path, told: Told) -> None:
    """Every promise, seen by ranks that know nothing of the run."""
    s3_obstore._PID = os.getpid()
    with open_manager(place, max_to_keep=KEPT, timeout=60.0) as manager:
        found = {step: _restored_save(manager, step, oracle) for step in manager.all_steps()}
        check_found(found, told)
        target = _divided(state_of(0, 0))
        step = manager.restore_latest(target)
        assert (step is None) == (not found), (step, found)
        assert step is None or target["save"] == found[step] == max(found.values()), (step, target["save"], found)
        if link.rank == 0:
            age_temporary_files(place)
        manager.save(NEXT, _divided(state_of(NEXT, NEXT)))
        found[NEXT] = NEXT
        manager.join()
        manager._ranks.agree([], phase="saved")
        manager.refresh()
        kept = sorted(sorted(found, key=found.__getitem__)[-KEPT:])
        assert manager.all_steps() == kept, (manager.all_steps(), kept)
        for step in kept:
            assert _restored_save(manager, step, oracle) == found[step]
        if link.rank == 0:
            assert (stray := left(place, manager._storage, kept)) == [], stray
            manager._storage.delete(list(manager._storage.list_files()))


def _restored_save(manager: Any, step: int, oracle: Path) -> int:
    target = _divided(state_of(0, 0))
    for value in (target["shared"].to_local(), target["alike"]):
        value.zero_()
    manager.restore(step, target, strict=True)
    expected = _divided(torch.load(oracle / f"{target['save']}.pt", weights_only=True))
    assert target["n"] == expected["n"], (target["n"], expected["n"])
    for key in ("shared", "alike"):
        assert raw_bytes(_local(target[key])) == raw_bytes(_local(expected[key])), f"{key} of step {step} differs"
    return int(target["save"])


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
