"""One small training run under each kind of parallelism, and its state as digests that do not show the kind."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from asyncckpt import CheckpointManager, TrainState
from asyncckpt.plan import leaves
from stagers import OverlappingAsyncStager
from tests.processes import Link
from tests.states import raw_bytes, tensor_of

KINDS = ["ddp", "fsdp1", "fsdp", "hsdp", "fsdp+tp"]
SAVED_STEP, NUM_STEPS = 2, 4


class Net(nn.Module):
    """No number of ranks divides all of its sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Linear(13, 10), nn.Tanh())
        self.down = nn.Linear(10, 7)
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        return self.down(self.up(x)).tanh()


class Run:
    """What is trained, fresh, and the TrainState over it. kind: one of KINDS, or "whole" for a process alone."""

    def __init__(self, kind: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.model: nn.Module = Net()
        if kind != "whole":
            self.model = _parallelize(self.model, kind)
            torch.manual_seed(seed + dist.get_rank())  # from here on every rank has its own random numbers
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.state = TrainState(model=self.model, optimizer=self.optimizer, scheduler=self.scheduler)

    def train(self, manager: CheckpointManager | None = None) -> list[float]:
        """Run the steps that are left; this rank's random numbers, one a step."""
        drawn = []
        for step in range(self.state.step, NUM_STEPS):
            drawn.append(torch.rand(()).item())
            self.model(tensor_of(torch.float32, 5, 13, seed=step)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            if manager is not None:
                manager.save_async(step, self.state)
        return drawn

    def digest(self) -> dict[str, str]:
        """Of every bit of the model, the optimizer and the scheduler, as whole tensors."""
        found = {}
        for fqn, leaf in leaves(self.state.state_dict()).items():
            if fqn.split(".")[0] in ("model", "optimizer", "scheduler"):
                value = _whole(leaf.value)
                if isinstance(value, torch.Tensor):
                    value = value.dtype, tuple(value.shape), hashlib.sha256(raw_bytes(value)).hexdigest()
                found[fqn] = str(value)
        return found


def _parallelize(model: nn.Module, kind: str) -> nn.Module:
    num_ranks = dist.get_world_size()
    line = init_device_mesh("cpu", (num_ranks,))
    grid = init_device_mesh("cpu", (2, num_ranks // 2), mesh_dim_names=("outer", "inner"))
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp1":
        warnings.simplefilter("ignore", FutureWarning)  # it is deprecated, and so is much that its state_dict() calls
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.")
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    if kind == "fsdp+tp":
        model = parallelize_module(model, grid["inner"], {"up.0": ColwiseParallel(), "down": RowwiseParallel()})
    mesh = {"fsdp": line, "hsdp": grid, "fsdp+tp": grid["outer"]}[kind]
    fully_shard(model.up, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, ShardedTensor):  # FSDP1's; gathered on rank 0 alone
        whole = torch.empty(value.size(), dtype=value.dtype) if dist.get_rank() == 0 else None
        value.gather(dst=0, out=whole)
        return whole
    return value


def run_and_save(link: Link, kind: str, path: str) -> tuple[dict[str, str], list[float]]:
    """An uninterrupted run that saves every second step: its state at the end, and the random numbers on the way."""
    run = Run(kind, seed=0)
    with CheckpointManager(path, SAVED_STEP, stager=OverlappingAsyncStager()) as manager:
        drawn = run.train(manager)
    return run.digest(), drawn


def resume(link: Link, kind: str, path: str) -> tuple[dict[str, str], int, dict[str, str], list[float]]:
    """(the state restored, the next step, the state at the end, the random numbers on the way)."""
    run = Run(kind, seed=50)
    with CheckpointManager(path, SAVED_STEP) as manager:
        manager.restore(SAVED_STEP, run.state, strict=True)
    restored, step = run.digest(), run.state.step
    drawn = run.train()
    return restored, step, run.digest(), drawn
