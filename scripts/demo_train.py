"""Trains a character GPT on the source of Python's own library, with a checkpoint every 20 steps, kept are the last 3.

    python scripts/demo_train.py runs/first            a folder, or s3://bucket/run, gs://bucket/run, ...
    torchrun --nproc-per-node 2 scripts/demo_train.py runs/first             under FSDP2 (demo_ranks.py)

Started again with the same URL it goes on from the newest whole checkpoint, to the same result, bit for bit: its last
event is the SHA-256 of parameters, optimizer state and losses. demo_run.py starts it some times to show that, for
which `--events`, `--kill-while-saving` and `--comparable` are there. The model is in demo_model.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sysconfig
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo_model import GPT
from demo_ranks import join_ranks, leave_ranks, mean_over_ranks, own_rows, shard, whole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from asyncckpt import CheckpointManager, Event, Staged, TrainState, Written
from asyncckpt.events import Sink

NUM_STEPS = 101
SAVE_INTERVAL = 20
# For which ranks wait for each other; a guess, below the 30 s that torchrun leaves them once one has died: time for the
# others to say which.
TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Size:
    """Of the model, and of what it reads in one step."""

    length: int
    batch: int
    width: int
    depth: int
    num_heads: int


FULL = Size(length=64, batch=8, width=384, depth=6, num_heads=6)  # 10.7 M parameters
QUICK = Size(length=32, batch=4, width=64, depth=2, num_heads=2)  # 0.1 M, for tests


def train(url: str, size: Size, events: EventFile, kill_while_saving: int | None, *, comparable: bool) -> None:
    """comparable: see main."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    text, validation_text = read_text()
    # Every rank reads every batch and trains on its rows of it. The order is drawn from a generator of its own, so that
    # it is the same on any number of ranks.
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(Windows(text, size.length), size.batch, shuffle=True, drop_last=True, generator=order)
    validation_batch = next(iter(DataLoader(Windows(validation_text, size.length), batch_size=size.batch)))
    model, optimizer = make_model(size, dropout=0.0 if comparable else 0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS)
    losses = LossHistory()
    state = TrainState(model=model, optimizer=optimizer, scheduler=scheduler, dataloader=loader, losses=losses)

    sinks: list[Sink] = [events]
    if kill_while_saving is not None:
        sinks.append(KillWhileSaving(kill_while_saving))
    bar = progress_bar(is_shown=events.rank == 0)
    with CheckpointManager(url, SAVE_INTERVAL, max_to_keep=3, events=sinks, timeout=TIMEOUT_S) as manager, bar:
        restored = manager.restore_latest(state)
        if comparable and restored is not None:
            events.write("State", step=restored, sha256=fingerprints(model, optimizer, losses))
        manager.prewarm(state)  # else the first save would stall for as long as it takes to allocate its buffers
        task = bar.add_task(url.rpartition("/")[2], total=NUM_STEPS, completed=state.step, loss="")
        for step, batch in zip(range(state.step, NUM_STEPS), state.batches(), strict=False):
            started_s = time.time()
            optimizer.zero_grad()
            own_loss = model.loss(*own_rows(batch))
            own_loss.backward()
            optimizer.step()
            scheduler.step()
            loss = mean_over_ranks(own_loss)
            losses.append(loss)
            events.write("Step", step=step, loss=loss, started_s=started_s, time_s=time.time())

            metrics = None
            if manager.should_save(step):
                metrics = {"validation_loss": validation_loss(model, validation_batch)}
                if comparable:
                    events.write("State", step=step, sha256=fingerprints(model, optimizer, losses))
            manager.save_async(step, state, metrics=metrics)
            bar.update(task, completed=step + 1, loss=f"loss {loss:.3f}")
            if manager.reached_preemption(step):
                return
    events.write("Finished", sha256=fingerprints(model, optimizer, losses))


