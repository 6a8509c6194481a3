"""CheckpointManager on real ranks: whatever layout saved a state, any other restores it bit for bit."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from asyncckpt import CheckpointManager, Merged, PerRank, ShardReader, ShardWriter, TrainState
from asyncckpt.chunks import payload_bytes_of
from asyncckpt.manifest import Manifest, decode_manifest
from tests.crew import Crew
from tests.layouts import own, parts, state_of, target_of, whole
from tests.processes import Link
from tests.states import assert_same, target_like, tensor_of


@pytest.fixture(scope="module")
def four() -> Iterator[Crew]:
    with Crew(4) as crew:
        yield crew


@pytest.fixture(scope="module")
def two() -> Iterator[Crew]:
    with Crew(2) as crew:
        yield crew


# -- layouts


def save_layouts(link: Link, path: str, seed: int) -> None:
    with CheckpointManager(path, 1) as manager:
        manager.save_async(1, state_of(seed, link.rank, dist.get_world_size()))


def restore_layouts(link: Link, path: str, seed: int, turned: bool, num_saved: int) -> list[str]:
    """What was warned of. num_saved: the ranks that saved."""
    world_size = dist.get_world_size()
    target = target_of(link.rank, world_size, turned=turned)
    before = dict(target["sharded"])
    with warnings.catch_warnings(record=True) as warned, CheckpointManager(path, 1) as manager:
        warnings.simplefilter("always")
        manager.restore(1, target, strict=True)  # other ranks' own values are not keys too many
    expected = state_of(seed, link.rank, world_size, turned=turned)
    assert parts(target) == parts(expected)
    assert all(target["sharded"][key] is tensor for key, tensor in before.items())
    assert target["nested"][0] == {"n": seed}
    assert_same(own(seed, link.rank % num_saved), target["mine"].value)
    return [str(warning.message) for warning in warned]


@pytest.fixture(scope="module")
def saved_by_four(four: Crew, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("four") / "run"
    four.run(save_layouts, str(path), 3)
    return path


@pytest.mark.parametrize("turned", [False, True])
def test_what_four_ranks_saved_four_ranks_restore(four: Crew, saved_by_four: pathlib.Path, turned: bool) -> None:
    """Into the same layouts and into others; every rank gets back its own values."""
    assert four.run(restore_layouts, str(saved_by_four), 3, turned, 4) == [[]] * 4


@pytest.mark.parametrize("turned", [False, True])
def test_what_four_ranks_saved_two_ranks_restore(two: Crew, saved_by_four: pathlib.Path, turned: bool) -> None:
    """Ranks 2 and 3 are gone; their own values stay where they are, and rank 0 says so."""
    warned = two.run(restore_layouts, str(saved_by_four), 3, turned, 4)
    assert [len(messages) for messages in warned] == [1, 0]
    assert "'mine' was saved by 4 ranks, and 2 restore it" in warned[0][0]


def test_what_two_ranks_saved_four_ranks_restore(two: Crew, four: Crew, tmp_path: pathlib.Path) -> None:
    """A rank that is new takes the own values of one that was there, and says so."""
    two.run(save_layouts, str(tmp_path), 4)
    warned = four.run(restore_layouts, str(tmp_path), 4, False, 2)
    assert [len(messages) for messages in warned] == [0, 0, 1, 1]
    assert "rank 3 was not there and takes rank 1's" in warned[3][0]


def one_target() -> dict[str, Any]:
    return {
        "sharded": target_like(whole(0)),
        "plain": torch.zeros(700, 600),
        "nested": [{"n": 0}, torch.zeros(3, dtype=torch.int64)],
    }


def one_truth(seed: int) -> dict[str, Any]:
    return {
        "sharded": whole(seed),
        "plain": tensor_of(torch.float32, 700, 600, seed=seed),
        "nested": [{"n": seed}, torch.arange(3) + seed],
    }


def test_what_four_ranks_saved_one_process_restores(saved_by_four: pathlib.Path) -> None:
    """Without a process group, into plain tensors."""
    target = one_target() | {"mine": PerRank(target_like(own(0, 0)))}
    with CheckpointManager(str(saved_by_four), 1) as manager:
        manager.verify(1)
        with pytest.warns(UserWarning, match="'mine' was saved by 4 ranks, and 1 restore it"):
            manager.restore(1, target, strict=True)
    assert_same(own(3, 0), target.pop("mine").value)
    assert_same(one_truth(3), target)


# -- stock DCP


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_stock_dcp_load_reads_in_one_process_what_four_ranks_saved(saved_by_four: pathlib.Path) -> None:
    """Every rank's own values, too, under their keys."""
    target = one_target() | {f"mine/rank_{rank}": target_like(own(0, rank)) for rank in range(4)}
    dcp.load(target, checkpoint_id=str(saved_by_four / "1"))
    assert_same(one_truth(3) | {f"mine/rank_{rank}": own(3, rank) for rank in range(4)}, target)


