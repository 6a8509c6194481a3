"""`AsyncckptIO` under Lightning itself: what is there when, what is removed, what is raised, and killed runs."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import lightning as L
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torchdata.stateful_dataloader import StatefulDataLoader

import asyncckpt
from asyncckpt import DamagedStepError, WriteError
from asyncckpt.integrations.lightning import AsyncckptIO, newest_checkpoint
from asyncckpt.testing import FaultyStorage, GatedStorage
from tests.exact import bits
from tests.integrations.lightning_script import Model, Wrapped, make_loader, make_trainer

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]
ROOT = Path(asyncckpt.__file__).parents[1]


def fit(folder, plugin, *, resume=None, model=None, **options):
    trainer = make_trainer(str(folder), plugin, **options)
    trainer.fit(model or Model(), make_loader(), ckpt_path=resume, weights_only=False)
    return trainer


def state(step=1):
    """What a strategy gives to a plugin, in short."""
    return {"global_step": step, "state_dict": {"weight": torch.full((1000,), float(step))}}


def run_script(folder, *, ranks=1, **options):
    """(exit status, what it said) of a run of its own."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launch, "-m", "tests.integrations.lightning_script", str(folder), json.dumps(options)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    return ended.returncode, ended.stderr[-3000:]


def losses_of(path):
    """{step: the last loss that a run noted for it}"""
    return dict(line.split() for line in Path(path).read_text().splitlines())


# -- what is saved


def test_lightning_alone_reads_what_was_saved_and_goes_on_from_it(tmp_path):
    """The same file as Lightning's own, at the same name, and the same names of what is kept."""
    L.seed_everything(1)
    ours = fit(tmp_path / "ours", AsyncckptIO())
    L.seed_everything(1)
    fit(tmp_path / "theirs", None)
    assert os.listdir(tmp_path / "ours") == os.listdir(tmp_path / "theirs")
    mine, stock = (torch.load(tmp_path / run / "last.ckpt", weights_only=False) for run in ("ours", "theirs"))
    for checkpoint in (mine, stock):  # what differs by the folder
        (callback,) = checkpoint["callbacks"].values()
        del callback["dirpath"]
        for key in ("best_model_path", "last_model_path"):
            callback[key] = os.path.basename(callback[key])
    assert type(mine["state_dict"]) is collections.OrderedDict
    assert mine["state_dict"]._metadata == stock["state_dict"]._metadata
    assert type(mine["hyper_parameters"]) is type(stock["hyper_parameters"])
    assert bits(mine) == bits(stock)
    assert ours.global_step == 12
    assert fit(tmp_path / "ours", None, resume="last", max_steps=14).global_step == 14


@pytest.mark.parametrize("package", [L, pytorch_lightning])
def test_both_packages_take_the_plugin(tmp_path, package):
    """`lightning` and `pytorch_lightning` are two packages with two base classes."""
    plugin = AsyncckptIO()
    trainer = package.Trainer(
        plugins=[plugin], logger=False, accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False
    )
    assert trainer.strategy.checkpoint_io is plugin


def test_fabric_takes_the_plugin_too(tmp_path):
    """Its `save` returns before the file is there, its `load` waits."""
    fabric = L.Fabric(accelerator="cpu", devices=1, plugins=[AsyncckptIO()])
    model = fabric.setup(torch.nn.Linear(2, 2))
    fabric.save(str(tmp_path / "x.ckpt"), {"model": model, "step": 3})
    saved = {"model": torch.nn.Linear(2, 2), "step": 0}
    assert fabric.load(str(tmp_path / "x.ckpt"), saved) == {}
    assert saved["step"] == 3
    assert torch.equal(saved["model"].weight, model.weight)
    fabric.strategy.checkpoint_io.teardown()


