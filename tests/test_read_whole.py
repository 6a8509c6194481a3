"""Whole tensors and objects: what is asked of storage, into which memory it goes, how much Python it takes."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from asyncckpt import CheckpointManager, DamagedStepError
from asyncckpt.read_whole import find_whole, read_whole
from asyncckpt.restore import OpenStep, open_step
from asyncckpt.storage import Storage, open_storage
from asyncckpt.testing import RecordingStorage
from tests.states import DTYPES, assert_same, every_kind, raw_bytes, target_like, tensor_of

MIB = 1 << 20


class Counting(RecordingStorage):
    """Keeps the bytes fetched, and the memory that ranges were read into."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.num_bytes = 0
        self.memory: list[tuple[int, int]] = []

    def read_file(self, path: str) -> bytes:
        data = super().read_file(path)
        self.num_bytes += len(data)
        return data

    def read_into(
        self, path: str, ranges: Sequence[tuple[int, memoryview]], filled: Callable[[int], None] | None = None
    ) -> None:
        for _, view in ranges:
            self.num_bytes += len(view)
            self.memory.append((torch.frombuffer(view, dtype=torch.uint8).data_ptr(), len(view)))
        super().read_into(path, ranges, filled)


def save(path: pathlib.Path, state: dict[str, Any]) -> None:
    with CheckpointManager(str(path), 1, chkpt_on_preemption=False) as manager:
        manager.save(1, state)


def restore(path: pathlib.Path, target: dict[str, Any]) -> Counting:
    with CheckpointManager(str(path), 1, chkpt_on_preemption=False) as manager:
        manager._storage = storage = Counting(manager._storage)
        manager.restore(1, target)
    return storage


def opened(path: pathlib.Path) -> tuple[Storage, OpenStep]:
    storage = open_storage(str(path))
    return storage, open_step(storage, "1")


def test_large_tensors_are_read_into_their_own_memory(tmp_path: pathlib.Path) -> None:
    """By address: no copy is made, and hardly a byte more is fetched than they hold."""
    state = {f"w{i}": tensor_of(torch.float32, 1500, 1000, seed=i) for i in range(4)}
    target = target_like(state)
    save(tmp_path, state)
    storage = restore(tmp_path, target)
    assert_same(state, target)
    blocks = [
        (w.data_ptr() + at, min(4 * MIB, w.nbytes - at)) for w in target.values() for at in range(0, w.nbytes, 4 * MIB)
    ]
    assert sorted(storage.memory) == sorted(blocks)
    assert storage.num_bytes <= 1.02 * sum(w.nbytes for w in target.values())
    assert storage.count("read_into") == 1


def test_small_tensors_are_few_calls_of_bounded_memory(tmp_path: pathlib.Path) -> None:
    """Neighbours come in runs of 4 MiB, and no more than 16 MiB of them in one call."""
    state = {f"w{i}": torch.full((1024,), float(i)) for i in range(5000)}
    target = target_like(state)
    save(tmp_path, state)
    storage = restore(tmp_path, target)
    assert_same(state, target)
    assert storage.count("read_into") == 2
    assert 6 <= len(storage.memory) <= 9
    assert max(size for _, size in storage.memory) <= 4 * MIB + 4096


def test_one_tensor_costs_its_bytes_and_the_index(tmp_path: pathlib.Path) -> None:
    """Of a state that is a hundred times larger."""
    state = {f"w{i}": tensor_of(torch.float32, 100, 1000, seed=i) for i in range(100)}
    save(tmp_path, state)
    (manifest,) = tmp_path.glob("1/manifest-*")
    target = {"w7": torch.zeros(100, 1000)}
    storage = restore(tmp_path, target)
    assert torch.equal(target["w7"], state["w7"])
    assert storage.num_bytes == manifest.stat().st_size + 400_000


def test_python_calls_per_tensor_are_few(tmp_path: pathlib.Path) -> None:
    """Counted, Python's and C's, as the growth from 1000 tensors to 2000: no planner, no object per item of DCP's."""

    def count(num_tensors: int) -> int:
        path = tmp_path / str(num_tensors)
        state = {f"layers.{i}.w": torch.full((1024,), float(i)) for i in range(num_tensors)}
        save(path, state)
        target, calls = target_like(state), Counter[str]()

        def profile(frame: Any, event: str, argument: Any) -> None:
            calls[event] += 1

        with CheckpointManager(str(path), 1, chkpt_on_preemption=False) as manager:
            threading.setprofile(profile)
            sys.setprofile(profile)
            try:
                manager.restore(1, target)
            finally:
                sys.setprofile(None)
                threading.setprofile(None)  # type: ignore[arg-type]
        assert_same(state, target)
        return calls["call"] + calls["c_call"]

    assert (count(2000) - count(1000)) / 1000 < 36


@pytest.mark.parametrize("saved_tied", [True, False])
@pytest.mark.parametrize("target_tied", [True, False])
@pytest.mark.parametrize("size", [100, 300_000])
def test_tied_tensors(tmp_path: pathlib.Path, size: int, saved_tied: bool, target_tied: bool) -> None:
    """Tied when saved, in the target, in both or in neither; small, and large ones that are read in place. Where values
    that differ meet in one memory the last key has it."""
    first = tensor_of(torch.float32, size, seed=1)
    state = {"a": first, "b": first if saved_tied else tensor_of(torch.float32, size, seed=2)}
    save(tmp_path, state)
    a = torch.zeros(size)
    target = {"a": a, "b": a if target_tied else torch.zeros(size)}
    storage = restore(tmp_path, target)
    assert torch.equal(target["b"], state["b"])
    assert torch.equal(target["a"], state["b"] if target_tied else state["a"])
    if saved_tied and target_tied and size > 1000:
        assert sum(length for _, length in storage.memory) == 4 * size