def load_with_stock_dcp(link: Link, path: str, seed: int, turned: bool) -> None:
    target = target_of(link.rank, 4, turned=turned)
    target[f"mine/rank_{link.rank}"] = target.pop("mine").value
    dcp.load(target, checkpoint_id=path)
    assert_same(own(seed, link.rank), target.pop(f"mine/rank_{link.rank}"))
    assert parts(target) == parts(state_of(seed, link.rank, 4, turned=turned))


def test_stock_dcp_load_reads_on_four_ranks_what_four_ranks_saved(four: Crew, saved_by_four: pathlib.Path) -> None:
    """Into the same layouts and into others."""
    for turned in (False, True):
        four.run(load_with_stock_dcp, str(saved_by_four / "1"), 3, turned)


def save_with_stock_dcp(link: Link, path: str, seed: int, use_shard_writer: bool) -> None:
    state = state_of(seed, link.rank, dist.get_world_size())
    state[f"mine/rank_{link.rank}"] = state.pop("mine").value
    dcp.save(state, storage_writer=ShardWriter(path) if use_shard_writer else None, checkpoint_id=path)


def test_what_four_ranks_saved_with_stock_dcp_is_restored(four: Crew, two: Crew, tmp_path: pathlib.Path) -> None:
    """A foreign step, on the same ranks and on fewer."""
    four.run(save_with_stock_dcp, str(tmp_path / "1"), 5, False)
    four.run(restore_layouts, str(tmp_path), 5, True, 4)
    two.run(restore_layouts, str(tmp_path), 5, False, 4)


def load_with_shard_reader(link: Link, path: str, seed: int) -> None:
    target = target_of(link.rank, 2, turned=True)
    target[f"mine/rank_{link.rank}"] = target.pop("mine").value
    dcp.load(target, storage_reader=ShardReader(path))
    assert_same(own(seed, link.rank), target.pop(f"mine/rank_{link.rank}"))
    assert parts(target) == parts(state_of(seed, link.rank, 2, turned=True))


def test_shard_writer_and_reader_serve_stock_save_and_load_on_two_ranks(two: Crew, tmp_path: pathlib.Path) -> None:
    """Saved twice: the second save replaces the first. The manager knows the step."""
    for seed in (6, 7):
        two.run(save_with_stock_dcp, str(tmp_path / "1"), seed, True)
        two.run(load_with_shard_reader, str(tmp_path / "1"), seed)
    assert len(list((tmp_path / "1").glob("manifest-*"))) == 1
    two.run(restore_layouts, str(tmp_path), 7, False, 2)


# -- who writes what


def manifest_of(step: pathlib.Path) -> Manifest:
    (path,) = step.glob("manifest-*.json")
    return decode_manifest(path.read_bytes())


def test_replicas_are_written_once_and_every_rank_writes_its_own_files(saved_by_four: pathlib.Path) -> None:
    """No byte of the state is stored twice."""
    chunks = manifest_of(saved_by_four / "1").chunks
    for key, num_chunks in {"plain": 1, "sharded.replicated": 1, "sharded.hybrid": 2, "sharded.rows": 4}.items():
        assert len([chunk for chunk in chunks if chunk.key == key]) == num_chunks, key
    stored = sum(
        payload_bytes_of(chunk.layout) for chunk in chunks if chunk.layout and chunk.key.startswith("sharded.")
    )
    assert stored == sum(tensor.nbytes for tensor in whole(3).values())
    assert {chunk.file.split("_")[2] for chunk in chunks} == {"0", "1", "2", "3"}
    for rank in range(4):
        assert {chunk.file for chunk in chunks if chunk.key == f"mine/rank_{rank}.draws"} == {f"__{rank}_0.distcp"}


