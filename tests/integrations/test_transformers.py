"""transformers' own Trainer over asyncckpt: what it saves, resumes from, keeps, and refuses."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import signal
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback

from asyncckpt import CheckpointManager, Event, RestoreError, SaveError, SaveEvery, Staged, StepNotFoundError
from asyncckpt.integrations.transformers import AsyncTrainer, CheckpointMixin, KeepAsTrainer, from_pretrained
from asyncckpt.policy import CommittedStep
from tests.exact import bits
from tests.integrations import trainer_script
from tests.integrations.trainer_script import AtStep, RecordingTrainer, arguments, outcome, samples, tiny_model

pytestmark = pytest.mark.integration
FILES = {
    "config.json", "generation_config.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt",
    "trainer_state.json", "training_args.bin",
}  # fmt: skip


def make(url: str, output: pathlib.Path, kind: type = RecordingTrainer, options: Any = None, **values: Any) -> Any:
    """A trainer that saves at steps 3, 6, 9 and 10, in epochs of 5 steps."""
    return kind(
        tiny_model(), arguments(str(output), **values), train_dataset=samples(), checkpoint_url=url,
        checkpoint_options=options,
    )  # fmt: skip


def steps_at(url: str) -> list[int]:
    with CheckpointManager(url) as manager:
        return manager.all_steps()


def assert_goes_on(resumed: dict[str, Any], whole: dict[str, Any], step: int) -> None:
    """From `step` on the same batches, and the same of everything at the end."""
    assert resumed["seen"] == whole["seen"][step:]
    assert bits({**resumed, "seen": []}) == bits({**whole, "seen": []})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make(str(folder / "run"), folder / "output")
    trainer.train()
    return outcome(trainer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of all ten steps, to be read only."""
    folder = tmp_path_factory.mktemp("saved")
    make(str(folder / "run"), folder / "output").train()
    return str(folder / "run")


def run_script(*arguments: object, num_ranks: int = 0) -> int:
    """The exit status of the training script, alone or under torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"] if num_ranks else []
    command = [sys.executable, *launch, trainer_script.__file__, *map(str, arguments)]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0 or "kill=7" in command, ended.stderr
    return ended.returncode


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}


# -- resuming


def test_a_killed_run_that_is_resumed_ends_like_one_that_was_not(whole: dict[str, Any], tmp_path: pathlib.Path) -> None:
    """Parameters, optimizer, scheduler, random streams, the order of the data and the log, to the last bit."""
    assert run_script(tmp_path / "run", tmp_path / "output", "kill=7") == -signal.SIGKILL
    trainer = make(str(tmp_path / "run"), tmp_path / "output")
    trainer.train(resume_from_checkpoint=True)
    assert_goes_on(outcome(trainer), whole, 6)
    assert steps_at(str(tmp_path / "run")) == [3, 6, 9, 10]


def test_a_damaged_newest_checkpoint_is_passed_over(whole: dict[str, Any], tmp_path: pathlib.Path) -> None:
    """The one before it is taken."""
    run = tmp_path / "run"
    make(str(run), tmp_path / "output", max_steps=7).train()
    (newest,) = run.glob("7/*/optimizer.pt")
    os.truncate(newest, newest.stat().st_size // 2)
    trainer = make(str(run), tmp_path / "output")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.seen[0][0] == 7


@pytest.mark.parametrize("name", ["checkpoint-6", "6/", pathlib.Path("6")])
def test_one_checkpoint_is_resumed_from_by_its_url(
    whole: dict[str, Any], saved: str, tmp_path: pathlib.Path, name: str | pathlib.Path
) -> None:
    """Of this run or of another; with Trainer's name or with ours."""
    trainer = make(str(tmp_path / "run"), tmp_path / "output")
    trainer.train(resume_from_checkpoint=f"{saved}/{name}" if isinstance(name, str) else saved / name)
    assert_goes_on(outcome(trainer), whole, 6)


def test_the_newest_of_another_run_is_resumed_from_by_the_url_of_the_run(saved: str, tmp_path: pathlib.Path) -> None:
    """Nothing is written there."""
    trainer = make(str(tmp_path / "run"), tmp_path / "output", max_steps=12)
    trainer.train(resume_from_checkpoint=saved)
    assert [step for step, _ in trainer.seen] == [11, 12]
    assert steps_at(saved) == [3, 6, 9, 10]
    assert steps_at(str(tmp_path / "run")) == [12]


