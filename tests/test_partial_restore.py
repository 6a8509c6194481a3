"""Part of a checkpoint into a state, or a checkpoint into part of one: which keys, and which may be missing."""

from __future__ import annotations

import logging
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from asyncckpt import CheckpointManager, PerRank, Restored, StateMismatchError, TrainState
from asyncckpt.selection import Selection, matcher
from tests.crew import Crew
from tests.layouts import own, parts, state_of, target_of, whole
from tests.processes import Link
from tests.states import assert_same

# -- patterns


@pytest.mark.parametrize(
    ("pattern", "matched", "not_matched"),
    [
        ("model", ["model", "model.a", "model.a.b"], ["model_ema.a", "a.model", "modelx"]),
        (
            "model.*.weight",
            ["model.a.weight", "model.a.b.weight", "model.a.weight.x"],
            ["model.weight", "model.a.bias"],
        ),
        ("model.layer?.w", ["model.layer1.w"], ["model.layer10.w"]),
        ("model.layer[0-3].*", ["model.layer2.w"], ["model.layer4.w"]),
        ("rng", ["rng/rank_0", "rng/rank_12", "rng/rank_1.x"], ["rng/other"]),
        ("*", ["anything", "at.all"], []),
    ],
)
def test_a_pattern_is_a_key_or_the_start_of_one(pattern: str, matched: list[str], not_matched: list[str]) -> None:
    """Up to a dot or a rank; a star stands for dots, too."""
    is_match = matcher([pattern])
    assert [key for key in matched if not is_match(key)] == []
    assert [key for key in not_matched if is_match(key)] == []


def test_no_pattern_matches_nothing() -> None:
    """An empty list is not everything."""
    assert not matcher([])("a")
    assert not Selection.of([], False).has("a")
    assert Selection.of(None, False).has("a")


@pytest.mark.parametrize(("keys", "allow_missing"), [([1], False), (None, [nn.Linear])])
def test_what_is_no_pattern_is_told(keys: Any, allow_missing: Any) -> None:
    """Before anything is read."""
    with pytest.raises(TypeError, match="no pattern"):
        Selection.of(keys, allow_missing)


# -- a plain dict


def saved() -> dict[str, Any]:
    return {
        "model": {"a": torch.full((3,), 1.0), "b": torch.full((2, 2), 2.0)},
        "list": [torch.full((2,), 3.0), {"n": 4}],
        "step": 5,
        "mine": PerRank("theirs"),
    }


def fresh() -> dict[str, Any]:
    return {
        "model": {"a": torch.zeros(3), "b": torch.zeros(2, 2)},
        "list": [torch.zeros(2), {"n": 0}],
        "step": 0,
        "mine": PerRank("ours"),
    }


class OwnPlanner(DefaultLoadPlanner):
    """A user's."""


