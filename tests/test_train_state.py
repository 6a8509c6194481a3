"""TrainState: an interrupted run that goes on from a checkpoint cannot be told from one that was never interrupted."""

import copy
import io
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from asyncckpt.errors import StateMismatchError
from asyncckpt.per_rank import PerRank, collect_per_rank, expand_per_rank
from asyncckpt.train_state import TrainState
from tests.exact import bits
from tests.processes import Job

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata
]


ROOT = Path(__file__).parents[1]


# -- ways for a state to travel: each takes it at once, and returns how to load it into a fresh TrainState


def through_memory(state, folder):
    saved = copy.deepcopy(state.state_dict())
    return lambda fresh: fresh.load_state_dict(saved)


def through_a_file(state, folder):
    buffer = io.BytesIO()
    torch.save(state.state_dict(), buffer)
    buffer.seek(0)
    return lambda fresh: fresh.load_state_dict(torch.load(buffer, weights_only=True))


def through_dcp(state, folder):
    dcp.save(state.state_dict(), checkpoint_id=folder)
    return lambda fresh: restore(fresh, folder)


def restore(fresh, folder):
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    target = fresh.target_state_dict(saved)
    dcp.load(target, checkpoint_id=folder)
    fresh.load_state_dict(target)


everyway = pytest.mark.parametrize("travel", [through_memory, through_a_file, through_dcp])


# -- a run: everything random in it comes from the global streams


class Noisy(Dataset):
    """Samples augmented from all three CPU streams, in whichever process loads them."""

    def __len__(self):
        return 22

    def __getitem__(self, index):
        noise = torch.rand(3) + random.random() + np.random.rand()
        return index, (torch.arange(3) * index + noise).float()


def seed(value):
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


