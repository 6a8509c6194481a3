"""The model that parallel_runs.py trains, with a part of each kind that some parallelism treats in its own way, and its
optimizers. parallel_layouts.py divides it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

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