def test_the_copy_is_of_one_moment_and_keeps_what_torch_save_keeps(tmp_path):
    """Later changes do not get in; ties, types and tensors in objects do."""
    plugin = AsyncckptIO()
    shared = torch.zeros(3)
    module = torch.nn.Linear(2, 2)
    counts = collections.Counter(a=1)
    checkpoint = {"global_step": 1, "a": shared, "b": shared, "module": module, "counts": counts}
    weight = module.weight.detach().clone()
    plugin.save_checkpoint(checkpoint, str(tmp_path / "x.ckpt"))
    with torch.no_grad():
        shared += 1
        module.weight += 1
    counts["a"] += 1
    loaded = plugin.load_checkpoint(str(tmp_path / "x.ckpt"), weights_only=False)
    assert torch.equal(loaded["a"], torch.zeros(3))
    assert loaded["a"] is loaded["b"]
    assert isinstance(loaded["module"].weight, torch.nn.Parameter)
    assert torch.equal(loaded["module"].weight, weight)
    assert loaded["counts"] == {"a": 1}
    plugin.teardown()


def test_what_cannot_be_pickled_is_an_error_of_that_save(tmp_path):
    """And takes no place in the queue, nor a buffer."""
    plugin = AsyncckptIO(max_pending_async=1)
    for _ in range(3):
        with pytest.raises((AttributeError, TypeError), match="pickle"):
            plugin.save_checkpoint({"hook": lambda: None}, str(tmp_path / "x.ckpt"))
    plugin.save_checkpoint(state(), str(tmp_path / "x.ckpt"))
    plugin.teardown()
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_weights_only_and_map_location_reach_torch(tmp_path):
    """As with Lightning's own plugin."""
    plugin, path = AsyncckptIO(), str(tmp_path / "x.ckpt")
    plugin.save_checkpoint(state() | {"path": Path("x")}, path)
    with pytest.raises(Exception, match="weights_only"):
        plugin.load_checkpoint(path, weights_only=True)
    loaded = plugin.load_checkpoint(path, map_location="meta", weights_only=False)
    assert loaded["state_dict"]["weight"].is_meta
    plugin.teardown()


# -- what is there when


def test_a_file_is_whole_or_the_one_before(tmp_path):
    """While a save in its place is in flight, and after it was killed by an error."""
    gate = None

    def gated(storage):
        nonlocal gate
        gate = gate or GatedStorage(storage, "replace_file")
        return gate

    plugin, path = Wrapped(gated), str(tmp_path / "last.ckpt")
    plugin.save_checkpoint(state(1), path)
    gate.let_pass()
    plugin.join()
    plugin.save_checkpoint(state(2), path)
    gate.wait_reached(2)
    assert torch.load(path)["global_step"] == 1
    gate.open()
    assert plugin.load_checkpoint(path)["global_step"] == 2  # waits
    plugin.teardown()


def test_an_old_checkpoint_goes_when_the_new_one_is_durable_and_not_before(tmp_path):
    """`save_top_k=1`: the request to remove comes at once."""
    gate = None

    def gated(storage):
        nonlocal gate
        gate = gate or GatedStorage(storage, "replace_file", matches=lambda call: call.path == "new.ckpt")
        return gate

    plugin = Wrapped(gated)
    plugin.save_checkpoint(state(1), str(tmp_path / "old.ckpt"))
    plugin.join()
    plugin.save_checkpoint(state(2), str(tmp_path / "new.ckpt"))
    plugin.remove_checkpoint(str(tmp_path / "old.ckpt"))
    gate.wait_reached()
    assert os.listdir(tmp_path) == ["old.ckpt"]
    gate.open()
    plugin.teardown()
    assert os.listdir(tmp_path) == ["new.ckpt"]