def make_model(size: Size, dropout: float) -> tuple[GPT, torch.optim.Optimizer]:
    """Untrained, this rank's part of it, and its optimizer."""
    model = GPT(
        vocabulary=128,
        max_length=size.length,
        width=size.width,
        depth=size.depth,
        num_heads=size.num_heads,
        dropout=dropout,
    )
    shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def read_text() -> tuple[Tensor, Tensor]:
    """(training text, validation text): ASCII codes of the standard library's modules, every tenth for validation."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    sources = [path.read_text("utf-8").encode("ascii", "replace") for path in paths]
    validation = b"".join(sources[::10])
    del sources[::10]
    return _codes(b"".join(sources)), _codes(validation)


def _codes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """`length` characters of a text, and the same one place further on; the windows do not overlap."""

    def __init__(self, text: Tensor, length: int) -> None:
        self._text = text
        self._length = length

    def __len__(self) -> int:
        return (len(self._text) - 1) // self._length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self._length
        window = self._text[start : start + self._length + 1].long()
        return window[:-1], window[1:]


def validation_loss(model: GPT, batch: tuple[Tensor, Tensor]) -> float:
    model.eval()
    with torch.no_grad():
        loss = model.loss(*batch).item()
    model.train()
    return loss


class LossHistory:
    """The loss of every step. Whatever has these two methods is saved with the run."""

    def __init__(self) -> None:
        self._losses: list[float] = []

    def append(self, loss: float) -> None:
        self._losses.append(loss)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self._losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses = state_dict["losses"]


class EventFile:
    """An event sink: one JSON object a line, each in one system call, so that SIGKILL leaves whole lines."""

    def __init__(self, path: str, rank: int) -> None:
        self.rank = rank
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def __call__(self, event: Event) -> None:
        self.write(type(event).__name__, **vars(event))

    def write(self, kind: str, **values: Any) -> None:
        line = json.dumps({"event": kind, "rank": self.rank, **values}, default=str)
        os.write(self._descriptor, line.encode() + b"\n")


class KillWhileSaving:
    """An event sink that plays the power cut: SIGKILL once the data of `step` is in storage and its commit is not.

    `Written` is reported on the writer thread, which commits when the sinks have returned; here they never do.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._is_training_on = threading.Event()

    def __call__(self, event: Event) -> None:
        if event.step == self._step and isinstance(event, Staged):
            self._is_training_on.set()
        if event.step == self._step and isinstance(event, Written):
            self._is_training_on.wait()
            os.kill(os.getpid(), signal.SIGKILL)


def progress_bar(*, is_shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description:>14}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(), disable=not is_shown,
    )  # fmt: skip


def fingerprints(model: GPT, optimizer: torch.optim.Optimizer, losses: LossHistory) -> dict[str, str]:
    """SHA-256 of each part of the training state, in a fixed order of keys."""
    parts = {
        "parameters": model.state_dict(),
        "optimizer state": optimizer.state_dict(),
        "loss history": losses.state_dict(),
    }
    digests = {}
    for name, state in parts.items():
        digest = hashlib.sha256()
        _feed(digest, state)
        digests[name] = digest.hexdigest()
    return digests


def _feed(digest: hashlib._Hash, value: Any) -> None:
    if isinstance(value, Tensor):
        value = whole(value)
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().numpy().data)
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, list):
        for item in value:
            _feed(digest, item)
    else:
        digest.update(repr(value).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a character GPT with asynchronous checkpoints.")
    parser.add_argument("url", help="where the checkpoints are: a folder or any fsspec URL")
    parser.add_argument("--events", metavar="FILE", default=os.devnull, help="append a JSON line for each event")
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument(
        "--kill-while-saving", metavar="STEP", type=int, help="the last rank dies by SIGKILL before STEP is committed"
    )
    parser.add_argument(
        "--comparable",
        action="store_true",
        help="with runs on other numbers of ranks: no dropout, as its masks depend on how a batch is split; and report "
        "the SHA-256 of the whole state at each save and after a restore",
    )
    arguments = parser.parse_args()
    rank, num_ranks = join_ranks()
    train(
        arguments.url,
        QUICK if arguments.quick else FULL,
        EventFile(arguments.events, rank),
        arguments.kill_while_saving if rank == num_ranks - 1 else None,
        comparable=arguments.comparable,
    )
    leave_ranks()


if __name__ == "__main__":
    main()
