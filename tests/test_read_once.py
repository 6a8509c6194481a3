"""`read_once`: each shared byte leaves storage once, every rank gets every bit, and no rank is left waiting."""

from __future__ import annotations

import pathlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from asyncckpt import CheckpointError, CheckpointManager, Event, PerRank, Restored
from asyncckpt.storage import Storage
from asyncckpt.testing import FaultyStorage, RecordingStorage
from tests.crew import Crew
from tests.layouts import own, parts, state_of, target_of
from tests.processes import Job, Link
from tests.states import assert_same, every_kind, target_like, tensor_of

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(scope="module")
def four() -> Iterator[Crew]:
    with Crew(4) as crew:
        yield crew


class Fetching(RecordingStorage):
    """Counts the bytes of data that were fetched."""

    num_bytes = 0

    def read_into(
        self, path: str, ranges: Sequence[tuple[int, memoryview]], filled: Callable[[int], None] | None = None
    ) -> None:
        self.num_bytes += sum(len(view) for _, view in ranges)
        super().read_into(path, ranges, filled)


def restore(path: str, target: dict[str, Any], **options: Any) -> int:
    """The bytes that this rank fetched, of which it also says so."""
    seen: list[Event] = []
    with CheckpointManager(path, 1, events=[seen.append], **options) as manager:
        manager._storage = fetching = Fetching(manager._storage)
        manager.restore(1, target, strict=True)
    assert [event.num_bytes for event in seen if isinstance(event, Restored)] == [fetching.num_bytes]
    return fetching.num_bytes


def save(path: str, state: dict[str, Any]) -> None:
    with CheckpointManager(path, 1) as manager:
        manager.save(1, state)


# -- bits and bytes


def restore_layouts(link: Link, path: str, turned: bool) -> list[int]:
    if not pathlib.Path(path).exists():
        save(path, state_of(3, link.rank, 4))
    found = []
    for read_once in (False, True):
        target = target_of(link.rank, 4, turned=turned)
        found.append(restore(path, target, read_once=read_once))
        assert parts(target) == parts(state_of(3, link.rank, 4, turned=turned))
        assert target["nested"][0] == {"n": 3}
        assert_same(own(3, link.rank), target["mine"].value)
    return found


@pytest.mark.parametrize("turned", [False, True])
def test_every_layout_comes_back_bit_for_bit(four: Crew, tmp_path: pathlib.Path, turned: bool) -> None:
    """With fewer bytes fetched by all ranks together."""
    without, with_it = map(sum, zip(*four.run(restore_layouts, str(tmp_path / "run"), turned), strict=True))
    assert with_it < without - 3 * 700 * 600 * 4  # the plain tensor, which all have


def replicas(seed: int) -> dict[str, Any]:
    """Of all sizes: in blocks, in reads together, and objects."""
    return {
        "large": [tensor_of(torch.float32, 3000, 1000, seed=seed + n) for n in range(2)],
        "medium": {f"m{n}": tensor_of(torch.bfloat16, 300, 300, seed=seed + n) for n in range(30)},
        "small": {f"s{n}": tensor_of(torch.float32, 100, seed=seed + n) for n in range(200)},
        "objects": [{"step": seed, "name": "x" * 1000}],
    }


def restore_replicas(link: Link, path: str) -> tuple[list[int], int]:
    state = replicas(1)
    save(path, state)
    found = []
    for read_once in (False, True):
        target = target_like(state)
        found.append(restore(path, target, read_once=read_once))
        assert_same(state, target)
    return found


def test_what_all_ranks_have_leaves_storage_once_in_equal_parts(four: Crew, tmp_path: pathlib.Path) -> None:
    """As under DDP. No rank fetches more than its part and one block."""
    found = four.run(restore_replicas, str(tmp_path))
    unique = found[0][0]
    assert [without for without, _ in found] == [unique] * 4
    assert sum(once for _, once in found) <= 1.02 * unique
    assert max(once for _, once in found) <= unique / 4 + 4 * MIB