class Run:
    """Model with dropout, batch norm and a buffer, optimizer, scheduler, scaler, EMA and data."""

    def __init__(self, seed_value=7, make_loader=None, make_optimizer=None, make_scheduler=None, **options):
        seed(seed_value)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.optimizer = (make_optimizer or torch.optim.AdamW)(self.model.parameters())
        self.scheduler = (make_scheduler or (lambda o: CosineAnnealingLR(o, 20)))(self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        self.ema = AveragedModel(self.model)
        self.loader = (make_loader or (lambda: DataLoader(Noisy(), batch_size=4, shuffle=True)))()
        self.state = TrainState(
            model=self.model, optimizer=self.optimizer, scheduler=self.scheduler, scaler=self.scaler,
            dataloader=self.loader, ema=self.ema, **options,
        )  # fmt: skip
        self.history = []

    def steps(self, until, batches=None):
        """Train up to step `until`; each step leaves (step, epoch, samples, loss) in the history."""
        for step, (index, x) in enumerate(batches or self.state.batches(), start=self.state.step):
            self.optimizer.zero_grad()
            loss = self.model(x).square().mean()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step(*([loss.item()] if isinstance(self.scheduler, ReduceLROnPlateau) else []))
            self.ema.update_parameters(self.model)
            self.history.append((step, self.state.epoch, index.tolist(), loss.item()))
            self.state.step = step + 1  # what the manager does at every save
            if step + 1 == until:
                return self
        return self

    def end(self):
        """All that can be compared at the end, as exact bits."""
        streams = [torch.get_rng_state(), *map(repr, (random.getstate(), np.random.get_state()))]
        state = {k: v for k, v in self.state.state_dict().items() if not k.startswith("dataloader")}
        return bits([self.history, state, self.optimizer.state_dict(), self.scheduler.state_dict(), streams])


def assert_resumes_exactly(travel, folder, interrupt, total, **parts):
    """Train `total` steps at once, and with a change of process after `interrupt`."""
    whole = Run(**parts).steps(total)
    expected = whole.end()
    first = Run(**parts).steps(interrupt)
    load = travel(first.state, folder)
    second = Run(**parts, seed_value=1234)  # a new process has other random streams and parameters
    load(second.state)
    assert second.state.step == interrupt
    second.history = first.history
    second.steps(total)
    assert second.history == whole.history
    assert second.end() == expected


@everyway
@pytest.mark.parametrize("interrupt", [1, 4, 6, 9], ids=lambda n: f"after step {n}")
def test_a_resumed_run_equals_an_uninterrupted_one(travel, interrupt, tmp_path):
    """Six batches an epoch: in the first epoch, at its end, and in the second one."""
    assert_resumes_exactly(travel, tmp_path, interrupt, 13)


def test_a_run_saved_before_its_first_step_starts_as_it_would_have(tmp_path):
    """Saving primes the optimizer, which neither the run nor its resume can tell."""
    expected = Run().steps(8).end()
    first = Run()
    load = through_dcp(first.state, tmp_path)
    assert first.steps(8).end() == expected
    fresh = Run(seed_value=1234)
    load(fresh.state)
    assert fresh.steps(8).end() == expected


def generator_loader():
    return DataLoader(Noisy(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5))


def shared_generator_loader():
    """One generator for the order and, while the epoch runs, for the data."""
    generator = torch.Generator().manual_seed(5)

    class Drawing(Noisy):
        def __getitem__(self, index):
            return index, torch.rand(3, generator=generator)

    return DataLoader(Drawing(), batch_size=4, shuffle=True, generator=generator)


def replacement_loader():
    sampler = RandomSampler(Noisy(), replacement=True, num_samples=22, generator=torch.Generator().manual_seed(5))
    return DataLoader(Noisy(), batch_size=4, sampler=sampler, drop_last=True)


def batch_sampler_loader():
    return DataLoader(Noisy(), batch_sampler=BatchSampler(RandomSampler(Noisy()), 4, drop_last=False))


def distributed_loader(rank=1, replicas=2):
    sampler = DistributedSampler(Noisy(), num_replicas=replicas, rank=rank, shuffle=True, seed=3)
    return DataLoader(Noisy(), batch_size=2, sampler=sampler, drop_last=True)


def unbatched_loader():
    class Batches(Noisy):
        def __getitem__(self, index):
            return torch.tensor([index, index + 1]), torch.stack([super().__getitem__(index)[1]] * 2)

    return DataLoader(Batches(), batch_size=None, shuffle=True)


class Stream(IterableDataset):
    """Shuffled by itself, told the epoch."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = random.Random(self.epoch).sample(range(22), 22)
        return ((i, torch.full((3,), float(i))) for i in order)


def iterable_loader():
    return DataLoader(Stream(), batch_size=4)


def stateful_loader():
    return StatefulDataLoader(Noisy(), batch_size=4, shuffle=True)


@pytest.mark.parametrize("interrupt", [3, 6, 11])
@pytest.mark.parametrize(
    "make_loader",
    [
        generator_loader,
        shared_generator_loader,
        replacement_loader,
        batch_sampler_loader,
        distributed_loader,
        unbatched_loader,
        iterable_loader,
        stateful_loader,
    ],
)
def test_every_kind_of_loader_goes_on_where_it_stood(make_loader, interrupt, tmp_path):
    """Own generators, samplers told the epoch, data without indices, and a loader that keeps its own state."""
    assert_resumes_exactly(through_a_file, tmp_path, interrupt, 13, make_loader=make_loader)


def test_samplers_are_told_the_epoch():
    """Without it a DistributedSampler shuffles every epoch alike."""
    sampler = DistributedSampler(Noisy(), num_replicas=2, rank=0, seed=3)
    train = TrainState(dataloader=DataLoader(Noisy(), batch_size=11, sampler=sampler))
    orders = [index.tolist() for index, _ in train.batches(epochs=2)]
    expected = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        expected.append(list(sampler))
    assert orders == expected
    assert expected[0] != expected[1]


def worker_loader():
    return DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=2)


def stateful_worker_loader():
    class Quiet(Noisy):
        def __getitem__(self, index):
            return index, torch.full((3,), float(index))

    return StatefulDataLoader(Quiet(), batch_size=4, shuffle=True, num_workers=2)


def seldom_snapshot_loader():
    """Its workers' state is taken at every fourth batch: cheaper, and batches from there on are drawn again."""
    return StatefulDataLoader(Noisy(), batch_size=4, shuffle=True, snapshot_every_n_steps=4)


@pytest.mark.parametrize("make_loader", [worker_loader, stateful_worker_loader, seldom_snapshot_loader])
def test_loaders_with_workers_go_on_where_they_stood(make_loader, tmp_path):
    """A plain loader exactly, with what its workers draw at random; a stateful one in its order."""
    assert_resumes_exactly(through_a_file, tmp_path, 9, 13, make_loader=make_loader)


@pytest.mark.slow
def test_a_stateful_loader_killed_with_its_workers_goes_on_with_the_next_sample(tmp_path):
    """SIGKILL of the process, in the first epoch and in the second, with a snapshot at every fourth batch alone."""

    def run(name, *kill_at):
        command = [sys.executable, "-m", "tests.loader_script", tmp_path / name, tmp_path / f"{name}.txt", *kill_at]
        return subprocess.run(command, cwd=ROOT, timeout=300).returncode

    assert run("whole") == 0
    assert run("killed", "6") == -signal.SIGKILL
    assert run("killed", "21") == -signal.SIGKILL
    assert run("killed") == 0
    whole, killed = ((tmp_path / f"{name}.txt").read_text().splitlines() for name in ("whole", "killed"))
    assert dict(line.split(" ", 1) for line in killed) == dict(line.split(" ", 1) for line in whole)
    assert len(whole) == 28


def samples(run, until):
    return [row[2] for row in run.steps(until).history]


def persistent_loader():
    return DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=1, persistent_workers=True)


@pytest.mark.parametrize("interrupt", [3, 9], ids=["first epoch", "second epoch"])
def test_persistent_workers_keep_the_order_of_samples(interrupt, tmp_path):
    """Also after the first epoch, where the loader draws no seed for its workers."""
    expected = samples(Run(make_loader=persistent_loader), 14)
    first = Run(make_loader=persistent_loader).steps(interrupt)
    load = through_memory(first.state, tmp_path)
    second = Run(make_loader=persistent_loader, seed_value=1234)
    load(second.state)
    assert samples(second, 14) == expected[interrupt:]