# -- what each rank has for itself


class OwnRun:
    """A TrainState whose parts all differ by rank: random streams, data, a value and an object."""

    def __init__(self, rank: int, seed: int) -> None:
        torch.manual_seed(seed + rank)
        sampler = DistributedSampler(range(48), shuffle=True, seed=3)  # among as many as there are ranks
        self.host, self.seen = PerRank(f"host {seed + rank}"), PerRank(Seen())
        self.state = TrainState(
            dataloader=DataLoader(range(48), batch_size=2, sampler=sampler), host=self.host, seen=self.seen
        )  # fmt: skip

    def step(self) -> None:
        self.seen.value.samples += next(self.state.batches()).tolist()
        self.state.step += 1


class Seen:
    def __init__(self) -> None:
        self.samples: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples = state["samples"]


def save_own(link: Link, path: str) -> Any:
    """After three batches: (what this rank has, its next random number)."""
    run = OwnRun(link.rank, seed=10)
    for _ in range(3):
        run.step()
    with CheckpointManager(path) as manager:
        manager.save(2, run.state)
    return (run.host.value, run.seen.value.samples), torch.rand(()).item()


def restore_own(link: Link, path: str) -> Any:
    """(what this rank got, its next random number, its next batch, what was warned of)."""
    run = OwnRun(link.rank, seed=50)
    with warnings.catch_warnings(record=True) as warned, CheckpointManager(path) as manager:
        warnings.simplefilter("always")
        assert manager.restore_latest(run.state) == 2
    drawn, got = torch.rand(()).item(), (run.host.value, list(run.seen.value.samples))
    run.step()
    return got, drawn, run.seen.value.samples[-2:], [str(warning.message) for warning in warned]


def order(num_ranks: int, rank: int) -> list[int]:
    return list(DistributedSampler(range(48), num_ranks, rank, shuffle=True, seed=3))


def test_values_of_ranks_that_are_gone_stay_in_the_checkpoint(four: Crew, two: Crew, tmp_path: pathlib.Path) -> None:
    """Four to two: each rank has its own, rank 0 says what is left, and the data goes on after as many samples."""
    saved = four.run(save_own, str(tmp_path))
    for rank, (got, drawn, batch, warned) in enumerate(two.run(restore_own, str(tmp_path))):
        assert (got, drawn) == saved[rank]
        assert batch == order(2, rank)[12:14]
        left = [text for text in warned if "what 2 of them had, from rank 2 on, stays in the checkpoint" in text]
        assert sorted(text.split("'")[1] for text in left) == (
            ["dataloader", "host", "rng", "seen"] if rank == 0 else []
        )
        assert len(warned) == len(left) + 1
    # Nothing was lost by it: four ranks find all that they had.
    for rank, (got, drawn, batch, warned) in enumerate(four.run(restore_own, str(tmp_path))):
        assert (got, drawn, batch, warned) == (*saved[rank], order(4, rank)[6:8], [])


def test_ranks_that_were_not_there_take_turns_with_those_that_were(
    four: Crew, two: Crew, tmp_path: pathlib.Path
) -> None:
    """Two to four, in words; but no two ranks draw the same random numbers, or get the same data."""
    saved = two.run(save_own, str(tmp_path))
    found = four.run(restore_own, str(tmp_path))
    assert [got for got, *_ in found] == [saved[rank % 2][0] for rank in range(4)]
    assert [drawn for _, drawn, *_ in found[:2]] == [drawn for _, drawn in saved]
    assert len({drawn for _, drawn, *_ in found}) == 4
    for rank, (_, _, batch, warned) in enumerate(found):
        assert batch == order(4, rank)[2:4]
        assert "epoch 0 goes on at batch 1" in warned[-1]
        assert len(warned) == (1 if rank < 2 else 5)
        assert all(f"rank {rank} was not there and takes rank {rank - 2}'s" in text for text in warned[:-1])


