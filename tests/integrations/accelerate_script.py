"""A full Accelerate loop: `torchrun accelerate_script.py URL OUT`, which may kill itself and be started anew.

Gradient accumulation, clipping, mixed precision, a scheduler, dropout and shuffled data. Saves every fourth batch, goes
on from the newest checkpoint in mid-epoch, and writes what it saw of batches and its last weights to OUT.<rank>.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DataLoaderConfiguration, DistributedType, FullyShardedDataParallelPlugin, set_seed

from asyncckpt.integrations.accelerate import attach

EPOCHS, SAVE_EVERY = 3, 4  # where gradients are not half accumulated: Accelerate saves none


class Progress:
    """Registered by users: where the loop is."""

    def __init__(self) -> None:
        self.epoch = self.batch = 0

    def state_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def make_accelerator(layout: str, precision: str, loader: str = "plain") -> Accelerator:
    """layout: "ddp", or one that FSDP2 has for its state; on the CPU Accelerate must be told of it behind its back.
    precision: fp16 with a GradScaler is refused on the CPU by Accelerate, not by torch."""
    data = DataLoaderConfiguration(
        use_seedable_sampler=loader == "seedable", use_stateful_dataloader=loader == "stateful"
    )
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=2,
        mixed_precision="bf16" if precision == "bf16" else "no",
        dataloader_config=data,
    )
    if precision == "fp16":
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    if layout != "ddp":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, state_dict_type=layout, auto_wrap_policy="NO_WRAP", cpu_ram_efficient_loading=False
        )
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return accelerator


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("url")
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--layout", default="ddp")
    arguments.add_argument("--precision", default="no")
    arguments.add_argument("--loader", default="plain")
    arguments.add_argument("--die-at", type=int, default=-1, help="batches, over all epochs")
    options = arguments.parse_args()

    torch.set_num_threads(1)
    accelerator = make_accelerator(options.layout, options.precision, options.loader)
    set_seed(0)
    rank, seen = accelerator.process_index, []
    attach(accelerator, options.url, max_to_keep=2)
    model = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Dropout(0.3), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.9)
    inputs = torch.arange(60 * 4, dtype=torch.float32).reshape(60, 4) / 100
    data = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if accelerator.checkpoints.all_steps():
        torch.randn(7)  # no fresh process is where the one that died was
        accelerator.load_state()

    for epoch in range(progress.epoch, EPOCHS):
        batches, done = loader, progress.batch
        if progress.batch and options.loader != "stateful":
            batches = accelerator.skip_first_batches(loader, progress.batch)
        for number, (x, y) in enumerate(batches, start=done):
            with accelerator.accumulate(model):
                with accelerator.autocast(), torch.autocast("cpu", torch.float16, enabled=options.precision == "fp16"):
                    loss = ((model(x) - y) ** 2).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    if options.layout == "ddp":
                        accelerator.clip_grad_value_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            seen.append([epoch, number, hashlib.sha256(x.numpy().tobytes()).hexdigest()[:8], loss.item()])
            progress.epoch, progress.batch = epoch, number + 1
            if len(seen) == options.die_at:
                accelerator.wait_for_everyone()
                os.kill(os.getpid(), signal.SIGKILL)
            if (number + 1) % SAVE_EVERY == 0:
                accelerator.save_state(block=number + 1 == SAVE_EVERY)
        progress.epoch, progress.batch = epoch + 1, 0
    weights = hashlib.sha256()
    for value in accelerator.get_state_dict(model).values():
        weights.update(value.numpy().tobytes())
    accelerator.checkpoints.join()
    told = {"seen": seen, "weights": weights.hexdigest(), "steps": accelerator.checkpoints.all_steps()}
    options.out.with_suffix(f".{rank}").write_text(json.dumps(told))
    accelerator.end_training()


if __name__ == "__main__":
    main()
