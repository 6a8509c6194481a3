"""A model's weights out of a step, without anything else of it, on this process alone.

Into what the model has, wherever that is, or, for a model on the meta device, into new tensors. Decides nothing about
steps. Called by checkpoint.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.tensor import DTensor

from asyncckpt.chunks import Key
from asyncckpt.errors import UNCHANGED, StateMismatchError
from asyncckpt.lookup import read_value
from asyncckpt.named_state import ModuleState
from asyncckpt.restore import OpenStep, join, prepare, read
from asyncckpt.storage import Storage

CAST_BYTES = 256 << 20
"""Of tensors in another dtype, read before they are converted; a single larger one is read alone."""


class LoadedWeights(NamedTuple):
    """As torch's `load_state_dict` returns it. missing_keys: of the model, not in the checkpoint; unexpected_keys: the
    other way round. Names of the model, without the prefix."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_weights(
    storage: Storage,
    step: OpenStep,
    model: nn.Module,
    *,
    prefix: str,
    strict: bool,
    cast: bool,
    safe_globals: Iterable[Any],
) -> LoadedWeights:
    """As of `Checkpoint.load_weights`."""
    start = f"{prefix}." if prefix else ""
    live = {f"{start}{name}": value for name, value in ModuleState(model, StateDictOptions()).get().items()}
    owners = dict(zip(live, model.state_dict(keep_vars=True).items(), strict=True))
    extra = {key: _below(step, key) for key, value in live.items() if not isinstance(value, torch.Tensor)}
    missing = [key for key in live if key not in step.keys and not extra.get(key)]
    used = {*live, *(below for keys in extra.values() for below in keys)}
    unexpected = [key for key in step.keys if key.startswith(start) and key not in used]
    made = _made({key: owner for key, (_, owner) in owners.items() if key in step.keys})
    where = f"the checkpoint at {join(storage.url, step.folder)}"
    if strict:
        _check(where, missing, unexpected, _left_on_meta(model, made))
    states = {owners[key][0]: read_value(storage, step, key, safe_globals=safe_globals) for key in extra if extra[key]}
    found = {key: made.get(id(owners[key][1]), value) for key, value in live.items() if key not in extra}
    found = {key: value for key, value in found.items() if key in step.keys}
    other = {key: value for key, value in found.items() if _is_other(value, step.keys[key])}
    if other and not cast:
        lines = (f"{key!r}: torch.{step.keys[key].dtype}, {value.dtype} in the model" for key, value in other.items())
        raise StateMismatchError(
            f"{where} has {len(other)} tensors in another dtype; cast=True converts them\n  " + "\n  ".join(lines),
            outcome=UNCHANGED,
        )
    _read(storage, step, {key: value for key, value in found.items() if key not in other})
    for batch in _batches(other):
        as_saved = {key: torch.empty_like(value, dtype=_dtype_of(step.keys[key])) for key, value in batch.items()}
        _read(storage, step, as_saved)
        with torch.no_grad():
            for key, value in batch.items():
                value.copy_(as_saved[key])
    _put_in_place(model, made)
    if states:
        model.load_state_dict(states, strict=False)
    return LoadedWeights([key[len(start) :] for key in missing], [key[len(start) :] for key in unexpected])


def _below(step: OpenStep, key: str) -> list[str]:
    """The keys of an extra state: a dict is saved as several."""
    return [found for found in step.keys if found == key or found.startswith(f"{key}.")]


def _read(storage: Storage, step: OpenStep, target: dict[str, Any]) -> None:
    read(storage, prepare(storage, step, target, is_coordinator=True, load_planner=None, safe_globals=()))


def _check(where: str, missing: list[str], unexpected: list[str], left: list[str]) -> None:
    lines = [f"missing in the checkpoint: {key!r}" for key in missing]
    lines += [f"not in the model: {key!r}" for key in unexpected]
    lines += [f"on the meta device, and in no checkpoint: the buffer {name!r}" for name in left]
    if lines:
        raise StateMismatchError(
            f"{where} does not fit the model, {len(lines)} keys differ; strict=False loads the others\n  "
            + "\n  ".join(lines),
            outcome=UNCHANGED,
        )


def _made(owners: Mapping[str, Any]) -> dict[int, torch.Tensor]:
    """{id of a parameter or buffer on the meta device: a new tensor on the CPU}. Tied ones are one, and stay so."""
    on_meta = [owner for owner in owners.values() if isinstance(owner, torch.Tensor) and owner.is_meta]
    if any(isinstance(owner, DTensor) for owner in on_meta):
        raise StateMismatchError(
            "the model has DTensors on the meta device: call model.to_empty(device=...) first", outcome=UNCHANGED
        )
    return {id(owner): torch.empty(owner.shape, dtype=owner.dtype) for owner in on_meta}


def _left_on_meta(model: nn.Module, made: Mapping[int, torch.Tensor]) -> list[str]:
    """Buffers that no state dict has, of a model that is loaded from the meta device."""
    saved = {id(owner) for owner in model.state_dict(keep_vars=True).values()}
    return [name for name, buffer in model.named_buffers() if made and buffer.is_meta and id(buffer) not in saved]


def _dtype_of(key: Key) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, key.dtype or "")
    return dtype


def _is_other(value: Any, saved: Key) -> bool:
    """And of the same shape."""
    return (
        isinstance(value, torch.Tensor)
        and saved.dtype is not None
        and saved.shape == tuple(value.shape)
        and f"torch.{saved.dtype}" != str(value.dtype)
    )


def _batches(tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    batch: dict[str, torch.Tensor] = {}
    room = CAST_BYTES
    for key, tensor in tensors.items():
        if batch and tensor.nbytes > room:
            yield batch
            batch, room = {}, CAST_BYTES
        batch[key] = tensor
        room -= tensor.nbytes
    if batch:
        yield batch


def _put_in_place(model: nn.Module, made: Mapping[int, torch.Tensor]) -> None:
    """Give the modules their new tensors, as `load_state_dict(assign=True)` does, but what was tied stays tied."""
    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules() if made else ():
        for name, parameter in module._parameters.items():
            if parameter is not None and (tensor := made.get(id(parameter))) is not None:
                new = parameters.setdefault(id(parameter), nn.Parameter(tensor, requires_grad=parameter.requires_grad))
                module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None and (tensor := made.get(id(buffer))) is not None:
                module._buffers[name] = tensor