def test_a_view_that_shares_memory_with_another_target_never_meets_it(tmp_path: pathlib.Path) -> None:
    """A tensor and its transposed self, saved as two: one is read after the other."""
    state = {"w": tensor_of(torch.float32, 700, 600, seed=1), "t": tensor_of(torch.float32, 600, 700, seed=2)}
    save(tmp_path, state)
    w = torch.zeros(700, 600)
    restore(tmp_path, {"w": w, "t": w.t()})
    assert torch.equal(w.t(), state["t"])


def test_targets_of_every_kind_of_memory(tmp_path: pathlib.Path) -> None:
    """Dense, strided, conjugated, negated, of a parameter, of another order, empty, of every dtype."""
    plain = tensor_of(torch.float32, 40, 60)
    state = {
        **{str(dtype): tensor_of(dtype, 40, 60) for dtype in DTYPES},
        **{f"large {dtype}": tensor_of(dtype, 400, 300) for dtype in DTYPES},
        "transposed": plain.t(), "kept transposed": plain.t(), "columns": plain, "parameter": plain,
        "conjugated": tensor_of(torch.complex64, 5, 6), "negated": tensor_of(torch.float64, 5, 6),
        "empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "one row": plain[:1].clone(),
    }  # fmt: skip
    save(tmp_path, state)
    target = {key: torch.zeros_like(value) for key, value in state.items()}
    target |= {
        "transposed": torch.zeros(60, 40), "kept transposed": torch.zeros(40, 60).t(),
        "columns": torch.zeros(40, 120)[:, ::2], "parameter": torch.nn.Parameter(torch.zeros(40, 60)),
        "conjugated": torch.zeros(5, 6, dtype=torch.complex64).conj(),
        "negated": torch.zeros(5, 6, dtype=torch.complex128).conj().imag,
        "one row": torch.zeros(60, 1).t(),
    }  # fmt: skip
    memory = {key: value.data_ptr() for key, value in target.items()}
    before = dict(target)
    restore(tmp_path, target)
    for key in state:
        assert target[key] is before[key]
        assert target[key].data_ptr() == memory[key]
        assert raw_bytes(target[key].resolve_conj().resolve_neg()) == raw_bytes(state[key]), key
    assert target["conjugated"].is_conj()
    assert target["negated"].is_neg()
    assert target["parameter"].requires_grad


@pytest.mark.parametrize("key", ["small.250", "large", "name"])
def test_damage_is_reported_to_the_byte(tmp_path: pathlib.Path, key: str) -> None:
    """File, key, offset, what was found and what was expected: among small neighbours, in a block, in an object."""
    state = {
        **{f"small.{i}": torch.full((100,), float(i)) for i in range(500)},
        "large": torch.randn(2500, 1000),
        "name": "x",
    }
    save(tmp_path, state)
    _, step = opened(tmp_path)
    assert step.manifest is not None
    (chunk,) = (chunk for chunk in step.manifest.chunks if chunk.key == key)
    block = 2 if key == "large" else 0
    at = chunk.payload_offset + block * 4 * MIB
    path = tmp_path / step.data_folder / chunk.file
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    size = {"large": 10_000_000 - 8 * MIB, "small.250": 400}.get(key, chunk.length)
    expected = (
        f"{step.data_folder}/{chunk.file} at .* the {size} bytes of '{key}' at offset {at} have CRC32 [0-9a-f]{{8}}, "
    )
    with pytest.raises(DamagedStepError, match=f"{expected}the manifest says {chunk.block_crcs[block]:08x}"):
        restore(tmp_path, target_like(state))


def test_a_tensor_that_was_saved_in_pieces_is_left_to_the_planner(tmp_path: pathlib.Path) -> None:
    """As are classes of other people's; what is whole does not wait for them."""

    class Special(torch.Tensor):
        pass

    save(tmp_path, {"w": torch.randn(10), "special": torch.randn(10), "n": 3})
    _, step = opened(tmp_path)
    assert step.manifest is not None
    wanted = {"w": torch.zeros(10), "special": torch.zeros(10).as_subclass(Special), "n": 0}
    whole, rest = find_whole(step.manifest, step.keys, wanted)
    assert whole.keys == ["w", "n"]
    assert rest.keys() == {"special"}


def test_an_accelerator_gets_its_bytes_through_buffers(tmp_path: pathlib.Path) -> None:
    """The way to tensors that storage cannot write to, here with the CPU in the accelerator's place."""
    state = every_kind(1)["model"] | every_kind(1)["dtypes"]
    save(tmp_path, state)
    storage, step = opened(tmp_path)
    assert step.manifest is not None
    target = target_like(state)
    whole, rest = find_whole(step.manifest, step.keys, target)
    assert not rest
    elsewhere = dataclasses.replace(whole, on_cpu=torch.zeros(len(whole.keys), dtype=torch.bool).numpy())
    counting = Counting(storage)
    read_whole(counting, step.data_folder, elsewhere)
    assert_same(state, target)
    mine = {tensor.data_ptr() for tensor in target.values()}
    assert not mine & {address for address, _ in counting.memory}
    assert sum(size for _, size in counting.memory if size == 4 * MIB) == 8 * MIB
