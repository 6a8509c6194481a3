"""SafetensorsFile: byte for byte what the safetensors package writes, and no more than it takes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save, save_file

from asyncckpt.safetensors_file import _KINDS, Kind, SafetensorsFile, header_of


def written(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    file = SafetensorsFile(tensors, metadata)
    data = b"".join(file.views())
    assert len(data) == file.size
    return data


def of_dtype(name: str, *shape: int) -> torch.Tensor:
    dtype = getattr(torch, name)
    raw = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8)
    return raw.view(torch.uint8 if name == "bool" else dtype).reshape(shape).to(dtype)


tensors = st.dictionaries(
    st.text(max_size=6).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from([name for _, name in _KINDS]), st.lists(st.integers(0, 4), max_size=3)).map(
        lambda kind: of_dtype(kind[0], *kind[1])
    ),
    max_size=6,
)


@settings(max_examples=50, deadline=None)
@given(tensors, st.one_of(st.none(), st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1, max_size=1)))
def test_a_file_is_byte_for_byte_what_the_package_writes(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None
) -> None:
    """Order, padding, escapes of names, offsets; one entry of metadata, as the package writes several in any order
    (and none at all, of no tensors, as broken JSON)."""
    assert written(tensors, metadata) == save(tensors, metadata)


def test_every_dtype_lies_in_the_packages_order() -> None:
    """All that torch and the format both have."""
    kinds = [name for _, name in _KINDS]
    random.Random(0).shuffle(kinds)
    tensors = {f"x{number}": of_dtype(name, 3) for number, name in enumerate(kinds)}
    assert written(tensors) == save(tensors)


def test_stock_safetensors_loads_what_it_writes(tmp_path: Path) -> None:
    """bf16, fp8, bool, no dimension, no element."""
    tensors = {
        "a.weight": torch.randn(3, 4).to(torch.bfloat16), "a.scale": torch.tensor(2.0), "mask": torch.ones(5) > 0,
        "f8": torch.ones(7).to(torch.float8_e4m3fn), "none": torch.empty(0, 3),
    }  # fmt: skip
    (tmp_path / "m.safetensors").write_bytes(written(tensors, {"format": "pt"}))
    loaded = load_file(tmp_path / "m.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(loaded[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert all(torch.equal(loaded[name].view(-1).view(torch.uint8), t.view(-1).view(torch.uint8))
               for name, t in tensors.items())  # fmt: skip


def test_several_entries_of_metadata_are_kept_in_their_order() -> None:
    """The package writes them in a new order each time; a file that is written again is to be the same."""
    metadata = {"format": "pt", "a": "1", "b": "2"}
    data = written({"x": torch.ones(1)}, metadata)
    assert list(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]) == list(metadata)
    assert torch.equal(load(data)["x"], torch.ones(1))


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"c": torch.ones(2, dtype=torch.complex128)}, "complex128"),
        ({"s": torch.eye(3).to_sparse()}, "sparse"),
        ({"t": torch.ones(3, 4).t()}, "contiguous"),
        ({"n": 3}, "no tensor"),
        ({"__metadata__": torch.ones(1)}, "__metadata__"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_in_words(tensors: dict[str, torch.Tensor], why: str) -> None:
    """Before a byte is written."""
    with pytest.raises(ValueError, match=why):
        SafetensorsFile(tensors)


def test_tensors_in_one_memory_are_refused_as_the_package_does(tmp_path: Path) -> None:
    """Each would be stored by itself, and no longer be tied."""
    base = torch.ones(10)
    shared = {"a": base, "b": base[5:]}
    with pytest.raises(RuntimeError, match="share memory"):
        save_file(shared, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="'a' and 'b' share memory"):
        SafetensorsFile(shared)
    SafetensorsFile({"a": base[:5], "b": base[5:]})  # side by side is no sharing, to the package neither
    save_file({"a": base[:5], "b": base[5:]}, tmp_path / "y.safetensors")


def test_the_size_of_a_file_is_known_from_dtypes_and_shapes_alone() -> None:
    """For an export, before a tensor is read."""
    kinds = {"a": Kind(torch.float32, (10**6, 10**6)), "b": Kind(torch.bool, ())}
    header = header_of(kinds)
    assert header.size == len(header.data) + 4 * 10**12 + 1
    assert header.names == ["a", "b"]