def test_a_save_that_fails_is_raised_once_and_the_old_checkpoint_stays(tmp_path):
    """From Lightning's own loop: fit ends with it, the next fit goes on, and teardown has nothing to say."""
    faulty = None

    def failing(storage):
        nonlocal faulty
        faulty = faulty or FaultyStorage(storage, "replace_file", nth=3, error=OSError(28, "No space left on device"))
        return faulty

    plugin, seen = Wrapped(failing), []
    plugin._sinks += (seen.append,)
    with pytest.raises(WriteError, match=r"epoch=0-step=6.ckpt was not saved: .*No space left") as raised:
        fit(tmp_path, plugin, callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=2)])
    assert raised.value.step == 6
    assert "epoch=0-step=4.ckpt" in os.listdir(tmp_path)
    assert [type(event).__name__ for event in seen].count("Failed") == 1
    plugin.teardown()
    resume = str(tmp_path / "epoch=0-step=4.ckpt")
    fit(tmp_path, plugin, resume=resume, callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=2)])
    assert "epoch=0-step=12.ckpt" in os.listdir(tmp_path)


def test_what_fails_last_is_raised_by_teardown_once(tmp_path):
    """And what was to be removed for it stays."""
    plugin = Wrapped(lambda storage: FaultyStorage(storage, "replace_file", matches=lambda call: "new" in call.path))
    plugin.save_checkpoint(state(1), str(tmp_path / "old.ckpt"))
    plugin.save_checkpoint(state(2), str(tmp_path / "new.ckpt"))
    plugin.remove_checkpoint(str(tmp_path / "old.ckpt"))
    with pytest.raises(WriteError, match=r"new.ckpt was not saved"):
        plugin.teardown()
    plugin.teardown()
    assert os.listdir(tmp_path) == ["old.ckpt"]


def test_a_third_save_waits_until_the_first_is_durable(tmp_path):
    """So that at most two copies of the state are held."""
    gate, seen = None, []

    def gated(storage):
        nonlocal gate
        gate = gate or GatedStorage(storage, "replace_file")
        return gate

    plugin = Wrapped(gated, events=[seen.append])
    for step in 1, 2:
        plugin.save_checkpoint(state(step), str(tmp_path / f"{step}.ckpt"))
    opening = threading.Thread(target=lambda: gate.let_pass(1))
    opening.start()
    plugin.save_checkpoint(state(3), str(tmp_path / "3.ckpt"))
    opening.join()
    gate.open()
    plugin.teardown()
    said = [(type(event).__name__, event.step) for event in seen]
    assert said.index(("Committed", 1)) < said.index(("Staged", 3))


def test_a_second_fit_saves_and_the_first_left_all_durable(tmp_path):
    """Lightning's own AsyncCheckpointIO failed there (Lightning issue 20952)."""
    plugin = AsyncckptIO()
    trainer = fit(tmp_path, plugin, max_steps=4)
    assert torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"] == 4
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(trainer.lightning_module, make_loader())
    assert torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"] == 8
    assert plugin._saves is None


def test_an_exception_in_training_leaves_its_checkpoint_durable(tmp_path):
    """`save_on_exception`; the exception itself is what is raised."""

    def at_step(step):
        if step == 5:
            raise ZeroDivisionError("of the user")

    callback = ModelCheckpoint(tmp_path, every_n_train_steps=100, save_on_exception=True)
    with pytest.raises(ZeroDivisionError, match="of the user"):
        fit(tmp_path, AsyncckptIO(), model=Model(at_step=at_step), callbacks=[callback])
    (name,) = os.listdir(tmp_path)
    assert torch.load(tmp_path / name, weights_only=False)["global_step"] == 5


