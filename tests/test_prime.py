"""prime_optimizer: state appears, and nothing else can be told from an optimizer that was not primed."""

import copy
import random
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from asyncckpt.prime import prime_optimizer
from tests.exact import bits

VARIANTS = [
    (Adadelta, [{}, {"weight_decay": 0.1}]),
    (Adafactor, [{}, {"weight_decay": 0.1}]),
    (Adagrad, [{}, {"lr_decay": 0.1}, {"initial_accumulator_value": 0.3}, {"weight_decay": 0.1}, {"fused": True}]),
    (Adam, [{}, {"amsgrad": True}, {"weight_decay": 0.1}, {"fused": True}, {"fused": True, "amsgrad": True}]),
    (Adam, [{"decoupled_weight_decay": True}, {"lr": torch.tensor(0.1)}, {"lr": torch.tensor(0.1), "fused": True}]),
    (AdamW, [{}, {"amsgrad": True, "weight_decay": 0.3}, {"fused": True}]),
    (Adamax, [{}, {"weight_decay": 0.1}]),
    (ASGD, [{}, {"t0": 1, "lambd": 0.1, "alpha": 0.5}, {"weight_decay": 0.1}]),
    (Muon, [{}, {"nesterov": False}, {"weight_decay": 0.0}]),
    (NAdam, [{}, {"weight_decay": 0.1}, {"decoupled_weight_decay": True, "weight_decay": 0.1}]),
    (RAdam, [{}, {"weight_decay": 0.1}, {"decoupled_weight_decay": True, "weight_decay": 0.1}]),
    (RMSprop, [{}, {"momentum": 0.9}, {"centered": True}, {"momentum": 0.9, "centered": True, "weight_decay": 0.1}]),
    (Rprop, [{}, {"etas": (0.4, 1.3)}]),
    (SGD, [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "weight_decay": 0.1}]),
    (SGD, [{"dampening": 0.5}, {"momentum": 0.9, "fused": True}, {"lr": torch.tensor(0.1), "momentum": 0.9}]),
]
IMPLEMENTATIONS = [{}, {"foreach": True}, {"foreach": False}, {"maximize": True}, {"differentiable": True}]


def accepted_by_torch(cls, variant, implementation):
    if cls is Muon:
        return not implementation
    if "fused" in variant:
        return not implementation.keys() - {"maximize"}
    if cls is Adafactor:
        return "differentiable" not in implementation
    return not (isinstance(variant.get("lr"), torch.Tensor) and implementation.get("foreach"))


def cases():
    for cls, variants in VARIANTS:
        for variant in variants:
            for implementation in IMPLEMENTATIONS:
                if not accepted_by_torch(cls, variant, implementation):
                    continue
                options = {**variant, **implementation}
                name = ",".join(f"{k}={v}" for k, v in options.items())
                yield pytest.param(cls, options, id=f"{cls.__name__}({name})")


@pytest.fixture
def one_rank():
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def build(cls, options):
    params = parameters(cls)
    if options.get("differentiable"):
        params = [p.clone() for p in params]  # torch steps only non-leaf tensors with a graph
        for p in params:
            p.retain_grad()
    return cls(params, **copy.deepcopy(options))


