"""transformers' Trainer, saving in the background to any URL.

    class MyTrainer(CheckpointMixin, Trainer): ...        or AsyncTrainer in place of Trainer
    trainer = AsyncTrainer(model, TrainingArguments("s3://bucket/run", save_total_limit=3), train_dataset=...)
    trainer.train(resume_from_checkpoint="auto")
    model = from_pretrained(AutoModelForCausalLM, "s3://bucket/run/checkpoint-500")

checkpoint-500 is step 500 of a CheckpointManager at the URL. It has the files, names and bytes that Trainer's own code
writes, as that code runs unchanged under `capture`; fetched into a folder, plain Trainer and `from_pretrained` read it.
Not for DeepSpeed, SageMaker model parallelism or hyperparameter search, which are refused. Imported by users alone.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy, get_last_checkpoint
from transformers.utils import CONFIG_NAME, is_sagemaker_mp_enabled

from asyncckpt.errors import DamagedStepError, RestoreError, StepNotFoundError
from asyncckpt.fetch import fetch_files
from asyncckpt.files import File
from asyncckpt.integrations.accelerate_weights import download, is_url, to_url
from asyncckpt.integrations.capture import capture
from asyncckpt.integrations.processes import on_all_ranks
from asyncckpt.manager import CheckpointManager
from asyncckpt.policy import CommittedStep
from asyncckpt.steps import read_listing, summarise
from asyncckpt.storage import Storage, open_storage

_BEST = "best_step"  # among the metrics of a step: the best one of those saved until then
_A_STEP = re.compile(rf"(.+)/(?:{PREFIX_CHECKPOINT_DIR}-)?([0-9]+)")
_LOCAL_OUTPUT = "trainer_output"  # transformers' own default
_NOT_OF_MODEL = ("optimizer", "rng_state")


class CheckpointMixin(Trainer):  # type: ignore[misc]  # mypy skips transformers (pyproject.toml)
    """Stands before Trainer, or a class derived from it, among the bases of a trainer.

    checkpoint_url: where checkpoints go; any that CheckpointManager takes. Default: `args.output_dir`. If that is a
        URL, logs, the model card and the like go to the folder `trainer_output`, as without an output_dir.
    checkpoint_options: further arguments for the CheckpointManager, such as `storage_options` or `max_pending_async`.
        A `save_policy` saves beside what TrainingArguments say; `keep` replaces save_total_limit; a `stager` serves one
        training.

    `train` makes the manager, and closes it. A save blocks for the copy of the state; what fails in the background is
    raised once, by the next save or at the end of `train`, a CheckpointError. Callbacks' `on_save` runs when the save
    was taken: nothing of it lies in a local folder.
    save_total_limit: counts whole checkpoints at the URL; the newest and the best are kept, always. Nothing else is
        ever deleted.
    save_model: with an output_dir that is a URL, or to one, writes the files there, and blocks.
    resume_from_checkpoint: True or the URL itself is the newest whole one there, past damaged ones; `<url>/500` or
        `<url>/checkpoint-500` is that one; folders that Trainer wrote, as ever. True falls back to these in output_dir.
        "auto" is True if there is a checkpoint, else a training from the beginning.
    save_on_each_node: checkpoints have one place for all nodes, and are saved once.
    SIGTERM: saves at the end of the step and ends the training, if `train` runs on the main thread; not with the option
        chkpt_on_preemption=False.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *rest: Any,
        checkpoint_url: str | None = None,
        checkpoint_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        args = TrainingArguments(_LOCAL_OUTPUT) if args is None else args
        self._url = os.fspath(checkpoint_url or args.output_dir).rstrip("/")
        self._output_url = args.output_dir if is_url(args.output_dir) else None
        _check_supported(args, self._url)
        if self._output_url is not None:  # Trainer would make a folder of that name
            args = copy.copy(args)
            args.output_dir = _LOCAL_OUTPUT
        self._options = dict(checkpoint_options or {})
        self._best_step: int | None = None
        self._taken: set[int] = set()
        self.checkpoints: CheckpointManager
        super().__init__(model, args, *rest, **kwargs)
        self.add_callback(_SaveWhenAsked(self))

    def train(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if self.is_deepspeed_enabled or is_sagemaker_mp_enabled():
            raise ValueError(
                "DeepSpeed and SageMaker write checkpoints by themselves, so asyncckpt cannot make these asynchronous "
                "or remote. Nothing was done. Use Trainer as it is, with a local folder."
            )
        self._best_step = None
        self._taken.clear()
        with self._scratch(), self._open_manager() as self.checkpoints:
            return super().train(self._fetched(resume_from_checkpoint), *args, **kwargs)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "hyperparameter_search makes many trainings, which would all save their steps at one URL. Nothing was "
            "done. Use Trainer as it is for the search, and this class for the training after it."
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        url = output_dir if output_dir is not None or _internal_call else self._output_url
        if url is None or not is_url(url):
            super().save_model(output_dir, _internal_call)
            return
        with to_url(url, self._options.get("storage_options")) as folder, self._once_for_all_nodes():
            super().save_model(folder, True)

    # -- while it trains

    def _open_manager(self) -> CheckpointManager:
        limit = self.args.save_total_limit or 0
        options = {
            "save_policy": _Never(),
            "keep": KeepAsTrainer(limit) if limit > 0 else None,
            "chkpt_on_preemption": threading.current_thread() is threading.main_thread(),
            **self._options,
        }
        self._hears_sigterm = options["chkpt_on_preemption"]
        return CheckpointManager(self._url, **options)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        folder = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{step}")
        self._note_best(step)
        try:
            with capture(folder) as captured, self._once_for_all_nodes():
                super()._save_checkpoint(model, trial)
                self._place_best()
                if self.args.should_save:
                    self.state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))
                files = self._of_this_rank(captured.files())
            # What SIGTERM or a policy asks for is due, and may be skipped, as for lack of time (grace_period).
            force = not self.checkpoints.should_save(step)
            if self.checkpoints.save_async(step, {}, force, files=files, metrics=self._metrics(step)):
                self._taken.add(step)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if not self.args.auto_find_batch_size:  # which may begin anew, from what was fetched
            self._remove_on_this_node("resume")  # every rank has resumed, as it takes part in this save
        if self._hears_sigterm and self.checkpoints.reached_preemption(step):
            self.control.should_training_stop = True

    def _get_output_dir(self, trial: Any) -> str:
        """Where Trainer's own code believes that checkpoints lie, and deletes them: a folder of this rank's own."""
        return os.path.join(self._scratch_folder, f"rank-{self.args.process_index}")

    def _note_best(self, step: int) -> None:
        """The best step of those saved, this one included. Like Trainer, passes over one that was not saved."""
        best = self.state.best_global_step
        if best in self._taken and best not in self.checkpoints.all_steps():
            self.checkpoints.join()  # it is on its way, or has failed
        if best == step or (best in self._taken and best in self.checkpoints.all_steps()):
            self._best_step = best

    def _place_best(self) -> None:
        if self._best_step is not None:
            self.state.best_model_checkpoint = f"{self.checkpoints.url}/{self._best_step}"

    def _metrics(self, step: int) -> dict[str, float]:
        """What was logged at this step, and which step was the best by now, for KeepAsTrainer."""
        logged = {
            name: value for entry in self.state.log_history if entry["step"] == step for name, value in entry.items()
        }
        metrics = {n: float(v) for n, v in logged.items() if isinstance(v, int | float) and math.isfinite(v)}
        return metrics | ({} if self._best_step is None else {_BEST: float(self._best_step)})

    def _load_best_model(self) -> None:
        if self._best_step is None:  # from a folder of Trainer's, if that was resumed from
            super()._load_best_model()
            return
        self.checkpoints.join()
        folder = os.path.join(self._scratch_folder, "best")
        self._fetch_on_all_nodes(self.checkpoints, self._best_step, folder, _is_of_model)
        self.state.best_model_checkpoint = folder
        try:
            super()._load_best_model()
        finally:
            self._place_best()

    # -- resuming

    def _fetched(self, resume: str | os.PathLike[str] | bool | None) -> str | bool | None:
        """What Trainer is to resume from: a local folder that it understands."""
        if isinstance(resume, os.PathLike):
            resume = os.fspath(resume)
        if not resume or (isinstance(resume, str) and os.path.isfile(os.path.join(resume, TRAINER_STATE_NAME))):
            return resume
        run, step = self._url, None
        if isinstance(resume, str) and resume != "auto" and resume.rstrip("/") != self._url:
            run, step = _run_and_step(resume)
        folder = os.path.join(self._scratch_folder, "resume")
        with self._reading(run) as manager:
            if step is not None:
                self._fetch_on_all_nodes(manager, step, folder, _everything)
            elif manager.fetch_latest(folder, _everything if self._fetches else _nothing) is None:
                return self._nothing_at(run, resume)
        best = on_all_ranks(partial(self._take_best, folder), run)[0]
        self._best_step = best if run == self._url and best in self.checkpoints.all_steps() else None
        return folder

    def _nothing_at(self, run: str, resume: str | bool) -> bool:
        output = self.args.output_dir
        if resume in (True, "auto") and os.path.isdir(output) and get_last_checkpoint(output) is not None:
            return True  # Trainer itself wrote there before
        if resume == "auto":
            return False
        raise StepNotFoundError(
            f"there is no checkpoint to resume from at {run}. Nothing was done. Call train() without "
            'resume_from_checkpoint, or with "auto", to begin there',
            known=[], url=run,
        )  # fmt: skip

    def _reading(self, run: str) -> AbstractContextManager[CheckpointManager]:
        """A manager of `run`: this training's own, or one for now. A collective call."""
        if run == self._url:
            return nullcontext(self.checkpoints)
        options = {name: value for name, value in self._options.items() if name != "stager"}  # a manager closes its own
        return CheckpointManager(run, **(options | {"chkpt_on_preemption": False}))

    def _take_best(self, folder: str) -> int | None:
        """The best step so far. Its place goes from the fetched state, as Trainer would look for a folder, and warn."""
        if not self._fetches:
            return None
        path = os.path.join(folder, TRAINER_STATE_NAME)
        if not os.path.isfile(path):
            raise RestoreError(
                f"the checkpoint has no {TRAINER_STATE_NAME}: Trainer did not save it. Nothing was done."
            )
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
        step = (state.get("best_model_checkpoint") or "").rpartition("/")[2]
        if not step.isdecimal():  # none, or in a folder of Trainer's
            return None
        with open(path, "w", encoding="utf-8") as file:
            json.dump(state | {"best_model_checkpoint": None}, file, indent=2, sort_keys=True)
        return int(step)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        trained = super()._init_training_state(*args, **kwargs)
        self._place_best()
        return trained

    # -- ranks and nodes

    @property
    def _fetches(self) -> bool:
        """Whether this rank downloads, for all on its node."""
        return bool(self.args.local_process_index == 0)

    def _fetch_on_all_nodes(
        self, manager: CheckpointManager, step: int, folder: str, select: Callable[[str], bool]
    ) -> None:
        on_all_ranks(partial(manager.fetch, step, folder, select) if self._fetches else lambda: None, manager.url)

    def _of_this_rank(self, files: dict[str, File | bytes]) -> dict[str, File | bytes]:
        """Without those that a lower rank gives, too: hooks of users may write the same on all ranks."""
        if self.args.world_size == 1:
            return files
        given = set().union(*gather_object([list(files)])[: self.args.process_index])
        return {name: file for name, file in files.items() if name not in given}

    @contextmanager
    def _scratch(self) -> Iterator[None]:
        """A folder of this node's, in output_dir, for as long as a training runs. What a killed one left there goes.
        Nodes that share output_dir are told apart by their first rank."""
        node = f"node-{self.args.process_index - self.args.local_process_index}"
        self._scratch_folder = os.path.join(os.path.abspath(self.args.output_dir), ".asyncckpt", node)
        self._remove_on_this_node("")
        try:
            yield
        finally:
            self._remove_on_this_node("")
            with suppress(OSError):  # another node's may be there
                os.rmdir(os.path.dirname(self._scratch_folder))

    def _remove_on_this_node(self, name: str) -> None:
        if self._fetches:
            shutil.rmtree(os.path.join(self._scratch_folder, name), ignore_errors=True)

    @contextmanager
    def _once_for_all_nodes(self) -> Iterator[None]:
        """Else the main process of each node would give the same files."""
        each_node, self.args.save_on_each_node = self.args.save_on_each_node, False
        try:
            yield
        finally:
            self.args.save_on_each_node = each_node


