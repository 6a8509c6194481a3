"""`TrainState`: all that a training run must remember, as one DCP `Stateful`.

It says what the state is, by key, and puts it back in the right order; it reads and writes no storage. Layout, where
[name] stands only if a list or dict of models, optimizers, ... was given:

    model          {[name.]fqn: tensor}                                      DCP's canonical names
    optimizer      [name]: {"state": {fqn: {...}}, "param_groups": [...]}    DCP's, each optimizer by itself
    scheduler, scaler, progress, rng/rank_<k>, dataloader/rank_<k>           one object each
    <registered>   an nn.Module: {fqn: tensor}; else {"tensors": {path: tensor}, "values": one object}

An object is a 1-tuple around plain values. DCP takes a tuple for a leaf, so that empty dicts, int keys and nested lists
come back as they were; dicts it would take apart, and lose or rename these. Called by manager.py and by users.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from asyncckpt import optimizer_state
from asyncckpt.errors import StateMismatchError
from asyncckpt.loader import LoaderPosition
from asyncckpt.optimizer_state import SavedKeys
from asyncckpt.per_rank import PerRank, saved_ranks, source_rank
from asyncckpt.prime import prime_optimizer
from asyncckpt.rng import derive_rng_state, rng_state, set_rng_state

_OWN_KEYS = ("model", "optimizer", "scheduler", "scaler", "progress", "rng", "dataloader")


class TrainState:
    """Model, optimizer, scheduler, scaler, data position, random streams and progress of a run, saved as one.

    model, optimizer, scheduler, dataloader: one, a list, or a dict by name. options: for DCP's `get_state_dict` and
    `set_state_dict`; strict=False also restores from a checkpoint that lacks parts of the model.
    objects: what else has state_dict/load_state_dict, loaded back exactly as state_dict() gave it; and `PerRank`, for a
    value of this rank, or for such an object that each rank has for itself.
    step: the next step to run; the manager sets it at each save. epoch: set by `batches`, else the user's to set.
    Optimizers are primed (`prime_optimizer`) when the state is first asked for.
    """

    def __init__(
        self,
        *,
        model: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        scaler: Any = None,
        dataloader: Any = None,
        rng: bool = True,
        options: StateDictOptions | None = None,
        **objects: Any,
    ) -> None:
        self.step = 0
        self.epoch = 0
        models = _by_name(model)
        self._model: Any = model if "" in models else nn.ModuleDict(models) if models else None
        self._optimizers: dict[str, Optimizer] = _by_name(optimizer)
        if self._optimizers and self._model is None:
            raise ValueError("an optimizer needs its model here: its state is saved under the parameters' names")
        self._schedulers = _by_name(scheduler)
        self._scaler = scaler
        self._loaders = {name: LoaderPosition(loader) for name, loader in _by_name(dataloader).items()}
        self._rng = rng
        self._options = options or StateDictOptions()
        self._primed: dict[str, int] = {}
        self._objects: dict[str, Any] = {}
        for name, value in objects.items():
            self.register(name, value)

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        return tuple(self._optimizers.values())

    def register(self, name: str, value: Any) -> None:
        """Save and restore `value`, too, under `name`: an object with state_dict/load_state_dict, or a PerRank."""
        if name in _OWN_KEYS or name in self._objects or not name.isidentifier():
            raise ValueError(f"{name!r} cannot be registered: it is taken, or no identifier")
        if not isinstance(value, PerRank) and not _is_stateful(value):
            raise TypeError(f"{name!r} has no state_dict/load_state_dict; wrap a plain value of this rank in PerRank")
        self._objects[name] = value

    def batches(
        self, epochs: int | None = None, *, loader: str | None = None, fast_skip: bool = False
    ) -> Iterator[Any]:
        """The batches of a dataloader from where the run stands: `enumerate(state.batches(), start=state.step)`.

        epochs: stop when so many passes are done in all; None: never. loader: its name, if there are several. A sampler
        or dataset with `set_epoch` is told the epoch. A restore ends a loop under way with an error.
        A resume within an epoch skips what was consumed by index if `num_workers=0`. With workers, or an
        IterableDataset, it loads and drops it, so that random augmentations in workers go on exactly; fast_skip: by
        index with workers, too, where only the order stays exact. Beyond reach: augmentations in persistent workers
        after the first epoch, and what a sampler or IterableDataset in this process draws from a global random stream
        while the epoch runs. A StatefulDataLoader resumes as it does by itself.
        """
        if loader is None and len(self._loaders) != 1:
            raise ValueError(f"batches() needs one dataloader, or the name of one of {list(self._loaders)}")
        position = self._loaders[loader] if loader is not None else next(iter(self._loaders.values()))
        return self._follow(position, position.batches(epochs, fast_skip=fast_skip))

    def _follow(self, position: LoaderPosition, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.epoch = position.epoch
            yield batch
        self.epoch = position.epoch

    def state_dict(self) -> dict[str, Any]:
        """The state in this file's layout, of per-rank values only this rank's. Tensors are the live ones.

        Changes nothing but optimizers without state, which are primed.
        """
        rank = _rank()
        state: dict[str, Any] = {"progress": ({"step": self.step, "epoch": self.epoch},)}
        if self._model is not None:
            state["model"] = dict(get_model_state_dict(self._model, options=self._options))
        for name, optimizer in self._optimizers.items():
            self._prime(name, optimizer)
            osd = optimizer_state.get_state(self._model, optimizer, self._options)
            state["optimizer"] = {**state.get("optimizer", {}), name: osd} if name else osd
        if self._schedulers:
            state["scheduler"] = _object({name: s.state_dict() for name, s in self._schedulers.items()})
        if self._scaler is not None:
            state["scaler"] = _object(self._scaler.state_dict())
        if self._rng:
            state[f"rng/rank_{rank}"] = _object(rng_state())
        if self._loaders:
            self._warn_of_unknown_positions()
            state[f"dataloader/rank_{rank}"] = _object({n: p.state_dict() for n, p in self._loaders.items()})
        for name, value in self._objects.items():
            key = f"{name}/rank_{rank}" if isinstance(value, PerRank) else name
            state[key] = self._registered_state(value.value if isinstance(value, PerRank) else value)
        return state

    def target_state_dict(self, saved: SavedKeys) -> dict[str, Any]:
        """What a checkpoint is to be loaded into before `load_state_dict`: state_dict(), fitted to what was saved.

        saved: DCP's `Metadata.state_dict_metadata`, with keys as they flatten from this object's own state dict.
        The checkpoint decides which rank's values there are to take, which parameters have optimizer state, and what
        tensors a registered object has; tensors that are not here yet are allocated.
        Raises StateMismatchError: the checkpoint has more parameter groups than the optimizer; nothing was changed.
        """
        target = self.state_dict()
        ranks, rank = saved_ranks(saved), _rank()
        for key in [key for key in target if "/rank_" in key]:
            base = key.partition("/")[0]
            target[f"{base}/rank_{source_rank(base, rank, ranks)}"] = target.pop(key)
        for name, optimizer in self._optimizers.items():
            osd, prefix = (
                (target["optimizer"][name], f"optimizer.{name}.") if name else (target["optimizer"], "optimizer.")
            )
            optimizer_state.fit_to_checkpoint(osd, optimizer, saved, prefix)
        for key, entry in target.items():
            if key.partition("/")[0] in self._objects and "values" in entry:
                _fit_tensors(entry, saved, f"{key}.tensors.")
        if not self._options.strict and "model" in target:
            target["model"] = {fqn: value for fqn, value in target["model"].items() if f"model.{fqn}" in saved}
        return target

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put a state back: models and optimizers, then what depends on them, the random streams last.

        Raises StateMismatchError for a missing part, torch's errors for a model or optimizer of another structure.
        """
        if self._model is not None:
            self._load_module(self._model, _part(state_dict, "model"))
        for name, optimizer in self._optimizers.items():
            self._prime(name, optimizer)
            osd = _part(state_dict, "optimizer")
            optimizer_state.load_state(self._model, optimizer, _part(osd, name) if name else osd, self._options)
        for name, value in self._objects.items():
            if isinstance(value, PerRank):
                value.value = self._load_registered(value.value, _own_part(state_dict, name)[1])
            else:
                self._load_registered(value, _part(state_dict, name))
        for name, scheduler in self._schedulers.items():
            scheduler.load_state_dict(_part(_value(_part(state_dict, "scheduler")), name))
        if self._scaler is not None:
            self._scaler.load_state_dict(_value(_part(state_dict, "scaler")))
        for name, position in self._loaders.items():
            position.load_state_dict(_part(_value(_own_part(state_dict, "dataloader")[1]), name))
        progress = _value(_part(state_dict, "progress"))
        self.step, self.epoch = progress["step"], progress["epoch"]
        if self._rng:
            source, streams = _own_part(state_dict, "rng")
            set_rng_state(_value(streams)) if source == _rank() else derive_rng_state(_value(streams), _rank())

    def _prime(self, name: str, optimizer: Optimizer) -> None:
        trainable = sum(param.requires_grad for group in optimizer.param_groups for param in group["params"])
        if self._primed.get(name) != trainable:
            with contextlib.suppress(ValueError):  # no exact initial state: saved, and restored, as none
                prime_optimizer(optimizer)
            self._primed[name] = trainable

    def _warn_of_unknown_positions(self) -> None:
        if self.step and any(position.is_unknown for position in self._loaders.values()):
            warnings.warn(
                "a plain DataLoader of this TrainState is not iterated through state.batches(): its position is "
                "unknown, and a resume begins its epoch anew",
                stacklevel=3,
            )

    def _registered_state(self, value: Any) -> dict[str, Any]:
        if isinstance(value, nn.Module):
            options = dataclasses.replace(self._options, ignore_frozen_params=False)  # an EMA copy is all frozen
            return dict(get_model_state_dict(value, options=options))
        tensors: dict[str, torch.Tensor] = {}
        tree = _map(value.state_dict() if _is_stateful(value) else value, lambda path, leaf: _take(path, leaf, tensors))
        return {"values": (tree,), **({"tensors": tensors} if tensors else {})}

    def _load_registered(self, value: Any, entry: Mapping[str, Any]) -> Any:
        """Load into `value` and return it, or return the plain value that was saved."""
        if isinstance(value, nn.Module):
            self._load_module(value, entry)
            return value
        tensors = entry.get("tensors", {})
        restored = _map(
            _value(_part(entry, "values")),
            lambda path, leaf: tensors[_join(path)] if isinstance(leaf, torch.Tensor) else leaf,
        )
        if not _is_stateful(value):
            return restored
        value.load_state_dict(restored)
        return value

    def _load_module(self, module: nn.Module, fqns: Mapping[str, Any]) -> None:
        strict = self._options.strict and not self._options.ignore_frozen_params
        set_model_state_dict(module, dict(fqns), options=dataclasses.replace(self._options, strict=strict))