@pytest.fixture(params=["ours", "foreign", "load planner"])
def manager(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[CheckpointManager]:
    """With one step of ours, or of stock DCP; or with a user's planner."""
    path = str(tmp_path / "run")
    if request.param == "foreign":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = saved() | {"mine/rank_0": "theirs"}
            del state["mine"]
            dcp.save(state, checkpoint_id=f"{path}/1")
    planner = OwnPlanner(allow_partial_load=True) if request.param == "load planner" else None
    with CheckpointManager(path, load_planner=planner, chkpt_on_preemption=False) as manager:
        if request.param != "foreign":
            manager.save(1, saved())
        yield manager


@pytest.mark.parametrize(
    "keys",
    ["model", ["model.*", "list.1"], lambda key: key.endswith((".a", "step")), "mine", ["list"], ["step", "model.b"]],
    ids=str,
)
def test_the_keys_chosen_are_restored_and_the_rest_stays(manager: CheckpointManager, keys: Any) -> None:
    """Tensors in place, values into their containers; what was not chosen is the same object as before."""
    target = fresh()
    tensors = [target["model"]["a"], target["model"]["b"], target["list"][0]]
    nested = target["list"][1]
    manager.restore(1, target, keys=keys)
    takes = Selection.of(keys, False).has
    expected = fresh()
    for key, into, source, name in [
        ("model.a", expected["model"], saved()["model"], "a"),
        ("model.b", expected["model"], saved()["model"], "b"),
        ("list.0", expected["list"], saved()["list"], 0),
        ("list.1.n", expected["list"][1], saved()["list"][1], "n"),
        ("step", expected, saved(), "step"),
    ]:
        if takes(key):
            into[name] = source[name]
    expected["mine"].value = "theirs" if takes("mine/rank_0") else "ours"
    assert target["mine"].value == expected.pop("mine").value
    del target["mine"]
    assert_same(expected, target)
    assert target["model"]["a"] is tensors[0]
    assert target["model"]["b"] is tensors[1]
    assert target["list"][0] is tensors[2]
    assert target["list"][1] is nested


def test_a_pattern_that_the_checkpoint_has_no_key_for_is_an_error(manager: CheckpointManager) -> None:
    """A slip of the pen must not restore nothing in silence."""
    target = fresh()
    with pytest.raises(StateMismatchError, match=r"no key of .* matches 'modle'.*Nothing was changed"):
        manager.restore(1, target, keys=["model", "modle"])
    assert target["model"]["a"].eq(0).all()


def test_keys_that_take_nothing_are_an_error(manager: CheckpointManager) -> None:
    """Of a function, or where the state has none of them."""
    with pytest.raises(StateMismatchError, match="takes nothing"):
        manager.restore(1, fresh(), keys=lambda key: False)
    with pytest.raises(StateMismatchError, match="takes nothing"):
        manager.restore(1, {"step": 0}, keys="model")


def test_strict_is_about_the_keys_that_are_chosen(manager: CheckpointManager) -> None:
    """What of them the state lacks is an error; what was not chosen is none."""
    manager.restore(1, {"model": fresh()["model"]}, keys="model", strict=True)
    with pytest.raises(StateMismatchError, match=r"1 keys.*\n.*'model.b'"):
        manager.restore(1, {"model": {"a": torch.zeros(3)}}, keys="model", strict=True)


def with_head() -> dict[str, Any]:
    state = fresh()
    state["model"] |= {"head.w": torch.full((2,), 9.0), "head.b": torch.full((1,), 8.0)}
    return state


@pytest.mark.parametrize("allow_missing", [True, "model.head", ["model.head.*"], lambda key: "head" in key], ids=str)
def test_what_a_checkpoint_may_lack_keeps_its_value(tmp_path: pathlib.Path, allow_missing: Any) -> None:
    """A new head; the event and the log say what was missing. All the rest is restored."""
    heard: list[Any] = []
    with CheckpointManager(str(tmp_path), events=[heard.append]) as manager:
        manager.save(1, saved())
        target = with_head()
        manager.restore(1, target, allow_missing=allow_missing, strict=True)
    assert target["model"]["head.w"].tolist() == [9, 9]
    assert target["model"]["head.b"].tolist() == [8]
    assert target["model"]["a"].eq(1).all()
    assert target["mine"].value == "theirs"
    (event,) = [event for event in heard if isinstance(event, Restored)]
    assert (event.missing_keys, event.ignored_keys) == (("model.head.w", "model.head.b"), ())


def test_missing_keys_are_logged(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """By name, as a warning."""
    with CheckpointManager(str(tmp_path)) as manager, caplog.at_level(logging.WARNING):
        manager.save(1, saved())
        manager.restore(1, with_head(), allow_missing=True)
    assert "2 keys it lacks kept their values, model.head.w, model.head.b" in caplog.text


def test_missing_keys_that_are_not_allowed_are_an_error_that_changes_nothing(tmp_path: pathlib.Path) -> None:
    """Also beside others that are; and so is a shape that differs."""
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, saved())
        target = with_head()
        with pytest.raises(StateMismatchError, match=r"1 keys differ.*\n  missing in the checkpoint: 'model.head.w'"):
            manager.restore(1, target, allow_missing="model.head.b")
        target["model"]["a"] = torch.zeros(4)
        with pytest.raises(StateMismatchError, match=r"torch.float32 \(4,\)"):
            manager.restore(1, target, allow_missing=True)
    assert target["model"]["b"].eq(0).all()


def test_restore_latest_takes_the_same_arguments(tmp_path: pathlib.Path) -> None:
    """And walks back past a damaged step as ever."""
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, saved())
        manager.save(2, saved())
        (data,) = tmp_path.glob("2/*/*.distcp")
        data.write_bytes(b"")
        target = with_head()
        assert manager.restore_latest(target, keys="model", allow_missing=["model.head"]) == 1
    assert target["model"]["a"].eq(1).all()
    assert target["model"]["head.w"].eq(9).all()
    assert target["step"] == 0


