"""Lightning with FSDP2 on the CPU, for tests: `torchrun -m tests.integrations.sharded_script FOLDER OPTIONS`."""

from __future__ import annotations

import json
import os
import sys
import warnings

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torchdata.stateful_dataloader import StatefulDataLoader

import asyncckpt.dcp
from asyncckpt.integrations.lightning import AsyncckptIO
from asyncckpt.integrations.lightning_sharded import ShardedSaves
from tests.integrations.lightning_script import Model, make_loader, make_trainer


class Sharded(ShardedSaves, ModelParallelStrategy):
    pass


class ShardedModel(Model):
    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.layers[0], mesh=mesh)
        fully_shard(self.layers, mesh=mesh)


def die_in(step):
    """End this process when it has written its files of `step`, and before they are committed."""
    write = asyncckpt.dcp.write_items

    def write_and_die(storage, *args):
        written = write(storage, *args)
        if f"step={step}.ckpt" in storage.url:
            os.kill(os.getpid(), 9)
        return written

    asyncckpt.dcp.write_items = write_and_die


def main(folder, options):
    """options: losses, resume (a path or null), kill_in (a step), stock (without ShardedSaves)."""
    warnings.simplefilter("ignore")
    L.seed_everything(1)
    if options.get("kill_in") and os.environ["RANK"] == "1":
        die_in(options["kill_in"])
    kind = ModelParallelStrategy if options.get("stock") else Sharded
    strategy = kind(data_parallel_size=int(os.environ["WORLD_SIZE"]), tensor_parallel_size=1)
    plugin = None if options.get("stock") else AsyncckptIO()
    callbacks = [ModelCheckpoint(folder, every_n_train_steps=2, save_last=True)]
    devices = int(os.environ["WORLD_SIZE"])
    trainer = make_trainer(
        folder, plugin, callbacks=callbacks, strategy=strategy, devices=devices, max_steps=options.get("max_steps", 8)
    )
    model = ShardedModel(options["losses"])
    loader = make_loader(StatefulDataLoader)
    trainer.fit(model, loader, ckpt_path=options.get("resume"), weights_only=False)
    if trainer.is_global_zero:
        print("STEPS", trainer.global_step)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