def save_what_differs(link: Link, path: str) -> list[tuple[str, ...]]:
    rank, merged = link.rank, []
    state = {
        "same": {"n": 1, "w": torch.ones(3), "large": torch.full((100_000,), 2.0)},
        "own": {"n": rank, "options": ({"lr": 0.1 * rank},), "random": torch.tensor([rank])},
        "names": {f"name {number}" for number in range(20)},  # in another order in each process
        "mine": PerRank(rank),
    }
    sinks = [lambda event: merged.append(event.keys) if isinstance(event, Merged) else None]
    with CheckpointManager(path, 1, events=sinks) as manager:
        for step in range(2):
            manager.save(step, state)
        manager.restore(1, state)
    assert (state["own"]["n"], state["own"]["random"].item(), state["mine"].value) == (0, 0, rank)
    return merged


def test_values_that_differ_are_named_and_come_from_the_lowest_rank(four: Crew, tmp_path: pathlib.Path) -> None:
    """Once, by rank 0; DCP takes each from any rank, without a word."""
    first, *others = four.run(save_what_differs, str(tmp_path))
    assert first == [("own.n", "own.options", "own.random")]
    assert others == [[]] * 3


# -- elsewhere


def save_elsewhere(link: Link, url: str, options: dict[str, Any]) -> None:
    with CheckpointManager(url, 1, max_to_keep=1, storage_options=options) as manager:
        for step in range(3):
            manager.save_async(step, state_of(step, link.rank, 2))
        manager.join()
        assert manager.all_steps() == [2]
    with CheckpointManager(url, 1, storage_options=options) as manager:
        assert manager.all_steps() == [2]
        target = target_of(link.rank, 2, turned=True)
        assert manager.restore_latest(target) == 2
    assert parts(target) == parts(state_of(2, link.rank, 2, turned=True))


def test_ranks_save_to_s3_and_restore_from_it(two: Crew, s3_url: str, s3_options: dict[str, Any]) -> None:
    """Several saves with retention, and a restart."""
    two.run(save_elsewhere, s3_url, s3_options)


@pytest.mark.slow
def test_ranks_save_to_gcs_and_restore_from_it(two: Crew, gs_url: str, gs_options: dict[str, Any]) -> None:
    """The same on the emulator."""
    two.run(save_elsewhere, gs_url, gs_options)


ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = [sys.executable, "-W", "error", "-m", "tests.user_script"]


@pytest.mark.slow
def test_a_job_whose_store_is_on_rank_0_ends_without_a_word(tmp_path: pathlib.Path) -> None:
    """Without torchrun the store goes with rank 0, which must not leave while the others still need it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*SCRIPT, str(tmp_path), "1200"], env=os.environ | job | {"RANK": str(rank)}, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert said == [("training\nleft after step 1199\n", "")] * 2
    assert [process.returncode for process in ranks] == [0, 0]
    with CheckpointManager(str(tmp_path), 1) as manager:
        assert manager.all_steps() == [0, 1000]


@pytest.mark.slow
def test_torchrun_told_to_end_saves_the_step_at_which_all_ranks_left(tmp_path: pathlib.Path) -> None:
    """It passes SIGTERM on to the ranks; the next run goes on from there."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", *SCRIPT]
    as_user = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "cwd": ROOT, "text": True}
    with subprocess.Popen([*command, str(tmp_path), "1000000000"], stdout=subprocess.PIPE, **as_user) as job:
        assert job.stdout is not None
        try:
            assert [job.stdout.readline() for _ in range(2)] == ["training\n"] * 2
            job.terminate()
            left = job.stdout.read().splitlines()
            job.wait(120)
        finally:
            job.kill()
    step = int(left[0].removeprefix("left after step "))
    assert left == [f"left after step {step}"] * 2
    with CheckpointManager(str(tmp_path), 1) as manager:
        assert manager.latest_step() == step
    again = subprocess.run([*command, str(tmp_path), str(step + 3)], capture_output=True, check=True, **as_user)
    assert again.stdout == f"left after step {step + 2}\n" * 2
