"""A run with a StatefulDataLoader and workers, for tests: `python -m tests.loader_script FOLDER HISTORY [KILL_AT]`."""

from __future__ import annotations

import os
import signal
import sys
import warnings

import torch
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from asyncckpt import CheckpointManager, TrainState


class Rows(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return index


def main(folder, history, kill_at):
    """Each line of the file `history` is a step and its samples. kill_at: the process ends before that step."""
    warnings.simplefilter("ignore")
    torch.manual_seed(3)
    model = torch.nn.Linear(1, 1)
    # A snapshot of the workers at every fourth batch; what lies between is run through again at a resume.
    loader = StatefulDataLoader(Rows(), batch_size=3, shuffle=True, num_workers=2, snapshot_every_n_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    state = TrainState(model=model, optimizer=optimizer, dataloader=loader)
    with CheckpointManager(folder, save_interval=3) as manager:
        manager.restore_latest(state)
        for step, index in enumerate(state.batches(epochs=2), start=state.step):
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            with open(history, "a") as file:
                print(step, *index.tolist(), file=file)
            manager.save(step, state)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else -1)
