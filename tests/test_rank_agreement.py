"""What all ranks must hold alike: the plan of a save, which steps there are, and who speaks on which group.

A change of anything on one rank is either planned anew by all, or refused in words by all; after every operation all
ranks name the same steps; and neither two managers nor a manager and its trainer disturb each other.
"""

from __future__ import annotations

import functools
import pathlib
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from asyncckpt import CheckpointError, CheckpointManager, KeepEvery, PerRank
from asyncckpt.events import Merged
from asyncckpt.plan import leaves
from asyncckpt.steps import read_listing, summarise
from asyncckpt.testing import FaultyStorage
from stagers import StagingError
from tests.crew import Crew
from tests.processes import Job, Link
from tests.states import raw_bytes, tensor_of


@pytest.fixture(scope="module")
def four() -> Iterator[Crew]:
    with Crew(4) as crew:
        yield crew


@dataclass(frozen=True)
class Raised:
    kind: str
    text: str
    rank: int | None


def attempt(call: Callable[[], Any]) -> Any:
    """What the call returns or raises."""
    try:
        return call()
    except (CheckpointError, StagingError, ValueError) as exc:
        return Raised(type(exc).__name__, str(exc), getattr(exc, "rank", None))


# -- one thing changes on one rank


@functools.cache
def mesh(*shape: int, order: tuple[int, ...] = (0, 1, 2, 3)) -> DeviceMesh:
    """Made once per process, by all ranks together."""
    if order == (0, 1, 2, 3):
        return init_device_mesh("cpu", shape)
    return DeviceMesh("cpu", torch.tensor(order).reshape(shape))


LINE, GRID, TURNED = ((4,),), ((2, 2),), ((4,), (3, 2, 1, 0))


def on(where: tuple[Any, ...], tensor: torch.Tensor, *placements: Any) -> DTensor:
    layout = mesh(*where[0], order=where[1]) if len(where) > 1 else mesh(*where[0])
    return distribute_tensor(tensor, layout, placements, src_data_rank=None)


def rich_state(step: int) -> dict[str, Any]:
    """Something of each kind; the same on all ranks but for `own`."""
    rows, tied = tensor_of(torch.float32, 8, 4, seed=step), tensor_of(torch.float32, 5, seed=step)
    return {
        "w": tensor_of(torch.float32, 6, 4, seed=step),
        "image": tensor_of(torch.float32, 2, 3, 4, 4, seed=step),
        "pair": {"a": tied.clone(), "b": tied.clone()},
        "tied": {"a": tied, "b": tied},
        "list": [tensor_of(torch.int64, 3, seed=step), {"n": step}],
        "rows": on(LINE, rows, Shard(0)),
        "tiles": on(GRID, rows, Replicate(), Shard(0)),
        "everywhere": on(LINE, rows, Replicate()),
        "own": PerRank(torch.full((3,), 10.0 * step + dist.get_rank())),
        "n": step,
        "few": {"1": tensor_of(torch.float32, 2, seed=step)},
    }