class AsyncTrainer(CheckpointMixin):
    """Trainer with CheckpointMixin."""


def from_pretrained(
    kind: Any, url: str, *args: Any, storage_options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Any:
    """`kind.from_pretrained(...)` of a checkpoint at a URL: `<run>/500` or `<run>/checkpoint-500`; or what `save_model`
    left there; or else the newest whole one of a run.

    kind: a class of transformers' for models, tokenizers or configurations. Fetches into a folder under TMPDIR that it
    then removes. Not collective. Raises StepNotFoundError, DamagedStepError, RestoreError.
    """
    run, step = _run_and_step(url)
    storage = open_storage(run, storage_options)
    with TemporaryDirectory(prefix="asyncckpt-") as folder:
        try:
            _bring_model(storage, step, folder)
        except OSError as exc:
            if isinstance(exc, StepNotFoundError):
                raise
            raise RestoreError(f"{run} could not be read: {exc}. Check the path and the network.", url=run) from exc
        return kind.from_pretrained(folder, *args, **kwargs)


def _bring_model(storage: Storage, step: int | None, folder: str) -> None:
    if step is not None:
        fetch_files(storage, str(step), folder, _is_of_model)
        return
    names = storage.list_files()
    if CONFIG_NAME in names:
        download(storage, folder, lambda name: "/" not in name)
        return
    sequences = summarise(read_listing(names)).sequences
    for newest in sorted(sequences, key=lambda step: -sequences[step]):
        with suppress(DamagedStepError):
            fetch_files(storage, str(newest), folder, _is_of_model)
            return
    raise StepNotFoundError(
        f"there is no whole checkpoint at {storage.url}; damaged are {sorted(sequences) or 'none'}",
        known=sorted(sequences), url=storage.url,
    )  # fmt: skip


@dataclass(frozen=True)
class KeepAsTrainer:
    """What `save_total_limit` keeps: the newest step, the best one as the newest knows it, and then the newest until
    there are `limit`."""

    limit: int
    needs_metadata = True

    def keep(self, steps: Sequence[CommittedStep], now_s: float) -> set[int]:
        newest_first = [committed.step for committed in reversed(steps)]
        best = steps[-1].metrics.get(_BEST)
        kept = {newest_first[0], *(step for step in newest_first if step == best)}
        for step in newest_first:
            if len(kept) >= self.limit:
                break
            kept.add(step)
        return kept


class _Never:
    """Trainer alone decides when to save."""

    uses_clock = False

    def should_save(self, step: int, last_step: int | None, seconds_since_last: float) -> bool:
        return False


class _SaveWhenAsked(TrainerCallback):  # type: ignore[misc]  # as above
    """By SIGTERM, or by a save policy of the user's."""

    def __init__(self, trainer: CheckpointMixin) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer.checkpoints.should_save(state.global_step):
            control.should_save = True


def _check_supported(args: TrainingArguments, url: str) -> None:
    if args.enable_jit_checkpoint:
        raise ValueError("enable_jit_checkpoint: SIGTERM saves by itself here, at the end of the step. Leave it out.")
    pushes = args.push_to_hub and args.save_strategy != SaveStrategy.NO
    if pushes and args.hub_strategy != HubStrategy.END:
        raise ValueError(
            f"push_to_hub with hub_strategy={args.hub_strategy.value!r} uploads local checkpoint folders, and there "
            'are none. Use hub_strategy="end".'
        )
    if pushes and url == args.output_dir.rstrip("/") and "://" not in url:
        raise ValueError(
            f"push_to_hub uploads all of output_dir ({url}), and the checkpoints lie in it. Give them another place: "
            "checkpoint_url=."
        )


def _run_and_step(url: str | os.PathLike[str]) -> tuple[str, int | None]:
    """None: its newest."""
    url = os.fspath(url).rstrip("/")
    found = _A_STEP.fullmatch(url)
    return (found[1], int(found[2])) if found else (url, None)


def _everything(name: str) -> bool:
    return True


def _nothing(name: str) -> bool:
    return False


def _is_of_model(name: str) -> bool:
    return not name.startswith(_NOT_OF_MODEL)