def test_fast_skip_keeps_the_order_and_asks_workers_for_nothing_skipped(tmp_path):
    """For data without randomness in workers."""
    expected = samples(Run(make_loader=worker_loader), 8)
    first = Run(make_loader=worker_loader).steps(4)
    load = through_memory(first.state, tmp_path)
    second = Run(make_loader=worker_loader, seed_value=1234)
    load(second.state)
    second.steps(8, second.state.batches(fast_skip=True))
    assert [row[2] for row in second.history] == expected[4:]


def test_skipped_batches_are_not_loaded_without_workers(tmp_path):
    """Resuming late in an epoch costs indices, not data."""
    loaded = []

    class Watched(Noisy):
        def __getitem__(self, index):
            loaded.append(index)
            return super().__getitem__(index)

    def make():
        return DataLoader(Watched(), batch_size=4, shuffle=True)

    first = Run(make_loader=make).steps(5)
    load = through_memory(first.state, tmp_path)
    second = Run(make_loader=make, seed_value=1234)
    load(second.state)
    loaded.clear()
    next(second.state.batches())
    assert len(loaded) == 2  # the last batch of 22 samples


def test_batches_ends_after_so_many_epochs_in_all(tmp_path):
    """Counted from the start of the run, not of the process; and `epoch` is right inside and after the loop."""
    first = Run().steps(4)
    load = through_memory(first.state, tmp_path)
    second = Run(seed_value=1234)
    load(second.state)
    epochs = [second.state.epoch for _ in second.state.batches(epochs=2)]
    assert epochs == [0] * 2 + [1] * 6
    assert second.state.epoch == 2
    assert list(second.state.batches(epochs=2)) == []


def test_a_loop_left_in_the_middle_goes_on_in_the_next_one():
    """`break` for an evaluation, then on: no batch is lost or repeated."""
    for make_loader in (None, stateful_loader, persistent_loader):
        expected = samples(Run(make_loader=make_loader), 8)
        run = Run(make_loader=make_loader).steps(3)
        assert samples(run, 8) == expected


def test_a_loop_under_way_ends_with_an_error_after_a_restore(tmp_path):
    """Its batches would be those of the time before."""
    run = Run()
    batches = run.state.batches()
    next(batches)
    through_memory(run.state, tmp_path)(run.state)
    with pytest.raises(RuntimeError, match="is over"):
        next(batches)


def test_a_plain_loader_that_is_iterated_by_itself_is_warned_about():
    """Its position cannot be known."""
    run = Run()
    run.steps(2, iter(run.loader))
    with pytest.warns(UserWarning, match=r"state\.batches\(\)"):
        run.state.state_dict()


def test_a_loader_without_batches_is_an_error_not_an_endless_loop():
    """With `epochs=None` it would spin."""
    state = TrainState(dataloader=DataLoader(TensorDataset(torch.empty(0, 3))))
    with pytest.raises(ValueError, match="no batch"):
        next(state.batches())


def test_data_that_became_shorter_is_an_error(tmp_path):
    """The consumed batches are not there to skip."""
    first = Run().steps(5)
    load = through_memory(first.state, tmp_path)
    second = Run(make_loader=lambda: DataLoader(Subset(Noisy(), range(11)), batch_size=4, shuffle=True))
    load(second.state)
    with pytest.raises(StateMismatchError, match="5 batches"):
        next(second.state.batches())


def test_a_stateful_loader_needs_no_batches_call(tmp_path):
    """A plain `for batch in loader` resumes by itself, and so do the random streams."""

    def epochs(run):
        while True:
            yield from run.loader

    expected = Run(make_loader=stateful_loader)
    expected.steps(9, epochs(expected))
    first = Run(make_loader=stateful_loader)
    first.steps(4, epochs(first))
    load = through_a_file(first.state, tmp_path)
    second = Run(make_loader=stateful_loader, seed_value=1234)
    load(second.state)
    second.steps(9, epochs(second))
    assert first.history + second.history == expected.history


def test_a_stateful_loader_that_was_never_iterated_is_not_started_by_a_save():
    """It would spawn workers and move the random stream."""
    run = Run(make_loader=stateful_loader)
    before = bits(torch.get_rng_state())
    run.state.state_dict()
    assert run.loader._iterator is None
    assert bits(torch.get_rng_state()) == before


def divided_loader(kind, replicas, size):
    """Rank 0's, over samples in an order that is the same for any division."""
    sampler = DistributedSampler(Noisy(), num_replicas=replicas, rank=0, shuffle=True, seed=3)
    return kind(Noisy(), batch_size=size, sampler=sampler)


