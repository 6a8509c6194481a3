"""One optimizer's state under its parameters' names: DCP's, without what DCP does to the optimizer on the way.

DCP steps an optimizer that has no state (hooks fire, counters start at 1), drops the state of frozen parameters when it
loads, and torch casts loaded state to the parameter's dtype. Called by train_state.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Optimizer

from asyncckpt.errors import StateMismatchError

SavedKeys: TypeAlias = Mapping[str, TensorStorageMetadata | BytesStorageMetadata]


def get_state(model: nn.Module, optimizer: Optimizer, options: StateDictOptions) -> dict[str, Any]:
    """{"state": {fqn: {key: live tensor or value}}, "param_groups": [...]}; flat if `options` ask for that."""
    known = set(map(id, model.parameters()))
    if any(id(param) not in known for param in _params(optimizer)):
        raise ValueError(
            f"{type(optimizer).__name__} has a parameter that is in no model of the TrainState, so its state has no "
            "name. Give the TrainState every module whose parameters it optimizes."
        )
    with _left_alone(optimizer):
        osd = dict(get_optimizer_state_dict(model, optimizer, options=options))
    if "state" in osd:
        scratch = ("al",) if isinstance(optimizer, LBFGS) else ()  # of one step, as long as the whole history
        entries: Any = osd["state"]
        # Copied, because torch hands out the live dicts, and a load sets values in what we return.
        osd["state"] = {fqn: {k: v for k, v in s.items() if k not in scratch} for fqn, s in entries.items() if s}
    return osd


def fit_to_checkpoint(osd: dict[str, Any], optimizer: Optimizer, saved: SavedKeys, prefix: str) -> None:
    """Make `osd`, from `get_state`, ask for the state that a checkpoint has under `prefix`, no more and no less.

    A parameter without state in the checkpoint had none yet; for state that is there and not yet here (LBFGS's history,
    momentum of SGD with dampening, a parameter frozen by now) tensors are allocated.
    """
    if "param_groups" not in osd:
        return  # flattened for pipeline parallelism: keys only of what is here
    _fit_groups(osd["param_groups"], optimizer, saved, f"{prefix}param_groups.")
    fqns = chain.from_iterable(group["params"] for group in osd["param_groups"])
    params = dict(zip(fqns, _params(optimizer), strict=True))
    found: dict[str, dict[str, Any]] = {}
    for key, entry in saved.items():
        if key.startswith(f"{prefix}state."):
            fqn, path = _split_fqn(key.removeprefix(f"{prefix}state."), params)
            found.setdefault(fqn, {})[path] = entry
    state = osd["state"]
    for fqn, param in params.items():
        if fqn in found:
            state[fqn] = _fit_entry(state.get(fqn, {}), found[fqn], param)
        else:
            state.pop(fqn, None)


def load_state(model: nn.Module, optimizer: Optimizer, osd: Mapping[str, Any], options: StateDictOptions) -> None:
    """Load what `get_state` gave, in this process or another. State and options that are tensors already stay the same
    tensors, as a captured graph may hold them, and keep their dtype."""
    live = {param: dict(entry) for param, entry in optimizer.state.items()}
    groups = [dict(group) for group in optimizer.param_groups]
    tensors = {id(value) for entry in live.values() for value in entry.values() if isinstance(value, torch.Tensor)}
    kept: set[int] = set()
    _copy_into_live(get_state(model, optimizer, options), osd, tensors, kept)
    if "state" in osd:  # DCP wants an entry for every parameter
        osd = {**osd, "state": {fqn: {} for g in osd["param_groups"] for fqn in g["params"]} | dict(osd["state"])}
    with _left_alone(optimizer):
        set_optimizer_state_dict(model, optimizer, dict(osd), options=options)
    for param, entry in optimizer.state.items():
        entry.update({k: v for k, v in live.get(param, {}).items() if k in entry and id(v) in kept})
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        for option, tensor in before.items():
            if isinstance(tensor, torch.Tensor) and isinstance(group.get(option), torch.Tensor):
                with torch.no_grad():
                    group[option] = tensor.copy_(group[option])


@contextlib.contextmanager
def _left_alone(optimizer: Optimizer) -> Iterator[None]:
    """Keep DCP from stepping an optimizer without state, and from dropping frozen parameters' state."""
    params = _params(optimizer)
    frozen = [p for p in params if not p.requires_grad and (p.is_floating_point() or p.is_complex())]
    if params and not optimizer.state:
        optimizer.state[params[0]] = {}  # enough for `_init_optim_state` to do nothing
    for param in frozen:
        param.requires_grad_(True)
    try:
        yield
    finally:
        for param in frozen:
            param.requires_grad_(False)
        for param in [p for p, entry in optimizer.state.items() if not entry]:
            del optimizer.state[param]