@pytest.mark.parametrize("resume", [True, "checkpoint-6"])
def test_folders_that_trainer_wrote_are_resumed_from(
    whole: dict[str, Any], tmp_path: pathlib.Path, resume: bool | str
) -> None:
    """By their path, or as the newest in output_dir if there is nothing at the URL; they stay as they are."""
    output = tmp_path / "output"
    plain = Trainer(tiny_model(), arguments(str(output), max_steps=6), train_dataset=samples())
    plain.train()
    trainer = make(str(tmp_path / "run"), output, save_total_limit=1)
    trainer.train(resume_from_checkpoint=resume if resume is True else str(output / resume))
    assert trainer.seen[0][0] == 7
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]


def test_nothing_to_resume_from_is_an_error_that_says_where(tmp_path: pathlib.Path) -> None:
    """As with Trainer; nothing begins anew unasked."""
    trainer = make(str(tmp_path / "run"), tmp_path / "output")
    with pytest.raises(StepNotFoundError, match=f"no checkpoint to resume from at {tmp_path / 'run'}"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(StepNotFoundError, match="no whole step 4"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def test_auto_begins_where_there_is_nothing_and_goes_on_where_there_is(tmp_path: pathlib.Path) -> None:
    """One line for a job that may be started again."""
    for steps, seen in ((4, [1, 2, 3, 4]), (6, [5, 6])):
        trainer = make(str(tmp_path / "run"), tmp_path / "output", max_steps=steps)
        trainer.train(resume_from_checkpoint="auto")
        assert [step for step, _ in trainer.seen] == seen


def test_a_step_that_trainer_did_not_save_is_not_resumed_from(tmp_path: pathlib.Path) -> None:
    """It says so, and does nothing."""
    with CheckpointManager(str(tmp_path / "run")) as manager:
        manager.save(5, {"weight": torch.zeros(2)})
    with pytest.raises(RestoreError, match=r"no trainer_state\.json"):
        make(str(tmp_path / "run"), tmp_path / "output").train(resume_from_checkpoint=True)


def test_an_object_store_is_saved_to_and_resumed_from(
    whole: dict[str, Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, s3_url: str, s3_options: Any
) -> None:
    """Its URL may be the output_dir; Trainer makes no folder of that name."""
    monkeypatch.chdir(tmp_path)
    options = {"storage_options": s3_options}
    for resume in (None, f"{s3_url}/checkpoint-3"):
        trainer = RecordingTrainer(tiny_model(), arguments(s3_url), train_dataset=samples(), checkpoint_options=options)
        trainer.train(resume_from_checkpoint=resume)
    assert_goes_on(outcome(trainer), whole, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trainer_output"]
    assert list((tmp_path / "trainer_output").iterdir()) == []


def test_sigterm_saves_and_ends_the_training(whole: dict[str, Any], tmp_path: pathlib.Path) -> None:
    """At the end of the step, whatever the save strategy."""
    trainer = make(str(tmp_path / "run"), tmp_path / "output", save_strategy="no")
    trainer.add_callback(AtStep(trainer, 4, lambda trainer: os.kill(os.getpid(), signal.SIGTERM)))
    trainer.train()
    (step,) = steps_at(str(tmp_path / "run"))
    assert step < 10
    resumed = make(str(tmp_path / "run"), tmp_path / "output")
    resumed.train(resume_from_checkpoint=True)
    assert_goes_on(outcome(resumed), whole, step)


@pytest.mark.parametrize("sharded", ["", "SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_two_processes_that_are_killed_and_resumed_end_like_two_that_were_not(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, sharded: str
) -> None:
    """Under torchrun, with DDP or FSDP2; each rank has its own random streams and data."""
    if sharded:
        monkeypatch.setenv("STATE_DICT_TYPE", sharded)
    assert run_script(tmp_path / "run", tmp_path / "output", "whole=true", "kill=7", num_ranks=2) != 0
    run_script(tmp_path / "run", tmp_path / "output", "resume=true", num_ranks=2)
    for rank in range(2):
        resumed, whole = (
            torch.load(tmp_path / "output" / name, weights_only=False)
            for name in (f"result-{rank}.pt", f"whole-{rank}.pt")
        )
        assert_goes_on(resumed, whole, 6)


def test_nodes_have_one_place_for_checkpoints_and_hear_of_one_another_s_sigterm(tmp_path: pathlib.Path) -> None:
    """save_on_each_node gives no file twice; all save the same step and end; each node fetches what it resumes from."""
    run_nodes(2, tmp_path, 'save_strategy="no"', "max_steps=1000", "sigterm=2")
    (step,) = steps_at(str(tmp_path / "run"))
    assert 2 <= step < 1000
    run_nodes(2, tmp_path, f"max_steps={step + 1}", 'resume="auto"')
    assert steps_at(str(tmp_path / "run")) == [step, step + 1]


def run_nodes(num_nodes: int, folder: pathlib.Path, *options: str) -> None:
    """The script on nodes of one rank each, which share a disk."""
    command = [sys.executable, trainer_script.__file__, str(folder / "run"), str(folder / "output"), *options]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    job = {"WORLD_SIZE": str(num_nodes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "0"}
    nodes = [
        subprocess.Popen([*command, "save_on_each_node=true"], env=environment() | job | {"RANK": str(rank)})
        for rank in range(num_nodes)
    ]
    assert [node.wait(300) for node in nodes] == [0] * num_nodes


# -- what is saved


def test_a_step_has_the_files_that_trainer_writes_and_plain_trainer_and_from_pretrained_read_them(
    whole: dict[str, Any], saved: str, tmp_path: pathlib.Path
) -> None:
    """Fetched into a folder, or copied there by hand."""
    folder = tmp_path / "checkpoint-6"
    with CheckpointManager(saved) as manager:
        assert set(manager.files(6)) == FILES
        manager.fetch(6, str(folder))
    plain = Trainer(tiny_model(), arguments(str(tmp_path)), train_dataset=samples())
    plain.train(resume_from_checkpoint=str(folder))
    assert bits(plain.model.state_dict()) == bits(whole["model"])
    model = GPT2LMHeadModel.from_pretrained(folder)
    for url in (saved, f"{saved}/10", f"{saved}/checkpoint-6"):
        same = from_pretrained(GPT2LMHeadModel, url)
        assert (bits(same.state_dict()) == bits(model.state_dict())) == url.endswith("6")


def test_trainer_itself_writes_the_same(saved: str, tmp_path: pathlib.Path) -> None:
    """The same names, tensors and state, but for what differs from run to run: times, and the arguments' folder."""
    Trainer(tiny_model(), arguments(str(tmp_path)), train_dataset=samples()).train()
    plain = tmp_path / "checkpoint-3"
    with CheckpointManager(saved) as manager:
        manager.fetch(3, str(tmp_path / "ours"))
    assert {path.name for path in plain.iterdir()} == FILES
    assert (plain / "model.safetensors").read_bytes() == (tmp_path / "ours" / "model.safetensors").read_bytes()
    for name in ("optimizer.pt", "rng_state.pth"):
        theirs, ours = (torch.load(place / name, weights_only=False) for place in (plain, tmp_path / "ours"))
        assert str(bits(theirs)) == str(bits(ours))
    assert (plain / "config.json").read_text() == (tmp_path / "ours" / "config.json").read_text()


def test_the_training_thread_writes_no_tensor_to_disk(tmp_path: pathlib.Path) -> None:
    """When the state is copied, all that was written locally is text."""
    output, sizes = tmp_path / "output", dict[str, int]()

    def look(event: Event) -> None:
        if isinstance(event, Staged):
            sizes.update((p.name, p.stat().st_size) for p in output.rglob("*") if p.is_file())

    make(str(tmp_path / "run"), output, options={"events": [look]}, max_steps=3).train()
    assert set(sizes) == {"config.json", "generation_config.json", "trainer_state.json"}
    assert max(sizes.values()) < 4096


def test_the_model_is_saved_to_a_url_and_read_from_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, memory_url: str
) -> None:
    """By `save_model`, to the output_dir, or to another URL; a local folder stays one."""
    monkeypatch.chdir(tmp_path)
    trainer = AsyncTrainer(tiny_model(), arguments(memory_url), train_dataset=samples())
    for target in (None, f"{memory_url}-other", "folder"):
        trainer.save_model(target)
    assert GPT2LMHeadModel.from_pretrained("folder").config.n_embd == 16
    for url in (memory_url, f"{memory_url}-other"):
        model = from_pretrained(GPT2LMHeadModel, url)
        assert bits(model.state_dict()) == bits(trainer.model.state_dict())
    assert {path.name for path in tmp_path.iterdir()} <= {"folder", "trainer_output"}


def test_a_model_that_is_saved_beside_checkpoints_takes_nothing_from_them(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, memory_url: str
) -> None:
    """It replaces an older model there, and only that."""
    monkeypatch.chdir(tmp_path)
    with CheckpointManager(memory_url) as manager:
        names = ("model.safetensors.index.json", "model-00001-of-00001.safetensors")
        manager.save(0, {}, files=dict.fromkeys(names, b"{}"))
        AsyncTrainer(tiny_model(), arguments(memory_url), train_dataset=samples()).save_model()
        manager.verify(0)


def test_a_model_that_is_not_there_is_an_error_that_says_where(tmp_path: pathlib.Path, saved: str) -> None:
    """No run, or no such step."""
    with pytest.raises(StepNotFoundError, match=f"no whole checkpoint at {tmp_path}"):
        from_pretrained(GPT2LMHeadModel, str(tmp_path))
    with pytest.raises(StepNotFoundError):
        from_pretrained(GPT2LMHeadModel, f"{saved}/checkpoint-7")


def test_on_save_is_called_for_each_save(tmp_path: pathlib.Path) -> None:
    """After it was taken."""
    calls: list[int] = []

    class Listener(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            calls.append(state.global_step)

    trainer = make(str(tmp_path / "run"), tmp_path / "output")
    trainer.add_callback(Listener())
    trainer.train()
    assert calls == [3, 6, 9, 10]


def test_save_only_model_and_a_save_for_each_epoch(tmp_path: pathlib.Path) -> None:
    """As TrainingArguments say."""
    make(str(tmp_path / "run"), tmp_path / "output", save_only_model=True, save_strategy="epoch").train()
    assert steps_at(str(tmp_path / "run")) == [5, 10]
    with CheckpointManager(str(tmp_path / "run")) as manager:
        assert set(manager.files(5)) == FILES - {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


def test_a_save_policy_saves_beside_what_the_arguments_say(tmp_path: pathlib.Path) -> None:
    """So a clock may, which TrainingArguments do not know."""
    make(str(tmp_path / "run"), tmp_path / "output", options={"save_policy": SaveEvery(4)}).train()
    assert steps_at(str(tmp_path / "run")) == [3, 4, 6, 8, 9, 10]


def test_checkpoints_may_lie_in_output_dir_itself(tmp_path: pathlib.Path) -> None:
    """A local output_dir is the URL if no other is given."""
    AsyncTrainer(tiny_model(), arguments(str(tmp_path / "output")), train_dataset=samples()).train()
    assert steps_at(str(tmp_path / "output")) == [3, 6, 9, 10]


def test_the_mixin_stands_before_any_trainer(tmp_path: pathlib.Path) -> None:
    """What a trainer of one's own overrides still runs."""

    class Mine(Trainer):
        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            super()._save(output_dir, state_dict)
            pathlib.Path(output_dir, "mine.txt").write_text("mine")

    class MineAsync(CheckpointMixin, Mine):
        pass

    make(str(tmp_path / "run"), tmp_path / "output", MineAsync).train()
    with CheckpointManager(str(tmp_path / "run")) as manager:
        assert set(manager.files(10)) == FILES | {"mine.txt"}


# -- what is kept


@pytest.mark.parametrize(("fails", "left"), [(6, 3), (10, 9)])
def test_a_save_that_fails_is_raised_once_and_costs_no_older_checkpoint(
    tmp_path: pathlib.Path, fails: int, left: int
) -> None:
    """By the next save, or at the end. With save_total_limit=1 the good one stays: it goes only after a commit."""
    run = tmp_path / "run"
    trainer = make(str(run), tmp_path / "output", save_total_limit=1)
    trainer.add_callback(AtStep(trainer, 4, lambda trainer: (run / str(fails)).write_text("in the way")))
    with pytest.raises(SaveError, match=f"step {fails}"):
        trainer.train()
    assert steps_at(str(run)) == [left]
    (run / str(fails)).unlink()
    resumed = make(str(run), tmp_path / "output", save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.seen[0][0] == left + 1
    assert steps_at(str(run)) == [10]


def test_an_error_in_the_training_waits_for_the_saves_taken(tmp_path: pathlib.Path) -> None:
    """And passes on as it is."""

    class Broken(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyError("mine")

    trainer = make(str(tmp_path / "run"), tmp_path / "output")
    trainer.add_callback(Broken())
    with pytest.raises(KeyError, match="mine"):
        trainer.train()
    assert steps_at(str(tmp_path / "run")) == [3]
    assert not (tmp_path / "output" / ".asyncckpt").exists()


class ScoredTrainer(RecordingTrainer):
    """Its evaluation gives what a list says."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {"eval_score": SCORES[self.state.global_step]}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


SCORES = {3: 0.5, 6: 0.9, 9: 0.7, 10: 0.6}
SCORED = {
    "eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "metric_for_best_model": "score",
    "greater_is_better": True, "save_total_limit": 2,
}  # fmt: skip


def make_scored(run: pathlib.Path, output: pathlib.Path, **values: Any) -> Any:
    return ScoredTrainer(
        tiny_model(), arguments(str(output), **(SCORED | values)), train_dataset=samples(), eval_dataset=samples(),
        checkpoint_url=str(run),
    )  # fmt: skip


def test_the_best_checkpoint_is_kept_and_loaded_at_the_end(saved: str, tmp_path: pathlib.Path) -> None:
    """With a save_total_limit of 2 it is the best and the newest that stay."""
    trainer = make_scored(tmp_path / "run", tmp_path / "output")
    trainer.train()
    assert steps_at(str(tmp_path / "run")) == [6, 10]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "6")
    with CheckpointManager(str(tmp_path / "run")) as manager:
        manager.fetch(6, str(tmp_path / "best"))
        manager.fetch(10, str(tmp_path / "last"))
    best = GPT2LMHeadModel.from_pretrained(tmp_path / "best").state_dict()
    assert bits(dict(trainer.model.state_dict())) == bits(dict(best))
    state = json.loads((tmp_path / "last" / "trainer_state.json").read_text())
    assert (state["best_global_step"], state["best_metric"]) == (6, 0.9)
    assert state["best_model_checkpoint"] == str(tmp_path / "run" / "6")


def test_a_resumed_run_knows_the_best_checkpoint(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it comes to no better one."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    make_scored(tmp_path / "run", tmp_path / "output", max_steps=9, load_best_model_at_end=False).train()
    trainer = make_scored(tmp_path / "run", tmp_path / "output")
    trainer.train(resume_from_checkpoint=True)
    assert steps_at(str(tmp_path / "run")) == [6, 10]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "6")
    assert "does not exist anymore" not in caplog.text


def test_save_strategy_best_saves_what_is_better(tmp_path: pathlib.Path) -> None:
    """And nothing else."""
    make_scored(tmp_path / "run", tmp_path / "output", save_strategy="best", save_total_limit=None).train()
    assert steps_at(str(tmp_path / "run")) == [3, 6]


def test_a_limit_counts_the_best_one_as_trainer_does() -> None:
    """The newest and the best are kept in any case, and the newest others until there are as many as the limit."""

    def kept(limit: int, best: float | None, *steps: int) -> set[int]:
        metrics = {} if best is None else {"best_step": best}
        committed = [CommittedStep(step, sequence, 0.0, metrics) for sequence, step in enumerate(steps)]
        return KeepAsTrainer(limit).keep(committed, 0.0)

    assert kept(1, 1.0, 1, 2, 3) == {1, 3}
    assert kept(2, 1.0, 1, 2, 3) == {1, 3}
    assert kept(2, None, 1, 2, 3) == {2, 3}
    assert kept(2, 7.0, 1, 2, 3) == {2, 3}
    assert kept(3, 1.0, 1, 2, 3, 4) == {1, 3, 4}
    assert kept(9, 1.0, 1, 2) == {1, 2}


# -- what is refused


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"enable_jit_checkpoint": True}, "SIGTERM saves by itself"),
        ({"push_to_hub": True, "hub_strategy": "every_save"}, 'Use hub_strategy="end"'),
        ({"push_to_hub": True, "hub_strategy": "end"}, "Give them another place"),
    ],
)
def test_arguments_that_need_local_checkpoint_folders_are_refused(
    tmp_path: pathlib.Path, values: dict[str, Any], why: str
) -> None:
    """When the trainer is made."""
    with pytest.raises(ValueError, match=why):
        AsyncTrainer(tiny_model(), arguments(str(tmp_path), **values), train_dataset=samples())


def test_hyperparameter_search_is_refused(tmp_path: pathlib.Path) -> None:
    """In words, before anything is done."""
    with pytest.raises(ValueError, match="Use Trainer as it is for the search"):
        make(str(tmp_path), tmp_path).hyperparameter_search()