ORDER = list(DistributedSampler(Noisy(), num_replicas=1, rank=0, seed=3))


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize(
    ("saved", "steps", "found", "position"),
    [
        ((2, 2), 3, (1, 2), 6),  # two ranks consumed three batches each; one has six behind it, of the same samples
        ((1, 2), 3, (2, 2), 1),  # one and a half would be right: two samples come twice
        ((4, 2), 2, (2, 4), 2),  # the batch over all ranks stays what it was
        ((1, 4), 2, (1, 2), 4),
        ((2, 4), 3, (1, 4), 6),  # the epoch is over, its last batches were not full
    ],
)
def test_data_divided_anew_goes_on_after_as_many_samples(kind, saved, steps, found, position, tmp_path):
    """Another number of replicas, another batch size, or both; also of a loader that keeps a state of its own."""
    first = Run(make_loader=lambda: divided_loader(kind, *saved)).steps(steps)
    load = through_memory(first.state, tmp_path)
    second = Run(make_loader=lambda: divided_loader(kind, *found), seed_value=1234)
    with pytest.warns(UserWarning, match=f"epoch 0 goes on at batch {position}"):
        load(second.state)
    replicas, size = found
    seen = [index for index, _ in second.state.batches(epochs=2)]
    rest = ORDER[position * replicas * size :][::replicas]
    assert [row.tolist() for row in seen[: -len(second.loader)]] == [
        rest[i : i + size] for i in range(0, len(rest), size)
    ]
    assert torch.cat(seen[-len(second.loader) :]).tolist() == list(second.loader.sampler)  # the next epoch, in full


def test_a_stateful_loader_of_another_division_that_goes_its_own_way_is_warned_about(tmp_path):
    """Its state counts batches of a rank, and no more is known."""
    first = Run(make_loader=lambda: divided_loader(StatefulDataLoader, 2, 2))
    first.steps(3, iter(first.loader))
    load = through_memory(first.state, tmp_path)
    with pytest.warns(UserWarning, match="samples may be left out or come twice"):
        load(Run(make_loader=lambda: divided_loader(StatefulDataLoader, 1, 2)).state)


# -- optimizers and schedulers


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
        lambda p: torch.optim.Adam(p, amsgrad=True, fused=True),
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
        lambda p: torch.optim.NAdam(p),
        lambda p: torch.optim.ASGD(p),
        lambda p: torch.optim.Rprop(p),
        lambda p: torch.optim.Adafactor(p),
        lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.1),
        lambda p: (
            torch.optim.RMSprop(
                [{"params": q[:2], "centered": True}, {"params": q[2:], "lr": 0.1, "momentum": 0.9}], weight_decay=0.1
            )
            if (q := list(p))
            else None
        ),
    ],
)
def test_every_optimizer_resumes_exactly(make, tmp_path):
    """Through real DCP, at the first step and later; the fresh optimizer is primed by nobody but TrainState."""
    for interrupt in (1, 4):
        assert_resumes_exactly(through_dcp, tmp_path / str(interrupt), interrupt, 7, make_optimizer=make)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: LambdaLR(o, lambda step: 0.9**step),
        lambda o: MultiStepLR(o, [2, 4], gamma=0.5),
        lambda o: OneCycleLR(o, 0.1, total_steps=30),
        lambda o: CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
        lambda o: ReduceLROnPlateau(o, patience=0),
        lambda o: SequentialLR(o, [LinearLR(o, total_iters=3), ExponentialLR(o, 0.9)], [3]),
        lambda o: LambdaLR(o, lambda step: np.cos(step / 10)),
    ],
)
def test_every_scheduler_resumes_exactly(make, tmp_path):
    """Also those with int keys, nested schedulers, or numpy's numbers in their state."""
    assert_resumes_exactly(through_dcp, tmp_path, 5, 9, make_scheduler=make)


def lbfgs_run(steps, state=None):
    torch.manual_seed(2)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.3, max_iter=3, history_size=5)
    train = TrainState(model=model, optimizer=optimizer)
    if state is not None:
        restore(train, state)
    x, y = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), torch.ones(16, 3)

    def loss():
        optimizer.zero_grad()
        value = (model(x).tanh() - y).square().mean()
        value.backward()
        return value

    for _ in range(steps):
        optimizer.step(loss)
    return train


@pytest.mark.parametrize("interrupt", [0, 1, 2, 4])
def test_lbfgs_gets_its_history_back(interrupt, tmp_path):
    """Its lists are as long as the checkpoint says; before the first step there are none."""
    expected = bits(lbfgs_run(6).state_dict()["optimizer"])
    dcp.save(lbfgs_run(interrupt).state_dict(), checkpoint_id=tmp_path)
    resumed = lbfgs_run(6 - interrupt, tmp_path)
    assert bits(resumed.state_dict()["optimizer"]) == expected


def test_a_run_can_go_back_to_a_checkpoint_with_less_state(tmp_path):
    """In the same process: what was not there at the save is gone after the restore."""
    train = lbfgs_run(1)
    dcp.save(train.state_dict(), checkpoint_id=tmp_path)
    before = bits(train.state_dict()["optimizer"])
    longer = lbfgs_run(5)
    restore(longer, tmp_path)
    assert bits(longer.state_dict()["optimizer"]) == before

    params = [nn.Parameter(torch.ones(2))]
    model = nn.ParameterList(params)
    sgd = torch.optim.SGD(params, momentum=0.9, dampening=0.5)
    train = TrainState(model=model, optimizer=sgd)
    dcp.save(train.state_dict(), checkpoint_id=tmp_path / "sgd")
    params[0].grad = torch.ones(2)
    sgd.step()
    restore(train, tmp_path / "sgd")
    assert not sgd.state


def adam_on(params, **options):
    optimizer = torch.optim.Adam(params, **options)
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    return optimizer


