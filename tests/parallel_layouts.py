"""Every way to divide the model of parallel_net.py among ranks."""

from __future__ import annotations

import functools
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from tests.parallel_net import BATCH, NUM_EXPERTS, WIDTHS, Net


class Pipeline:
    """The parts of `net` on several ranks; what another rank has is gone from `net`."""

    def __init__(self, net: Net, owners: list[int]) -> None:
        """owners: the rank that has each part."""
        self.net = net
        self.owners = owners
        for name, owner in zip(WIDTHS, owners, strict=True):
            if owner != dist.get_rank():
                setattr(net, name, None)

    def loss(self, x: torch.Tensor, goal: torch.Tensor) -> float | None:
        """Forward and backward; the loss, on the rank that has the last part."""
        ins, outs = {}, {}
        for number, (name, width) in enumerate(WIDTHS.items()):
            if number:
                x = self._move(outs.get(number - 1, torch.empty(BATCH, width)), number - 1, number)
            if (part := getattr(self.net, name)) is not None:
                ins[number] = x.detach().requires_grad_()
                outs[number] = part(ins[number])
        loss, grad = None, torch.empty_like(goal)
        if number in outs:
            last = outs[number].detach().requires_grad_()
            loss = (last - goal).square().mean()
            loss.backward()
            grad = last.grad
        for number, width in reversed(list(enumerate(WIDTHS.values()))):
            if number in outs:
                outs[number].backward(grad)
                grad = ins[number].grad
            else:
                grad = torch.empty(BATCH, width)
            if number:
                grad = self._move(grad, number, number - 1)
        return None if loss is None else loss.item()

    def _move(self, tensor: torch.Tensor, here: int, there: int) -> torch.Tensor:
        """From the rank of one part to that of another."""
        source, target = self.owners[here], self.owners[there]
        tensor = tensor.detach()
        if source != target and dist.get_rank() == source:
            dist.send(tensor, target)
        elif source != target and dist.get_rank() == target:
            dist.recv(tensor, source)
        return tensor


@functools.cache
def mesh_of(*sizes: int) -> DeviceMesh:
    """Once for each shape, because it makes process groups."""
    return init_device_mesh("cpu", sizes, mesh_dim_names=("outer", "inner")[-len(sizes) :])


def shard(net: Net, mesh: DeviceMesh) -> nn.Module:
    """FSDP2, in units of one dtype each."""
    for part in (net.tied, net.low):
        fully_shard(part, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def shard_fsdp1(net: Net) -> nn.Module:
    warnings.simplefilter("ignore", FutureWarning)  # it is deprecated, and so is much that its state_dict() calls
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.")
    wrap = functools.partial(FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=True)
    for name in ("mix", "tied", "low"):  # an optimizer must have all of a unit, or nothing
        setattr(net, name, wrap(getattr(net, name)))
    return wrap(net)


def split_layers(net: Net, mesh: DeviceMesh) -> Net:
    """Tensor parallel: one layer by rows, one by columns; the rest is on all ranks."""
    return parallelize_module(
        net, mesh, {"front.up": ColwiseParallel(output_layouts=Replicate()),
                    "mix": RowwiseParallel(input_layouts=Replicate())},
    )  # fmt: skip


def split_grouped_experts(net: Net, mesh: DeviceMesh) -> Net:
    weight = distribute_tensor(net.grouped.weight.detach(), mesh, [Shard(0)], src_data_rank=None)
    net.grouped.weight = nn.Parameter(weight)
    net.grouped.group = mesh.get_group()
    return net


def split_listed_experts(net: Net) -> Net:
    for number in range(NUM_EXPERTS):
        if number % dist.get_world_size() != dist.get_rank():
            del net.listed.experts[str(number)]
    net.listed.group = dist.group.WORLD
    return net


def divide(net: Net, kind: str, num_ranks: int) -> nn.Module | Pipeline:
    line = mesh_of(num_ranks)
    if "+" in kind or kind == "hsdp":
        grid = mesh_of(2, num_ranks // 2)
    match kind:
        case "ddp":
            return DistributedDataParallel(net)
        case "fsdp1":
            return shard_fsdp1(net)
        case "fsdp" | "meta":
            return shard(net, line)
        case "hsdp":
            return shard(net, grid)
        case "tp":
            return split_layers(net, line)
        case "fsdp+tp":
            return shard(split_layers(net, grid["inner"]), grid["outer"])
        case "ep":
            return split_grouped_experts(net, line)
        case "fsdp+ep":
            fully_shard(split_grouped_experts(net, grid["inner"]).grouped, mesh=grid["outer"])
            return shard(net, line)  # all that is not sharded yet
        case "experts":
            return split_listed_experts(net)
        case "pp":
            return Pipeline(net, [number * num_ranks // len(WIDTHS) for number in range(len(WIDTHS))])
        case "looped":
            return Pipeline(net, [number % num_ranks for number in range(len(WIDTHS))])
        case "pp+fsdp":
            column = grid.mesh[:, grid.get_local_rank("inner")].tolist()
            pipeline = Pipeline(net, [column[number * 2 // len(WIDTHS)] for number in range(len(WIDTHS))])
            for part in net.children():
                fully_shard(part, mesh=grid["inner"])
            return pipeline
    raise ValueError(kind)