def parameters(cls, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    params = [torch.randn(4, 3, generator=generator).to(dtype), torch.randn(3, 4, generator=generator).to(dtype).t()]
    if cls is not Muon:
        params += [torch.randn(5, generator=generator).to(dtype), torch.tensor(0.7).to(dtype)]
        params[2][:2] = -0.0
    return [nn.Parameter(p) for p in params]


def set_gradients(params, step, every_parameter=False):
    """Gradients of mixed scale, with zeros of both signs; every third step leaves the first parameter without one."""
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 10.0 ** (step - i)
        grad = torch.where(torch.rand(p.shape, generator=generator) < 0.3, -0.0 * grad.abs(), grad)
        p.grad = torch.empty_like(p).copy_(grad)  # the strides of p, as autograd makes them
        if i == 0 and step % 3 == 0 and not every_parameter:
            p.grad = None


def run(optimizer, steps=5):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        # torch's fused SGD fails by itself when a parameter's first gradient comes later than the others'
        set_gradients(params, step, every_parameter=isinstance(optimizer, SGD) and optimizer.defaults["fused"])
        optimizer.step()
    return bits([params, optimizer.state_dict()])


@pytest.mark.parametrize(("cls", "options"), list(cases()))
def test_training_after_priming_equals_training_without_it(cls, options):
    """Five steps, every class and option: the same parameters and the same optimizer state, bit for bit."""
    assert run(prime_optimizer(build(cls, options))) == run(build(cls, options))


@pytest.mark.parametrize(("cls", "options"), list(cases()))
def test_priming_makes_the_keys_shapes_and_types_of_the_first_step(cls, options):
    """What a step would add to the state is there before it, so a checkpoint can be loaded in place."""

    def structure(optimizer):
        return {
            i: {
                k: (v.shape, v.dtype, v.stride(), v.device) if isinstance(v, torch.Tensor) else type(v)
                for k, v in s.items()
            }
            for i, s in optimizer.state_dict()["state"].items()
        }

    stepped = build(cls, options)
    set_gradients([p for g in stepped.param_groups for p in g["params"]], 1)
    stepped.step()
    assert structure(prime_optimizer(build(cls, options))) == structure(stepped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("cls", [AdamW, NAdam, ASGD, SGD, Adafactor])
def test_other_precisions_train_the_same_after_priming(cls, dtype):
    """bf16, fp16 and fp64 parameters, where some classes keep float32 scalars beside them."""
    options = {"momentum": 0.9} if cls is SGD else {}
    plain = run(cls(parameters(cls, dtype), **options))
    assert run(prime_optimizer(cls(parameters(cls, dtype), **options))) == plain


@pytest.mark.parametrize("cls", [Adadelta, Adagrad, Adam, AdamW, Adamax, ASGD, NAdam, RAdam, RMSprop, Rprop, SGD])
@pytest.mark.parametrize("foreach", [True, False])
def test_complex_parameters_train_the_same_after_priming(cls, foreach):
    """Complex parameters, compared as numbers: under SGD the sign of a zero real part may differ."""

    def train(prime):
        generator = torch.Generator().manual_seed(1)
        params = [nn.Parameter(torch.randn(4, 2, dtype=torch.complex64, generator=generator))]
        optimizer = cls(params, foreach=foreach, **({"momentum": 0.9} if cls is SGD else {}))
        if prime:
            prime_optimizer(optimizer)
        for _ in range(5):
            params[0].grad = torch.randn(4, 2, dtype=torch.complex64, generator=generator)
            optimizer.step()
        return [*params, *optimizer.state[params[0]].values()]

    assert all(torch.equal(a, b) for a, b in zip(train(prime=True), train(prime=False), strict=True))


def test_sharded_parameters_get_state_with_the_same_placements(one_rank):
    """FSDP2: the state of a DTensor is a DTensor on the same mesh, and training is the same."""

    def train(prime):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
        fully_shard(model, mesh=one_rank)
        optimizer = AdamW(model.parameters(), amsgrad=True)
        if prime:
            prime_optimizer(optimizer)
            for p in model.parameters():
                moments = [v for k, v in optimizer.state[p].items() if k != "step"]
                assert len(moments) == 3
                assert all(isinstance(m, DTensor) and m.placements == p.placements for m in moments)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
        return bits([p.to_local() for p in model.parameters()])

    assert train(prime=True) == train(prime=False)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"capturable": True}, {"fused": True}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("cls", [Adadelta, Adam, AdamW, Adamax, ASGD, NAdam, RAdam, RMSprop, Rprop, SGD])
def test_training_on_a_gpu_is_the_same_after_priming(cls, options):
    """Also with `capturable`, whose counters are on the GPU, and with fused kernels."""
    options = {**options, **({"momentum": 0.9} if cls is SGD else {})}
    try:
        optimizers = [cls([nn.Parameter(p.detach().cuda()) for p in parameters(cls)], **options) for _ in range(2)]
    except TypeError:
        pytest.skip(f"{cls.__name__} has no such option")
    assert run(prime_optimizer(optimizers[0])) == run(optimizers[1])


def test_sparse_adam_trains_the_same_after_priming():
    """Its gradients are sparse, and its step counter is a plain int."""

    def train(prime):
        torch.manual_seed(0)
        embedding = nn.Embedding(6, 2, sparse=True)
        optimizer = SparseAdam(embedding.parameters())
        if prime:
            prime_optimizer(optimizer)
        for index in (0, 3, 3, 5):
            optimizer.zero_grad()
            embedding(torch.tensor([index, 0])).sum().backward()
            optimizer.step()
        return bits([list(embedding.parameters()), optimizer.state_dict()])

    assert train(prime=True) == train(prime=False)


def test_priming_changes_nothing_but_the_state():
    """Parameters, gradients, options, random streams and every kind of step hook are as before."""
    params = parameters(AdamW)
    params[0].grad = torch.ones_like(params[0])
    gradient = params[0].grad
    optimizer = AdamW([{"params": params[:2], "lr": torch.tensor(0.5)}, {"params": params[2:], "lr": 0.1}])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    calls = Counter()
    optimizer.register_step_pre_hook(lambda *_: calls.update(["pre"]))
    optimizer.register_step_post_hook(lambda *_: calls.update(["post"]))
    common = [
        register_optimizer_step_pre_hook(lambda *_: calls.update(["common pre"])),
        register_optimizer_step_post_hook(lambda *_: calls.update(["common post"])),
    ]
    before = bits([params, optimizer.param_groups, scheduler.state_dict(), torch.get_rng_state()])
    attributes = {k: v for k, v in vars(optimizer).items() if k != "state"}
    versions = [p._version for p in params]
    streams = random.getstate(), np.random.get_state()[1].tobytes()

    assert prime_optimizer(optimizer) is optimizer

    assert bits([params, optimizer.param_groups, scheduler.state_dict(), torch.get_rng_state()]) == before
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == streams
    assert [p._version for p in params] == versions
    assert {k: v for k, v in vars(optimizer).items() if k != "state"} == attributes
    assert params[0].grad is gradient
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert all(p.grad is None for p in params[1:])
    assert not calls
    optimizer.step()
    assert calls == Counter(["pre", "post", "common pre", "common post"])
    for handle in common:
        handle.remove()


def test_common_hooks_stay_quiet_when_a_step_calls_the_step_of_its_parent():
    """`super().step()` runs the hooks that are common to all optimizers; during priming it must not."""

    class Clipped(AdamW):
        def step(self, closure=None):
            nn.utils.clip_grad_norm_([p for g in self.param_groups for p in g["params"]], 1.0)
            return super().step(closure)

    AdamW(parameters(AdamW))  # wraps AdamW.step, as any earlier use in the process does
    calls = []
    handle = register_optimizer_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer = prime_optimizer(Clipped(parameters(AdamW)))
    assert not calls
    assert optimizer.state_dict()["state"][0]["step"] == 0
    optimizer.step()
    assert calls
    handle.remove()


def test_state_that_exists_is_left_alone_and_missing_state_is_added():
    """A parameter group added later gets its state; the counters of the others go on."""
    params = parameters(Adam)
    optimizer = Adam(params[:2])
    set_gradients(params, 1)
    optimizer.step()
    old = {p: dict(optimizer.state[p]) for p in params[:2]}
    optimizer.add_param_group({"params": params[2:], "amsgrad": True})

    prime_optimizer(optimizer)

    assert all(optimizer.state[p][k] is v for p in params[:2] for k, v in old[p].items())
    assert all(optimizer.state[p]["step"] == 0 and "max_exp_avg_sq" in optimizer.state[p] for p in params[2:])
    assert all("max_exp_avg_sq" not in optimizer.state[p] for p in params[:2])
    state = {p: dict(s) for p, s in optimizer.state.items()}
    prime_optimizer(optimizer)
    assert all(optimizer.state[p][k] is v for p, s in state.items() for k, v in s.items())


def test_frozen_parameters_get_no_state():
    """As in training: a frozen backbone must not cost optimizer memory."""
    params = parameters(Adam)
    params[1].requires_grad_(False)
    optimizer = prime_optimizer(Adam(params))
    assert set(optimizer.state) == {params[0], params[2], params[3]}


def test_a_stateless_optimizer_stays_without_state():
    """SGD without momentum; not even empty entries appear."""
    optimizer = prime_optimizer(SGD(parameters(SGD)))
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, momentum=0.9, dampening=0.1),
        lambda p: SGD([{"params": p[:1]}, {"params": p[1:], "momentum": 0.9, "dampening": 0.1}]),
        lambda p: LBFGS(p),
    ],
    ids=["dampening", "dampening in one group", "LBFGS"],
)
def test_what_has_no_exact_initial_state_is_refused_with_nothing_changed(make):
    """A zero buffer would change the first update; refusing beats training that quietly differs."""
    optimizer = make(parameters(SGD))
    with pytest.raises(ValueError, match="cannot be primed"):
        prime_optimizer(optimizer)
    assert not optimizer.state