def count_files_read(link: Link, path: str) -> list[str]:
    save(path, replicas(1))
    read: list[str] = []
    with CheckpointManager(path, read_once=True) as manager:
        read_file = manager._storage.read_file
        manager._storage.read_file = lambda name: read.append(name) or read_file(name)  # type: ignore[method-assign]
        target = target_like(replicas(1))
        assert manager.restore_latest(target) is not None
    assert_same(replicas(1), target)
    return read


def test_the_manifest_leaves_storage_once(four: Crew, tmp_path: pathlib.Path) -> None:
    """Of a thousand ranks it would be the most of what is read."""
    first, *others = four.run(count_files_read, str(tmp_path))
    assert [name.split("/")[-1] for name in first] == ["manifest-00000001.json"]
    assert others == [[]] * 3


def restore_hybrid(link: Link, path: str) -> list[int]:
    mesh = init_device_mesh("cpu", (2, 2))

    def placed(seed: int) -> dict[str, Any]:
        whole = [tensor_of(torch.float32, 2000, 1000, seed=seed + n) for n in range(4)]
        return {f"w{n}": distribute_tensor(one, mesh, [Replicate(), Shard(0)]) for n, one in enumerate(whole)}

    save(path, placed(1))
    found = []
    for read_once in (False, True):
        target = placed(5)
        found.append(restore(path, target, read_once=read_once))
        for key, expected in placed(1).items():
            assert torch.equal(target[key].to_local(), expected.to_local())
    return found


def test_what_pairs_of_ranks_have_leaves_storage_once(four: Crew, tmp_path: pathlib.Path) -> None:
    """As under HSDP: a pair exchanges what it shares, and each of the two reads half."""
    found = four.run(restore_hybrid, str(tmp_path))
    assert [without for without, _ in found] == [16_000_000] * 4
    assert sum(once for _, once in found) == 32_000_000
    assert max(once for _, once in found) <= 8_000_000 + 4 * MIB


def restore_shards(link: Link, path: str) -> int:
    mesh = init_device_mesh("cpu", (4,))
    state = {f"w{n}": distribute_tensor(torch.rand(400, 100), mesh, [Shard(0)]) for n in range(20)}
    save(path, state)
    found, entered = [], []
    for read_once in (False, True):
        with CheckpointManager(path, 1, read_once=read_once) as manager:
            manager._storage = fetching = Fetching(manager._storage)
            before = manager._ranks._num_entered
            manager.restore(1, state)
            entered.append(manager._ranks._num_entered - before)
        found.append(fetching.num_bytes)
    assert found[0] == found[1]
    return entered[1] - entered[0]


def test_shards_of_which_each_rank_has_its_own_cost_four_small_messages(four: Crew, tmp_path: pathlib.Path) -> None:
    """As under FSDP: nothing is exchanged but the step, its manifest, and what each wants."""
    assert four.run(restore_shards, str(tmp_path)) == [4] * 4


def restore_differently(link: Link, path: str) -> None:
    state = every_kind(2)
    save(path, state)
    target = target_like(state)
    if link.rank == 1:  # in another order in memory, in which it must be copied
        target["model"]["large"] = torch.zeros(1000, 3000).t()
    if link.rank == 2:  # two targets in one memory, where the last one wins
        target["model"]["medium"] = target["model"]["large"].view(-1)[: 700 * 500].view(700, 500)
    if link.rank == 3:  # a stage of a pipeline
        target = {"model": {"large": target["model"]["large"]}, "name": ""}
    with CheckpointManager(path, 1, read_once=True) as manager:
        manager.restore(1, target)
    if link.rank == 2:
        target["model"]["large"] = state["model"]["large"]
    if link.rank == 3:
        state = {"model": {"large": state["model"]["large"]}, "name": state["name"]}
    assert_same(state, target)


