"""One small training run under each way to divide it among ranks, and its state as bytes that do not show the way.

A layout is "<kind>@<number of ranks>", or "whole" for a process alone. Every rank is given the same batch, so that all
layouts compute one and the same run, up to the order of sums. Used by test_parallelisms.py.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from asyncckpt import CheckpointManager, TrainState, prime_optimizer
from asyncckpt.plan import leaves
from stagers import OverlappingAsyncStager
from tests.processes import Link
from tests.states import raw_bytes, tensor_of

SAVED_STEP, NUM_STEPS = 1, 4
BATCH, NUM_EXPERTS = 6, 7
WIDTHS = {"front": 13, "grouped": 10, "listed": 10, "mix": 10, "frozen": 10, "tied": 10, "low": 7}
"""The parts of the model in order, a stage of a pipeline each, and the width of what goes in. No number of ranks
divides all of these."""


class Front(nn.Module):
    """With statistics that are saved and a table that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(13, 10, bias=False)
        self.norm = nn.BatchNorm1d(10)
        self.register_buffer("table", torch.empty(10), persistent=False)
        self.fill_table()

    def fill_table(self) -> None:
        self.table.copy_(torch.linspace(0.5, 1.5, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.up(x)) * self.table


class Experts(nn.Module):
    """All experts see all rows; where they are divided among ranks, the ranks' results are summed."""

    group: dist.ProcessGroup | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x if self.group is None else _Enter.apply(x, self.group)
        y = self.mixed(y, y[:, :NUM_EXPERTS].softmax(1))
        return x + (y if self.group is None else _Leave.apply(y, self.group))


class Grouped(Experts):
    """The experts are rows of one parameter, which a DTensor divides."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(NUM_EXPERTS, 10, 10) / 4)

    def mixed(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        first, weight = 0, self.weight
        if isinstance(weight, DTensor):
            _, (first, *_) = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
            weight = weight.to_local()
        each = torch.einsum("bi,eij->bej", x, weight).tanh()
        return torch.einsum("be,bej->bj", gates[:, first : first + len(weight)], each)


class Listed(Experts):
    """Each expert is a module, which one rank has or all; its name says which expert it is."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({str(number): nn.Linear(10, 10, bias=False) for number in range(NUM_EXPERTS)})

    def mixed(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        y = 0 * x  # there may be no expert here
        for number, expert in self.experts.items():
            y = y + gates[:, int(number), None] * expert(x).tanh()
        return y


class Tied(nn.Module):
    """Two layers with one weight. The bias `shift` has fewer rows than there are ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(10, 7), nn.Linear(10, 7)
        self.shift = nn.Parameter(torch.randn(1))
        self.tie()

    def tie(self) -> None:
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x).tanh() + self.b(x - self.shift)


class Frozen(nn.Linear):
    def __init__(self) -> None:
        super().__init__(10, 10)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x) / 8


class Low(nn.Linear):
    """In bfloat16; what is trained is a float32 copy that the optimizer keeps."""

    def __init__(self) -> None:
        super().__init__(7, 7, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x.bfloat16()).float() / 64  # little, as a last bit of bfloat16 is much


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front, self.grouped, self.listed = Front(), Grouped(), Listed()
        self.mix, self.frozen, self.tied, self.low = nn.Linear(10, 10), Frozen(), Tied(), Low()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in WIDTHS:
            x = getattr(self, name)(x)
        return x


class MasterAdam(torch.optim.Optimizer):
    """Adam without bias correction, on float32 copies of low-precision parameters."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad.float(), group)

    def _update(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[param], group["betas"]
        if not state:
            state["num_steps"] = 0
            state["master"] = param.detach().float()
            state["mean"], state["variance"] = torch.zeros_like(state["master"]), torch.zeros_like(state["master"])
        state["num_steps"] += 1
        state["mean"].lerp_(grad, 1 - beta1)
        state["variance"].lerp_(grad * grad, 1 - beta2)
        state["master"].sub_(group["lr"] * state["mean"] / (state["variance"].sqrt() + 1e-3))
        param.copy_(state["master"])


# -- layouts


class _Enter(torch.autograd.Function):
    """x to every rank of the group; the gradients that come back are summed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Leave(torch.autograd.Function):
    """The sum of every rank's y."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        y = y.clone()
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None


class Pipeline:
    """The parts of `net` on several ranks; what another rank has is gone from `net`."""

    def __init__(self, net: Net, owners: list[int]) -> None:
        """owners: the rank that has each part."""
        self.net = net
        self.owners = owners
        for name, owner in zip(WIDTHS, owners, strict=True):
            if owner != dist.get_rank():
                setattr(net, name, None)

    def loss(self, x: torch.Tensor, goal: torch.Tensor) -> float | None:
        """Forward and backward; the loss, on the rank that has the last part."""
        ins, outs = {}, {}
        for number, (name, width) in enumerate(WIDTHS.items()):
            if number:
                x = self._move(outs.get(number - 1, torch.empty(BATCH, width)), number - 1, number)
            if (part := getattr(self.net, name)) is not None:
                ins[number] = x.detach().requires_grad_()
                outs[number] = part(ins[number])
        loss, grad = None, torch.empty_like(goal)
        if number in outs:
            last = outs[number].detach().requires_grad_()
            loss = (last - goal).square().mean()
            loss.backward()
            grad = last.grad
        for number, width in reversed(list(enumerate(WIDTHS.values()))):
            if number in outs:
                outs[number].backward(grad)
                grad = ins[number].grad
            else:
                grad = torch.empty(BATCH, width)
            if number:
                grad = self._move(grad, number, number - 1)
        return None if loss is None else loss.item()

    def _move(self, tensor: torch.Tensor, here: int, there: int) -> torch.Tensor:
        """From the rank of one part to that of another."""
        source, target = self.owners[here], self.owners[there]
        tensor = tensor.detach()
        if source != target and dist.get_rank() == source:
            dist.send(tensor, target)
        elif source != target and dist.get_rank() == target:
            dist.recv(tensor, source)
        return tensor


@functools.cache
def mesh_of(*sizes: int) -> DeviceMesh:
    """Once for each shape, because it makes process groups."""
    return init_device_mesh("cpu", sizes, mesh_dim_names=("outer", "inner")[-len(sizes) :])


def shard(net: Net, mesh: DeviceMesh) -> nn.Module:
    """FSDP2, in units of one dtype each."""
    for part in (net.tied, net.low):
        fully_shard(part, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def shard_fsdp1(net: Net) -> nn.Module:
    warnings.simplefilter("ignore", FutureWarning)  # it is deprecated, and so is much that its state_dict() calls
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.")
    wrap = functools.partial(FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=True)
    for name in ("mix", "tied", "low"):  # an optimizer must have all of a unit, or nothing
        setattr(net, name, wrap(getattr(net, name)))
    return wrap(net)


def split_layers(net: Net, mesh: DeviceMesh) -> Net:
    """Tensor parallel: one layer by rows, one by columns; the rest is on all ranks."""
    return parallelize_module(
        net, mesh, {"front.up": ColwiseParallel(output_layouts=Replicate()),
                    "mix": RowwiseParallel(input_layouts=Replicate())},
    )  # fmt: skip


def split_grouped_experts(net: Net, mesh: DeviceMesh) -> Net:
    weight = distribute_tensor(net.grouped.weight.detach(), mesh, [Shard(0)], src_data_rank=None)
    net.grouped.weight = nn.Parameter(weight)
    net.grouped.group = mesh.get_group()
    return net


def split_listed_experts(net: Net) -> Net:
    for number in range(NUM_EXPERTS):
        if number % dist.get_world_size() != dist.get_rank():
            del net.listed.experts[str(number)]
    net.listed.group = dist.group.WORLD
    return net


def divide(net: Net, kind: str, num_ranks: int) -> nn.Module | Pipeline:
    line = mesh_of(num_ranks)
    if "+" in kind or kind == "hsdp":
        grid = mesh_of(2, num_ranks // 2)
    match kind:
        case "ddp":
            return DistributedDataParallel(net)
        case "fsdp1":
            return shard_fsdp1(net)
        case "fsdp" | "meta":
            return shard(net, line)
        case "hsdp":
            return shard(net, grid)
        case "tp":
            return split_layers(net, line)
        case "fsdp+tp":
            return shard(split_layers(net, grid["inner"]), grid["outer"])
        case "ep":
            return split_grouped_experts(net, line)
        case "fsdp+ep":
            fully_shard(split_grouped_experts(net, grid["inner"]).grouped, mesh=grid["outer"])
            return shard(net, line)  # all that is not sharded yet
        case "experts":
            return split_listed_experts(net)
        case "pp":
            return Pipeline(net, [number * num_ranks // len(WIDTHS) for number in range(len(WIDTHS))])
        case "looped":
            return Pipeline(net, [number % num_ranks for number in range(len(WIDTHS))])
        case "pp+fsdp":
            column = grid.mesh[:, grid.get_local_rank("inner")].tolist()
            pipeline = Pipeline(net, [column[number * 2 // len(WIDTHS)] for number in range(len(WIDTHS))])
            for part in net.children():
                fully_shard(part, mesh=grid["inner"])
            return pipeline
    raise ValueError(kind)


# -- the run


class Run:
    """What is trained, fresh, and the TrainState over it."""

    def __init__(self, layout: str, seed: int, options: StateDictOptions | None = None) -> None:
        kind, _, num_ranks = layout.partition("@")
        torch.manual_seed(seed)
        with torch.device("meta" if kind == "meta" else "cpu"):
            net = Net()
        self.trained = net if kind == "whole" else divide(net, kind, int(num_ranks))
        self.model = net if isinstance(self.trained, Pipeline) else self.trained
        if kind == "meta":
            materialise(net)
        if kind != "whole":
            torch.manual_seed(seed + dist.get_rank())  # from here on every rank has its own random numbers
        self.optimizers = make_optimizers(self.model)
        self.schedulers = {
            name: torch.optim.lr_scheduler.StepLR(self.optimizers[name], 2)
            for name in self.optimizers
            if name != "master"
        }
        # The stages of a pipeline differ in the parameters of a group, and so do ranks with experts of their own.
        is_flat = isinstance(self.trained, Pipeline) or kind == "experts"
        options = options or StateDictOptions(flatten_optimizer_state_dict=is_flat)
        self.state = TrainState(
            model=self.model, optimizer=self.optimizers, scheduler=self.schedulers, options=options
        )  # fmt: skip

    def train(self, until: int) -> Steps:
        """Run the steps that are left."""
        losses, drawn = [], []
        for step in range(self.state.step, until):
            drawn.append(torch.rand(()).item())
            losses.append(self._loss(tensor_of(torch.float32, BATCH, 13, seed=step)))
            for optimizer in self.optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
            for scheduler in self.schedulers.values():
                scheduler.step()
        self.state.step = until
        return Steps(losses, drawn)

    def _loss(self, x: torch.Tensor) -> float | None:
        goal = x[:, :7].roll(1, 0)
        if isinstance(self.trained, Pipeline):
            return self.trained.loss(x, goal)
        loss = (self.trained(x) - goal).square().mean()
        loss.backward()
        return loss.item()

    def found(self) -> dict[str, Piece]:
        """Every bit of model, optimizers and scheduler that this rank has, under names that all layouts share."""
        state = self.state.state_dict()
        values = {fqn: leaf.value for fqn, leaf in leaves({"model": state["model"]}).items()}
        for name, osd in state["optimizer"].items():
            values |= {f"{name}.{key}": value for key, value in by_parameter(osd)}
        for name, scheduler in self.schedulers.items():
            kept, groups = scheduler.state_dict(), self.optimizers[name].param_groups
            assert kept.pop("base_lrs") == [group["initial_lr"] for group in groups]
            assert kept.pop("_last_lr") == [group["lr"] for group in groups]
            values |= {f"{name}.scheduler.{key}": value for key, value in kept.items()}
        return {key: piece for key, value in values.items() if (piece := piece_of(value)) is not None}


class Steps(NamedTuple):
    """What a rank saw: the loss of each step, and a random number. loss: None where it is another rank's."""

    losses: list[float | None]
    drawn: list[float]


def materialise(net: Net) -> None:
    """As the documentation of `to_empty` asks: what no checkpoint holds is the user's to make again."""
    net.to_empty(device="cpu")
    net.tied.tie()
    net.front.fill_table()


def make_optimizers(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Three, of which a stage of a pipeline may lack some, and some groups of the first."""
    adam: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    sgd, master = [], []
    for name, param in model.named_parameters():
        parts = name.split(".")
        if "low" in parts:
            master.append(param)
        elif "mix" in parts or "tied" in parts:
            sgd.append(param)
        else:
            adam[name.endswith("weight")].append(param)
    weights, others = adam[True], adam[False]
    groups = [{"params": weights, "lr": torch.tensor(0.02), "weight_decay": 0.1}, {"params": others, "lr": 0.01}]
    # A large eps, because Adam makes of a gradient of rounding errors alone a step as large as any.
    made = {
        "adam": [group for group in groups if group["params"]],
        "sgd": sgd,
        "master": master,
    }
    classes = {
        "adam": functools.partial(torch.optim.AdamW, eps=1e-3, weight_decay=0.0),
        "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        "master": functools.partial(MasterAdam, lr=0.01),
    }
    return {name: classes[name](params) for name, params in made.items() if params}


def by_parameter(osd: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """An optimizer's state in DCP's flat layout, whichever of its two layouts it is in."""
    flat = dict(osd)
    for group in flat.pop("param_groups", []):
        for name in group["params"]:
            flat |= {f"param_groups.{name}.{option}": v for option, v in group.items() if option != "params"}
    for name, leaf in leaves(flat).items():
        yield name, leaf.value


class Piece(NamedTuple):
    """What one rank has of a value. splits: (tensor dimension, whether it was cut last) of each mesh dimension that
    divides the tensor; place: this rank's number along each."""

    value: Any
    place: tuple[int, ...] = ()
    splits: tuple[tuple[int, bool], ...] = ()


def piece_of(value: Any) -> Piece | None:
    if isinstance(value, DTensor):
        placed = zip(value.device_mesh.get_coordinate(), value.placements, strict=True)
        cuts = [(place, p.dim, isinstance(p, _StridedShard)) for place, p in placed if not isinstance(p, Replicate)]
        return Piece(exact(value.to_local()), tuple(cut[0] for cut in cuts), tuple(cut[1:] for cut in cuts))
    if isinstance(value, ShardedTensor):  # FSDP1's
        for shard in value.local_shards():
            return Piece(exact(shard.tensor), (shard.metadata.shard_offsets[0],), ((0, False),))
        return None
    if isinstance(value, torch.Tensor):
        return Piece(exact(value))
    return Piece(repr(list(value) if isinstance(value, tuple) else value))  # DCP makes lists where it gathers


class Exact(NamedTuple):
    """A tensor in full that compares by its bits, and that pickles fast."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: bytes


def exact(tensor: torch.Tensor) -> Exact:
    return Exact(tensor.dtype, tuple(tensor.shape), raw_bytes(tensor))


def tensor_from(value: Exact) -> torch.Tensor:
    empty = torch.empty(value.shape, dtype=value.dtype)
    return torch.frombuffer(bytearray(value.data), dtype=value.dtype).reshape(value.shape) if value.data else empty


def together(ranks: list[dict[str, Piece]]) -> dict[str, Any]:
    """All ranks' pieces as whole values. What several ranks have must be the same. No distributed code has a part in
    it, so that a wrong idea of who has what cannot go unseen."""
    found: dict[str, dict[tuple[int, ...], Piece]] = {}
    for pieces in ranks:
        for key, piece in pieces.items():
            same = found.setdefault(key, {}).setdefault(piece.place, piece)
            assert same == piece, f"ranks differ in {key}"
    return {key: _join({p: one.value for p, one in places.items()}, next(iter(places.values())).splits)
            for key, places in found.items()}  # fmt: skip


def _join(parts: dict[tuple[int, ...], Any], splits: tuple[tuple[int, bool], ...]) -> Any:
    if not splits:
        (value,) = parts.values()
        return value
    first = next((number for number, (_, was_last) in enumerate(splits) if not was_last), 0)
    rows: dict[int, dict[tuple[int, ...], Any]] = {}
    for place, part in parts.items():
        rows.setdefault(place[first], {})[place[:first] + place[first + 1 :]] = part
    joined = [tensor_from(_join(rows[number], splits[:first] + splits[first + 1 :])) for number in sorted(rows)]
    return exact(torch.cat(joined, dim=splits[first][0]))


class Saved(NamedTuple):
    """One rank of a run that saved and went on."""

    state: dict[str, Piece]
    after: Steps
    end: dict[str, Piece]


class Resumed(NamedTuple):
    """One rank of a run that was restored and went on. warned: what was said of other ranks' values."""

    state: dict[str, Piece]
    after: Steps
    end: dict[str, Piece]
    warned: list[str]


def run_and_save(link: Link | None, layout: str, path: str, options: StateDictOptions | None = None) -> Saved:
    run = Run(layout, seed=0, options=options)
    run.train(SAVED_STEP + 1)
    with CheckpointManager(path, stager=OverlappingAsyncStager()) as manager:
        manager.save_async(SAVED_STEP, run.state)
        saved = run.found()
        after = run.train(NUM_STEPS)
    return Saved(saved, after, run.found())


def resume(link: Link | None, layout: str, path: str, options: StateDictOptions | None = None) -> Resumed:
    run = Run(layout, seed=50, options=options)
    with warnings.catch_warnings(record=True) as warned, CheckpointManager(path) as manager:
        warnings.simplefilter("always")
        manager.restore(SAVED_STEP, run.state, strict=True)
    assert run.state.step == SAVED_STEP + 1
    restored = run.found()
    after = run.train(NUM_STEPS)
    said = [text for one in warned if (text := str(one.message)).startswith(("'", "the checkpoint"))]  # not torch
    return Resumed(restored, after, run.found(), said)


def plain_state_of(run: Run) -> dict[str, Any]:
    """As one writes it without a TrainState: DTensors as the model gives them, optimizer state by parameter number."""
    optimizers = {name: prime_optimizer(optimizer) for name, optimizer in run.optimizers.items()}
    schedulers = {f"{name} scheduler": scheduler for name, scheduler in run.schedulers.items()}
    return {"model": run.model.state_dict(), **optimizers, **schedulers}


def run_and_save_plain(link: Link | None, layout: str, path: str) -> Saved:
    run = Run(layout, seed=0)
    run.train(SAVED_STEP + 1)
    with CheckpointManager(path) as manager:
        manager.save(SAVED_STEP, plain_state_of(run))
    return Saved(run.found(), run.train(NUM_STEPS), run.found())


def resume_plain(link: Link | None, layout: str, path: str) -> Resumed:
    run = Run(layout, seed=50)
    with CheckpointManager(path) as manager:
        manager.restore(SAVED_STEP, plain_state_of(run), strict=True)
    run.state.step = SAVED_STEP + 1
    return Resumed(run.found(), run.train(NUM_STEPS), run.found(), [])