def _by_name(value: Any) -> dict[str, Any]:
    """One, several or none as a dict; a single one has the name ""."""
    if value is None:
        return {}
    if isinstance(value, Mapping) and not isinstance(value, nn.Module):
        return dict(value)
    return {str(i): v for i, v in enumerate(value)} if isinstance(value, list | tuple) else {"": value}


def _is_stateful(value: Any) -> bool:
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _object(value: Any) -> tuple[Any]:
    return (_map(value, lambda _, leaf: leaf.detach().cpu() if isinstance(leaf, torch.Tensor) else leaf),)


def _value(entry: Any) -> Any:
    return copy.deepcopy(entry[0])


def _part(state: Mapping[str, Any], key: str) -> Any:
    if key not in state:
        raise StateMismatchError(f"the state to load has no {key!r}, only {list(state)}; this TrainState has one")
    return state[key]


def _own_part(state: Mapping[str, Any], key: str) -> tuple[int, Any]:
    """(the rank it is from, the value): this rank's, or the one that `target_state_dict` asked for in its place."""
    ranks = saved_ranks(state).get(key, {_rank()})
    source = _rank() if _rank() in ranks else min(ranks)
    return source, _part(state, f"{key}/rank_{source}")


def _map(value: Any, leaf: Callable[[tuple[Any, ...], Any], Any], path: tuple[Any, ...] = ()) -> Any:
    """`value` with new containers and leaf(path, value) at each leaf; numpy's scalars, which would need pickle, become
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
    """Move a tensor to `tensors`, so that it is saved by itself; an empty one marks its place."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if _join(path) in tensors:
        raise ValueError(f"two tensors of a registered object have the path {_join(path)!r}; rename a key")
    tensors[_join(path)] = leaf
    return torch.empty(0)


def _fit_tensors(entry: dict[str, Any], saved: SavedKeys, prefix: str) -> None:
    """Ask for the tensors that were saved: into ours where they fit, else into new ones."""
    ours = entry.pop("tensors", {})
    fitted = {}
    for key, kind in saved.items():
        if key.startswith(prefix) and isinstance(kind, TensorStorageMetadata):
            tensor = ours.get(path := key.removeprefix(prefix))
            fits = tensor is not None and tensor.shape == kind.size and tensor.dtype == kind.properties.dtype
            if not fits and not isinstance(tensor, DTensor):  # a DTensor of another shape is an error, later
                tensor = torch.empty(kind.size, dtype=kind.properties.dtype, device=getattr(tensor, "device", "cpu"))
            fitted[path] = tensor
    if fitted:
        entry["tensors"] = fitted
