"""`TrainState`: all that a training run must remember, as one DCP `Stateful`.

It says what the state is, by key, and puts it back in the right order; it reads and writes no storage. Layout, where
[name] stands only if a list or dict of models, optimizers, ... was given:

    model          {[name.]fqn: tensor}                                      DCP's canonical names
    optimizer      [name]: {"state": {fqn: {...}}, "param_groups": [...]}    DCP's, each optimizer by itself; or flat
    scheduler      [name]: one object (object_state.py)
    scaler, progress, rng/rank_<k>, dataloader/rank_<k>                      one object each
    <registered>   an nn.Module: {fqn: tensor}; else {"tensors": {path: tensor}, "values": one object}

Called by manager.py and by users.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.optim import Optimizer

from asyncckpt.errors import UNCHANGED, StateMismatchError
from asyncckpt.loader import LoaderPosition
from asyncckpt.named_state import ModuleState, OptimizerState, SavedKeys
from asyncckpt.object_state import ObjectState, is_stateful, pack, unpack
from asyncckpt.per_rank import PerRank, saved_ranks, source_rank
from asyncckpt.plan import leaves
from asyncckpt.rng import derive_rng_state, rng_state, set_rng_state
from asyncckpt.selection import EVERYTHING, Selection

_OWN_KEYS = ("model", "optimizer", "scheduler", "scaler", "progress", "rng", "dataloader")


class TrainState:
    """Model, optimizer, scheduler, scaler, data position, random streams and progress of a run, saved as one.

    model, optimizer, scheduler, dataloader: one, a list, or a dict by name. options: for DCP's `get_state_dict` and
    `set_state_dict`; strict=False also restores from a checkpoint that lacks parts of the model. Where ranks differ in
    their parameters (stages of a pipeline, experts of single ranks), give flatten_optimizer_state_dict=True, so that no
    rank's parameter groups are taken for another's; such a checkpoint is restored without the option, too.
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
        self._options = options or StateDictOptions()
        self._model = _module_state(_by_name(model), self._options)
        self._optimizers: dict[str, OptimizerState] = {}
        for name, one in _by_name(optimizer).items():
            if self._model is None:
                raise ValueError("an optimizer needs its model here: its state is saved under the parameters' names")
            self._optimizers[name] = OptimizerState(one, self._model.module, self._options)
        self._schedulers = _by_name(scheduler)
        self._scaler = scaler
        self._loaders = {name: LoaderPosition(one) for name, one in _by_name(dataloader).items()}
        self._rng = rng
        self._objects: dict[str, ModuleState | ObjectState] = {}
        self._per_rank = {"rng", "dataloader"}
        for name, value in objects.items():
            self.register(name, value)

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        return tuple(state.optimizer for state in self._optimizers.values())

    def register(self, name: str, value: Any) -> None:
        """Save and restore `value`, too, under `name`: an object with state_dict/load_state_dict, or a PerRank."""
        if name in _OWN_KEYS or name in self._objects or not name.isidentifier():
            raise ValueError(f"{name!r} cannot be registered: it is taken, or no identifier")
        if isinstance(value, PerRank):
            self._per_rank.add(name)
        elif not is_stateful(value):
            raise TypeError(f"{name!r} has no state_dict/load_state_dict; wrap a plain value of this rank in PerRank")
        # An EMA copy is frozen, so `ignore_frozen_params` is meant for models only.
        options = dataclasses.replace(self._options, ignore_frozen_params=False)
        self._objects[name] = ModuleState(value, options) if isinstance(value, nn.Module) else ObjectState(value)

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
        return self._with_optimizers({name: optimizer.get() for name, optimizer in self._optimizers.items()})

    def _with_optimizers(self, optimizers: dict[str, dict[str, Any]]) -> dict[str, Any]:
        state: dict[str, Any] = {"progress": pack({"step": self.step, "epoch": self.epoch})}
        if self._model is not None:
            state["model"] = self._model.get()
        if optimizers:
            state["optimizer"] = optimizers.get("", optimizers)
        if self._schedulers:
            # One object each, as stages of a pipeline may lack some.
            states = {name: pack(scheduler.state_dict()) for name, scheduler in self._schedulers.items()}
            state["scheduler"] = states.get("", states)
        if self._scaler is not None:
            state["scaler"] = pack(self._scaler.state_dict())
        if self._rng:
            state["rng"] = pack(rng_state())
        if self._loaders:
            self._warn_of_unknown_positions()
            state["dataloader"] = pack({name: position.state_dict() for name, position in self._loaders.items()})
        state |= {name: part.get() for name, part in self._objects.items()}
        return {f"{key}/rank_{_rank()}" if key in self._per_rank else key: value for key, value in state.items()}

    def target_state_dict(self, saved: SavedKeys, selection: Selection = EVERYTHING) -> dict[str, Any]:
        """What a checkpoint is to be loaded into before `load_state_dict`: state_dict(), fitted to what was saved.

        saved: DCP's `Metadata.state_dict_metadata`, with keys as they flatten from this object's own state dict.
        The checkpoint decides which rank's values there are to take, which parameters have optimizer state, and what
        tensors a registered object has; tensors that are not here yet are allocated.
        selection: parts of which it takes nothing are left out. Of a model it may take any keys.
        Raises StateMismatchError: the checkpoint has more parameter groups than the optimizer, or the selection takes
        a part of what can only be loaded whole; nothing was changed.
        """
        target = self._with_optimizers(
            {
                name: optimizer.target(saved, f"{_optimizer_key(name)}.")
                if not selection.may_lack or _saved_below(_optimizer_key(name), saved)
                else optimizer.get()
                for name, optimizer in self._optimizers.items()
                if _is_taken(_optimizer_key(name), saved, selection)
            }
        )
        if selection is not EVERYTHING:
            target = {key: part for key, part in target.items() if self._is_taken(key, part, saved, selection)}
            saved = {key: entry for key, entry in saved.items() if selection.has(key)}
        ranks, rank = saved_ranks(saved), _rank()
        for base in self._per_rank & {key.partition("/")[0] for key in target}:
            target[f"{base}/rank_{source_rank(base, rank, ranks, _world_size())}"] = target.pop(f"{base}/rank_{rank}")
        if self._model is not None and "model" in target:
            self._model.fit(target["model"], saved, "model.")
        for key in target:
            part = self._objects.get(key.partition("/")[0])
            if part is not None and (not selection.may_lack or _saved_below(key, saved)):
                part.fit(target[key], saved, f"{key}.")
        return target

    def _is_taken(self, key: str, part: Any, saved: SavedKeys, selection: Selection) -> bool:
        """Whether the selection takes something of a part of the target."""
        name = key.partition("/")[0]
        if name == "optimizer":  # of each alone
            return True
        if name in ("model", "scheduler") or isinstance(self._objects.get(name), ModuleState):
            return any(map(selection.has, leaves({key: part})))
        return _is_taken(key, saved, selection)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put a state back: models and optimizers, then what depends on them, the random streams last.

        Raises StateMismatchError for a missing part, torch's errors for a model or optimizer of another structure.
        """
        self._load(state_dict, set(self._parts()))

    def load_parts(self, state_dict: Mapping[str, Any]) -> None:
        """The same of what `target_state_dict` gave for a selection: what is not there stays as it is."""
        optimizers = map(_optimizer_key, state_dict.get("optimizer", ()))
        self._load(state_dict, {*(key.partition("/rank_")[0] for key in state_dict), *optimizers})

    def _parts(self) -> Iterator[str]:
        """Of a whole state; the optimizers each."""
        yield "progress"
        own = self._model, self._schedulers, self._scaler is not None, self._rng, self._loaders
        names = "model", "scheduler", "scaler", "rng", "dataloader"
        yield from (name for name, part in zip(names, own, strict=True) if part)
        yield from self._objects
        yield from map(_optimizer_key, self._optimizers)

    def _load(self, state_dict: Mapping[str, Any], parts: Container[str]) -> None:
        if self._model is not None and "model" in parts:
            self._model.load(_part(state_dict, "model"))
        for name, optimizer in self._optimizers.items():
            if _optimizer_key(name) in parts:
                osd = _part(state_dict, "optimizer")
                optimizer.load(_part(osd, name) if name else osd)
        for name, part in self._objects.items():
            if name in parts:
                part.load(_own_part(state_dict, name)[1] if name in self._per_rank else _part(state_dict, name))
        for name, scheduler in self._schedulers.items() if "scheduler" in parts else ():
            saved = _part(state_dict, "scheduler")
            scheduler.load_state_dict(unpack(_part(saved, name) if name else saved))
            _fit_to_groups(scheduler, always=self._options.flatten_optimizer_state_dict)
        if self._scaler is not None and "scaler" in parts:
            self._scaler.load_state_dict(unpack(_part(state_dict, "scaler")))
        for name, position in self._loaders.items() if "dataloader" in parts else ():
            position.load_state_dict(_part(unpack(_own_part(state_dict, "dataloader")[1]), name))
        if "progress" in parts:
            progress = unpack(_part(state_dict, "progress"))
            self.step, self.epoch = progress["step"], progress["epoch"]
        if self._rng and "rng" in parts:
            source, streams = _own_part(state_dict, "rng")
            set_rng_state(unpack(streams)) if source == _rank() else derive_rng_state(unpack(streams), _rank())

    def _warn_of_unknown_positions(self) -> None:
        if self.step and any(position.is_unknown for position in self._loaders.values()):
            warnings.warn(
                "a plain DataLoader of this TrainState is not iterated through state.batches(): its position is "
                "unknown, and a resume begins its epoch anew",
                stacklevel=4,
            )


def _module_state(models: Mapping[str, nn.Module], options: StateDictOptions) -> ModuleState | None:
    if not models:
        return None
    return ModuleState(models[""] if "" in models else nn.ModuleDict(models), options)


def _optimizer_key(name: str) -> str:
    return f"optimizer.{name}" if name else "optimizer"


def _saved_below(part: str, saved: Iterable[str]) -> list[str]:
    """The checkpoint's keys of a part of the state."""
    return [key for key in saved if key == part or key.startswith(f"{part}.")]


