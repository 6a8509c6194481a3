"""Creates the state that an optimizer makes lazily in its first step, so that a checkpoint can be loaded into it.

Nothing else changes: training after priming equals training without it, bit for bit. The values are made by the
optimizer's own `step`, run by a shallow copy of it over one clone of a parameter at a time, with a zero gradient; the
copy's state keeps the first value that each key is given, which is the one before the first update (`step=0`, not 1).
Stepping the real optimizer, as torch's `_init_optim_state` and torch_xla's `prime_optimizer` do, leaves `step=1`, fires
step hooks and, with weight decay, moves parameters (pytorch#164929, pytorch/xla#6572). Called by `TrainState`, and by
users who checkpoint a plain dict.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import OrderedDict, UserDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch.optim import LBFGS, SGD, Optimizer, SparseAdam
from torch.optim import optimizer as torch_optimizer

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)


def prime_optimizer(optimizer: OptimizerT) -> OptimizerT:
    """Add the missing state of every parameter that requires a gradient, and return the same optimizer.

    State that is there is left alone, so a second call does nothing. Parameters, gradients, options, step counters,
    hooks and random streams stay as they are. Memory: the new state, and a few copies of one parameter at a time.
    Every torch.optim class is primed exactly, and so is a class that creates its state before its first update.
    SGD's momentum becomes -0.0, which adds to nothing: exact for real parameters with dense gradients.
    Raises ValueError, with nothing changed, where no initial state equals "none yet": SGD with dampening (its first
    step skips the dampening), LBFGS, an optimizer that wraps another one, or one whose `step` needs arguments.
    `TrainState` restores these too, as it takes their structure from the checkpoint.
    """
    missing = {
        p: group
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad and not optimizer.state.get(p)
    }
    if isinstance(optimizer, LBFGS) and optimizer.state:
        return optimizer  # it keeps one state for all parameters, under the first
    if missing:
        _refuse_what_reaches_real_parameters(optimizer)
        with _no_step_hooks(), _keep_rng(missing), torch.no_grad():
            first = {p: _first_state(optimizer, p, group) for p, group in missing.items()}
        optimizer.state.update({p: state for p, state in first.items() if state})
    return optimizer


def _refuse_what_reaches_real_parameters(optimizer: Optimizer) -> None:
    for name, value in vars(optimizer).items():
        inner = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(v, Optimizer | torch.Tensor) for v in inner) and name not in ("grad_scale", "found_inf"):
            raise ValueError(
                f"{type(optimizer).__name__} cannot be primed: its attribute {name!r} holds a tensor or an optimizer, "
                "which a trial step could change. Nothing was changed. Prime the optimizer inside it, take the first "
                "step before the restore, or restore through a TrainState."
            )


def _first_state(optimizer: Optimizer, param: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """The state of `param` before its first step; empty for a stateless optimizer."""
    if isinstance(optimizer, SGD) and inspect.unwrap(type(optimizer).step) is inspect.unwrap(SGD.step):
        return _first_momentum(param, group)
    recorded = _RecordingState()
    shadow, clone = _shadow(optimizer, param, group, recorded)
    try:
        shadow.step()
    except Exception as exc:
        raise ValueError(
            f"{type(optimizer).__name__} cannot be primed: its step() fails on a zero gradient ({exc}). "
            "Nothing was changed. Take the first step before the restore, or restore through a TrainState."
        ) from exc
    state = recorded.get(clone, _FirstValues({}))
    for key, first in state.first.items():
        if isinstance(first, list | dict) and len(first) != len(state[key]):
            raise ValueError(
                f"{type(optimizer).__name__} cannot be primed: its state {key!r} grows after it was first set. "
                "Nothing was changed. Take the first step before the restore, or restore through a TrainState."
            )
    return state.first


def _first_momentum(param: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    if not group["momentum"]:
        return {}
    if group["dampening"]:
        raise ValueError(
            "SGD with dampening cannot be primed: its first step skips the dampening, so a momentum buffer that is "
            "there already changes training. Nothing was changed. Take the first step before the restore, or restore "
            "through a TrainState, which knows from the checkpoint whether there was one."
        )
    # SGD sets its buffer to the first gradient g. m * -0.0 + g is g for every g, also for -0.0, where +0.0 is not.
    zero = complex(-0.0, -0.0) if param.is_complex() else -0.0
    return {"momentum_buffer": torch.full_like(param.detach(), zero)}


def _shadow(
    optimizer: Optimizer, param: torch.Tensor, group: Mapping[str, Any], state: _RecordingState
) -> tuple[Optimizer, torch.Tensor]:
    """A copy of `optimizer` with `state` for its state, a clone of `param` for its only parameter, and no hooks."""
    clone = param.detach().clone()
    sparse = isinstance(optimizer, SparseAdam)  # refuses dense gradients
    clone.grad = torch.zeros_like(clone, layout=torch.sparse_coo) if sparse else torch.zeros_like(clone)
    options = {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")}
    shadow = object.__new__(type(optimizer))
    vars(shadow).update(vars(optimizer))
    # A scheduler leaves its own `step` bound to the real optimizer; GradScaler's attributes belong to a step under way.
    for name in ("step", "grad_scale", "found_inf"):
        vars(shadow).pop(name, None)
    shadow.state = state  # type: ignore[assignment]
    shadow.param_groups = [{**options, "params": [clone]}]
    shadow._optimizer_step_pre_hooks = OrderedDict()
    shadow._optimizer_step_post_hooks = OrderedDict()
    return shadow, clone


class _FirstValues(UserDict[str, Any]):
    """One parameter's state, and in `first` a copy of the first value that each key was given."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.first: dict[str, Any] = {}
        super().__init__(values)

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self.first:
            self.first[key] = value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
        super().__setitem__(key, value)


class _RecordingState(UserDict[Any, _FirstValues]):
    """Stands in for `Optimizer.state`, however a class fills it."""

    def __missing__(self, param: Any) -> _FirstValues:
        self[param] = {}
        return self.data[param]

    def __setitem__(self, param: Any, values: Mapping[str, Any]) -> None:
        super().__setitem__(param, _FirstValues(values))


@contextlib.contextmanager
def _no_step_hooks() -> Iterator[None]:
    """Hide the step hooks that are common to all optimizers: a class whose `step` calls `super().step()` runs them
    even when called past its own wrapper."""
    registries: list[dict[int, Any]] = [
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    ]
    hidden = [dict(r) for r in registries]
    for registry in registries:
        registry.clear()
    try:
        yield
    finally:
        for registry, hooks in zip(registries, hidden, strict=True):
            registry.update(hooks)


def _keep_rng(params: Iterable[torch.Tensor]) -> contextlib.AbstractContextManager[None]:
    """Some optimizers round stochastically."""
    devices = {p.device for p in params if p.device.index is not None and hasattr(torch, p.device.type)}
    kind = next((d.type for d in devices if d.type != "cpu"), "cuda")
    return torch.random.fork_rng([d.index for d in devices if d.type == kind], device_type=kind)
