"""A training script as a user would write it: `torchrun --nproc-per-node 2 user_script.py PATH NUM_STEPS`."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from asyncckpt import CheckpointManager, TrainState

path, num_steps = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo")
model = fully_shard(torch.nn.Linear(50, 30))
optimizer = torch.optim.AdamW(model.parameters())
state = TrainState(model=model, optimizer=optimizer)
with CheckpointManager(path, save_interval=1000, max_to_keep=2) as manager:
    if steps := manager.all_steps():
        manager.restore(max(steps), state)
    for step in range(state.step, num_steps):
        model(torch.ones(8, 50)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        manager.save_async(step, state)
        if step == 10:
            print("training\n", end="", flush=True)
        if manager.reached_preemption(step):
            break
print(f"left after step {step}\n", end="", flush=True)
dist.destroy_process_group()
