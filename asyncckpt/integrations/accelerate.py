"""Accelerate's `save_state` and `load_state`, in the background and to any URL.

    accelerator = attach(Accelerator(project_dir="run"), "s3://bucket/run", max_to_keep=3)

checkpoint_7 is step 7 of a CheckpointManager at <url>/checkpoints. It has the files, names and bytes that Accelerate's
own code writes, as that code runs under `capture`: hooks, registered objects and FSDP come along. Fetched into a folder
(`accelerator.checkpoints.fetch`) it loads with plain Accelerate. Beside them lies asyncckpt_dataloaders_<rank>.bin
(accelerate_data.py). Imported by users alone; needs the extra `accelerate`.
"""

from __future__ import annotations

import os
import platform
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import SCALER_NAME, DistributedType, gather_object, load

from asyncckpt.arguments import check_step
from asyncckpt.errors import RestoreError, SaveError, StepNotFoundError
from asyncckpt.files import File
from asyncckpt.integrations.accelerate_data import places, set_places, track
from asyncckpt.integrations.accelerate_weights import download, is_url, load_checkpoint_in_model, to_url
from asyncckpt.integrations.capture import Captured, capture
from asyncckpt.integrations.processes import on_all_ranks
from asyncckpt.manager import CheckpointManager
from asyncckpt.policy import KeepPolicy
from asyncckpt.storage import Storage, open_storage

__all__ = ["SavedState", "attach", "load_checkpoint_in_model"]
_NUMBERED = re.compile(r"(?:checkpoint_)?(0|[1-9][0-9]*)")
_PLAIN_NUMBERED = re.compile(r"checkpoint_(0|[1-9][0-9]*)/random_states_0\.pkl")
_RANDOM_STATES = re.compile(r"random_states_(\d+)\.pkl")
_OF_ONE_RANK = re.compile(r"(?:random_states_|asyncckpt_dataloaders_|.*_rank)(\d+)\.(?:pkl|bin)")
_LOADER_STATE = re.compile(r"(dl_state_dict(?:_\d+)?)(?:_rank\d+)?\.bin")
_WRITE_THEMSELVES = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class SavedState(str):
    """The name of a checkpoint, as `load_state` takes it, whose saving may still go on."""

    _manager: CheckpointManager

    @classmethod
    def of(cls, name: str, manager: CheckpointManager) -> SavedState:
        saved = cls(name)
        saved._manager = manager
        return saved

    def result(self) -> SavedState:
        """Wait until it is committed. Raises what it failed with, as `CheckpointManager.join` does."""
        self._manager.join()
        return self

    wait = result


def attach(
    accelerator: Accelerator,
    url: str | os.PathLike[str] | None = None,
    *,
    max_to_keep: int | None = None,
    keep: KeepPolicy | None = None,
    storage_options: Mapping[str, Any] | None = None,
    timeout: float = 600.0,
    **options: Any,
) -> Accelerator:
    """Have an Accelerator save to `url` in the background; the same object, whose `checkpoints` is the manager.

    A collective call, once, before or after `prepare`. All its methods keep their signatures:

    save_state(output_dir=None, safe_serialization=True, *, step=None, block=False, **kwargs) -> SavedState, a str:
        returns when all is copied; `.result()` or block=True waits for the commit. Without output_dir it is the number
        after the last, in storage as here, with or without automatic naming; step: that number. `.../checkpoint_7` and
        `.../7` are step 7 at `...`. Any other folder or URL holds one checkpoint, which the next save there replaces
        when it is whole. A name without "/" lies below `url`, as does what lies below `project_dir`.
        What an earlier save failed with is raised here, by `load_state`, or by `end_training`, once.
    load_state(input_dir=None, ...): the newest whole one, past damaged ones; or what is named as above; or a folder or
        URL that plain Accelerate saved to. The next `save_state` goes on counting. `<url>/checkpointing/` is
        `<url>/checkpoints/`, as Accelerate's guide writes it.
    skip_first_batches: needed after load_state as ever, but for a StatefulDataLoader; the batches that follow are those
        that the saved run had before it, and the epoch after is the next one.
    save_model, save, and save_pretrained of what `unwrap_model` gives: also to URLs; they block.
    end_training: waits for the saves in flight.

    url: where to; None: the accelerator's project_dir. max_to_keep: of the checkpoints there; 0 keeps all; None: as
    many as ProjectConfiguration.total_limit says. They go after the commit of a newer one. Others are never deleted.
    options: further arguments of CheckpointManager. DeepSpeed and Megatron write to a scratch folder first: such a save
    blocks for that. Raises ValueError, and what CheckpointManager does.
    """
    if hasattr(accelerator, "checkpoints"):
        raise ValueError(f"this Accelerator saves to {accelerator.checkpoints.url} already. Attach once.")
    root = url if url is not None else accelerator.project_dir
    if root is None:
        raise ValueError("where to? Give attach a url, or the Accelerator a project_dir.")
    if accelerator.num_processes > 1 and not dist.is_initialized():
        raise ValueError(f"{accelerator.distributed_type} without torch.distributed is not served: ranks cannot agree.")
    if max_to_keep is None:
        max_to_keep = accelerator.project_configuration.total_limit or 0
    options |= {"storage_options": storage_options, "timeout": timeout, "chkpt_on_preemption": False}
    _Attached(accelerator, os.fspath(root), {"max_to_keep": max_to_keep, "keep": keep}, options)
    return accelerator


