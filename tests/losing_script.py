"""A training script that loses a rank: `torchrun ... losing_script.py PATH NUM_STEPS`. At its first start rank 1 kills
itself when its part of step 6 is durable, and nobody knows it yet."""

import os
import signal
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from asyncckpt import CheckpointManager, Event, TrainState, Written

path, num_steps = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
is_first_start = not os.path.exists(path)


def die(event: Event) -> None:
    if is_first_start and isinstance(event, Written) and (event.step, event.rank) == (6, 1):
        os.kill(os.getpid(), signal.SIGKILL)


torch.manual_seed(0)
model = fully_shard(torch.nn.Linear(5, 3).double())
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
state = TrainState(model=model, optimizer=optimizer)
dist.barrier()  # all have looked whether the path is there
with CheckpointManager(path, 2, timeout=12.0, events=[die]) as manager:
    restored = manager.restore_latest(state)
    if rank == 0:
        print(f"{world_size} ranks from {restored} of {manager.all_steps()}\n", end="", flush=True)
    for step in range(state.step, num_steps):
        loss = model(torch.full((4, 5), step + 1.0, dtype=torch.float64)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        manager.save_async(step, state)
        if rank == 0:
            print(f"{step} {loss.item():.9f}\n", end="", flush=True)
dist.destroy_process_group()
