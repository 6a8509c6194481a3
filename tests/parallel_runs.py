"""One small training run under each way to divide it among ranks: saved, and restored and run on.

A layout is "<kind>@<number of ranks>", or "whole" for a process alone. Every rank is given the same batch, so that all
layouts compute one and the same run, up to the order of sums. Used by test_parallelisms.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions

from asyncckpt import CheckpointManager, TrainState, prime_optimizer
from asyncckpt.plan import leaves
from stagers import OverlappingAsyncStager
from tests.parallel_layouts import Pipeline, divide
from tests.parallel_net import BATCH, Net, make_optimizers, materialise
from tests.pieces import Piece, piece_of
from tests.processes import Link
from tests.states import tensor_of

SAVED_STEP, NUM_STEPS = 1, 4


class Run:
    """What is trained, fresh, and the TrainState over it."""

    def __init__(self, layout: str, seed: int, options: StateDictOptions | None = None) -> None:
        kind, _, num_ranks = layout.partition("@")
        torch.manual_seed(seed)
        with torch.device("meta" if kind == "meta" else "cpu"):
            net = Net()
        self.trained = net if kind == "whole" else divide(net, kind, int(num_ranks))
        self.model = net if isinstance(self.trained, Pipeline) else self.trained
        if kind == "meta":
            materialise(net)
        if kind != "whole":
            torch.manual_seed(seed + dist.get_rank())  # from here on every rank has its own random numbers
        self.optimizers = make_optimizers(self.model)
        self.schedulers = {
            name: torch.optim.lr_scheduler.StepLR(self.optimizers[name], 2)
            for name in self.optimizers
            if name != "master"
        }
        # The stages of a pipeline differ in the parameters of a group, and so do ranks with experts of their own.
        is_flat = isinstance(self.trained, Pipeline) or kind == "experts"
        options = options or StateDictOptions(flatten_optimizer_state_dict=is_flat)
        self.state = TrainState(
            model=self.model, optimizer=self.optimizers, scheduler=self.schedulers, options=options
        )  # fmt: skip

    def train(self, until: int) -> Steps:
        """Run the steps that are left."""
        losses, drawn = [], []
        for step in range(self.state.step, until):
            drawn.append(torch.rand(()).item())
            losses.append(self._loss(tensor_of(torch.float32, BATCH, 13, seed=step)))
            for optimizer in self.optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
            for scheduler in self.schedulers.values():
                scheduler.step()
        self.state.step = until
        return Steps(losses, drawn)

    def _loss(self, x: torch.Tensor) -> float | None:
        goal = x[:, :7].roll(1, 0)
        if isinstance(self.trained, Pipeline):
            return self.trained.loss(x, goal)
        loss = (self.trained(x) - goal).square().mean()
        loss.backward()
        return loss.item()

    def found(self) -> dict[str, Piece]:
        """Every bit of model, optimizers and scheduler that this rank has, under names that all layouts share."""
        state = self.state.state_dict()
        values = {fqn: leaf.value for fqn, leaf in leaves({"model": state["model"]}).items()}
        for name, osd in state["optimizer"].items():
            values |= {f"{name}.{key}": value for key, value in by_parameter(osd)}
        for name, scheduler in self.schedulers.items():
            kept, groups = scheduler.state_dict(), self.optimizers[name].param_groups
            assert kept.pop("base_lrs") == [group["initial_lr"] for group in groups]
            assert kept.pop("_last_lr") == [group["lr"] for group in groups]
            values |= {f"{name}.scheduler.{key}": value for key, value in kept.items()}
        return {key: piece for key, value in values.items() if (piece := piece_of(value)) is not None}


class Steps(NamedTuple):
    """What a rank saw: the loss of each step, and a random number. loss: None where it is another rank's."""

    losses: list[float | None]
    drawn: list[float]


def by_parameter(osd: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """An optimizer's state in DCP's flat layout, whichever of its two layouts it is in."""
    flat = dict(osd)
    for group in flat.pop("param_groups", []):
        for name in group["params"]:
            flat |= {f"param_groups.{name}.{option}": v for option, v in group.items() if option != "params"}
    for name, leaf in leaves(flat).items():
        yield name, leaf.value


class Saved(NamedTuple):
    """One rank of a run that saved and went on."""

    state: dict[str, Piece]
    after: Steps
    end: dict[str, Piece]


class Resumed(NamedTuple):
    """One rank of a run that was restored and went on. warned: what was said of other ranks' values."""

    state: dict[str, Piece]
    after: Steps
    end: dict[str, Piece]
    warned: list[str]


def run_and_save(link: Link | None, layout: str, path: str, options: StateDictOptions | None = None) -> Saved:
    run = Run(layout, seed=0, options=options)
    run.train(SAVED_STEP + 1)
    with CheckpointManager(path, stager=OverlappingAsyncStager()) as manager:
        manager.save_async(SAVED_STEP, run.state)
        saved = run.found()
        after = run.train(NUM_STEPS)
    return Saved(saved, after, run.found())


def resume(link: Link | None, layout: str, path: str, options: StateDictOptions | None = None) -> Resumed:
    run = Run(layout, seed=50, options=options)
    with warnings.catch_warnings(record=True) as warned, CheckpointManager(path) as manager:
        warnings.simplefilter("always")
        manager.restore(SAVED_STEP, run.state, strict=True)
    assert run.state.step == SAVED_STEP + 1
    restored = run.found()
    after = run.train(NUM_STEPS)
    said = [text for one in warned if (text := str(one.message)).startswith(("'", "the checkpoint"))]  # not torch
    return Resumed(restored, after, run.found(), said)


def plain_state_of(run: Run) -> dict[str, Any]:
    """As one writes it without a TrainState: DTensors as the model gives them, optimizer state by parameter number."""
    optimizers = {name: prime_optimizer(optimizer) for name, optimizer in run.optimizers.items()}
    schedulers = {f"{name} scheduler": scheduler for name, scheduler in run.schedulers.items()}
    return {"model": run.model.state_dict(), **optimizers, **schedulers}


def run_and_save_plain(link: Link | None, layout: str, path: str) -> Saved:
    run = Run(layout, seed=0)
    run.train(SAVED_STEP + 1)
    with CheckpointManager(path) as manager:
        manager.save(SAVED_STEP, plain_state_of(run))
    return Saved(run.found(), run.train(NUM_STEPS), run.found())


def resume_plain(link: Link | None, layout: str, path: str) -> Resumed:
    run = Run(layout, seed=50)
    with CheckpointManager(path) as manager:
        manager.restore(SAVED_STEP, plain_state_of(run), strict=True)
    run.state.step = SAVED_STEP + 1
    return Resumed(run.found(), run.train(NUM_STEPS), run.found(), [])