class _Attached:
    """What an Accelerator's methods are after `attach`."""

    def __init__(self, accelerator: Accelerator, root: str, retention: dict[str, Any], options: dict[str, Any]) -> None:
        self._accelerator, self._config = accelerator, accelerator.project_configuration
        self._rank, self._num_ranks = accelerator.process_index, accelerator.num_processes
        self._root = _normal(root)
        self._options = options
        self._manager = CheckpointManager(f"{self._root}/checkpoints", **retention, **options)
        self._elsewhere: CheckpointManager | None = None  # of another path, the last one that was asked for
        self._elsewhere_base = ""
        self._save_state, self._load_state = accelerator.save_state, accelerator.load_state
        self._end_training = accelerator.end_training
        accelerator.checkpoints = self._manager
        for method in (self.save_state, self.load_state, self.end_training):
            setattr(accelerator, method.__name__, method)
        _take_urls(accelerator, options["storage_options"])
        _track_loaders(accelerator)

    # -- saving

    def save_state(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        safe_serialization: bool = True,
        *,
        step: int | None = None,
        block: bool = False,
        **kwargs: Any,
    ) -> SavedState:
        if output_dir is not None and step is not None:
            raise ValueError(f"save_state got output_dir={os.fspath(output_dir)!r} and step={step}: give one of them")
        number = self._next_number() if step is None else step
        check_step(number)
        base, named = self._place(output_dir if output_dir is not None else f"{self._root}/checkpoints/{number}")
        manager, step = self._manager_at(base), named or 0
        with TemporaryDirectory(prefix="asyncckpt-") as scratch:
            files = self._files(os.path.join(scratch, f"checkpoint_{step}"), safe_serialization, kwargs)
        save = manager.save if block else manager.save_async
        save(step, {}, force=True, files=files)
        if manager is self._manager:
            self._config.iteration = step + 1
        return SavedState.of(base if named is None else f"{base}/checkpoint_{named}", manager)

    def _next_number(self) -> int:
        """After all that are known, so that none is replaced."""
        latest = self._manager.latest_step()
        return max(int(self._config.iteration), 0 if latest is None else latest + 1)

    def _files(self, folder: str, safe_serialization: bool, kwargs: Mapping[str, Any]) -> dict[str, File | bytes]:
        """What Accelerate would write into `folder`, this rank's part."""
        files: dict[str, File | bytes] = {}

        def take() -> list[str]:
            with self._plain_naming(), self._captured(folder) as captured:
                self._save_state(folder, safe_serialization, **kwargs)
                torch.save(places(self._accelerator._dataloaders), f"{folder}/asyncckpt_dataloaders_{self._rank}.bin")
            files.update((_name_on(self._rank, name), file) for name, file in captured.files().items())
            return list(files)

        names = on_all_ranks(take, self._manager.url, SaveError)
        # What several ranks write is the same (scaler.pt), or meant for one of them: the lowest one's is kept.
        taken = set().union(*names[: self._rank])
        return {name: file for name, file in files.items() if name not in taken}

    @contextmanager
    def _captured(self, folder: str) -> Iterator[Captured]:
        """DeepSpeed and Megatron read what they wrote, and write in ways of their own: they do so really."""
        os.makedirs(folder)
        if self._accelerator.distributed_type in _WRITE_THEMSELVES:
            yield Captured(folder)
        else:
            with capture(folder) as captured:
                yield captured

    @contextmanager
    def _plain_naming(self) -> Iterator[None]:
        """Accelerate itself numbers and deletes nothing."""
        automatic, iteration = self._config.automatic_checkpoint_naming, self._config.iteration
        self._config.automatic_checkpoint_naming = False
        try:
            yield
        finally:
            self._config.automatic_checkpoint_naming, self._config.iteration = automatic, iteration

    # -- loading

    def load_state(
        self,
        input_dir: str | os.PathLike[str] | None = None,
        load_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for manager in filter(None, (self._manager, self._elsewhere)):
            manager.join()
        with self._scratch() as scratch:
            number, names = self._fetch(input_dir, scratch)
            self._accelerator.wait_for_everyone()  # what is shared is there
            saved_ranks = sum(_RANDOM_STATES.fullmatch(name) is not None for name in names)
            on_all_ranks(partial(self._lay_out, scratch, saved_ranks), self._manager.url)
            self._load_state(scratch.folder, load_kwargs, **kwargs)
            self._reload_scaler(scratch.folder)
            if (saved := scratch.read_places(self._rank)) is not None:
                set_places(self._accelerator._dataloaders, saved, only_epochs=saved_ranks != self._num_ranks)
        if number is not None:
            self._config.iteration = number + 1

    def _fetch(self, input_dir: str | os.PathLike[str] | None, scratch: _Scratch) -> tuple[int | None, Iterable[str]]:
        """The number, if it is a checkpoint of this run, and the names of its files: those of all ranks."""
        if input_dir is None:
            number = self._manager.fetch_latest(scratch.shared, scratch.wants)
            if number is not None:
                return number, self._manager.files(number)
            input_dir = self._newest_plain()
        base, number = self._place(input_dir)
        plain = on_all_ranks(partial(self._plain, input_dir, base, number), self._manager.url)[self._rank]
        if plain is not None:
            storage = self._storage(plain)
            on_all_ranks(partial(download, storage, scratch.shared, scratch.wants), storage.url)
            return number if base == f"{self._root}/checkpoints" else None, storage.list_files()
        manager = self._manager_at(base)
        step = number if number is not None else manager.latest_step() or 0
        on_all_ranks(partial(manager.fetch, step, scratch.shared, scratch.wants), manager.url)
        return number if manager is self._manager else None, manager.files(step)

    def _newest_plain(self) -> str:
        """Of those that plain Accelerate saved before, by number."""
        folder = f"{self._root}/checkpoints"
        names = on_all_ranks(partial(self._listed, folder), self._manager.url)[self._rank]
        found = [int(match[1]) for match in map(_PLAIN_NUMBERED.fullmatch, names) if match]
        if not found:
            raise StepNotFoundError(
                f"there is no checkpoint at {self._manager.url}. Nothing was loaded. Save one first, or name one.",
                known=[], url=self._manager.url,
            )  # fmt: skip
        return f"{folder}/checkpoint_{max(found)}"

    def _plain(self, given: str | os.PathLike[str], base: str, number: int | None) -> str | None:
        """The folder, if plain Accelerate saved to it."""
        for path in (os.path.expanduser(given), base if number is None else f"{base}/checkpoint_{number}"):
            is_there = is_url(path) or os.path.isdir(path)
            if is_there and any(map(_RANDOM_STATES.fullmatch, self._listed(path))):
                return path
        return None

    def _listed(self, folder: str) -> list[str]:
        storage = self._storage(folder)
        try:
            return list(storage.list_files())
        except OSError as exc:
            raise RestoreError(
                f"{storage.url} cannot be listed: {exc}. Nothing was loaded. Check the path, that the bucket exists, "
                "and the permissions.",
                url=storage.url,
            ) from exc

    def _storage(self, folder: str) -> Storage:
        return open_storage(folder, self._options["storage_options"] if is_url(folder) else None)

    def _lay_out(self, scratch: _Scratch, saved_ranks: int) -> None:
        """What Accelerate is to load, if it can be. It passes over random states that it cannot read."""
        if saved_ranks != self._num_ranks:
            warnings.warn(
                f"this checkpoint is of {saved_ranks} processes, and here are {self._num_ranks}: the places in the "
                "data are the beginnings of epochs, and processes that were not there keep their random states",
                stacklevel=5,
            )
        scratch.lay_out(self._rank, with_loaders=saved_ranks == self._num_ranks)
        states = os.path.join(scratch.folder, f"random_states_{self._rank}.pkl")
        if self._rank < saved_ranks:
            try:
                load(states)
            except Exception as exc:
                raise RestoreError(
                    f"the random states of rank {self._rank} cannot be read: {type(exc).__name__}: {exc}. Nothing was "
                    "loaded. Take another checkpoint, or delete the file if other random numbers do no harm.",
                    rank=self._rank,
                ) from exc

    def _reload_scaler(self, folder: str) -> None:
        """FSDP2's optimizers take a step to be loaded, which the scaler that was loaded before has counted."""
        if self._accelerator.scaler is not None and self._accelerator.is_fsdp2:
            self._accelerator.scaler.load_state_dict(torch.load(os.path.join(folder, SCALER_NAME)))

    @contextmanager
    def _scratch(self) -> Iterator[_Scratch]:
        with TemporaryDirectory(prefix="asyncckpt-") as mine:
            shared = mine
            if self._num_ranks > 1:
                node = platform.node()
                shared = next(path for name, path in gather_object([(node, mine)]) if name == node)
            scratch = _Scratch(self._rank, os.path.join(mine, "rank"), os.path.join(shared, "node"), shared == mine)
            yield scratch
            self._accelerator.wait_for_everyone()  # others may still read what is shared

    # -- the rest

    def end_training(self) -> None:
        try:
            self._manager.close()
        finally:
            try:
                if self._elsewhere is not None:
                    self._elsewhere.close()
            finally:
                self._end_training()

    def _place(self, path: str | os.PathLike[str]) -> tuple[str, int | None]:
        """Where a manager for `path` is, and the step; None: the path is all its own."""
        given = os.fspath(path).rstrip("/")
        where = _normal(given)
        project = _normal(self._accelerator.project_dir) if self._accelerator.project_dir else self._root
        if "/" not in given:
            where = f"{self._root}/{given}"
        elif where.startswith(f"{project}/"):
            where = self._root + where.removeprefix(project)
        base, _, name = where.rpartition("/")
        if (match := _NUMBERED.fullmatch(name)) is None:
            return where, None
        return f"{self._root}/checkpoints" if base == f"{self._root}/checkpointing" else base, int(match[1])

    def _manager_at(self, base: str) -> CheckpointManager:
        """A collective call where it is another path than last time: waits for the saves to that one."""
        if base == f"{self._root}/checkpoints":
            return self._manager
        if self._elsewhere is None or self._elsewhere_base != base:
            if self._elsewhere is not None:
                self._elsewhere.close()
            self._elsewhere = CheckpointManager(base, **self._options)
            self._elsewhere_base = base
        return self._elsewhere


@dataclass(frozen=True)
class _Scratch:
    """folder: of this rank, made by `lay_out`: what Accelerate is given. shared: of the ranks on this node, to which
    each brings its own files, and the one whose folder it is (is_owner) those for all."""

    rank: int
    folder: str
    shared: str
    is_owner: bool

    def wants(self, name: str) -> bool:
        match = _OF_ONE_RANK.fullmatch(name)
        return int(match[1]) == self.rank if match else self.is_owner

    def lay_out(self, rank: int, *, with_loaders: bool) -> None:
        """Links to what there is, under the names that Accelerate looks for."""
        for base, _, names in os.walk(self.shared):
            folder = os.path.join(self.folder, os.path.relpath(base, self.shared))
            os.makedirs(folder, exist_ok=True)
            for name in names:
                if (plain := _LOADER_STATE.fullmatch(name)) is None:
                    os.symlink(os.path.join(base, name), os.path.join(folder, name))
                elif with_loaders and name == _name_on(rank, f"{plain[1]}.bin"):
                    os.symlink(os.path.join(base, name), os.path.join(folder, f"{plain[1]}.bin"))

    def read_places(self, rank: int) -> list[Any] | None:
        """None: plain Accelerate wrote the checkpoint. Of a rank that was not there, rank 0's."""
        for of in (rank, 0):
            path = os.path.join(self.folder, f"asyncckpt_dataloaders_{of}.bin")
            if os.path.exists(path):
                places: list[Any] = torch.load(path)
                return places
        return None


def _name_on(rank: int, name: str) -> str:
    """Every rank has a loader's state, under one name in Accelerate: whose was last, it was all ranks'."""
    loader = _LOADER_STATE.fullmatch(name)
    return f"{loader[1]}_rank{rank}.bin" if loader and rank else name


def _normal(path: str | os.PathLike[str]) -> str:
    path = os.path.expanduser(os.fspath(path))
    return path.rstrip("/") if is_url(path) else os.path.abspath(path)


def _track_loaders(accelerator: Any) -> None:
    for loader in accelerator._dataloaders:
        track(loader)
    prepare, skip = accelerator.prepare_data_loader, accelerator.skip_first_batches

    @wraps(prepare)
    def prepare_data_loader(*args: Any, **kwargs: Any) -> Any:
        return track(prepare(*args, **kwargs))

    @wraps(skip)
    def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
        return track(skip(dataloader, num_batches), dataloader)

    accelerator.prepare_data_loader, accelerator.skip_first_batches = prepare_data_loader, skip_first_batches


def _take_urls(accelerator: Any, storage_options: Mapping[str, Any] | None) -> None:
    """In place of the local folders that the methods for weights take."""
    save, save_model, unwrap = accelerator.save, accelerator.save_model, accelerator.unwrap_model

    @wraps(save)
    def save_anywhere(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        url, _, name = os.fspath(f).rpartition("/") if is_url(f) else ("", "", "")
        with to_url(url, storage_options, replaces=False) if url else nullcontext() as folder:
            save(obj, os.path.join(folder, name) if folder else f, *args, **kwargs)

    @wraps(save_model)
    def save_model_anywhere(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        with to_url(os.fspath(save_directory), storage_options) if is_url(save_directory) else nullcontext() as folder:
            save_model(model, folder or save_directory, *args, **kwargs)

    @wraps(unwrap)
    def unwrap_model(*args: Any, **kwargs: Any) -> Any:
        model = unwrap(*args, **kwargs)
        if hasattr(type(model), "save_pretrained"):
            model.save_pretrained = partial(_save_pretrained, model, storage_options)
        return model

    accelerator.save, accelerator.save_model, accelerator.unwrap_model = (
        save_anywhere,
        save_model_anywhere,
        unwrap_model,
    )


def _save_pretrained(
    model: Any, storage_options: Mapping[str, Any] | None, save_directory: Any, *args: Any, **kwargs: Any
) -> Any:
    """Of the model's class, which makes a local folder "s3:" of a URL. In place of a closure: models are pickled."""
    save_pretrained = type(model).save_pretrained
    if not is_url(save_directory):
        return save_pretrained(model, save_directory, *args, **kwargs)
    with to_url(os.fspath(save_directory), storage_options) as folder:
        return save_pretrained(model, folder, *args, **kwargs)