def test_objects_with_a_state_of_their_own_are_left_alone_unless_chosen(tmp_path: pathlib.Path) -> None:
    """Their load_state_dict is not called."""
    model, optimizer = nn.Linear(2, 2), Holder()
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, {"model": model, "optimizer": optimizer})
        other = nn.Linear(2, 2)
        manager.restore(1, {"model": other, "optimizer": optimizer}, keys="model")
        assert torch.equal(other.weight, model.weight)
        assert optimizer.num_loads == 0
        manager.restore(1, {"model": other, "optimizer": optimizer}, keys="optimizer")
        assert optimizer.num_loads == 1


class Holder:
    num_loads = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_loads += 1


# -- a TrainState


class Run:
    """A small run, one step of which was made."""

    def __init__(self, seed: int, *, head: bool = False, **options: Any) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        if head:
            self.model.add_module("head", nn.Linear(2, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1 * seed)
        self.scheduler = StepLR(self.optimizer, 1)
        self.loader = DataLoader(torch.arange(8.0).reshape(2, 4), batch_size=1)
        self.ema = torch.full((3,), float(seed))
        self.state = TrainState(
            model=self.model, optimizer=self.optimizer, scheduler=self.scheduler, dataloader=self.loader,
            counter=Counter(seed), **options,
        )  # fmt: skip

    def step(self) -> None:
        for batch in self.state.batches(1):
            self.model(batch).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()

    def all(self) -> Any:
        return snapshot(self.state.state_dict())


def snapshot(value: Any) -> Any:
    """A copy that later steps do not change, with lists for tuples, whose tensors `assert_same` compares."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    return list(map(snapshot, value)) if isinstance(value, list | tuple) else value


class Counter:
    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "tensor": torch.full((3,), float(self.value))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


@pytest.fixture
def full(tmp_path: pathlib.Path) -> Iterator[tuple[CheckpointManager, Run]]:
    """A manager with one step of a whole run."""
    run = Run(1)
    run.step()
    with CheckpointManager(str(tmp_path), chkpt_on_preemption=False) as manager:
        manager.save(7, run.state)
        yield manager, run


@pytest.mark.parametrize(
    "keys", ["model", "optimizer", "scheduler", "progress", "rng", "counter", ["model", "counter"]]
)
def test_parts_of_a_train_state_are_restored_and_the_others_stay(
    full: tuple[CheckpointManager, Run], keys: str | list[str]
) -> None:
    """Every value of the parts that were not chosen, random streams and the place in the data among them."""
    manager, run = full
    other = Run(2)
    other.step()
    before = other.all()
    theirs = run.all() | {"rng/rank_0": snapshot(manager.read(7, "rng/rank_0"))}  # as it was then
    manager.restore(7, other.state, keys=keys)
    chosen = {keys} if isinstance(keys, str) else set(keys)
    for key, now in other.all().items():
        expected = theirs if key.partition("/")[0] in chosen else before
        if not (key == "optimizer" and "scheduler" in chosen):
            assert_same(expected[key], now, key)


def test_weights_alone_into_a_run_that_never_stepped(full: tuple[CheckpointManager, Run]) -> None:
    """From a full step; the optimizer stays as it was made, and the run begins at step 0."""
    manager, run = full
    other = Run(2)
    manager.restore(7, other.state, keys="model")
    assert_same(run.all()["model"], other.all()["model"])
    assert other.state.step == 0
    model = Run(3).model
    manager.restore(7, TrainState(model=model), keys="model")
    assert torch.equal(model[0].weight, run.model[0].weight)


def test_layers_of_a_model_are_chosen_by_name(full: tuple[CheckpointManager, Run]) -> None:
    """The other ones stay."""
    manager, run = full
    other = Run(2)
    before = snapshot(other.model.state_dict())
    manager.restore(7, other.state, keys="model.1.*")
    assert torch.equal(other.model[1].weight, run.model[1].weight)
    assert torch.equal(other.model[0].weight, before["0.weight"])


def test_part_of_what_is_loaded_whole_is_refused(full: tuple[CheckpointManager, Run]) -> None:
    """Half of an optimizer is none."""
    manager, _ = full
    other = Run(2)
    other.step()
    before = other.all()
    with pytest.raises(StateMismatchError, match="'optimizer' is restored whole or not at all"):
        manager.restore(7, other.state, keys=["model", "optimizer.state.0.*"])
    assert_same(before, other.all())


def test_a_loop_goes_on_when_the_weights_are_restored_within_it(full: tuple[CheckpointManager, Run]) -> None:
    """The place in the data was not chosen, so no iterator is made anew."""
    manager, _ = full
    other = Run(2)
    seen = []
    for batch in other.state.batches(1):
        seen.append(batch[0, 0].item())
        manager.restore(7, other.state, keys="model")
    assert seen == [0, 4]


def test_a_new_head_is_trained_from_an_old_checkpoint(full: tuple[CheckpointManager, Run]) -> None:
    """Fine-tuning: the weights that are there, and nothing else."""
    manager, run = full
    other = Run(2, head=True)
    head = other.model.get_submodule("head").weight.detach().clone()
    manager.restore(7, other.state, keys="model", allow_missing="model.head")
    assert torch.equal(other.model.get_submodule("head").weight, head)
    assert torch.equal(other.model[0].weight, run.model[0].weight)
    other.step()


def test_an_optimizer_that_has_a_new_head_too_is_restored_for_the_rest(full: tuple[CheckpointManager, Run]) -> None:
    """Its state for the new parameters begins afresh, as that of any parameter that had none."""
    manager, run = full
    other = Run(2, head=True)
    other.step()
    manager.restore(7, other.state, keys=["model", "optimizer"], allow_missing="model.head")
    found, saved = (one.state.state_dict()["optimizer"]["state"] for one in (other, run))
    assert_same(saved["1.weight"], found["1.weight"])
    assert len(other.optimizer.param_groups[0]["params"]) == 6
    head = other.model.get_submodule("head")
    assert other.optimizer.state.get(head.weight, {}).get("step", torch.zeros(())).item() == 0
    other.optimizer.step()


def test_parts_that_a_checkpoint_lacks_stay_as_they_are(tmp_path: pathlib.Path) -> None:
    """A step of weights alone into a whole run: optimizer, registered objects and all else are left alone."""
    run, other = Run(1), Run(2)
    other.step()
    before = other.all()
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, {"model": run.model.state_dict()})
        manager.restore(1, other.state, allow_missing=True)
        now = other.all()
        assert_same(run.all()["model"], now.pop("model"))
        del before["model"]
        assert_same(before, now)
        with pytest.raises(StateMismatchError, match="missing in the checkpoint"):
            manager.restore(1, other.state)


def test_a_train_state_within_a_dict_is_chosen_by_its_whole_key(tmp_path: pathlib.Path) -> None:
    """Beside plain values."""
    run, other = Run(1), Run(2)
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, {"run": run.state, "n": 1})
        target = {"run": other.state, "n": 0}
        before = other.all()
        manager.restore(1, target, keys=["run.model", "n"])
        now = other.all()
        assert_same(run.all()["model"], now.pop("model"))
        del before["model"]
        assert_same(before, now)
        assert target["n"] == 1
        manager.restore(1, target, keys=["n"])


def test_of_several_optimizers_one_is_restored(tmp_path: pathlib.Path) -> None:
    """By its name."""

    def state(lr: float) -> TrainState:
        models = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}
        optimizers = {name: torch.optim.SGD(model.parameters(), lr=lr) for name, model in models.items()}
        return TrainState(model=models, optimizer=optimizers)

    ours = state(0.5)
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, state(0.1))
        manager.restore(1, ours, keys="optimizer.a")
    assert [optimizer.param_groups[0]["lr"] for optimizer in ours.optimizers] == [0.1, 0.5]


# -- many ranks


@pytest.fixture(scope="module")
def two() -> Iterator[Crew]:
    with Crew(2) as crew:
        yield crew


def save_layouts(link: Link, path: str) -> None:
    with CheckpointManager(path) as manager:
        manager.save(1, state_of(3, link.rank, dist.get_world_size()))


@pytest.fixture(scope="module")
def saved_by_two(two: Crew, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("two") / "run"
    two.run(save_layouts, str(path))
    return str(path)


CHOSEN = ("sharded.rows", "sharded.uneven_columns", "sharded.tiles", "sharded.large_columns", "mine")


def restore_chosen(link: Link, path: str, turned: bool, read_once: bool, planner: bool) -> tuple[str, ...]:
    """The missing keys."""
    target = target_of(link.rank, 2, turned=turned)
    before = parts(target)
    target["sharded"]["new"] = torch.full((3,), 7.0)
    heard: list[Any] = []
    own_planner = OwnPlanner() if planner else None
    with CheckpointManager(path, read_once=read_once, load_planner=own_planner, events=[heard.append]) as manager:
        manager.restore(1, target, keys=[*CHOSEN, "sharded.*w"], allow_missing="sharded.new")
    assert target["sharded"].pop("new").tolist() == [7, 7, 7]
    expected = parts(state_of(3, link.rank, 2, turned=turned))
    for key, found in parts(target).items():
        assert found == (expected if f"sharded.{key}" in CHOSEN else before)[key], key
    assert target["nested"][0] == {"n": -1}
    assert_same(own(3, link.rank), target["mine"].value)
    (event,) = [event for event in heard if isinstance(event, Restored)]
    return event.missing_keys


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("read_once", "planner"),
    [(False, False), *(pytest.param(*ways, marks=pytest.mark.slow) for ways in ((True, False), (False, True)))],
)
def test_ranks_restore_chosen_keys_of_shards(
    two: Crew, saved_by_two: str, turned: bool, read_once: bool, planner: bool
) -> None:
    """Into the layouts they were saved in and into others; each rank's own value among them."""
    found = two.run(restore_chosen, saved_by_two, turned, read_once, planner)
    assert found == [("sharded.new",)] * 2


def restore_differently(link: Link, path: str, read_once: bool) -> dict[str, bytes]:
    target = target_of(link.rank, 2)
    with CheckpointManager(path, read_once=read_once) as manager:
        manager.restore(1, target, keys=["plain", "sharded.replicated"] if link.rank else "sharded.replicated")
    return parts(target)


@pytest.mark.parametrize("read_once", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ranks_may_choose_different_keys(two: Crew, saved_by_two: str, read_once: bool) -> None:
    """As the stages of a pipeline do."""
    first, second = two.run(restore_differently, saved_by_two, read_once)
    assert first["replicated"] == second["replicated"]
    assert set(first["plain"]) == {0}
    assert set(second["plain"]) != {0}


def restore_strictly(link: Link, path: str) -> str:
    target = target_of(link.rank, 2)
    del target["plain"]
    with CheckpointManager(path) as manager:
        try:
            manager.restore(1, target, strict=link.rank == 0)
        except StateMismatchError as exc:
            return str(exc)
    return ""


def test_rank_0_says_whether_a_restore_is_strict(two: Crew, saved_by_two: str) -> None:
    """So that it fails on all ranks or on none."""
    assert all("'plain'" in text for text in two.run(restore_strictly, saved_by_two))


def read_values(link: Link, path: str) -> tuple[list[float], list[str], str]:
    with CheckpointManager(path) as manager:
        rows = manager.read(1, "sharded.uneven_rows", slice(2, 5))  # of both ranks' shards
        return (
            rows.flatten().tolist(),
            sorted(manager.read(1, "mine/rank_1")),
            manager.tree(1)["mine/rank_1"]["name"].key,
        )


def test_each_rank_reads_what_any_rank_saved(two: Crew, saved_by_two: str) -> None:
    """By itself: reading is no collective call."""
    rows = whole(3)["uneven_rows"][2:5].flatten().tolist()
    assert two.run(read_values, saved_by_two) == [(rows, ["draws", "name"], "mine/rank_1.name")] * 2


def save_fsdp(link: Link, path: str) -> dict[str, list[float]]:
    model, state = fsdp_state(1)
    with CheckpointManager(path) as manager:
        manager.save(1, state)
    return full_weights(model)


def fsdp_state(seed: int, *, head: bool = False) -> tuple[nn.Module, TrainState]:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    if head:
        model.add_module("head", nn.Linear(3, 1))
    fully_shard(model[0])
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    return model, TrainState(model=model, optimizer=optimizer)


def full_weights(model: nn.Module) -> dict[str, list[float]]:
    return {name: param.full_tensor().flatten().tolist() for name, param in model.named_parameters()}


def restore_fsdp(link: Link, path: str, expected: dict[str, list[float]]) -> None:
    model, state = fsdp_state(2, head=True)
    before = full_weights(model)
    moments = snapshot_local(state)
    with CheckpointManager(path) as manager:
        manager.restore(1, state, keys="model", allow_missing="model.head")
    now = full_weights(model)
    assert {name: now[name] for name in expected} == expected
    assert {name: now[name] for name in now if name.startswith("head")} == {
        name: before[name] for name in before if name.startswith("head")
    }
    assert snapshot_local(state) == moments


def snapshot_local(state: TrainState) -> dict[str, list[float]]:
    optimizer = state.state_dict()["optimizer"]["state"]
    return {name: entry["exp_avg"].to_local().flatten().tolist() for name, entry in optimizer.items()}


def test_fsdp2_takes_weights_from_a_full_step_and_keeps_a_new_head(two: Crew, tmp_path: pathlib.Path) -> None:
    """DTensors on two ranks; the optimizer is left alone."""
    expected = two.run(save_fsdp, str(tmp_path))[0]
    two.run(restore_fsdp, str(tmp_path), expected)