def test_ranks_that_want_different_things_each_get_theirs(four: Crew, tmp_path: pathlib.Path) -> None:
    """Tensors elsewhere in memory, tied ones, a part of the keys: who cannot share reads for itself."""
    four.run(restore_differently, str(tmp_path))


def restore_by_the_word_of_rank_0(link: Link, path: str) -> list[int]:
    save(path, {"w": torch.ones(1000, 1000)})
    return [restore(path, {"w": torch.zeros(1000, 1000)}, read_once=link.rank == says) for says in (0, 1)]


def test_the_word_of_rank_0_counts(four: Crew, tmp_path: pathlib.Path) -> None:
    """Ranks that were told otherwise do as it does."""
    once, each = zip(*four.run(restore_by_the_word_of_rank_0, str(tmp_path)), strict=True)
    assert (sum(once), sum(each)) == (4_000_000, 16_000_000)


def restore_on_accelerator(link: Link, path: str) -> None:
    device = torch.accelerator.current_accelerator()
    state = replicas(1)
    state["large"] = [tensor.to(device) for tensor in state["large"]]
    state["small"] = {key: tensor.to(device) for key, tensor in state["small"].items()}
    save(path, state)
    target = target_like(state)
    for tensors in (target["large"], target["small"]):
        for key in range(len(tensors)) if isinstance(tensors, list) else tensors:
            tensors[key] = tensors[key].to(device)
    restore(path, target, read_once=True)
    assert_same(replicas(1)["medium"], target["medium"])
    assert all(torch.equal(a, b) for a, b in zip(state["large"], target["large"], strict=True))
    assert all(torch.equal(tensor, target["small"][key]) for key, tensor in state["small"].items())


@pytest.mark.gpu
def test_tensors_on_an_accelerator_come_through_page_locked_buffers(four: Crew, tmp_path: pathlib.Path) -> None:
    """Four ranks on one device; others on the CPU beside them."""
    four.run(restore_on_accelerator, str(tmp_path))


# -- failures


class Raised(NamedTuple):
    kind: str
    text: str
    rank: int | None


def raised_by(call: Callable[[], Any]) -> Raised:
    with pytest.raises(CheckpointError) as found:
        call()
    return Raised(type(found.value).__name__, str(found.value), found.value.rank)


def damage(path: pathlib.Path) -> None:
    """A byte in the middle of the data."""
    (file,) = path.glob("*-*/__0_0.distcp")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def restore_damaged(link: Link, path: str) -> list[Any]:
    with CheckpointManager(path, 1, read_once=True) as manager:
        if manager.all_steps() == []:
            for step in (1, 2):
                manager.save(step, replicas(step))
            return []
        target = target_like(replicas(0))
        found = [raised_by(lambda: manager.restore(2, target)), manager.restore_latest(target)]
        assert_same(replicas(1), target)
        return found


def test_damage_that_one_rank_reads_is_damage_on_all(four: Crew, tmp_path: pathlib.Path) -> None:
    """It names the file; all walk back to the step before."""
    four.run(restore_damaged, str(tmp_path))
    damage(tmp_path / "2")
    found = four.run(restore_damaged, str(tmp_path))
    assert [raised.kind for raised, _ in found] == ["DamagedStepError"] * 4
    assert [step for _, step in found] == [1] * 4
    (reader,) = (rank for rank, (raised, _) in enumerate(found) if "have CRC32" in raised.text)
    for rank, (raised, _) in enumerate(found):
        assert rank == reader or f"rank {reader} could not restore, see its error" in raised.text
        assert raised.rank == reader


def restore_from_broken_storage(link: Link, path: str) -> Raised:
    state = replicas(1)
    save(path, state)
    target = target_like(state)
    with CheckpointManager(path, 1, read_once=True) as manager:
        plain = manager._storage
        if link.rank == 2:
            manager._storage = FaultyStorage(plain, "read_into", nth=2)
        raised = raised_by(lambda: manager.restore(1, target))
        manager._storage = plain
        manager.restore(1, target)
    assert_same(state, target)
    return raised