def test_an_lbfgs_with_history_is_primed_already():
    """LBFGS keeps one state, under its first parameter."""
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    optimizer = LBFGS(params, max_iter=2)

    def loss():
        optimizer.zero_grad()
        value = sum((p**2).sum() for p in params)
        value.backward()
        return value

    optimizer.step(loss)
    before = bits(optimizer.state_dict())
    prime_optimizer(optimizer)
    assert bits(optimizer.state_dict()) == before


class Lion(Optimizer):
    """A third-party class in the usual form; `form` is how it fills its state."""

    def __init__(self, params, lr=0.1, form="item"):
        super().__init__(params, {"lr": lr})
        self.form = form

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                if self.form == "whole" and p not in self.state:
                    self.state[p] = {"step": 0, "m": torch.zeros_like(p), "slow": p.clone()}
                state = self.state[p]
                if self.form == "item" and not state:
                    state["step"], state["m"], state["slow"] = 0, torch.zeros_like(p), p.clone()
                if self.form == "update" and not state:
                    state.update(step=0, m=torch.zeros_like(p), slow=p.clone())
                if self.form == "setdefault":
                    state.setdefault("step", 0)
                    state.setdefault("m", torch.zeros_like(p))
                    state.setdefault("slow", p.clone())
                state["step"] += 1
                state["m"].mul_(0.9).add_(p.grad, alpha=0.1)
                p.add_(state["m"].sign(), alpha=-group["lr"]).lerp_(state["slow"], 0.01)


