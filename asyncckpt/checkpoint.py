"""A checkpoint without a training run: for inference, notebooks, tools.

`open_checkpoint` needs no process group, starts no thread that stays, handles no signal and writes nothing; any number
of processes may do so while the run goes on. What is in a step is lookup.py's to say. Called by users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from asyncckpt.errors import RestoreError, StepNotFoundError
from asyncckpt.lookup import look, read_value, tree_of
from asyncckpt.manifest import Head
from asyncckpt.restore import OpenStep, join
from asyncckpt.steps import DCP_METADATA, StepFiles, read_listing, read_step_files, summarise
from asyncckpt.storage import Storage, open_storage
from asyncckpt.weights import LoadedWeights, load_weights

T = TypeVar("T")


def open_checkpoint(
    url: str,
    step: int | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
    transfer: Literal["auto", "obstore", "fsspec"] = "auto",
    safe_globals: Iterable[Any] = (),
) -> Checkpoint:
    """The newest committed step under the URL of a run, or another one of it; or the one whose own folder the URL is.

    Steps of stock DCP are opened, too; without `step` only where there is none of ours. Lists, and reads the manifest.
    A damaged step is an error, and none older is taken for it in silence: name one. storage_options, transfer: as of
    `CheckpointManager`. safe_globals: classes that objects may be made of besides those `weights_only` allows.
    Raises StepNotFoundError, RestoreError: it cannot be listed; ValueError for a URL that nobody serves.
    """
    storage = open_storage(url, storage_options, transfer=transfer)
    checkpoint = Checkpoint(storage, _folder_of(storage) if step is None else str(step), tuple(safe_globals))
    checkpoint._look(lambda opened: None)
    return checkpoint


def _folder_of(storage: Storage) -> str:
    """The newest step's, or "": the URL is a step's."""
    try:
        files = storage.list_files()
    except OSError as exc:
        raise RestoreError(f"{storage.url} cannot be listed: {exc}", url=storage.url) from exc
    own = read_step_files(files)
    if own.manifests or (own.is_foreign and DCP_METADATA in own.other):
        return ""
    return str(_newest(storage, read_listing(files)))


def _newest(storage: Storage, steps: Mapping[int, StepFiles]) -> int:
    listing = summarise(steps)
    if listing.sequences:
        return max(listing.sequences, key=listing.sequences.__getitem__)
    foreign = [step for step in listing.foreign if DCP_METADATA in steps[step].other]
    if not foreign:
        raise StepNotFoundError(f"there is no whole step at {storage.url}", known=[], url=storage.url)
    return max(foreign)


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """One step, for reading. folder: of the step, below the storage's root. Its manifest is read once, and again if
    another process saves the step anew."""

    storage: Storage
    folder: str
    safe_globals: tuple[Any, ...] = ()
    _opened: list[OpenStep] = field(default_factory=list, init=False)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.url}>"

    @property
    def url(self) -> str:
        """Of the step, without credentials."""
        return join(self.storage.url, self.folder)

    @property
    def step(self) -> int | None:
        """None: the folder of a step of stock DCP, whose index does not say."""
        if (head := self._head) is not None:
            return head.step
        return int(self.folder) if self.folder else None

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the user gave when it was saved."""
        return self._head.metadata if self._head else {}

    @property
    def metrics(self) -> Mapping[str, float]:
        return self._head.metrics if self._head else {}

    @property
    def _head(self) -> Head | None:
        manifest = self._look(lambda step: step).manifest
        return manifest.head if manifest else None

    def tree(self, key: str = "") -> Any:
        """As of `CheckpointManager`; key: of a subtree."""
        return self._look(lambda step: tree_of(step, key))

    def read(
        self,
        key: str = "",
        index: Any = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Any:
        """As of `CheckpointManager`."""
        return self._look(
            lambda step: read_value(
                self.storage, step, key, index, safe_globals=self.safe_globals, dtype=dtype, device=device
            )
        )

    def load_weights(
        self, model: nn.Module, *, prefix: str = "model", strict: bool = True, cast: bool = False
    ) -> LoadedWeights:
        """Read a model's parameters and buffers, in place; on the device that each is on, or, for those on the meta
        device, into new ones on the CPU. Other state in the step (optimizer, ...) is not read.

        Not collective: each rank of a sharded model (FSDP2, TP) reads its part, whatever saved it. Wrappers (DDP,
        torch.compile) do not change names.
        prefix: the model's key in the step; "": the model is all there is. strict: as in `load_state_dict`: missing and
        unexpected keys are errors; else they are returned. Shapes that differ are errors always. cast: tensors that
        were saved in another dtype are converted to the model's, instead of being an error.
        Raises StateMismatchError: nothing was changed; DamagedStepError: the model may be half overwritten.
        """
        return self._look(
            lambda step: load_weights(
                self.storage, step, model, prefix=prefix, strict=strict, cast=cast, safe_globals=self.safe_globals
            )
        )

    def _look(self, work: Callable[[OpenStep], T]) -> T:
        def noted(step: OpenStep) -> T:
            self._opened[:] = [step]
            return work(step)

        try:
            return look(self.storage, self.folder, noted, self._opened[0] if self._opened else None)
        except OSError as exc:
            if isinstance(exc, StepNotFoundError):
                raise
            raise RestoreError(f"{self.url} cannot be read: {exc}. Try again", url=self.url) from exc