def put(key: str, make: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        state[key] = make(state[key])

    return change


def full(tensor: DTensor) -> torch.Tensor:
    """Of one of the sharded tensors of `rich_state`, without asking other ranks: they may not change it."""
    assert tensor.shape == (8, 4)
    return tensor_of(torch.float32, 8, 4, seed=2)


def larger_view(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor])[: len(tensor)]


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    # the tree
    "a key more": lambda state: state.update(more=torch.ones(3)),
    "a key less": lambda state: state.pop("w"),
    "an object more": lambda state: state.update(more="text"),
    "an object less": lambda state: state.pop("n"),
    "a key renamed": lambda state: state.update(renamed=state.pop("w")),
    "a key nested deeper": put("w", lambda w: {"inner": w}),
    "keys in another order": lambda state: state.update(w=state.pop("w")),
    "an int for a str key": put("few", lambda few: {1: few["1"]}),
    "a list longer by a tensor": put("list", lambda values: [*values, torch.ones(2)]),
    "a list shorter": put("list", lambda values: values[:1]),
    "a tuple for a list": put("list", tuple),
    "a dict for a list": put("list", lambda values: dict(enumerate(values))),
    "an object for a tensor": put("w", lambda w: 3.5),
    "a tensor for an object": put("n", lambda n: torch.tensor(n)),
    "PerRank around a tensor": put("w", PerRank),
    "PerRank taken off": put("own", lambda own: own.value),
    # the tensors
    "another dtype": put("w", lambda w: w.double()),
    "another dtype of the same size": put("w", lambda w: w.view(torch.int32)),
    "another shape": put("w", lambda w: w.reshape(4, 6)),
    "another rank of the shape": put("w", lambda w: w.reshape(24)),
    "no rows left": put("w", lambda w: w[:0]),
    "transposed memory": put("w", lambda w: w.t().contiguous().t()),
    "channels last": put("image", lambda image: image.to(memory_format=torch.channels_last)),
    "a part of larger memory": put("w", larger_view),
    "with gaps": put("w", lambda w: torch.stack([w, w], -1)[..., 0]),
    "a Parameter": put("w", torch.nn.Parameter),
    "tied": put("pair", lambda pair: {"a": pair["a"], "b": pair["a"]}),
    "untied": put("tied", lambda tied: {"a": tied["a"], "b": tied["b"].clone()}),
    "tied to another": lambda state: state["tied"].update(b=state["pair"]["a"]),
    # the placements
    "whole for a DTensor": put("everywhere", full),
    "a DTensor for whole": put("w", lambda w: on(LINE, w, Replicate())),
    "a part for all of it": put("w", lambda w: on(LINE, w, Shard(0))),
    "columns for rows": put("rows", lambda rows: on(LINE, full(rows), Shard(1))),
    "all of it for a part": put("rows", lambda rows: on(LINE, full(rows), Replicate())),
    "whole for rows": put("rows", full),
    "a local part for rows": put("rows", lambda rows: rows.to_local()),
    "another order of the mesh": put("rows", lambda rows: on(TURNED, full(rows), Shard(0))),
    "another shape of the mesh": put("rows", lambda rows: on(GRID, full(rows), Shard(0), Replicate())),
    "replicas and shards exchanged": put("tiles", lambda tiles: on(GRID, full(tiles), Shard(0), Replicate())),
    "a global shape that grew": put(
        "rows",
        lambda rows: DTensor.from_local(
            rows.to_local(), rows.device_mesh, rows.placements, run_check=False, shape=(12, 4), stride=(4, 1)
        ),
    ),
    "a sum that is yet to be made": put(
        "everywhere", lambda all_: DTensor.from_local(all_.to_local(), all_.device_mesh, [Partial()], run_check=False)
    ),
}


