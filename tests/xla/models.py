"""Models on a mesh of this process's virtual devices, as pure functions of a seed, and their state as bits."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
import torch_xla
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch.utils._pytree import tree_map_only

os.environ.pop("XLA_USE_SPMD", None)  # left by the next line in the process that started this one, and deprecated
xr.use_spmd()
NUM_DEVICES = xr.global_runtime_device_count()


def mesh_of(*shape: int) -> xs.Mesh:
    return xs.Mesh(np.arange(NUM_DEVICES), shape, ("fsdp", "tensor"))


def sharded(tensor: torch.Tensor, mesh: xs.Mesh, *spec: str | None) -> torch.Tensor:
    on_device = tensor.to("xla")
    xs.mark_sharding(on_device, mesh, spec)
    return on_device


def model_and_optimizer(mesh: xs.Mesh, seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A weight sharded over each axis of the mesh, one over both, and biases that the compiler shards as it likes."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(16, 33), torch.nn.Linear(33, 4), torch.nn.Linear(4, 8)).to("xla")
    xs.mark_sharding(model[0].weight, mesh, ("fsdp", None))  # 33 rows: padded on the devices
    xs.mark_sharding(model[1].weight, mesh, (None, "tensor"))
    xs.mark_sharding(model[2].weight, mesh, ("fsdp", "tensor"))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    for step in range(num_steps):
        inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).to("xla")
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        torch_xla.sync()


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optim": optimizer.state_dict()}


def trained(mesh: xs.Mesh, seed: int, num_steps: int = 3) -> dict[str, Any]:
    model, optimizer = model_and_optimizer(mesh, seed)
    train(model, optimizer, num_steps)
    return state_of(model, optimizer)


def on_cpu(state: Any) -> Any:
    """A copy, to compare with."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu().clone(), state)


def sharding_of(tensor: torch.Tensor) -> str:
    return torch_xla._XLAC._get_xla_sharding_spec(tensor)