def test_a_save_after_fit_is_durable_when_the_process_ends(tmp_path):
    """No teardown follows it."""
    script = (
        "import torch\nfrom asyncckpt.integrations.lightning import AsyncckptIO\n"
        f"AsyncckptIO().save_checkpoint({{'w': torch.zeros(1 << 20)}}, {str(tmp_path / 'x.ckpt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=300)
    assert torch.load(tmp_path / "x.ckpt")["w"].shape == (1 << 20,)


# -- top k, last, links


def test_top_k_by_a_metric_keeps_the_best_and_the_last(tmp_path):
    """As without the plugin: the same files."""
    for name, plugin in ("ours", AsyncckptIO()), ("theirs", None):
        L.seed_everything(1)
        best = ModelCheckpoint(
            tmp_path / name, monitor="loss", save_top_k=2, every_n_train_steps=1, save_last=True, filename="{step}"
        )
        fit(tmp_path / name, plugin, callbacks=[best])
    assert sorted(os.listdir(tmp_path / "ours")) == sorted(os.listdir(tmp_path / "theirs"))
    assert len(os.listdir(tmp_path / "ours")) == 3


def test_two_callbacks_that_give_one_name_do_not_remove_each_others_file(tmp_path):
    """The second sees no file yet, so its name is the first's; that one's removal must not take the second's best."""
    callbacks = [
        ModelCheckpoint(tmp_path, every_n_train_steps=2, filename="{step}"),
        ModelCheckpoint(tmp_path, monitor="negative", mode="min", every_n_train_steps=2, filename="{step}"),
    ]

    class Worsening(Model):
        def training_step(self, batch, index):
            self.log("negative", float(self.trainer.global_step))
            return super().training_step(batch, index)

    gate = None

    def gated(storage):  # the first two saves are in flight at once
        nonlocal gate
        if gate is None:
            gate = GatedStorage(storage, "replace_file")
            gate.let_pass(0)
        return gate

    plugin = Wrapped(gated)

    def at_step(step):
        if step == 2:
            gate.open()

    fit(tmp_path, plugin, model=Worsening(at_step=at_step), callbacks=callbacks, max_steps=6)
    assert os.path.basename(callbacks[1].best_model_path) == "step=2.ckpt"
    assert sorted(os.listdir(tmp_path)) == ["step=2.ckpt", "step=6.ckpt"]


def test_a_link_never_points_to_what_is_not_there(tmp_path):
    """`save_last="link"`, and a save that fails: the link stays where it was."""
    faulty = None

    def failing(storage):
        nonlocal faulty
        faulty = faulty or FaultyStorage(storage, "replace_file", nth=4)
        return faulty

    callback = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last="link")
    with pytest.raises(WriteError, match="step=8"):
        fit(tmp_path, Wrapped(failing), callbacks=[callback])
    assert os.readlink(tmp_path / "last.ckpt") == "epoch=0-step=6.ckpt"
    assert fit(tmp_path, AsyncckptIO(), resume="last", callbacks=[callback]).global_step == 12
    assert torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"] == 12


def test_another_runs_checkpoint_is_never_removed(memory_url):
    """The one resumed from, in another folder at a URL (Lightning issue 21813): Lightning asks for it at once."""
    first = ModelCheckpoint(f"{memory_url}/first", every_n_train_steps=2)
    fit(memory_url, AsyncckptIO(), callbacks=[first], max_steps=4)
    second = ModelCheckpoint(f"{memory_url}/second", every_n_train_steps=2)
    kept = []
    plugin = AsyncckptIO(events=[kept.append])
    fit(memory_url, plugin, callbacks=[second], resume=first.best_model_path, max_steps=8)
    storage = asyncckpt.storage.open_storage(memory_url)
    assert sorted(storage.list_files()) == ["first/epoch=0-step=4.ckpt", "second/epoch=0-step=8.ckpt"]
    assert [event.url for event in kept if isinstance(event, asyncckpt.Skipped)] == [first.best_model_path]


def test_the_newest_checkpoint_is_found_in_a_folder_and_at_a_url(memory_url, tmp_path):
    """Lightning's own "last" finds none at a URL."""
    for folder in (memory_url, str(tmp_path / "run")):
        assert newest_checkpoint(folder) is None
        callback = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1)
        fit(tmp_path, AsyncckptIO(), callbacks=[callback], max_steps=4)
        assert newest_checkpoint(folder) == f"{folder}/epoch=0-step=4.ckpt"
        trainer = fit(tmp_path, AsyncckptIO(), callbacks=[callback], resume=newest_checkpoint(folder), max_steps=6)
        assert trainer.global_step == 6


