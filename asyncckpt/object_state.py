"""Python state in a checkpoint: as one object, or, where it may hold large tensors, as tensors plus one object.

An object is a 1-tuple around plain values. DCP takes a tuple for a leaf, so that empty dicts, int keys and nested lists
come back as they were; dicts it takes apart, and then loses or renames these. Called by train_state.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from asyncckpt.named_state import SavedKeys
from asyncckpt.per_rank import PerRank


def pack(value: Any) -> tuple[Any]:
    """`value` as one object: a copy of its containers, tensors on the CPU, numpy's scalars as Python's."""
    return (_map(value, lambda _, leaf: leaf.detach().cpu() if isinstance(leaf, torch.Tensor) else leaf),)


def unpack(entry: Any) -> Any:
    """The value; a copy, so that one loaded state may be used twice."""
    return copy.deepcopy(entry[0])


def is_stateful(value: Any) -> bool:
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


class ObjectState:
    """The state of a registered object, loaded back exactly as its state_dict() gave it, or of a PerRank's value.

    {"values": one object, "tensors": {path: tensor}}: each tensor is a key of its own, so that it is staged, written
    and checked like a parameter. An empty tensor in the object marks the place of each.
    """

    def __init__(self, holder: Any) -> None:
        self._holder = holder

    def get(self) -> dict[str, Any]:
        value = self._value()
        tensors: dict[str, torch.Tensor] = {}
        values = _map(value.state_dict() if is_stateful(value) else value, lambda p, leaf: _take(p, leaf, tensors))
        return {"values": (values,), **({"tensors": tensors} if tensors else {})}

    def fit(self, entry: dict[str, Any], saved: SavedKeys, prefix: str) -> None:
        """Ask for the tensors that were saved: into ours where they fit, else into new ones."""
        ours = entry.pop("tensors", {})
        for key, kind in saved.items():
            if key.startswith(f"{prefix}tensors.") and isinstance(kind, TensorStorageMetadata):
                path = key.removeprefix(f"{prefix}tensors.")
                entry.setdefault("tensors", {})[path] = _fitting(ours.get(path), kind)

    def load(self, entry: Mapping[str, Any]) -> None:
        tensors = entry.get("tensors", {})
        state = _map(
            unpack(entry["values"]),
            lambda path, leaf: tensors[_join(path)] if isinstance(leaf, torch.Tensor) else leaf,
        )
        value = self._value()
        if is_stateful(value):
            value.load_state_dict(state)
        else:
            self._holder.value = state

    def _value(self) -> Any:
        return self._holder.value if isinstance(self._holder, PerRank) else self._holder


def _fitting(tensor: torch.Tensor | None, kind: TensorStorageMetadata) -> torch.Tensor:
    if isinstance(tensor, DTensor):
        return tensor  # sharding has no other source than ours; another shape will be an error
    same = tensor is not None and tensor.shape == kind.size and tensor.dtype == kind.properties.dtype
    if tensor is not None and same and tensor.is_contiguous():  # an expanded one cannot be filled
        return tensor
    return torch.empty(kind.size, dtype=kind.properties.dtype, device="cpu" if tensor is None else tensor.device)


def _map(value: Any, leaf: Callable[[tuple[Any, ...], Any], Any], path: tuple[Any, ...] = ()) -> Any:
    """`value` with new containers, and leaf(path, value) at each leaf; numpy's scalars, which need pickle, as
    Python's."""
    if isinstance(value, dict):
        copied = copy.copy(value)  # stays a Counter or an OrderedDict
        for key, item in value.items():
            copied[key] = _map(item, leaf, (*path, key))
        return copied
    if type(value) in (list, tuple):
        return type(value)(_map(item, leaf, (*path, index)) for index, item in enumerate(value))
    return leaf(path, value.item() if isinstance(value, np.generic) else value)


def _join(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path)) or "value"


def _take(path: tuple[Any, ...], leaf: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if _join(path) in tensors:
        raise ValueError(f"two tensors of a registered object have the path {_join(path)!r}; rename a key")
    tensors[_join(path)] = leaf
    return torch.empty(0)