def test_a_rank_whose_storage_fails_ends_the_restore_on_all_and_the_next_one_works(
    four: Crew, tmp_path: pathlib.Path
) -> None:
    """No rank is left in a collective."""
    for rank, raised in enumerate(four.run(restore_from_broken_storage, str(tmp_path))):
        assert (raised.kind, raised.rank) == ("RestoreError", 2)
        assert ("injected fault" in raised.text) == (rank == 2)


class SavedAnew(RecordingStorage):
    """Where another run saves the step anew just before the first read."""

    def __init__(self, inner: Storage, run: CheckpointManager) -> None:
        super().__init__(inner)
        self.run: CheckpointManager | None = run

    def read_into(self, *args: Any) -> None:
        if self.run is not None:
            run, self.run = self.run, None
            run.save(1, replicas(2))
            run.join()  # the old files are gone
        super().read_into(*args)


def restore_what_is_saved_anew(link: Link, path: str) -> None:
    save(path, replicas(1))
    alone = [dist.new_group([rank]) for rank in range(4)]
    target = target_like(replicas(1))
    with CheckpointManager(path, 1, read_once=True) as manager:
        if link.rank == 3:
            with CheckpointManager(path, 1, process_group=alone[3]) as another_run:
                manager._storage = SavedAnew(manager._storage, another_run)
                manager.restore(1, target)
        else:
            manager.restore(1, target)
    assert_same(replicas(2), target)


def test_a_step_saved_anew_while_ranks_read_it_is_read_again(four: Crew, tmp_path: pathlib.Path) -> None:
    """By all, and whole."""
    four.run(restore_what_is_saved_anew, str(tmp_path))


class Held(RecordingStorage):
    """Says that it was asked to read, and waits to be killed."""

    def __init__(self, inner: Storage, link: Link) -> None:
        super().__init__(inner)
        self._link = link

    def read_into(self, *args: Any) -> None:
        self._link.send("reading")
        self._link.receive()


def restore_beside_a_dying_rank(link: Link, path: str) -> Raised:
    with CheckpointManager(path, 1, read_once=True, timeout=20.0) as manager:
        manager.save(1, replicas(1))
        if link.rank == 1:
            manager._storage = Held(manager._storage, link)
        return raised_by(lambda: manager.restore(1, target_like(replicas(1))))


def test_a_rank_that_dies_while_it_reads_is_an_error_on_the_others(tmp_path: pathlib.Path) -> None:
    """At once, and the step is still there."""
    with Job(3, restore_beside_a_dying_rank, str(tmp_path)) as job:
        assert job.hear(1) == "reading"
        job.signal(1, signal.SIGKILL)
        for rank in (0, 2):
            raised = job.result(rank)
            assert raised.kind == "CheckpointError"
            assert "read once" in raised.text
    target = target_like(replicas(1))
    with CheckpointManager(str(tmp_path), 1) as manager:
        manager.restore(1, target)
    assert_same(replicas(1), target)


def own_values(rank: int) -> dict[str, Any]:
    return {"shared": torch.arange(50_000), "mine": PerRank({"rank": rank, "draws": torch.full((rank + 1,), rank)})}


def restore_own_values(link: Link, path: str) -> None:
    save(path, own_values(link.rank))
    target = {
        "shared": torch.zeros(50_000, dtype=torch.int64),
        "mine": PerRank(target_like(own_values(link.rank)["mine"].value)),
    }
    restore(path, target, read_once=True)
    assert_same(own_values(link.rank)["mine"].value, target["mine"].value)


def test_each_rank_keeps_its_own_values(four: Crew, tmp_path: pathlib.Path) -> None:
    """Which nobody else asks for."""
    four.run(restore_own_values, str(tmp_path))