def test_frozen_parameters_keep_their_optimizer_state(tmp_path):
    """GAN training freezes one network while the other learns; a save in between must not forget its moments."""

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        return model, adam_on(list(model.parameters()))

    model, optimizer = build()
    optimizer.step()
    model[0].requires_grad_(False)
    train = TrainState(model=model, optimizer=optimizer)
    dcp.save(train.state_dict(), checkpoint_id=tmp_path)
    expected = bits(optimizer.state_dict()["state"])

    for frozen in (False, True):
        fresh, other = build()
        fresh[0].requires_grad_(not frozen)
        restore(TrainState(model=fresh, optimizer=other), tmp_path)
        assert bits(other.state_dict()["state"]) == expected
        assert [p.requires_grad for p in fresh.parameters()] == [not frozen] * 2 + [True] * 2


def test_a_parameter_frozen_at_the_save_and_never_stepped_has_no_state_after_it(tmp_path):
    """Its later first step must be a first step."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    dcp.save(
        TrainState(model=model, optimizer=torch.optim.Adam(model.parameters())).state_dict(), checkpoint_id=tmp_path
    )
    model[0].requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters())
    restore(TrainState(model=model, optimizer=optimizer), tmp_path)
    assert set(optimizer.state) == set(model[1].parameters())


def test_restored_state_and_tensor_options_stay_the_same_tensors(tmp_path):
    """A captured CUDA graph, and a compiled step, refer to them."""
    model = nn.Linear(2, 2)
    train = TrainState(
        model=model, optimizer=(optimizer := adam_on(list(model.parameters()), lr=torch.tensor(0.1), foreach=False))
    )
    saved = copy.deepcopy(train.state_dict())
    optimizer.step()
    optimizer.param_groups[0]["lr"].fill_(0.7)
    lr, moments = optimizer.param_groups[0]["lr"], dict(optimizer.state[model.weight])
    train.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == torch.tensor(0.1)
    assert all(optimizer.state[model.weight][key] is value for key, value in moments.items())
    assert moments["step"] == 0


@everyway
def test_float32_state_of_bf16_parameters_is_not_rounded(travel, tmp_path):
    """torch's own load_state_dict casts NAdam's running product to the parameter's dtype."""

    def build():
        model = nn.Linear(2, 2, dtype=torch.bfloat16)
        optimizer = torch.optim.NAdam(model.parameters(), lr=0.1)
        return model, optimizer, TrainState(model=model, optimizer=optimizer)

    model, optimizer, train = build()
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    _, other, fresh = build()
    travel(train, tmp_path)(fresh)
    assert bits(other.state_dict()["state"]) == bits(optimizer.state_dict()["state"])
    assert other.state_dict()["state"][0]["mu_product"].dtype == torch.float32


def test_saving_and_restoring_fire_no_step_hooks(tmp_path):
    """torch's own helper steps an optimizer without state, at every call."""
    calls = []
    for make in (torch.optim.SGD, torch.optim.LBFGS, torch.optim.Adam):
        model = nn.Linear(2, 2)
        optimizer = make(model.parameters())
        optimizer.register_step_pre_hook(lambda *_: calls.append("step"))
        train = TrainState(model=model, optimizer=optimizer)
        through_dcp(train, tmp_path / make.__name__)(train)
        assert all(p.grad is None for p in model.parameters())
    assert not calls


def test_a_parameter_group_added_later_is_asked_for_by_name(tmp_path):
    """Restoring without it would drop its options and state without a word."""

    def build(groups):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        optimizer = torch.optim.Adam(model[0].parameters())
        if groups == 2:
            optimizer.add_param_group({"params": list(model[1].parameters()), "lr": 0.5})
        return TrainState(model=model, optimizer=optimizer)

    dcp.save(build(2).state_dict(), checkpoint_id=tmp_path)
    restore(build(2), tmp_path)
    with pytest.raises(StateMismatchError, match="add_param_group"):
        restore(build(1), tmp_path)


def test_names_follow_a_model_and_an_optimizer_that_grow():
    """They are remembered between saves, as long as the parameters are the same."""
    model = nn.Sequential(nn.Linear(2, 2))
    optimizer = torch.optim.Adam(model.parameters())
    train = TrainState(model=model, optimizer=optimizer, rng=False)
    assert bits(train.state_dict()) == bits(train.state_dict())
    model.insert(0, nn.Linear(2, 2))
    optimizer.add_param_group({"params": list(model[0].parameters())})
    grown = train.state_dict()
    assert set(grown["model"]) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert [group["params"] for group in grown["optimizer"]["param_groups"]] == [
        ["1.weight", "1.bias"],
        ["0.weight", "0.bias"],
    ]
    fresh = TrainState(model=model, optimizer=optimizer, rng=False)
    assert bits(train.state_dict()) == bits(fresh.state_dict()) == bits(grown)