def _params(optimizer: Optimizer) -> list[torch.Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _fit_groups(groups: list[dict[str, Any]], optimizer: Optimizer, saved: SavedKeys, prefix: str) -> None:
    for key, entry in saved.items():
        if key.startswith(prefix):
            index, _, option = key.removeprefix(prefix).partition(".")
            if int(index) >= len(groups):
                raise StateMismatchError(
                    f"the checkpoint has more parameter groups than the {len(groups)} of {type(optimizer).__name__}. "
                    "Nothing was changed. Call add_param_group as the saved run did, then restore."
                )
            if option not in groups[int(index)] and "." not in option:  # set by a step or a scheduler
                groups[int(index)][option] = _placeholder(entry, _params(optimizer)[0])


def _split_fqn(rest: str, params: Mapping[str, torch.Tensor]) -> tuple[str, str]:
    """A parameter's name and the path in its state, both with dots; ("", rest) for no parameter of ours."""
    parts = rest.split(".")
    for length in range(1, len(parts)):
        if (fqn := ".".join(parts[:length])) in params:
            return fqn, ".".join(parts[length:])
    return "", rest


def _fit_entry(live: Mapping[str, Any], found: Mapping[str, Any], param: torch.Tensor) -> dict[str, Any]:
    fitted = {key: value for key, value in live.items() if not isinstance(value, list)}  # lists: as long as saved
    for path, entry in found.items():
        parts = path.split(".")
        if parts[0] in live and parts[0] in fitted and fitted[parts[0]] is live[parts[0]]:
            continue
        set_element(fitted, tuple(int(p) if p.isdigit() else p for p in parts), _placeholder(entry, param))
    return fitted


def _placeholder(entry: TensorStorageMetadata | BytesStorageMetadata, param: torch.Tensor) -> Any:
    if not isinstance(entry, TensorStorageMetadata):
        return None
    dtype = entry.properties.dtype
    if isinstance(param, DTensor) and entry.size == param.shape:
        return torch.empty_like(param.detach(), dtype=dtype)  # sharded as the parameter is
    # Counters live on the CPU; torch moves them where `capturable` or `fused` wants them.
    return torch.empty(entry.size, dtype=dtype, device=param.device if entry.size else "cpu")


def _copy_into_live(ours: Any, loaded: Any, tensors: set[int], kept: set[int]) -> None:
    """Copy loaded tensors into our state's where they fit; `kept` collects the ids of ours that now hold them."""
    if isinstance(ours, dict) and isinstance(loaded, Mapping):
        for key in ours.keys() & loaded.keys():
            _copy_into_live(ours[key], loaded[key], tensors, kept)
    elif id(ours) in tensors and isinstance(loaded, torch.Tensor):
        same_kind = isinstance(ours, DTensor) == isinstance(loaded, DTensor) and ours.dtype == loaded.dtype
        if same_kind and ours.shape == loaded.shape:
            if loaded is not ours:
                with torch.no_grad():
                    ours.copy_(loaded)
            kept.add(id(ours))