def blank(value: Any) -> Any:
    """The same with nothing in it, in place."""
    if isinstance(value, PerRank):
        return PerRank(blank(value.value))
    if isinstance(value, dict):
        return {key: blank(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(blank, value))
    if not isinstance(value, torch.Tensor):
        return None
    with torch.no_grad():
        (value.to_local() if isinstance(value, DTensor) else value).zero_()
    return value


def contents(state: dict[str, Any]) -> dict[str, Any]:
    """This rank's part of everything, comparable."""
    found: dict[str, Any] = {}
    for fqn, leaf in leaves({**state, "own": getattr(state["own"], "value", state["own"])}).items():
        value = leaf.value.value if isinstance(leaf.value, PerRank) else leaf.value
        local = value.to_local() if isinstance(value, DTensor) else value
        found[fqn] = raw_bytes(local) if isinstance(local, torch.Tensor) else str(local)
    return found


def change_one_thing(link: Link, path: str, name: str, culprits: list[int]) -> list[Any]:
    mesh(*TURNED[0], order=TURNED[1]), mesh(*GRID[0])  # a mesh is made by all ranks

    def changed() -> dict[str, Any]:
        state = rich_state(2)
        if link.rank in culprits:
            CHANGES[name](state)
        return state

    def restored(step: int, source: Callable[[], dict[str, Any]]) -> set[str]:
        """What is not as it was saved."""
        target = blank(source())
        manager.restore(step, target)
        found, wanted = contents(target), contents(source())
        return {key for key in found | wanted if found.get(key) != wanted.get(key)}

    merged: list[str] = []
    sink = [lambda event: merged.extend(event.keys) if isinstance(event, Merged) else None]
    with CheckpointManager(path, 1, events=sink) as manager:
        manager.save(1, rich_state(1))
        plan = manager._planning._plan
        saved = attempt(lambda: manager.save(2, changed()))
        is_planned_anew = manager._planning._plan is not plan
        wrong = restored(2, changed) if saved is True else set()
        manager.save(3, rich_state(3))
        return [saved, is_planned_anew, wrong, restored(3, lambda: rich_state(3)), manager.all_steps(), merged]


NO_NEWS = {"a part of larger memory", "a Parameter"}
"""The copy is laid out as before, so the old plan is right."""
AT_ODDS = {
    "an object for a tensor", "a tensor for an object", "another dtype", "another dtype of the same size",
    "another shape", "another rank of the shape", "no rows left", "a part for all of it", "columns for rows",
    "all of it for a part", "whole for rows", "a local part for rows", "another order of the mesh",
    "another shape of the mesh", "a global shape that grew",
}  # fmt: skip
"""Refused where only some ranks have it."""
OWN_VALUES = {"PerRank taken off": "own", "a local part for rows": "rows"}
"""Where all ranks have it they have different values under one key: the lowest rank's is kept, and that is told."""


@pytest.mark.parametrize(
    "culprits",
    [[2], pytest.param([0], marks=pytest.mark.slow), pytest.param([0, 1, 2, 3], marks=pytest.mark.slow)],
    ids=["rank 2", "rank 0", "all"],
)
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_planned_anew_or_refused_by_all(
    four: Crew, tmp_path: pathlib.Path, name: str, culprits: list[int]
) -> None:
    """Anything about the state, on any rank, between two saves. The save after it is right in either case."""
    results = four.run(change_one_thing, str(tmp_path), name, culprits)
    is_refused = (name in AT_ODDS and len(culprits) == 1) or name == "a sum that is yet to be made"
    kept = OWN_VALUES.get(name) if len(culprits) == 4 else None
    for rank, (saved, is_planned_anew, wrong, wrong_later, steps, merged) in enumerate(results):
        assert is_planned_anew == (name not in NO_NEWS)
        if is_refused:
            assert saved.kind == "SaveError"
            assert "Nothing was written" in saved.text
        else:
            assert saved is True
        assert wrong == ({kept} if kept and rank else set())
        assert merged == ([kept] if kept and not rank else [])
        assert wrong_later == set()
        assert steps == ([1, 3] if is_refused else [1, 2, 3])


# -- which steps there are


FAULTS = [
    *[("", "before")] * 9,
    ("stage", "before"),
    ("write_file", "before"),
    ("write_file", "middle"),
    ("create", "before"),
    ("create", "after"),  # the answer is lost: the step may be there
    ("replace", "before"),
    ("list_files", "before"),
    ("delete", "before"),
    ("read_into", "before"),
    ("read_file", "before"),
]
OPERATIONS = ["save", "save_async", "save_async", "join", "refresh", "protect", "restore", "restore_latest", "restart"]


def numbered(number: int) -> dict[str, Any]:
    """A tensor that all ranks have, and one of each rank's own, so that every rank writes and reads."""
    return {"w": torch.full((100,), float(number)), "mine": PerRank(torch.full((9,), float(number)))}


class History:
    """What one rank does and sees. `chance` is in the same state on all of them."""

    def __init__(self, rank: int, path: str, seed: int) -> None:
        self.rank, self.path, self.chance = rank, path, random.Random(seed)
        self.values: dict[int, set[float]] = {}  # what a step may hold
        self.number = 0
        self.start()

    def start(self) -> None:
        self.protected: set[int] = set()
        self.manager = CheckpointManager(
            self.path, 1, max_to_keep=2, keep=KeepEvery(5), max_pending_async=self.chance.choice([1, 2])
        )

    def restored(self, restore: Callable[[dict[str, Any]], Any], step: int | None) -> None:
        target = numbered(-1)
        found = restore(target)
        step = step if found is None else found
        if step is not None:
            values = {target["w"][0].item(), target["mine"].value[0].item()}
            assert len(values) == 1
            assert values <= self.values[step]

    def save(self, step: int, number: int, is_staging_broken: bool, *, wait: bool) -> None:
        state = numbered(number) | ({"lock": threading.Lock()} if is_staging_broken else {})
        before = self.values.get(step, set())
        self.values[step] = before | {number}
        (self.manager.save if wait else self.manager.save_async)(step, state)
        if wait:
            self.values[step] = {number}

    def run_one(self, operation: str, is_staging_broken: bool) -> None:
        manager, step = self.manager, self.chance.randrange(12)
        known = manager.all_steps()
        match operation:
            case "save" | "save_async":
                self.save(step, self.number, is_staging_broken, wait=operation == "save")
            case "join":
                manager.join()
            case "refresh":
                manager.refresh()
            case "protect" if known:
                manager.protect(chosen := self.chance.choice(known))
                self.protected.add(chosen)
            case "restore" if known:
                chosen = self.chance.choice(known)
                self.restored(lambda target: manager.restore(chosen, target), chosen)
            case "restore_latest":
                self.restored(manager.restore_latest, None)
            case "restart":
                try:
                    manager.close()
                finally:
                    self.start()

    def next(self) -> list[Any]:
        """One operation, in which a fault may wait on one rank; what this rank then knows."""
        self.number += 1
        operation, (verb, moment) = self.chance.choice(OPERATIONS), self.chance.choice(FAULTS)
        is_culprit = self.chance.randrange(4) == self.rank
        manager = self.manager
        storage = manager._storage
        if is_culprit and verb not in ("", "stage"):
            broken = FaultyStorage(storage, verb, nth=1, moment=moment)  # type: ignore[arg-type]
            manager._storage = manager._saver.committer.storage = broken
        outcome = attempt(lambda: self.run_one(operation, is_culprit and verb == "stage"))
        manager._writer.join()
        manager._storage = manager._saver.committer.storage = storage
        dist.barrier()
        steps = self.manager.all_steps()
        if self.rank == 0:
            there = summarise(read_listing(self.manager._storage.list_files())).sequences
            assert set(steps) <= set(there)
            assert self.protected <= set(steps)
        dist.barrier()  # the others do not begin to write before
        return [operation, verb, isinstance(outcome, Raised), steps, self.manager.latest_step()]


def live(link: Link, path: str, seed: int, num_operations: int) -> list[Any]:
    history = History(link.rank, path, seed)
    seen = [history.next() for _ in range(num_operations)]
    attempt(history.manager.close)
    with CheckpointManager(path) as manager:
        manager.save(12, numbered(0))  # after a commit what a fault left is mended: a stale `.metadata`
        manager.join()
        dist.barrier()  # rank 0 has
        history.values[12] = {0}
        for step in manager.all_steps():
            manager.verify(step)
            history.restored(lambda target, step=step: manager.restore(step, target), step)
        return [seen, manager.all_steps()]


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 30))])
def test_all_ranks_name_the_same_steps_after_each_operation(four: Crew, tmp_path: pathlib.Path, seed: int) -> None:
    """Saves, restores, restarts and retention in random order, with faults on one rank; what one raises all raise.

    Whatever is named is in storage, whole, and holds what was last saved there; what was protected stays.
    """
    results = four.run(live, str(tmp_path), seed, 40)
    assert results == [results[0]] * 4