def test_options_that_a_step_adds_to_a_group_are_restored(tmp_path):
    """Several third-party optimizers count their steps in the group."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.param_groups[0]["k"] = 41
    dcp.save(TrainState(model=model, optimizer=optimizer).state_dict(), checkpoint_id=tmp_path)
    fresh = torch.optim.SGD(model.parameters())
    restore(TrainState(model=model, optimizer=fresh), tmp_path)
    assert fresh.param_groups[0]["k"] == 41


def test_an_optimizer_of_parameters_outside_the_models_is_refused():
    """They have no names to be saved under."""
    train = TrainState(model=nn.Linear(2, 2), optimizer=torch.optim.SGD([nn.Parameter(torch.ones(2))]))
    with pytest.raises(ValueError, match="in no model"):
        train.state_dict()
    with pytest.raises(ValueError, match="needs its model"):
        TrainState(optimizer=torch.optim.SGD([nn.Parameter(torch.ones(2))]))


# -- models


class Gan:
    """Two models, an optimizer each and one over both, two schedulers."""

    def __init__(self, seed_value=0):
        torch.manual_seed(seed_value)
        self.generator, self.critic = nn.Linear(2, 3), nn.Linear(3, 1)
        self.optimizers = {
            "g": torch.optim.Adam(self.generator.parameters()),
            "d": torch.optim.SGD(self.critic.parameters(), lr=0.1, momentum=0.9),
            "both": torch.optim.RMSprop([*self.generator.parameters(), *self.critic.parameters()]),
        }
        self.schedulers = [ExponentialLR(self.optimizers[name], 0.9) for name in "gd"]
        self.state = TrainState(
            model={"generator": self.generator, "critic": self.critic},
            optimizer=self.optimizers, scheduler=self.schedulers,
        )  # fmt: skip

    def train(self, steps):
        for _ in range(steps):
            loss = self.critic(self.generator(torch.rand(4, 2))).square().mean()
            for optimizer in self.optimizers.values():
                optimizer.zero_grad()
            loss.backward()
            for part in (*self.optimizers.values(), *self.schedulers):
                part.step()
        return self


@everyway
def test_several_models_and_optimizers_resume_by_name(travel, tmp_path):
    """Keys carry the names; one optimizer may span models, and a parameter may have two optimizers."""
    expected = bits(Gan().train(6).state.state_dict())
    first = Gan().train(3)
    load = travel(first.state, tmp_path)
    second = Gan(1)
    load(second.state)
    assert len(second.state.optimizers) == 3
    assert bits(second.train(3).state.state_dict()) == expected
    assert "generator.weight" in first.state.state_dict()["model"]
    assert set(first.state.state_dict()["optimizer"]) == {"g", "d", "both"}


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "wrap",
    [
        nn.parallel.DistributedDataParallel,
        lambda model: nn.ModuleDict({"a": nn.parallel.DistributedDataParallel(model)}),
        lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (1,))),
        pytest.param(torch.compile, marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]),
    ],
    ids=["DDP", "DDP inside", "FSDP2", "compile"],
)
def test_a_wrapped_model_restores_what_an_unwrapped_one_saved(wrap, one_rank, tmp_path):
    """DCP's canonical names: the wrapper is not in the checkpoint; optimizer state arrives as the parameters are."""
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    optimizer = adam_on(list(model.parameters()))
    optimizer.step()
    named = nn.ModuleDict({"a": model}) if isinstance(wrap(nn.Linear(2, 2)), nn.ModuleDict) else model
    plain = TrainState(model=named, optimizer=optimizer)
    dcp.save(plain.state_dict(), checkpoint_id=tmp_path)
    wrapped = wrap(nn.Linear(2, 2))
    restored = TrainState(model=wrapped, optimizer=torch.optim.Adam(wrapped.parameters()))
    restore(restored, tmp_path)
    expected, found = plain.state_dict(), restored.state_dict()
    assert set(found["model"]) == set(expected["model"])
    for fqn, state in expected["optimizer"]["state"].items():
        for key, value in state.items():
            other = found["optimizer"]["state"][fqn][key]
            assert torch.equal(other.full_tensor() if isinstance(other, DTensor) else other, value)


def test_a_stock_dcp_load_takes_a_train_state_as_a_stateful(tmp_path):
    """As any Stateful, at the top level of a plain dict."""
    first = Run().steps(3)
    dcp.save({"train": first.state}, checkpoint_id=tmp_path)
    expected = first.end()[1:]
    second = Run(seed_value=1234)
    dcp.load({"train": second.state}, checkpoint_id=tmp_path)
    assert second.end()[1:] == expected


