"""TorchFile: the bytes that torch.save writes, read by stock torch.load in all its ways."""

from __future__ import annotations

import io
import mmap
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from asyncckpt.framing import BLOCK_BYTES
from asyncckpt.shard import payload_view
from asyncckpt.torch_file import TorchFile

DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8,
    torch.bool, torch.complex64,
]  # fmt: skip


def written(obj: Any) -> bytes:
    file = TorchFile(obj)
    data = b"".join(file.views())
    assert len(data) == file.size
    return data


def saved(obj: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def records(data: bytes) -> dict[str, bytes]:
    """All but the one that nothing reads back; ValueError if a CRC32 does not hold."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("serialization_id")}


tensors = st.builds(
    lambda shape, dtype, seed: (
        torch.randint(
            0, 255, (*shape, dtype.itemsize), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        )
        .view(torch.uint8 if dtype is torch.bool else dtype)
        .reshape(shape)
        .to(dtype)
    ),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5), st.binary())
states = st.recursive(
    st.one_of(plain, tensors, tensors.map(lambda tensor: tensor.t() if tensor.dim() == 2 else tensor)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.text(max_size=4), st.integers()), inner, max_size=4),
    ),
    max_leaves=12,
)


@settings(max_examples=40, deadline=None)
@given(states)
def test_any_nested_state_is_what_torch_saves_but_for_the_id_that_nothing_reads(state: Any) -> None:
    """Record by record, with CRC32s that hold, and of the same length."""
    data, expected = written(state), saved(state)
    assert records(data) == records(expected)
    assert len(data) == len(expected)


def test_stock_torch_reads_it_mapped_and_without_running_code(tmp_path: Path) -> None:
    """mmap=True and weights_only=True, for large and small tensors, empty ones and objects."""
    state = {
        "large": torch.randn(3 * BLOCK_BYTES // 4 + 1),
        "nested": [torch.ones(3), {"n": 1}],
        "none": torch.empty(0),
    }
    (tmp_path / "state.pt").write_bytes(written(state))
    loaded = torch.load(tmp_path / "state.pt", mmap=True, weights_only=True)
    assert torch.equal(loaded["large"], state["large"])
    assert torch.equal(loaded["nested"][0], torch.ones(3))
    assert loaded["nested"][1] == {"n": 1}
    assert loaded["none"].shape == (0,)


def test_a_storage_that_tensors_share_is_written_once_and_shared_again() -> None:
    """A base and views of it: the whole storage, as torch.save has it."""
    base = torch.arange(1000.0)
    data = written({"base": base, "head": base[:10], "tail": base[990:]})
    assert len(data) < 2 * base.nbytes
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    loaded["base"][995] = -1.0
    assert loaded["tail"][5] == -1.0


def test_a_strange_order_of_memory_and_a_parameter_come_back_as_they_were() -> None:
    """Transposed: the same strides; a Parameter stays one."""
    state = {"t": torch.randn(4, 5).t(), "p": torch.nn.Parameter(torch.ones(3))}
    loaded = torch.load(io.BytesIO(written(state)), weights_only=True)
    assert loaded["t"].stride() == state["t"].stride()
    assert torch.equal(loaded["t"], state["t"])
    assert isinstance(loaded["p"], torch.nn.Parameter)


def test_the_tensors_memory_is_given_out_and_not_copied() -> None:
    """Every view of a large payload lies in the tensor's own memory."""
    tensor = torch.randn(2 * BLOCK_BYTES)
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    addresses = [np.frombuffer(view, np.uint8).ctypes.data for view in TorchFile(tensor).views()]
    assert sum(start <= address < end for address in addresses) == len(addresses) - 2


def test_a_file_may_be_streamed_twice() -> None:
    """A write that failed is tried again."""
    file = TorchFile({"a": torch.randn(100), "b": torch.randn(7)})
    assert b"".join(file.views()) == b"".join(file.views())


def test_the_size_of_a_file_above_4_gib_is_known_without_its_bytes() -> None:
    """Zip64: 5 TiB of fake tensors, whose payloads are given by nobody."""
    with FakeTensorMode():
        file = TorchFile({"huge": torch.empty(5 * 2**40, dtype=torch.uint8), "small": torch.empty(3)})
    assert file.size > 5 * 2**40


@pytest.mark.slow
def test_a_file_above_4_gib_carries_crc32s_that_hold(tmp_path: Path) -> None:
    """Zip64's descriptors and directory, read by Python's zipfile and by torch. The payload is one page of memory."""
    num_bytes = 4 * 2**30 + 12345
    page = memoryview(bytes(range(256)) * 4096)

    def in_pages(num_bytes: int) -> Iterator[memoryview]:
        return (page[: num_bytes - at] for at in range(0, num_bytes, len(page)))

    with FakeTensorMode():
        state = {"huge": torch.empty(num_bytes, dtype=torch.uint8), "small": torch.empty(4, dtype=torch.uint8)}
        file = TorchFile(state, payloads=lambda slots: ((None, in_pages(slot.storage.nbytes())) for slot in slots))
    path = tmp_path / "huge.pt"
    with path.open("wb") as out:
        out.writelines(file.views())
    assert path.stat().st_size == file.size
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert loaded["huge"][-1] == (num_bytes - 1) % 256
    assert loaded["small"].tolist() == [0, 1, 2, 3]


def test_fake_tensors_take_the_place_of_tensors_whose_bytes_come_later() -> None:
    """The same as of the real ones but for how the pickle spells it; no memory of theirs is needed at once."""
    real = {"a": torch.randn(3, 4), "b": [torch.ones(2, dtype=torch.bfloat16)], "n": 3, "e": torch.empty(0)}
    with FakeTensorMode():
        fake = {"a": torch.empty(3, 4), "b": [torch.empty(2, dtype=torch.bfloat16)], "n": 3, "e": torch.empty(0)}
        payloads = {fake["a"].untyped_storage()._cdata: real["a"], fake["b"][0].untyped_storage()._cdata: real["b"][0]}
        file = TorchFile(
            fake, payloads=lambda slots: ((None, [payload_view(payloads[s.storage._cdata])]) for s in slots)
        )
    data = b"".join(file.views())
    assert {**records(data), "archive/data.pkl": b""} == {**records(written(real)), "archive/data.pkl": b""}
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    assert torch.equal(loaded["a"], real["a"])
    assert torch.equal(loaded["b"][0], real["b"][0])


def test_a_tensor_over_mapped_memory_is_written_with_the_memory_it_shows() -> None:
    """Staged tensors lie in one large buffer, each with a storage of its own."""
    memory = mmap.mmap(-1, 1 << 20)
    tensor = torch.frombuffer(memory, dtype=torch.float32, count=10, offset=4096)
    assert len(written({"t": tensor})) < 4096
    del tensor
