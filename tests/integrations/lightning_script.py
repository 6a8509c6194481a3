"""A run under Lightning, for tests: `python -m tests.integrations.lightning_script FOLDER OPTIONS`, or by torchrun.

The loss of each step goes to a file as soon as it is known, so that a test can compare runs of which one was killed.
"""

from __future__ import annotations

import json
import os
import sys
import warnings

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from asyncckpt.integrations.lightning import AsyncckptIO
from asyncckpt.testing import RecordingStorage


class Rows(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.randn(8, generator=torch.Generator().manual_seed(index))


class Model(L.LightningModule):
    """losses: a file to which each step's loss goes. at_step: called with the number of each step before it."""

    def __init__(self, losses=None, at_step=None, lr=0.05):
        super().__init__()
        self.save_hyperparameters("lr")
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.BatchNorm1d(32), torch.nn.Linear(32, 1))
        self.losses, self.at_step = losses, at_step

    def training_step(self, batch, index):
        step = self.trainer.global_step
        torch.manual_seed(100 * step + self.global_rank)  # Lightning does not save random streams
        if self.at_step:
            self.at_step(step)
        loss = self.layers(batch + 0.01 * torch.randn(1)).square().mean()
        self.log("loss", loss)
        if self.losses and self.trainer.is_global_zero:
            with open(self.losses, "a") as file:
                file.write(f"{step} {loss.item().hex()}\n")
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def make_trainer(folder, plugin=None, *, callbacks=None, trainer=L.Trainer, **options):
    """Quiet, on the CPU, with a checkpoint every two steps unless other callbacks are given."""
    callbacks = callbacks or [ModelCheckpoint(folder, every_n_train_steps=2, save_last=True)]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    defaults = {"max_steps": 12, "accelerator": "cpu", "devices": 1, "default_root_dir": folder} | quiet
    return trainer(plugins=[plugin] if plugin else None, callbacks=callbacks, **(defaults | options))


def make_loader(kind=DataLoader):
    return kind(Rows(), batch_size=4)


class Wrapped(AsyncckptIO):
    """Its storage is what `wrap` makes of it."""

    def __init__(self, wrap, **options):
        super().__init__(**options)
        self._wrap = wrap

    def _open(self, path, storage_options):
        storage, name = super()._open(path, storage_options)
        return self._wrap(storage), name


class KillingStorage(RecordingStorage):
    """Ends the process when half of the file `name` was handed over."""

    def __init__(self, inner, name):
        super().__init__(inner)
        self._name = name

    def replace_file(self, path, size, views):
        def half():
            written = 0
            for view in views:
                yield view
                written += len(view)
                if written > size // 2:
                    os.kill(os.getpid(), 9)

        super().replace_file(path, size, half() if path == self._name else views)


def main(folder, options):
    """options: losses, resume (a path or null), kill_in (the file in which the process ends), trainer (arguments)."""
    warnings.simplefilter("ignore")
    L.seed_everything(1)
    kill_in = options.get("kill_in")
    plugin = Wrapped(lambda storage: KillingStorage(storage, kill_in)) if kill_in else AsyncckptIO()
    trainer = make_trainer(folder, plugin, **options.get("trainer", {}))
    model = Model(options["losses"])
    loader = make_loader(StatefulDataLoader)  # its place in the data is in the checkpoint, a DataLoader's is not
    trainer.fit(model, loader, ckpt_path=options.get("resume"), weights_only=False)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