def test_options_reach_dcp(tmp_path):
    """Flat optimizer keys for pipelines, frozen parameters left out, and partial loads."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    options = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True)
    train = TrainState(model=model, optimizer=adam_on(list(model[1].parameters())), options=options)
    train.optimizers[0].step()
    state = train.state_dict()
    assert set(state["model"]) == {"1.weight", "1.bias"}
    assert "state.1.weight.exp_avg" in state["optimizer"]
    dcp.save(state, checkpoint_id=tmp_path)
    fresh = TrainState(model=model, optimizer=torch.optim.Adam(model[1].parameters()), options=options)
    restore(fresh, tmp_path)
    assert bits(fresh.state_dict()["optimizer"]) == bits(state["optimizer"])
    ema = AveragedModel(model).requires_grad_(False)
    assert "module.0.weight" in TrainState(model=model, ema=ema, options=options).state_dict()["ema"]

    larger = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1), nn.Linear(1, 1))
    with pytest.raises(CheckpointException, match="Missing key"):
        restore(TrainState(model=larger), tmp_path)
    restore(TrainState(model=larger, options=StateDictOptions(strict=False)), tmp_path)
    assert torch.equal(larger[1].weight, model[1].weight)


# -- registered objects and per-rank values


class Memory:
    """Any state: nested, with int keys, tuples, empty containers, and tensors that come and go."""

    def __init__(self, state=None):
        self.state = state or {}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


RICH = {
    "tensor": torch.arange(3.0),
    "list": [torch.ones(2, dtype=torch.int64), {"inner": torch.zeros(1)}],
    "ints": {1: "a", 2: {"b": None}},
    "empty": {},
    "tuple": (1, (2.5, torch.tensor(True))),
    "numpy": np.float64(0.5),
    "growing": {"loss": [1.0, 2.0]},
}


@everyway
@pytest.mark.parametrize(
    "before",
    [{}, {"tensor": torch.zeros(9), "extra": torch.ones(1)}, {"tensor": torch.zeros(1).expand(3)}],
    ids=["nothing yet", "other", "expanded"],
)
def test_a_registered_object_gets_back_exactly_what_it_gave(travel, before, tmp_path):
    """Whatever it held before: the checkpoint says which tensors there are."""
    train, memory = TrainState(memory=Memory(RICH)), Memory(before)
    travel(train, tmp_path)(TrainState(memory=memory))
    assert bits(memory.state) == bits({**RICH, "numpy": 0.5})
    assert type(memory.state["numpy"]) is float
    assert type(memory.state["tuple"]) is tuple


def test_tensors_of_registered_objects_are_keys_of_their_own():
    """An EMA of a large model must not travel inside a pickle."""
    state = TrainState(memory=Memory(RICH), ema=AveragedModel(nn.Linear(2, 2))).state_dict()
    assert set(state["memory"]["tensors"]) == {"tensor", "list.0", "list.1.inner", "tuple.1.1"}
    assert set(state["ema"]) == {"n_averaged", "module.weight", "module.bias"}


def test_names_that_are_taken_and_values_that_have_no_state_are_refused():
    """At registration, not at the first save."""
    train = TrainState()
    for name in ("model", "rng", "not an identifier", "a/b"):
        with pytest.raises(ValueError, match="cannot be registered"):
            train.register(name, Memory())
    with pytest.raises(TypeError, match="PerRank"):
        train.register("best", 0.5)
    train.register("best", PerRank(0.5))
    with pytest.raises(ValueError, match="taken"):
        train.register("best", PerRank(0.5))
    with pytest.raises(ValueError, match="taken"):
        TrainState(progress=Memory())


@everyway
def test_per_rank_values_of_a_train_state_come_back(travel, tmp_path):
    """Plain values, tensors and objects."""
    plain, tensor, obj = PerRank({"seen": [1, 2]}), PerRank(torch.arange(3)), PerRank(Memory({"n": 3}))
    train = TrainState(plain=plain, tensor=tensor, obj=obj)
    assert {"plain/rank_0", "tensor/rank_0", "obj/rank_0"} < set(train.state_dict())
    fresh = {"plain": PerRank(None), "tensor": PerRank(None), "obj": PerRank(Memory())}
    travel(train, tmp_path)(TrainState(**fresh))
    assert fresh["plain"].value == {"seen": [1, 2]}
    assert torch.equal(fresh["tensor"].value, torch.arange(3))
    assert fresh["obj"].value.state == {"n": 3}


def test_per_rank_values_in_a_plain_dict_get_keys_of_their_rank():
    """And the loaded values find their way back, to the PerRank and to everything beside it."""
    mine = PerRank(torch.zeros(2))
    state = {"a": {"b": mine, "step": 1}, "c": {"step": 1}, "d": PerRank({"x": 1})}
    expanded = expand_per_rank(state, rank=3)
    assert expanded["a"]["b/rank_3"] is mine.value
    assert expanded["d/rank_3"] == {"x": 1}
    assert expanded["c"] is state["c"]

    expanded["a"]["b/rank_3"] = torch.ones(2)
    expanded["a"]["step"] = 2
    expanded["d/rank_3"] = {"x": 5}
    collect_per_rank(state, expanded)
    assert torch.equal(mine.value, torch.ones(2))
    assert state["a"] == {"b": mine, "step": 2}
    assert state["d"].value == {"x": 5}


def test_more_ranks_than_saved_take_turns_with_a_warning():
    """Rank 5 of a checkpoint of two ranks takes rank 1's; a key that no rank saved stays missing."""
    saved = ["a.b/rank_0.x", "a.b/rank_1.x", "step"]
    with pytest.warns(UserWarning, match=r"rank 5 was not there and takes rank 1's"):
        expanded = expand_per_rank({"a": {"b": PerRank({"x": 0})}}, 5, saved)
    assert set(expanded["a"]) == {"b/rank_1"}
    assert set(expand_per_rank({"new": PerRank(1)}, 5, saved)) == {"new/rank_5"}
    assert set(expand_per_rank({"a": {"b": PerRank(1)}}, 1, saved)["a"]) == {"b/rank_1"}


