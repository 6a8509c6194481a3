"""Where each of an Accelerator's dataloaders is, so that a fresh process yields the batches that were left.

Accelerate saves neither a loader's epoch nor what its order was drawn from. Here each loader notes the random streams
at the start of its epoch; `places` gives them to be saved, and `set_places` has the next iteration begin from them.
How many batches were done is for the user (`skip_first_batches`), or for a StatefulDataLoader, to say.
Called by accelerate.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch.utils.data import BatchSampler

from asyncckpt.rng import rng_state, set_rng_state


@dataclass
class Place:
    """Of a loader as Accelerate prepared it; those that `skip_first_batches` makes of it share it.

    began: the streams at the start of the epoch it is in; None between epochs. resume: what the next epoch begins with,
    and the streams after its first batch, which is when the interrupted run went on drawing from them.
    """

    loader: Any
    began: dict[str, Any] | None = None
    resume: tuple[dict[str, Any], dict[str, Any]] | None = None

    def streams(self) -> dict[str, Any]:
        generators = [generator.get_state() for generator in _generators(self.loader)]
        return {"rng": rng_state(devices=False), "generators": generators}

    def set_streams(self, streams: dict[str, Any]) -> None:
        set_rng_state(streams["rng"])
        for generator, state in zip(_generators(self.loader), streams["generators"], strict=False):
            generator.set_state(state)


class _Tracked:
    """Mixed into the class of a loader."""

    def __iter__(self) -> Iterator[Any]:
        place: Place = self.__dict__["asyncckpt_place"]
        resume, place.resume = place.resume, None
        if resume is not None:
            place.set_streams(resume[0])
        place.began = place.streams()
        try:
            for batch in super().__iter__():  # type: ignore[misc]  # the loader's
                if resume is not None:
                    set_rng_state(resume[1])
                    resume = None
                yield batch
            if resume is not None:  # nothing was left of the epoch
                set_rng_state(resume[1])
            if place.loader is not self:  # Accelerate would begin this epoch again with the loader itself
                place.loader.iteration = self.__dict__["iteration"]
        finally:
            place.began = None


def track(loader: Any, of: Any = None) -> Any:
    """Have `loader` note its place; the loader. of: the one that it continues. Other loaders stay as they are."""
    if type(loader) not in (DataLoaderShard, DataLoaderDispatcher):
        return loader
    place = getattr(of, "asyncckpt_place", None) or Place(loader)
    tracked = type(type(loader).__name__, (_Tracked, type(loader)), {})
    # By the slot itself: on these classes the name __class__ is a property, which gives the class they wrap.
    object.__dict__["__class__"].__set__(loader, tracked)
    loader.asyncckpt_place = place
    return loader


def places(loaders: Sequence[Any]) -> list[dict[str, Any] | None]:
    """Plain values and tensors."""
    return [_saved(loader.asyncckpt_place) if _is_tracked(loader) else None for loader in loaders]


def _saved(place: Place) -> dict[str, Any]:
    seed = getattr(_sampler(place.loader), "initial_seed", None)
    return {"iteration": place.loader.iteration, "initial_seed": seed, "began": place.began}


def set_places(loaders: Sequence[Any], saved: Sequence[dict[str, Any] | None], *, only_epochs: bool = False) -> None:
    """To be called when the random streams are those of the save. only_epochs: it had another number of ranks."""
    now = rng_state()
    for loader, values in zip(loaders, saved, strict=False):
        if values is None or not _is_tracked(loader):
            continue
        place = loader.asyncckpt_place
        place.resume = None if values["began"] is None or only_epochs else (values["began"], now)
        if values["initial_seed"] is not None and hasattr(_sampler(loader), "initial_seed"):
            _sampler(loader).initial_seed = values["initial_seed"]
        loader.set_epoch(values["iteration"])


def _is_tracked(loader: Any) -> bool:
    return isinstance(loader, _Tracked)


def _sampler(loader: Any) -> Any:
    """The one below all batch samplers, which share it with what skips batches."""
    sampler = loader.sampler if isinstance(loader.sampler, BatchSampler) else loader.batch_sampler
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    return getattr(sampler, "sampler", None)


def _generators(loader: Any) -> list[torch.Generator]:
    """The streams of its own that a loader draws from, each once."""
    owners = (_sampler(loader), loader.base_dataloader, loader.dataset)
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
