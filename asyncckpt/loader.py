"""Where a data loader stands, so that the batches after a resume are those that an uninterrupted run would have seen.

An epoch's order comes from the random state at its start. That state is kept; a resume goes back to it, makes the
iterator again, skips what was consumed, and returns to the random state of the moment. A loader that keeps its own
state (torchdata's StatefulDataLoader) is asked for it instead. Called by train_state.py only.

A position is this rank's, and counts its batches. Where the data is divided anew, among another number of replicas (a
sampler's `num_replicas`) or in batches of another size, the epoch goes on after as many samples of all replicas
together, rounded down to a whole batch of theirs: some may come twice, none is left out, and it warns. A loader's own
state says nothing then; it is skipped ahead like any other. Which rank's position a new rank takes: per_rank.py.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from asyncckpt.errors import StateMismatchError
from asyncckpt.rng import rng_state, set_rng_state


class LoaderPosition:
    """One loader of a TrainState. epoch: full passes done. position: batches handed out in the epoch under way."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.epoch = 0
        self.position = 0
        self._is_stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self._is_loaded = False
        self._is_divided_anew = False
        self._start: dict[str, Any] | None = None
        self._iteration = 0

    @property
    def is_unknown(self) -> bool:
        """No batch was ever asked for here, and the loader itself cannot tell."""
        return not self._is_stateful and self._start is None

    def batches(self, epochs: int | None, *, fast_skip: bool) -> Iterator[Any]:
        self._iteration += 1
        iteration = self._iteration
        while epochs is None or self.epoch < epochs:
            for batch in self._resume(fast_skip) if self.position else self._begin():
                self.position += 1
                yield batch
                if iteration != self._iteration:
                    raise RuntimeError("this loop over batches() is over: the state was restored or batches() was "
                                       "called again. Loop over a new batches().")  # fmt: skip
            if not self.position:
                raise ValueError(f"{self.loader!r} has no batch in epoch {self.epoch}")
            self.epoch += 1
            self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "position": self.position,
            "start": self._start,
            "generators": [g.get_state() for g in self._generators()],
            "replicas": self._of_samplers("num_replicas", 1),
            "batch_size": self._batch_size(),
            "sampler_epoch": self._of_samplers("epoch", None),
            # A StatefulDataLoader asked before its first iteration would start its workers and draw a random number.
            "loader": self.loader.state_dict()
            if self._is_stateful and getattr(self.loader, "_iterator", self) is not None
            else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loops under way end with an error. The random streams may be moved: restore them after this."""
        self._iteration += 1
        self.epoch, self.position, self._start = state["epoch"], state["position"], state["start"]
        self._is_divided_anew = self._divide_anew(state["replicas"], state.get("batch_size"))
        if self._is_stateful:
            self._load_stateful(state)
        for generator, saved in zip(self._generators(), state["generators"], strict=True):
            generator.set_state(saved)

    def _divide_anew(self, saved_replicas: int, saved_size: int | None) -> bool:
        """Convert the position from another division of the data; whether it is another."""
        replicas, size = self._of_samplers("num_replicas", 1), self._batch_size()
        if saved_size is None or size is None:  # an older checkpoint, or batches of no fixed size
            saved_size = size = 1
        if (replicas, size) == (saved_replicas, saved_size):
            return False
        if self.position:
            self.position = self.position * saved_replicas * saved_size // (replicas * size)
            with contextlib.suppress(TypeError):  # it may have no length
                self.position = min(self.position, len(self.loader))  # of an epoch that is over, or nearly
            warnings.warn(
                f"the checkpoint was saved with the data divided by {saved_replicas}, in batches of {saved_size}, now "
                f"it is by {replicas}, of {size}: epoch {self.epoch} goes on at batch {self.position}, and a few "
                "samples may come twice",
                stacklevel=2,
            )
        return True

    def _load_stateful(self, state: dict[str, Any]) -> None:
        if self._is_divided_anew and self._start is not None:
            self._is_loaded = False
            return
        if self._is_divided_anew and state["loader"] is not None:
            warnings.warn(
                f"{self.loader!r} was not iterated through state.batches(), and its own state is of another number of "
                "replicas or batch size: it goes on where that says, and samples may be left out or come twice",
                stacklevel=2,
            )
        self._is_loaded = state["loader"] is not None
        self.loader.load_state_dict(state["loader"] or {})
        if self._is_loaded and hasattr(self.loader, "next_iter_state"):
            if state["sampler_epoch"] is not None:
                self._set_epoch(state["sampler_epoch"])
            # Makes the iterator now, for the next iter() to use: it draws a random number, which must not happen
            # after the random streams were restored.
            self.loader.state_dict()

    def _begin(self) -> Iterator[Any]:
        self._set_epoch(self.epoch)
        self._is_divided_anew = False
        has_workers = getattr(self.loader, "persistent_workers", False) and self.loader._iterator is not None
        self._start = {
            "rng": rng_state(devices=False),
            "generators": [g.get_state() for g in self._generators()],
            "seeds_workers": not has_workers,
        }
        return iter(self.loader)

    def _resume(self, fast_skip: bool) -> Iterator[Any]:
        self._set_epoch(self.epoch)
        now, generators = rng_state(devices=False), [g.get_state() for g in self._generators()]
        try:
            if self._is_stateful and not self._is_divided_anew:
                return self._resume_stateful()
            return self._replay(fast_skip)
        finally:
            set_rng_state(now)
            for generator, state in zip(self._generators(), generators, strict=True):
                generator.set_state(state)

    def _resume_stateful(self) -> Iterator[Any]:
        if not self._is_loaded:  # an earlier loop was left in the middle; iter() alone would begin a new epoch
            self.loader.load_state_dict(self.loader.state_dict())
        self._is_loaded = False
        return iter(self.loader)

    def _replay(self, fast_skip: bool) -> Iterator[Any]:
        assert self._start is not None
        set_rng_state(self._start["rng"])
        for generator, state in zip(self._generators(), self._start["generators"], strict=True):
            generator.set_state(state)
        loader = self.loader
        if getattr(loader, "persistent_workers", False):
            return self._skip(self._new_workers())
        has_indices = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
        has_indices &= not self._is_stateful  # which counts what it hands out
        if has_indices and loader.num_workers and fast_skip:
            return iter(_skipping(loader, self.position))
        iterator: Any = iter(loader)
        if has_indices and not loader.num_workers:
            # Nothing needs loading: what the skipped batches drew is in the random state of now.
            self._skip(iterator._sampler_iter)
            return iterator  # type: ignore[no-any-return]
        return self._skip(iterator)

    def _new_workers(self) -> Iterator[Any]:
        """Persistent workers are seeded in the first epoch only; to start them in a later one, the seed is drawn aside,
        so that the sampler draws what it drew then."""
        assert self._start is not None
        self.loader = copy.copy(self.loader)
        self.loader._iterator = None
        generator = self.loader.generator
        if not self._start["seeds_workers"]:
            self.loader.generator = torch.Generator()
        iterator: Iterator[Any] = iter(self.loader)
        self.loader.generator = generator
        return iterator

    def _skip(self, iterator: Iterator[Any]) -> Iterator[Any]:
        if sum(1 for _ in itertools.islice(iterator, self.position)) < self.position:
            raise StateMismatchError(
                f"epoch {self.epoch} of {self.loader!r} ends before the {self.position} batches that were consumed: "
                "its data or batch size changed. Leave the dataloader out of the TrainState to restore the rest."
            )
        return iterator

    def _set_epoch(self, epoch: int) -> None:
        for part in (*self._samplers(), getattr(self.loader, "dataset", None)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def _samplers(self) -> list[Any]:
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        return [getattr(self.loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]

    def _of_samplers(self, attribute: str, default: Any) -> Any:
        return next((getattr(s, attribute) for s in self._samplers() if hasattr(s, attribute)), default)

    def _batch_size(self) -> int | None:
        sizes = (
            getattr(part, "batch_size", None) for part in (self.loader, getattr(self.loader, "batch_sampler", None))
        )
        return next((size for size in sizes if isinstance(size, int)), None)

    def _generators(self) -> list[torch.Generator]:
        found = [getattr(part, "generator", None) for part in (self.loader, *self._samplers())]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _skipping(loader: Any, count: int) -> Any:
    """A copy of `loader` that never asks its workers for the first `count` batches of its next epoch."""
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    copied = copy.copy(loader)
    vars(copied)[name] = _Tail(getattr(loader, name), count)  # DataLoader refuses to set it
    return copied


class _Tail:
    def __init__(self, sampler: Iterable[Any], count: int) -> None:
        self._sampler = sampler
        self._count = count

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self._sampler, self._count, None)