# -- damage


def test_a_damaged_file_is_refused_and_one_without_checksums_is_not(tmp_path):
    """A bit that flipped, a file cut short; torch can be told to leave checksums out."""
    plugin, path = AsyncckptIO(), tmp_path / "x.ckpt"
    plugin.save_checkpoint(state(), str(path))
    plugin.join()
    whole = path.read_bytes()
    at = whole.index(torch.full((1000,), 1.0).numpy().tobytes())
    for damaged in whole[: at + 7] + b"\xff" + whole[at + 8 :], whole[:-100]:
        path.write_bytes(damaged)
        with pytest.raises(DamagedStepError, match=r"x.ckpt is damaged"):
            plugin.load_checkpoint(str(path))
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert plugin.load_checkpoint(str(path))["global_step"] == 1
    torch.save(state(), path, _use_new_zipfile_serialization=False)
    assert plugin.load_checkpoint(str(path))["global_step"] == 1
    with pytest.raises(FileNotFoundError):
        plugin.load_checkpoint(str(tmp_path / "nothing.ckpt"))
    plugin.teardown()


# -- killed and resumed


def test_a_run_killed_in_the_middle_of_a_save_goes_on_as_if_it_had_not_been(tmp_path):
    """SIGKILL when half of step 8's file is written; the losses of all steps are those of a run that nobody killed."""

    def go_on(run, resume=None):
        L.seed_everything(1)
        model = Model(str(tmp_path / f"{run}.txt"))
        trainer = make_trainer(str(tmp_path / run), AsyncckptIO())
        trainer.fit(model, make_loader(StatefulDataLoader), ckpt_path=resume, weights_only=False)

    go_on("whole")
    assert run_script(tmp_path / "killed", kill_in="epoch=0-step=8.ckpt", losses=str(tmp_path / "killed.txt"))[0] == -9
    names = {name for name in os.listdir(tmp_path / "killed") if not name.startswith(".tmp-")}
    assert names == {"epoch=0-step=6.ckpt", "last.ckpt"}
    go_on("killed", resume="last")
    assert losses_of(tmp_path / "killed.txt") == losses_of(tmp_path / "whole.txt")
    assert len(losses_of(tmp_path / "whole.txt")) == 12


def test_two_ranks_killed_and_resumed_give_the_same_losses(tmp_path):
    """DDP over gloo under torchrun; rank 0 writes."""
    run = {"ranks": 2, "trainer": {"devices": 2, "strategy": "ddp", "max_steps": 8}}
    status, output = run_script(tmp_path / "whole", losses=str(tmp_path / "whole.txt"), **run)
    assert status == 0, output
    killed = run | {"losses": str(tmp_path / "killed.txt")}
    assert run_script(tmp_path / "killed", kill_in="epoch=0-step=6.ckpt", **killed)[0] != 0
    status, output = run_script(tmp_path / "killed", resume="last", **killed)
    assert status == 0, output
    assert losses_of(tmp_path / "killed.txt") == losses_of(tmp_path / "whole.txt")


def test_a_run_on_s3_goes_on_from_its_url(s3_server, s3_url, monkeypatch, tmp_path):
    """Saves, top k, removal and resume at a URL, the server known by the environment, as ModelCheckpoint needs it."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    callback = ModelCheckpoint(s3_url, every_n_train_steps=2, save_last=True)
    fit(tmp_path, AsyncckptIO(), callbacks=[callback], max_steps=6)
    assert sorted(asyncckpt.storage.open_storage(s3_url).list_files()) == ["epoch=0-step=6.ckpt", "last.ckpt"]
    trainer = fit(tmp_path, AsyncckptIO(), callbacks=[callback], resume=f"{s3_url}/last.ckpt", max_steps=8)
    assert trainer.global_step == 8
    assert sorted(asyncckpt.storage.open_storage(s3_url).list_files()) == ["epoch=0-step=8.ckpt", "last.ckpt"]
