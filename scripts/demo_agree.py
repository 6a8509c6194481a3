"""How far apart runs of demo_train.py ended that differ in their number of ranks, as a table. For demo_run.py.

Reads each run's last checkpoint in this process, which is in no process group, as whole tensors.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from demo_report import Launch
from demo_train import NUM_STEPS, LossHistory, Size, fingerprints, make_model
from rich import box
from rich.table import Table
from torch import Tensor

from asyncckpt import CheckpointManager, TrainState

# On another number of ranks gradients are added up in another order. Seen 60 steps later: up to 3e-6 with --quick,
# 3e-7 without; 2e-2 and more where the optimizer's exp_avg had been zeroed at the restore (2 cores, torch 2.13 on CPU).
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Agreement:
    """Of a resumed run with the uninterrupted one. is_restored: it went on from the very bits of that run at `step`.

    distances: at the end, of each part of the state: |resumed - uninterrupted| / |uninterrupted|, over all numbers.
    """

    title: str
    step: int
    is_restored: bool
    distances: Mapping[str, float]

    @property
    def is_exact(self) -> bool:
        return self.is_restored and not any(self.distances.values())

    @property
    def is_within_tolerance(self) -> bool:
        return self.is_restored and max(self.distances.values()) <= TOLERANCE


def compare_ends(reference: Launch, resumed: Sequence[Launch], size: Size) -> list[Agreement]:
    expected = read_end(reference, size)
    agreements = []
    for launch in resumed:
        (step,) = launch.of("Restored")
        is_restored = launch.of("State")[step]["sha256"] == reference.of("State")[step]["sha256"]
        distances = measure(expected, read_end(launch, size))
        agreements.append(Agreement(launch.title, step, is_restored, distances))
    return agreements


def read_end(launch: Launch, size: Size) -> dict[str, list[Tensor]]:
    """The tensors of each part of the state after the last step. ValueError: its checkpoint holds another state."""
    model, optimizer = make_model(size, dropout=0.0)
    losses = LossHistory()
    logging.getLogger("asyncckpt").setLevel(logging.ERROR)  # or it would list what is not asked for here
    with CheckpointManager(launch.url) as manager:
        manager.restore(NUM_STEPS - 1, TrainState(model=model, optimizer=optimizer, losses=losses, rng=False))
    if fingerprints(model, optimizer, losses) != launch.sha256:
        raise ValueError(f"the last checkpoint at {launch.url} is not the state that the run ended with")
    states = optimizer.state.values()
    return {
        "losses": [torch.tensor(losses.state_dict()["losses"])],
        "parameters": [parameter.detach() for parameter in model.parameters()],
        **{f"optimizer, {key}": [state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step")},
    }


def measure(expected: Mapping[str, list[Tensor]], found: Mapping[str, list[Tensor]]) -> dict[str, float]:
    differences = {part: map(torch.sub, found[part], expected[part]) for part in expected}
    return {part: _norm(differences[part]) / _norm(expected[part]) for part in expected}


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


def agreement_table(title: str, agreements: Sequence[Agreement]) -> Table:
    """A column for each resumed run. title: the run that they are compared with."""
    table = Table(title=f"The end, against the {title} run", title_justify="left", box=box.SIMPLE)
    for name in ("", *(agreement.title for agreement in agreements)):
        table.add_column(name)
    table.add_row("restored step", *(str(agreement.step) for agreement in agreements))
    same = ("[green]equal" if agreement.is_restored else "[red]different" for agreement in agreements)
    table.add_row("SHA-256 of what was restored", *same)
    for part in agreements[0].distances:
        table.add_row(f"{part}", *(_how_far(agreement.distances[part]) for agreement in agreements))
    return table


def _how_far(distance: float) -> str:
    if distance == 0:
        return "[green]equal"
    return f"[{'green' if distance <= TOLERANCE else 'red'}]{distance:.1e} apart"