def _is_taken(part: str, saved: SavedKeys, selection: Selection) -> bool:
    """Whether the selection takes a part that is loaded whole. StateMismatchError: it takes some of it."""
    if selection.takes is None:
        return True
    found = {selection.has(key): key for key in _saved_below(part, saved) or [part]}
    if len(found) == 2:
        raise StateMismatchError(
            f"keys= takes {found[True]!r} and not {found[False]!r}: of a TrainState {part!r} is restored whole or not "
            "at all. Take all of it, or restore into a plain dict",
            outcome=UNCHANGED,
        )
    return True in found


def _by_name(value: Any) -> dict[str, Any]:
    """One, several or none as a dict; a single one has the name ""."""
    if value is None:
        return {}
    if isinstance(value, Mapping) and not isinstance(value, nn.Module):
        return dict(value)
    return {str(i): v for i, v in enumerate(value)} if isinstance(value, list | tuple) else {"": value}


def _fit_to_groups(scheduler: Any, *, always: bool) -> None:
    """What a scheduler keeps for each parameter group, as the restored optimizer's groups have it. The checkpoint has
    one rank's, and the stages of a pipeline may differ in their groups. always: also where the numbers are the same."""
    groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", [])
    for attribute, option in (("base_lrs", "initial_lr"), ("_last_lr", "lr")):
        kept = getattr(scheduler, attribute, None)
        if isinstance(kept, list) and (always or len(kept) != len(groups)) and all(option in group for group in groups):
            setattr(scheduler, attribute, [copy.deepcopy(group[option]) for group in groups])
    for part in getattr(scheduler, "_schedulers", ()):
        _fit_to_groups(part, always=always)


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _part(state: Mapping[str, Any], key: str) -> Any:
    if key not in state:
        raise StateMismatchError(f"the state to load has no {key!r}, only {list(state)}; this TrainState has one")
    return state[key]


def _own_part(state: Mapping[str, Any], key: str) -> tuple[int, Any]:
    """(the rank it is from, the value): this rank's, or the one that `target_state_dict` asked for in its place."""
    ranks = saved_ranks(state).get(key, {_rank()})
    source = _rank() if _rank() in ranks else min(ranks)
    return source, _part(state, f"{key}/rank_{source}")
