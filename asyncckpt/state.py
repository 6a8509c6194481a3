"""A user's state as the nested dict that is saved, or restored into; and back again.

The one place that knows the three forms a state may have: a TrainState, a dict with Stateful values at its top level,
and a plain nested dict with `PerRank` values anywhere. Called by manager.py and restorer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from asyncckpt.files import File, checked, with_files
from asyncckpt.named_state import SavedKeys, uncast
from asyncckpt.per_rank import collect_per_rank, expand_per_rank
from asyncckpt.plan import leaves
from asyncckpt.selection import EVERYTHING, Selection
from asyncckpt.train_state import TrainState
from stagers import StateDict
from stagers.flatten import flatten
from stagers.layout import Layout

State: TypeAlias = TrainState | Mapping[str, Any]


def for_save(state: State, rank: int) -> StateDict:
    """What to copy and write; its tensors are the live ones."""
    if isinstance(state, TrainState):
        return state.state_dict()
    values = {kind for kind in set(map(type, state.values())) if issubclass(kind, torch.Tensor | Mapping)}
    return expand_per_rank({k: v if type(v) in values else _state_dict(v) for k, v in state.items()}, rank)


def for_restore(
    state: State, saved: SavedKeys, rank: int, world_size: int, selection: Selection = EVERYTHING
) -> StateDict:
    """What to read a checkpoint into. saved: its keys; they decide which ranks' values are there to take. selection:
    objects of which it takes nothing are left out."""
    if isinstance(state, TrainState):
        return state.target_state_dict(saved, selection)
    target = {}
    for key, value in state.items():
        if isinstance(value, TrainState):
            prefix = f"{key}."
            below = {fqn.removeprefix(prefix): entry for fqn, entry in saved.items() if fqn.startswith(prefix)}
            part = value.target_state_dict(below, selection.below(prefix))
        else:
            part = _state_dict(value)
        if not _is_stateful(value) or selection.takes is None or any(map(selection.has, leaves({key: part}))):
            target[key] = part
    taken = saved if selection.takes is None else list(filter(selection.has, saved))
    return expand_per_rank(target, rank, taken, world_size)


def num_bytes_of(state: State, files: Mapping[str, File | bytes] | None, rank: int) -> int | None:
    """The tensor bytes that a snapshot of `state` and `files` would have; None if it cannot be told, which saving it
    will explain. Costs as much as a save whose structure changed, but for the copy."""
    try:
        return Layout(flatten(with_files(for_save(state, rank), checked(files))), 0).num_bytes
    except Exception:
        return None


def take_restored(state: State, target: StateDict, selection: Selection = EVERYTHING) -> None:
    """Hand what was read to the objects of `state`, and to its own dict where values were replaced."""
    if isinstance(state, TrainState):
        _load(state, target, selection)
        return
    assert isinstance(state, dict)
    loaded = dict(target)
    for key, value in state.items():
        if not _is_stateful(value):
            continue
        loaded[key] = value
        if isinstance(value, TrainState) and key in target:
            _load(value, target[key], selection)
        elif key in target:
            with uncast(value) if isinstance(value, Optimizer) else nullcontext():
                value.load_state_dict(target[key])
    collect_per_rank(state, loaded)


def _load(state: TrainState, target: StateDict, selection: Selection) -> None:
    if selection.takes is None:
        state.load_state_dict(target)
    else:
        state.load_parts(target)


def _state_dict(value: Any) -> Any:
    return value.state_dict() if _is_stateful(value) else value


def _is_stateful(value: Any) -> bool:
    # Tensors first: asking a protocol costs 70 us each, and a flat state dict has thousands.
    return not isinstance(value, (torch.Tensor, Mapping)) and isinstance(value, Stateful)
