"""What demo_train.py does where torchrun started it on several ranks: FSDP2, and each batch split over the ranks.

In a process alone every function here leaves things as they are. Knows nothing of checkpoints.
"""

from __future__ import annotations

import torch.distributed as dist
from demo_model import GPT
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def join_ranks() -> tuple[int, int]:
    """(this process's rank, how many there are)."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def leave_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model: GPT) -> None:
    """Leave each rank its part of every parameter. All ranks must have made the same model."""
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)


def own_rows(batch: list[Tensor]) -> list[Tensor]:
    """This rank's part of a batch that all ranks read alike: its rows by index, as many for each rank."""
    if not dist.is_initialized():
        return batch
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    if len(batch[0]) % num_ranks:
        raise ValueError(f"a batch of {len(batch[0])} cannot be split evenly over {num_ranks} ranks")
    return [part[rank::num_ranks] for part in batch]


def mean_over_ranks(value: Tensor) -> float:
    """The same on every rank, so that what follows from it is, too."""
    if dist.is_initialized():
        value = value.detach().clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value.item()


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all ranks, which must all ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