# -- several managers, and the trainer


GROUPS: list[list[int] | None] = [None, [0, 1], [1, 2, 3], None]
"""Of four managers, by their ranks; None: all of the world."""


@functools.cache
def group_of(ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
    """Made once per process, by all ranks together."""
    return dist.new_group(list(ranks))


def juggle(link: Link, path: str, seed: int, num_operations: int) -> list[Any]:
    """Open, use and close four managers in an order that is the same on all ranks and otherwise random."""
    groups = [None if ranks is None else group_of(tuple(ranks)) for ranks in GROUPS]
    chance = random.Random(seed)
    open_ones: dict[int, CheckpointManager] = {}
    saved: dict[int, list[int]] = {}
    seen: list[Any] = []
    for step in range(num_operations):
        number, action = chance.randrange(4), chance.choice(["save_async", "save_async", "save", "restore", "close"])
        if link.rank not in (GROUPS[number] or range(4)):
            continue
        if number not in open_ones:
            open_ones[number] = CheckpointManager(f"{path}/{number}", 1, process_group=groups[number])
            assert open_ones[number].all_steps() == saved.get(number, [])
        manager = open_ones[number]
        match action:
            case "save" | "save_async":
                assert getattr(manager, action)(step, numbered(step + 1000 * number))
                saved.setdefault(number, []).append(step)
            case "restore":
                target = numbered(-1)
                found = manager.restore_latest(target)
                assert found == (saved[number][-1] if number in saved else None)
                assert found is None or target["mine"].value[0].item() == found + 1000 * number
            case "close":
                open_ones.pop(number).close()
                seen.append((number, manager.all_steps()))
    for number in chance.sample(range(4), 4):
        if (left := open_ones.get(number)) is not None:
            left.close()
            seen.append((number, left.all_steps()))
    assert dict(seen) == {number: saved.get(number, []) for number, _ in seen}
    return [saved.get(number) for number in range(4)]


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 15))])
def test_managers_of_overlapping_groups_do_not_interfere(four: Crew, tmp_path: pathlib.Path, seed: int) -> None:
    """Opened, used and closed in any order, with saves of one in flight while another restores."""
    results = four.run(juggle, str(tmp_path), seed, 40)
    for number, ranks in enumerate(GROUPS):
        steps = results[(ranks or [0])[0]][number] or []
        assert all(results[rank][number] == (steps or None) for rank in ranks or range(4))
        with CheckpointManager(f"{tmp_path}/{number}", 1) as manager:
            assert manager.all_steps() == steps
            for step in steps:
                assert manager.verify(step)


