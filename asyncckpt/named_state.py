"""A module's and an optimizer's state under DCP's canonical names, without what DCP does on the way.

DCP steps an optimizer that has no state (hooks fire, counters start at 1), drops the state of frozen parameters when it
loads, and torch casts loaded state to the parameter's dtype. Finding the names costs about 100 us per parameter (1000
parameters: 114 ms of 121, `get_state_dict` on one core of the development machine), so they are remembered; a save in
steady state only asks torch for `state_dict()`. Called by train_state.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from itertools import chain
from operator import is_
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    _get_fqns,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Optimizer

from asyncckpt.errors import UNCHANGED, StateMismatchError
from asyncckpt.optimizer_layout import by_name, flat, is_saved_flat, with_groups
from asyncckpt.prime import prime_optimizer

SavedKey: TypeAlias = TensorStorageMetadata | BytesStorageMetadata
SavedKeys: TypeAlias = Mapping[str, SavedKey]


class ModuleState:
    """The state of one module: {fqn: live tensor, or extra state}."""

    def __init__(self, module: nn.Module, options: StateDictOptions) -> None:
        self.module = module
        self._options = options
        self._by_dcp_alone = options.ignore_frozen_params or _is_gathered(module, options)
        self._keys: list[str] | None = None
        self._names: list[str] = []

    def get(self) -> dict[str, Any]:
        if self._by_dcp_alone:
            return dict(get_model_state_dict(self.module, options=self._options))
        state = self.module.state_dict()
        if self._keys != list(state):
            self._keys = list(state)
            self._names = [name for key in state for name in _get_fqns(self.module, key)]
        return dict(zip(self._names, state.values(), strict=True))

    def fit(self, state: dict[str, Any], saved: SavedKeys, prefix: str) -> None:
        """Make `state`, from `get`, ask for what may be had: everything, unless the options say strict=False."""
        if not self._options.strict:
            for name in [name for name in state if f"{prefix}{name}" not in saved]:
                del state[name]

    def load(self, state: Mapping[str, Any]) -> None:
        strict = self._options.strict and not self._options.ignore_frozen_params
        options = dataclasses.replace(_for_load(self._options), strict=strict)
        set_model_state_dict(self.module, dict(state), options=options)  # a copy, because DCP renames keys in it


class OptimizerState:
    """The state of one optimizer over parameters of `module`; it is primed when the state is first asked for."""

    def __init__(self, optimizer: Optimizer, module: nn.Module, options: StateDictOptions) -> None:
        self.optimizer = optimizer
        self._module = module
        self._is_flat = options.flatten_optimizer_state_dict
        self._options = dataclasses.replace(options, flatten_optimizer_state_dict=False)
        self._named_params: list[torch.Tensor] = []
        self._names: list[str] = []
        self._num_primed: int | None = None

    def get(self) -> dict[str, Any]:
        """{"state": {fqn: {key: live tensor or value}}, "param_groups": [...]}; flat if the options ask for that."""
        return flat(self._nested()) if self._is_flat else self._nested()

    def target(self, saved: SavedKeys, prefix: str) -> dict[str, Any]:
        """What to read a checkpoint's keys under `prefix` into: `get`, asking for the state that is there, no more and
        no less, and flat if it was saved flat.

        A parameter without state in the checkpoint had none yet; for state that is there and not yet here (LBFGS's
        history, momentum of SGD with dampening, a parameter frozen by now) tensors are allocated.
        """
        osd, is_flat = self._nested(), is_saved_flat(saved, prefix, self._is_flat)
        if "param_groups" in osd and not _is_gathered(self._module, self._options):  # else names are not one to each
            names = chain.from_iterable(group["params"] for group in osd["param_groups"])
            params = dict(zip(names, _params(self.optimizer), strict=True))
            if not is_flat and self._is_flat:  # which of the checkpoint's groups are ours is known when they are read
                osd["param_groups"] = self._all_groups(saved, f"{prefix}param_groups.")
            for group, option, entry in self._options_in(saved, f"{prefix}param_groups.", osd["param_groups"], is_flat):
                if option not in group and "." not in option:  # set by a step or a scheduler
                    group[option] = _placeholder(entry, _params(self.optimizer)[0])
            found = by_name(saved, f"{prefix}state.", params)
            osd["state"] = {
                name: _fit_entry(osd["state"].get(name, {}), found[name], param)
                for name, param in params.items()
                if name in found
            }
        return flat(osd) if is_flat else osd

    def load(self, osd: Mapping[str, Any]) -> None:
        """Load what `get` gave, in this process or another, in either layout. State and options that are tensors here
        already stay the same tensors, as a captured graph may hold them, and keep their dtype."""
        ours = self._nested()
        live = {param: dict(entry) for param, entry in self.optimizer.state.items()}
        groups = [dict(group) for group in self.optimizer.param_groups]
        tensors = {id(value) for entry in live.values() for value in entry.values() if isinstance(value, torch.Tensor)}
        kept: set[int] = set()
        if osd and ours:  # else rank 0 alone has it, as the options may say
            osd = with_groups(osd, ours["param_groups"])
            _copy_into_live(ours, osd, tensors, kept)
            # DCP wants an entry for every parameter.
            osd["state"] = {n: {} for group in osd["param_groups"] for n in group["params"]} | osd["state"]
        with _never_stepped(self.optimizer), _all_trainable(self.optimizer), uncast(self.optimizer):
            set_optimizer_state_dict(self._module, self.optimizer, dict(osd), options=_for_load(self._options))
        for param, entry in self.optimizer.state.items():
            entry.update({k: v for k, v in live.get(param, {}).items() if k in entry and id(v) in kept})
        for group, before in zip(self.optimizer.param_groups, groups, strict=True):
            for option, value in before.items():
                loaded = group.get(option)
                if isinstance(value, torch.Tensor) and isinstance(loaded, torch.Tensor):
                    with torch.no_grad():
                        group[option] = value.copy_(loaded)
                elif isinstance(value, tuple) and isinstance(loaded, list):  # DCP's gathering makes lists of tuples
                    group[option] = tuple(loaded)

    def _nested(self) -> dict[str, Any]:
        self._prime()
        params = _params(self.optimizer)
        if self._names and len(params) == len(self._named_params) and all(map(is_, params, self._named_params)):
            osd = self._rename(self.optimizer.state_dict())
        else:
            osd = self._ask_dcp(params)
        if "state" in osd:
            scratch = ("al",) if isinstance(self.optimizer, LBFGS) else ()  # of one step, as long as the whole history
            # Copied, because torch hands out the live dicts, and a load sets values in what we return.
            osd["state"] = {n: {k: v for k, v in s.items() if k not in scratch} for n, s in osd["state"].items() if s}
            for group in osd["param_groups"]:
                group.pop("param_names", None)  # of modules as they are wrapped here; "params" are the names to save
        return osd

    def _prime(self) -> None:
        num_trainable = sum(param.requires_grad for param in _params(self.optimizer))
        if num_trainable != self._num_primed:
            with contextlib.suppress(ValueError):  # no exact initial state: saved, and restored, as none
                prime_optimizer(self.optimizer)
            self._num_primed = num_trainable

    def _ask_dcp(self, params: list[torch.Tensor]) -> dict[str, Any]:
        known = set(map(id, self._module.parameters()))
        if any(id(param) not in known for param in params):
            raise ValueError(
                f"{type(self.optimizer).__name__} has a parameter that is in no model of the TrainState, so its state "
                "has no name. Give the TrainState every module whose parameters it optimizes."
            )
        with _never_stepped(self.optimizer):
            osd: dict[str, Any] = dict(get_optimizer_state_dict(self._module, self.optimizer, options=self._options))
        if "param_groups" in osd and not _is_gathered(self._module, self._options):
            self._named_params = params
            self._names = list(chain.from_iterable(group["params"] for group in osd["param_groups"]))
        return osd

    def _rename(self, osd: dict[str, Any]) -> dict[str, Any]:
        for group in osd["param_groups"]:
            group["params"] = [self._names[index] for index in group["params"]]
        return {**osd, "state": {self._names[index]: entry for index, entry in osd["state"].items()}}

    def _options_in(
        self, saved: SavedKeys, prefix: str, groups: list[dict[str, Any]], is_flat: bool
    ) -> Iterator[tuple[dict[str, Any], str, SavedKey]]:
        """(group, option, entry) of what the checkpoint has of them."""
        if is_flat:
            firsts = {group["params"][0]: group for group in groups if group["params"]}
            for name, options in by_name(saved, prefix, firsts).items():
                if name:
                    yield from ((firsts[name], option, entry) for option, entry in options.items())
            return
        for key, entry in saved.items():
            if key.startswith(prefix):
                index, _, option = key.removeprefix(prefix).partition(".")
                if int(index) >= len(groups):
                    raise StateMismatchError(
                        f"the checkpoint has more parameter groups than the {len(groups)} of "
                        f"{type(self.optimizer).__name__}. Call add_param_group as the saved run did, then restore. If "
                        "ranks differ in their groups, as the stages of a pipeline may, give the TrainState "
                        "StateDictOptions(flatten_optimizer_state_dict=True)",
                        outcome=UNCHANGED,
                    )
                yield groups[int(index)], option, entry

    @staticmethod
    def _all_groups(saved: SavedKeys, prefix: str) -> list[dict[str, Any]]:
        """Empty ones, as many as the checkpoint has."""
        numbers = {key.removeprefix(prefix).partition(".")[0] for key in saved if key.startswith(prefix)}
        return [{} for _ in numbers]


@contextlib.contextmanager
def uncast(optimizer: Optimizer) -> Iterator[None]:
    """Keep `load_state_dict` from casting state to the parameter's dtype: torch would round what an optimizer keeps in
    float32 of a bfloat16 parameter. It alone knows what "step" must be."""
    given: dict[str, Any] = {}
    hook = optimizer.register_load_state_dict_pre_hook(lambda _, osd: given.update(osd))
    try:
        yield
    finally:
        hook.remove()
    ids = chain.from_iterable(group["params"] for group in given.get("param_groups", ()))
    for number, param in zip(ids, _params(optimizer), strict=False):
        entry = optimizer.state.get(param, {})
        for key, value in given["state"].get(number, {}).items():
            cast = entry.get(key) if key != "step" else None
            if isinstance(value, torch.Tensor) and isinstance(cast, torch.Tensor) and cast.dtype != value.dtype:
                entry[key] = value.to(cast.device, copy=True)


def _is_gathered(module: nn.Module, options: StateDictOptions) -> bool:
    """DCP makes new tensors of the module's: options that ask for it, or FSDP1."""
    if options.full_state_dict or options.cpu_offload:
        return True
    return any(isinstance(part, FullyShardedDataParallel) for part in module.modules())


