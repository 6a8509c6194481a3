"""Who writes what: DCP's planners, asked only when the structure of the state changed.

Runs on the training thread, because a change of structure is exchanged between the ranks with collectives; in steady
state it costs a comparison. Also the state dict's walk that the planners' flattening implies: leaves by fqn. Called by
manager.py; writing is shard.py's job, reading restore.py's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from asyncckpt.errors import SaveError
from asyncckpt.objects import check_object
from asyncckpt.ranks import Ranks
from stagers import StateDict


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf of a nested state dict, and where it hangs: `container[key] is value`."""

    value: Any
    container: Any
    key: Any


def leaves(state_dict: Mapping[str, Any]) -> dict[str, Leaf]:
    """{fqn: leaf} by the rules of DCP's `flatten_state_dict`, but keeping each leaf's own container and key: DCP turns
    keys into str on the way, so that a value under an int key would be restored to a new key. ValueError: two leaves
    have one fqn."""
    found: dict[str, Leaf] = {}
    for path, leaf in _walk((), state_dict):
        fqn = ".".join(map(str, path))
        if fqn in found:
            raise ValueError(
                f"two values of the state dict flatten to the key {fqn!r}: checkpoint keys join the path with dots. "
                "Nothing was written. Rename one of the two."
            )
        found[fqn] = leaf
    return found


def _walk(path: tuple[Any, ...], container: Any) -> Iterator[tuple[tuple[Any, ...], Leaf]]:
    entries = container.items() if isinstance(container, Mapping) else enumerate(container)
    for key, value in entries:
        if isinstance(value, Mapping) or (isinstance(value, list) and _is_split(value)):
            yield from _walk((*path, key), value)
        else:
            yield (*path, key), Leaf(value, container, key)


def _is_split(values: list[Any]) -> bool:
    """DCP splits a list if a tensor or a mapping is in it, however deep in lists; else it is one object."""
    return any(
        isinstance(value, (torch.Tensor, Mapping)) or (isinstance(value, list) and _is_split(value)) for value in values
    )


def check_savable(state_dict: Mapping[str, Any], safe_globals: Iterable[Any]) -> None:
    """Raise before anything is copied or written: duplicate keys (ValueError), objects that could not be loaded back
    (UnsafeObjectError)."""
    for fqn, leaf in leaves(state_dict).items():
        if not isinstance(leaf.value, torch.Tensor) and not hasattr(leaf.value, "__create_write_items__"):
            check_object(leaf.value, safe_globals, fqn)


@dataclass(frozen=True, slots=True)
class PlannedSave:
    """What the writer needs. metadata: only on the coordinator."""

    plan: SavePlan
    metadata: Metadata | None
    _planner: SavePlanner
    _state_dict: StateDict | None

    def planner(self) -> SavePlanner:
        """The planner, holding the staged state dict; to be called once. Where the plan is an old one this flattens it,
        some microseconds per tensor that the training thread is spared."""
        if self._state_dict is not None:
            self._planner.set_up_planner(state_dict=self._state_dict, is_coordinator=self.metadata is not None)
        return self._planner


class SavePlanning:
    """Plans of one manager, kept while the structure stays the same. Training thread only."""

    def __init__(self, ranks: Ranks, save_planner: SavePlanner | None) -> None:
        self._ranks = ranks
        self._template = save_planner or DefaultSavePlanner()
        self._structure: int | None = None
        self._plan: SavePlan | None = None
        self._metadata: Metadata | None = None

    def is_current(self, structure: int | None) -> bool:
        """Whether the plan at hand fits a state dict of this structure (a stager's `snapshot.structure`)."""
        return self._plan is not None and structure is not None and structure == self._structure

    def plan(self, state_dict: StateDict, structure: int | None, *, replan: bool) -> PlannedSave:
        """A plan for the staged `state_dict`. replan: a collective call, asked for if any rank's structure changed."""
        # A copy, because the planner holds one save's tensors while the writer may still be busy with another's.
        planner = copy.copy(self._template)
        if replan:
            self._plan = None
            self._plan, self._metadata = self._exchange(planner, state_dict)
            self._structure = structure
        assert self._plan is not None
        return PlannedSave(self._plan, self._metadata, planner, None if replan else state_dict)

    def _exchange(self, planner: SavePlanner, state_dict: StateDict) -> tuple[SavePlan, Metadata | None]:
        """Local plans to the coordinator, the global plan back. A failure anywhere is raised everywhere."""
        ranks = self._ranks

        def local_plan() -> SavePlan:
            planner.set_up_planner(state_dict=state_dict, is_coordinator=ranks.is_coordinator)
            return planner.create_local_plan()

        local_plans = ranks.gather_objects(self._attempt(local_plan), phase="plan")
        parts, metadata = None, None
        if ranks.is_coordinator:
            made = self._attempt(lambda: planner.create_global_plan([_value(plan) for plan in local_plans]))
            parts, metadata = ([made] * ranks.world_size, None) if isinstance(made, SaveError) else made
        part = ranks.scatter_objects(parts, phase="plan")
        plan = self._attempt(lambda: planner.finish_plan(_value(part)))
        for rank, (failed,) in enumerate(ranks.agree([isinstance(plan, SaveError)], phase="plan")):
            if failed and not isinstance(plan, SaveError):
                raise SaveError(f"rank {rank} could not plan the save, see its error. Nothing was written.", rank=rank)
        return _value(plan), metadata

    def _attempt(self, function: Callable[[], Any]) -> Any:
        """The result or, so that the other ranks hear of it, the failure as a value."""
        try:
            return function()
        except SaveError as exc:
            return exc
        except Exception as exc:
            what = f"rank {self._ranks.rank} could not plan the save: {type(exc).__name__}: {exc}. Nothing was written."
            error = SaveError(what, rank=self._ranks.rank)
            error.__cause__ = exc
            return error


def _value(result: Any) -> Any:
    if isinstance(result, SaveError):
        raise result
    return result