def test_fewer_ranks_than_saved_leave_values_behind_with_a_warning():
    """Rank 0 says so, once; nobody takes what is left, also of ranks whose numbers do not begin at 0."""
    saved = [f"b/rank_{rank}" for rank in range(3)]
    with pytest.warns(
        UserWarning, match="saved by 3 ranks, and 2 restore it: what 1 of them had, from rank 2 on, stays"
    ):
        assert set(expand_per_rank({"b": PerRank(1)}, 0, saved, 2)) == {"b/rank_0"}
    assert set(expand_per_rank({"b": PerRank(1)}, 1, saved, 2)) == {"b/rank_1"}
    with pytest.warns(UserWarning, match="takes rank 7's") as warned:
        assert set(expand_per_rank({"b": PerRank(1)}, 0, ["b/rank_7", "b/rank_8"], 2)) == {"b/rank_7"}
    assert len(warned) == 1


def test_a_rank_that_was_not_saved_gets_random_streams_of_its_own(monkeypatch, tmp_path):
    """Repeatable, and unlike those of the rank that they derive from."""
    seed(1)
    dcp.save(TrainState().state_dict(), checkpoint_id=tmp_path)
    own = torch.rand(1).item()
    drawn = []
    for rank in (0, 1, 2, 1):
        monkeypatch.setattr("asyncckpt.train_state._rank", lambda rank=rank: rank)
        train = TrainState()
        if rank:
            with pytest.warns(UserWarning, match="'rng' was saved by 1 ranks"):
                restore(train, tmp_path)
        else:
            restore(train, tmp_path)
        drawn.append((torch.rand(1).item(), random.random(), np.random.rand()))
    assert drawn[0][0] == own
    assert len(set(drawn)) == 3
    assert drawn[1] == drawn[3]


def test_a_state_without_a_part_says_which_one():
    """For example a checkpoint of a run without a scheduler."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    state = TrainState(model=model, optimizer=optimizer).state_dict()
    with pytest.raises(StateMismatchError, match="no 'scheduler'"):
        TrainState(model=model, optimizer=optimizer, scheduler=LambdaLR(optimizer, lambda _: 1.0)).load_state_dict(
            state
        )


def test_random_streams_can_be_left_out(tmp_path):
    """For a run that seeds each step by itself."""
    train = TrainState(rng=False, model=nn.Linear(1, 1))
    assert not any("rng" in key for key in train.state_dict())
    before = bits(torch.get_rng_state())
    through_memory(train, tmp_path)(train)
    assert bits(torch.get_rng_state()) == before


# -- several ranks


def train_a_rank(link, folder):
    """For each kind of model a run that saves after step 4 and goes on to 7, and a fresh one that resumes there."""
    warnings.simplefilter("ignore", FutureWarning)  # FSDP1 is deprecated
    return {
        kind: [train_and_save(wrap, 100 + link.rank, folder / kind), resume_and_train(wrap, folder / kind)]
        for kind, wrap in {
            "DDP": nn.parallel.DistributedDataParallel,
            "FSDP2": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (2,))),
            "FSDP1": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
        }.items()
    }


def train_and_save(wrap, seed_value, folder):
    run = RankRun(wrap, seed_value)
    run.steps(4)
    dcp.save(run.state.state_dict(), checkpoint_id=folder)
    return run.steps(7).end()


def resume_and_train(wrap, folder):
    run = RankRun(wrap, 999)
    restore(run.state, folder)
    return run.steps(7).end()


class RankRun:
    """One rank of a job whose ranks differ in samples, dropout and augmentations."""

    def __init__(self, wrap, seed_value):
        seed(seed_value)
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 2))
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.3)
        self.model = wrap(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.seen = PerRank([])
        loader = DataLoader(Noisy(), batch_size=4, sampler=DistributedSampler(Noisy(), seed=3))
        self.state = TrainState(model=self.model, optimizer=self.optimizer, dataloader=loader, seen=self.seen)

    def steps(self, until):
        for step, (index, x) in enumerate(self.state.batches(), start=self.state.step):
            self.optimizer.zero_grad()
            loss = self.model(x).square().mean()
            loss.backward()
            self.optimizer.step()
            self.seen.value = [*self.seen.value, (step, index.tolist(), loss.item())]
            self.state.step = step + 1
            if self.state.step == until:
                break
        return self

    def end(self):
        params = [p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters()]
        return self.seen.value, bits(params), list(self.state.state_dict())


def test_every_rank_of_a_job_goes_on_with_its_own_streams_and_data(tmp_path):
    """Two ranks, DDP and FSDP, in the second epoch: what differs by rank is saved for each of them."""
    with Job(2, train_a_rank, tmp_path) as job:
        first, second = job.results()
    for kind in ("DDP", "FSDP2", "FSDP1"):
        for rank, (whole, resumed) in enumerate([first[kind], second[kind]]):
            assert resumed == whole
            assert len(whole[0]) == 7
            assert f"rng/rank_{rank}" in whole[2]
        assert first[kind][0][0] != second[kind][0][0]