def _for_load(options: StateDictOptions) -> StateDictOptions:
    """With both options rank 0 alone has a state to load; unless it passes it on, DCP waits for the others forever."""
    is_rank_0s = options.full_state_dict and options.cpu_offload and dist.is_available() and dist.is_initialized()
    return dataclasses.replace(options, broadcast_from_rank0=options.broadcast_from_rank0 or is_rank_0s)


@contextlib.contextmanager
def _never_stepped(optimizer: Optimizer) -> Iterator[None]:
    """Keep DCP from stepping an optimizer without state: one empty entry is enough for its `_init_optim_state`."""
    params = _params(optimizer)
    if params and not optimizer.state:
        optimizer.state[params[0]] = {}
    try:
        yield
    finally:
        for param in [param for param, entry in optimizer.state.items() if not entry]:
            del optimizer.state[param]


@contextlib.contextmanager
def _all_trainable(optimizer: Optimizer) -> Iterator[None]:
    """Keep DCP from dropping the state of frozen parameters."""
    frozen = [p for p in _params(optimizer) if not p.requires_grad and (p.is_floating_point() or p.is_complex())]
    for param in frozen:
        param.requires_grad_(True)
    try:
        yield
    finally:
        for param in frozen:
            param.requires_grad_(False)


def _params(optimizer: Optimizer) -> list[torch.Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _fit_entry(live: Mapping[str, Any], found: Mapping[str, Any], param: torch.Tensor) -> dict[str, Any]:
    fitted = {key: value for key, value in live.items() if not isinstance(value, list)}  # lists: as long as saved
    ours = set(fitted)
    for path, entry in found.items():
        parts = path.split(".")
        if parts[0] not in ours:
            set_element(fitted, tuple(int(p) if p.isdigit() else p for p in parts), _placeholder(entry, param))
    return fitted


def _placeholder(entry: SavedKey, param: torch.Tensor) -> Any:
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
