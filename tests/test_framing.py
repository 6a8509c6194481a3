"""Framing: the bytes around a payload are torch's own, and their CRC32s are right."""

from __future__ import annotations

import io
import os
import zipfile

import numpy as np
import pytest
import torch

from asyncckpt.framing import Layout, PayloadCrc, crc32, crc32_of_equal, encode_object, frame_of
from asyncckpt.shard import payload_view
from tests.states import DTYPES, raw_bytes, tensor_of


def item_of(tensor: torch.Tensor) -> bytes:
    frame, payload = frame_of(Layout.of(tensor)), bytes(payload_view(tensor))
    return frame.head + payload + frame.tail_with(crc32(payload))


LAYOUTS = {
    "matrix": torch.randn(3, 5),
    "transposed": torch.randn(5, 6).t(),
    "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "0-d": torch.tensor(7),
    "empty": torch.empty(0, 3),
    "one of a larger storage": torch.randn(9, 9)[3],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_item_is_a_valid_zip_that_torch_loads_with_the_same_stride(name: str) -> None:
    """Every layout: CRC32 fields right, bits and strides back."""
    tensor = LAYOUTS[name]
    item = item_of(tensor)
    with zipfile.ZipFile(io.BytesIO(item)) as archive:
        assert archive.testzip() is None
    loaded = torch.load(io.BytesIO(item), weights_only=True)
    assert loaded.stride() == tensor.stride()
    assert raw_bytes(loaded) == raw_bytes(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_item_differs_from_torch_save_only_in_the_serialization_id(dtype: torch.dtype) -> None:
    """Every dtype: same length, and the same records but torch's hash of the whole."""
    tensor = tensor_of(dtype, 3, 5)
    stock = io.BytesIO()
    torch.save(tensor, stock)
    ours, theirs = item_of(tensor), stock.getvalue()
    assert len(ours) == len(theirs)
    with zipfile.ZipFile(io.BytesIO(ours)) as a, zipfile.ZipFile(io.BytesIO(theirs)) as b:
        assert a.namelist() == b.namelist()
        different = [name for name in a.namelist() if a.read(name) != b.read(name)]
    assert different in ([], ["archive/.data/serialization_id"])


def test_a_frame_of_a_tensor_larger_than_4_gib_uses_zip64() -> None:
    """The lengths are known without the bytes: nothing of 6 GiB is written or read."""
    frame = frame_of(Layout("bfloat16", (3 * 2**30,), (1,)))
    assert frame.payload_bytes == 6 * 2**30
    assert frame.num_bytes == len(frame.head) + frame.payload_bytes + len(frame.tail)
    assert b"PK\x06\x06" in frame.tail


def test_a_crc32_of_blocks_is_the_crc32_of_the_whole() -> None:
    """Blocks of any size, empty ones too."""
    data = bytes(range(256)) * 41
    payload = PayloadCrc()
    for start in range(0, len(data), 1000):
        payload.add(crc32(data[start : start + 1000]), len(data[start : start + 1000]))
    assert (payload.value, payload.num_bytes) == (crc32(data), len(data))


def test_an_object_item_is_what_torch_save_writes() -> None:
    """Objects need no template."""
    assert torch.load(io.BytesIO(encode_object({"a": [1, 2]})), weights_only=True) == {"a": [1, 2]}


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 130, 480])
def test_checksums_of_many_items_are_those_of_their_bytes(count: int) -> None:
    """Of each item and of all together, from the payloads' alone; by tables where there are many."""
    frame = frame_of(Layout("float32", (5,), (1,)))
    payloads = [os.urandom(20) for _ in range(count)]
    items = [frame.head + payload + frame.tail_with(crc32(payload)) for payload in payloads]
    found = frame.item_crc32s(np.array([crc32(payload) for payload in payloads], np.uint32))
    assert found.tolist() == [crc32(item) for item in items]
    assert crc32_of_equal(found, frame.num_bytes) == crc32(b"".join(items))
