"""Trains with transformers' Trainer over asyncckpt: `trainer_script.py URL FOLDER [key=value ...]`, alone or under
torchrun. Each rank writes what came of it to FOLDER/result-<rank>.pt.

whole=true: first trains at URL-whole, undisturbed, which is written to whole-<rank>.pt. kill=7: dies at the end of that
step. sigterm=7: rank 1 then gets SIGTERM. resume=...: given to `train`. The rest are TrainingArguments. STATE_DICT_TYPE
in the environment: with FSDP2.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments

from asyncckpt.integrations.transformers import AsyncTrainer

NUM_SAMPLES, LENGTH, VOCABULARY = 20, 8, 32


def tiny_model() -> GPT2LMHeadModel:
    """With dropout, so that its losses depend on the random streams."""
    torch.manual_seed(3)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": LENGTH, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def samples() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(VOCABULARY, (NUM_SAMPLES, LENGTH), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(output_dir: str, **options: Any) -> TrainingArguments:
    values = {
        "max_steps": 10, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4, "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "seed": 7, "learning_rate": 0.01,
        "weight_decay": 0.1, "lr_scheduler_type": "cosine",
    }  # fmt: skip
    return TrainingArguments(output_dir, **(values | options))


class RecordingTrainer(AsyncTrainer):
    """Notes each batch: the order of the data."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[Any] = []

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen.append((self.state.global_step + 1, inputs["input_ids"].tolist()))
        return super().training_step(model, inputs, *args, **kwargs)


class ShardedTrainer(RecordingTrainer):
    """With FSDP2, which Accelerate ignores on the CPU: its state is told so once it is there. The state dict type is in
    the environment."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, state_dict_type=os.environ["STATE_DICT_TYPE"], auto_wrap_policy="NO_WRAP",
            cpu_ram_efficient_loading=False,
        )  # fmt: skip
        for state in (PartialState._shared_state, AcceleratorState._shared_state):
            state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        self.is_fsdp_enabled = True


class AtStep(TrainerCallback):
    """Calls `act(trainer)` at the end of one step, when earlier saves are committed."""

    def __init__(self, trainer: AsyncTrainer, step: int, act: Callable[[AsyncTrainer], object]) -> None:
        self._trainer, self._step, self._act = trainer, step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            self._trainer.checkpoints.join()
            self._act(self._trainer)


def local(tree: Any) -> Any:
    """This rank's part of it."""
    if isinstance(tree, dict):
        return {key: local(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [local(value) for value in tree]
    return (
        tree.to_local().clone()
        if isinstance(tree, DTensor)
        else tree.clone()
        if isinstance(tree, torch.Tensor)
        else tree
    )


def outcome(trainer: RecordingTrainer) -> dict[str, Any]:
    """All that a later step depends on, and what was logged; times left out."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "model": local(model.state_dict()),
        "optimizer": local(trainer.optimizer.state_dict()),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "rng": [random.random(), float(np.random.rand()), torch.rand(3)],
        "seen": trainer.seen,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "epoch": trainer.state.epoch,
    }


def main(url: str, folder: str, *options: str) -> None:
    values = {name: json.loads(value) for name, _, value in (option.partition("=") for option in options)}
    whole, resume = values.pop("whole", False), values.pop("resume", None)
    kill, sigterm = values.pop("kill", 0), values.pop("sigterm", 0)
    if whole:
        trainer = make(f"{url}-whole", folder, values)
        trainer.train()
        write(outcome(trainer), folder, f"whole-{trainer.args.process_index}.pt")
    trainer = make(url, folder, values)
    if kill:
        trainer.add_callback(AtStep(trainer, kill, lambda trainer: os.kill(os.getpid(), signal.SIGKILL)))
    if sigterm and trainer.args.process_index == 1:
        trainer.add_callback(AtStep(trainer, sigterm, lambda trainer: os.kill(os.getpid(), signal.SIGTERM)))
    trainer.train(resume_from_checkpoint=resume)
    write(outcome(trainer), folder, f"result-{trainer.args.process_index}.pt")


def make(url: str, folder: str, values: dict[str, Any]) -> RecordingTrainer:
    kind = ShardedTrainer if "STATE_DICT_TYPE" in os.environ else RecordingTrainer
    return kind(tiny_model(), arguments(folder, **values), train_dataset=samples(), checkpoint_url=url)


def write(result: dict[str, Any], folder: str, name: str) -> None:
    os.makedirs(folder, exist_ok=True)
    torch.save(result, os.path.join(folder, name))


if __name__ == "__main__":
    main(*sys.argv[1:])