def train_ddp(rank: int, is_over: Callable[[int], bool]) -> tuple[int, torch.Tensor]:
    """Over the group of the world, until it is over for all ranks: the number of steps, and the parameters."""
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(20, 20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step, over = 0, torch.zeros(1)
    while not over:
        model(tensor_of(torch.float32, 4, 20, seed=10 * step + rank)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        dist.all_reduce(over.fill_(is_over(step)), dist.ReduceOp.MIN)
    return step, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def sum_up(group: dist.ProcessGroup, rank: int, is_over: Callable[[], bool]) -> set[float]:
    sums: set[float] = set()
    over = torch.zeros(1)
    while not over:
        value = torch.full((100,), float(rank))
        dist.all_reduce(value, group=group)
        sums |= set(value.tolist())
        dist.all_reduce(over.fill_(is_over()), dist.ReduceOp.MIN, group=group)
    return sums


def save_beside_training(link: Link, path: str) -> list[Any]:
    own, over, wrong = group_of((0, 1, 2, 3)), threading.Event(), []
    assert own is not None
    with (
        ThreadPoolExecutor(2) as trainers,
        CheckpointManager(f"{path}/a", 1, max_to_keep=2) as first,
        CheckpointManager(f"{path}/b", 1) as second,
    ):
        training = trainers.submit(train_ddp, link.rank, lambda _: over.is_set())
        summing = trainers.submit(sum_up, own, link.rank, over.is_set)
        for step in range(12):
            first.save_async(step, numbered(step))
            if step % 3 == 0:
                second.save(step, numbered(step))
                target = numbered(-1)
                wrong += [] if first.restore_latest(target) == step == target["w"][0].item() else [step]
        over.set()
        num_steps, parameters = training.result(60)
        sums = summing.result(60)
    _, alone = train_ddp(link.rank, lambda step: step == num_steps)
    return [wrong, sums, torch.equal(parameters, alone), first.all_steps(), second.all_steps()]


def test_saving_and_training_on_other_threads_do_not_disturb_each_other(four: Crew, tmp_path: pathlib.Path) -> None:
    """DDP trains over the group of the world, another thread sums over one of its own, two managers save and restore:
    the sums and every bit of the parameters are those of a run without them."""
    assert four.run(save_beside_training, str(tmp_path)) == [[[], {6.0}, True, [10, 11], [0, 3, 6, 9]]] * 4


def make_groups_beside(link: Link, path: str) -> list[Any]:
    pair = mesh(2, 2).get_group(1)
    some = CheckpointManager(f"{path}/part", 1, process_group=pair) if link.rank < 2 else None
    with CheckpointManager(f"{path}/all", 1) as everyone:
        tensor = on(TURNED, torch.ones(4, 4), Shard(0)).full_tensor()
        if link.rank in (1, 2):
            dist.all_reduce(tensor, group=dist.new_group([1, 2], use_local_synchronization=True))
        if some is not None:
            some.save(1, numbered(1))
            some.close()
        everyone.save(2, numbered(2))
        return [tensor.sum().item(), everyone.all_steps()]


def test_a_trainer_makes_its_groups_and_meshes_beside_managers(tmp_path: pathlib.Path) -> None:
    """torch names some groups by how many a rank has: a manager that only some ranks are in must not count."""
    with Crew(4) as crew:  # whose ranks have equally many so far
        assert crew.run(make_groups_beside, str(tmp_path)) == [[16.0, [2]], [32.0, [2]], [32.0, [2]], [16.0, [2]]]


def save_beside_nccl(link: Link, path: str) -> list[Any]:
    store = dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
    dist.destroy_process_group()
    dist.init_process_group("cuda:gloo", store=PrefixStore("nccl", store), rank=link.rank, world_size=3)
    part = dist.new_group([0, 2])
    refused = 0
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError:  # as over NCCL
        refused += 1
    with CheckpointManager(f"{path}/all", 1) as manager:
        manager.save(1, numbered(1))
        manager.save(2, numbered(2) | ({"more": torch.ones(3)} if link.rank == 1 else {}))
        target = numbered(-1)
        manager.restore(1, target)
        manager.refresh()
        seen = [refused, manager.all_steps(), target["mine"].value[0].item()]
        if link.rank != 1:
            with CheckpointManager(f"{path}/part", 1, process_group=part) as some:
                some.save(7, numbered(7))
                seen += some.all_steps()
        dist.destroy_process_group()
        manager.save(3, numbered(3))
        return [*seen, manager.latest_step()]


def test_a_trainers_group_that_takes_no_cpu_tensors_is_never_used(tmp_path: pathlib.Path) -> None:
    """As NCCL's takes none: any message of ours over it would fail. A plan, a plan anew, a restore, a part of it; and
    when it is gone the manager still saves."""
    with Job(3, save_beside_nccl, str(tmp_path)) as job:
        assert job.results() == [[1, [1, 2], 1.0, 7, 3], [1, [1, 2], 1.0, 3], [1, [1, 2], 1.0, 7, 3]]