@pytest.mark.parametrize("form", ["item", "whole", "update", "setdefault"])
def test_third_party_classes_train_the_same_after_priming(form):
    """Including state that starts as a copy of the parameter, and options that `step` itself writes."""
    plain = run(Lion(parameters(Lion), form=form))
    optimizer = prime_optimizer(Lion(parameters(Lion), form=form))
    assert "k" not in optimizer.param_groups[0]
    assert run(optimizer) == plain


def test_third_party_state_that_grows_after_it_is_set_is_refused():
    """Its first value alone would look like finished state, and the class would never fill it."""

    class Grows(Lion):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["factors"] = []
                    self.state[p]["factors"].append(p.clone())

    optimizer = Grows(parameters(Lion))
    with pytest.raises(ValueError, match="grows"):
        prime_optimizer(optimizer)
    assert not optimizer.state


def test_an_optimizer_around_another_one_is_refused():
    """A trial step of the wrapper would step the real optimizer inside it."""

    class Wrapper(Lion):
        def __init__(self, inner):
            super().__init__(inner.param_groups)
            self.inner = inner

        def step(self, closure=None):
            self.inner.step()

    params = parameters(Adam)
    set_gradients(params, 1)
    before = bits(params)
    with pytest.raises(ValueError, match="'inner'"):
        prime_optimizer(Wrapper(Adam(params)))
    assert bits(params) == before


def test_an_optimizer_whose_step_needs_a_closure_is_refused_by_its_own_words():
    """The cause stays readable."""

    class NeedsClosure(Lion):
        def step(self, closure):
            closure()

    with pytest.raises(ValueError, match="closure"):
        prime_optimizer(NeedsClosure(parameters(Lion)))
