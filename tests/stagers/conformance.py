"""What every stager must do. A test class per stager derives from `StagerTests` and says how to make one."""

from __future__ import annotations

import copy
import gc
import threading
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.staging as dcp_staging
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from stagers import AsyncStager, StagingError
from tests.states import DTYPES, assert_same, every_kind, tensor_of

Pair = namedtuple("Pair", ["weight", "name"])


@dataclass
class Holder:
    """An object with a tensor inside."""

    tensor: Tensor


class Named(Tensor):
    """A tensor subclass that adds nothing to its data."""


def staged(stager: Any, state: dict[str, Any]) -> dict[str, Any]:
    """What `stage` gives, complete."""
    result = stager.stage(state)
    return result.result() if isinstance(result, Future) else result


def model_and_optimizer(**options: Any) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Parameters above and below the size from which copies overlap, and BatchNorm statistics; one step is done."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(200, 200), torch.nn.BatchNorm1d(200), torch.nn.Linear(200, 200))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
    train(model, optimizer)
    return model, optimizer


def train(model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    """One step of each optimizer."""
    backward(model)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def backward(model: torch.nn.Module) -> None:
    model(torch.randn(4, 200)).square().mean().backward()


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def plain(state: Any) -> Any:
    """A deep copy with the types that a stager gives."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, list):
        return [plain(value) for value in state]
    return state.detach().clone() if isinstance(state, Tensor) else copy.deepcopy(state)


class StagerTests:
    """Derive, and return an open stager from `make`."""

    def make(self, max_bytes: int | None = None) -> Any:
        raise NotImplementedError

    @pytest.fixture
    def stager(self) -> Iterator[Any]:
        with self.make() as stager:
            yield stager

    @pytest.fixture
    def copied(self, stager: Any) -> Callable[[Any], Any]:
        """`copied(value)`: the staged copy of a value under the key "x"."""

        def copied(value: Any) -> Any:
            snapshot = stager.snapshot({"x": value})
            snapshot.wait()
            return snapshot.state_dict["x"]

        return copied

    # -- protocols

    def test_it_is_a_stager_for_us_and_for_dcp(self, stager):
        """Both runtime protocols accept it."""
        assert isinstance(stager, AsyncStager)
        assert isinstance(stager, dcp_staging.AsyncStager)
        assert stager.should_synchronize_after_execute is False

    def test_repr_tells_the_figures_of_the_pool(self, stager):
        """Buffers idle and lent, and their bytes."""
        snapshot = stager.snapshot({"x": torch.zeros(1 << 18)})
        assert "0 idle, 1 lent, 1.0 MiB" in repr(stager)
        snapshot.release()
        assert "1 idle, 0 lent, 1.0 MiB" in repr(stager)

    # -- what a copy is

    def test_a_copy_is_equal_bit_for_bit_and_owns_its_memory(self, stager):
        """Every dtype, layout and nesting; `stage` and `snapshot` agree."""
        state = every_kind(3)
        snapshot = stager.snapshot(state)
        snapshot.wait()
        assert_same(plain(state), snapshot.state_dict)
        assert_same(plain(state), staged(stager, state))
        sources = {t.untyped_storage().data_ptr() for t in _tensors(state)}
        copies = {t.untyped_storage().data_ptr() for t in _tensors(snapshot.state_dict)}
        assert sources & copies <= {0}  # the address of all empty tensors

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(), (0,), (3, 0), (7,), (2, 3)], ids=str)
    def test_every_dtype_and_shape_is_copied(self, copied, dtype, shape):
        """0-d and empty tensors too."""
        source = tensor_of(dtype, *shape)
        assert_same(source, copied(source))

    def test_parameters_become_tensors_without_grad(self, copied):
        """Nothing staged takes part in autograd."""
        for value in (torch.nn.Parameter(torch.ones(3)), torch.ones(3, requires_grad=True) * 2):
            copy = copied(value)
            assert type(copy) is Tensor
            assert not copy.requires_grad
            assert copy.grad_fn is None

    def test_num_bytes_counts_each_distinct_tensor_once(self, stager):
        """Padding and tied tensors do not count."""
        weight = torch.ones(10)
        assert stager.snapshot({"a": weight, "b": weight, "c": torch.ones(3, dtype=torch.int8)}).num_bytes == 43

    def test_a_state_without_tensors_is_staged(self, stager):
        """Also an empty one."""
        for state in ({}, {"step": 3, "nested": {}}):
            snapshot = stager.snapshot(state)
            snapshot.wait()
            assert snapshot.state_dict == staged(stager, state) == state
            assert snapshot.num_bytes == 0
            snapshot.release()

    def test_a_copy_made_in_inference_mode_can_be_made_again_outside(self, stager):
        """The reused tensors are not inference tensors."""
        with torch.inference_mode():
            stager.snapshot({"x": torch.ones(4)}).release()
        snapshot = stager.snapshot({"x": torch.zeros(4)})
        assert snapshot.state_dict["x"].tolist() == [0] * 4

    # -- memory layout

    def test_large_tensors_start_on_a_page_and_small_ones_on_a_cache_line(self, stager):
        """Writers hand the memory of large ones to O_DIRECT."""
        sizes = [1, 1 << 18, 5, (1 << 18) + 1, 1 << 18, 3]
        snapshot = stager.snapshot({str(i): torch.ones(size) for i, size in enumerate(sizes)})
        for size, tensor in zip(sizes, snapshot.state_dict.values(), strict=True):
            assert tensor.data_ptr() % (4096 if size >= 1 << 18 else 64) == 0

    def test_each_copy_has_a_storage_of_just_its_bytes(self, copied):
        """Stock DCP clones tensors in larger storages, and torch.save writes the whole of them."""
        base = torch.ones(1000)
        assert copied(base[10:20]).untyped_storage().nbytes() == 40

    def test_strides_without_gaps_are_kept(self, copied):
        """Transposed and channels_last tensors are copied as memory."""
        for source in (
            torch.arange(6.0).reshape(2, 3).t(),
            torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
            torch.rand(1, 5)[:, :5].as_strided((1, 5), (77, 1)),
        ):
            copy = copied(source)
            assert copy.stride() == source.stride()
            assert torch.equal(copy, source)

    def test_strides_with_gaps_or_overlaps_become_contiguous(self, copied):
        """The copy holds each element once."""
        for source in (
            torch.ones(3, 1).expand(3, 4),
            torch.rand(4, 6)[:, ::2],
            torch.rand(5).as_strided((3, 3), (1, 1)),
        ):
            copy = copied(source)
            assert copy.is_contiguous()
            assert torch.equal(copy, source)

    def test_conjugate_and_negative_views_are_resolved(self, copied):
        """The copy holds the values, not a note to negate them; a conjugate is not tied to its base."""
        z = torch.tensor([1 + 2j, 3 - 4j])
        copy = copied({"z": z, "conj": z.conj(), "neg": z.conj().imag, "imag": z.imag})
        assert not copy["conj"].is_conj()
        assert not copy["neg"].is_neg()
        assert copy["z"].tolist() == [1 + 2j, 3 - 4j]
        assert copy["conj"].tolist() == [1 - 2j, 3 + 4j]
        assert copy["neg"].tolist() == [-2.0, 4.0]
        assert copy["imag"].tolist() == [2.0, -4.0]

    def test_tied_tensors_are_one_tensor(self, stager):
        """Same memory seen the same way; an overlapping view is a copy of its own."""
        weight = torch.rand(4, 4)
        state = {
            "a": weight,
            "b": torch.nn.Parameter(weight),
            "c": weight.view(4, 4),
            "row": weight[0],
            "t": weight.t(),
        }
        copy = staged(stager, state)
        assert copy["a"] is copy["b"] is copy["c"]
        assert len({copy[key].data_ptr() for key in ("a", "row", "t")}) == 3
        assert torch.equal(copy["t"], weight.t())

    # -- nesting and objects

    def test_containers_keep_order_keys_and_kind(self, copied):
        """Mappings become dicts; named tuples stay what they are."""
        weight = torch.ones(2)
        source = OrderedDict(
            [
                ("b", weight),
                (0, MappingProxyType({"t": weight})),
                ("a", [1, weight]),
                (("k",), (weight, 2)),
                ("p", Pair(weight, "n")),
            ]
        )
        copy = copied(source)
        assert type(copy) is dict
        assert list(copy) == ["b", 0, "a", ("k",), "p"]
        assert type(copy[0]) is dict
        assert type(copy["a"]) is list
        assert type(copy[("k",)]) is tuple
        assert type(copy["p"]) is Pair
        assert copy["p"].name == "n"
        assert all(t is copy["b"] for t in (copy[0]["t"], copy["a"][1], copy[("k",)][0], copy["p"].weight))

    def test_objects_are_deep_copies_that_share_what_they_shared(self, copied):
        """Also lists and tuples of plain values, sizes, and objects with tensors in them."""
        shared = [1, [2]]
        source = {
            "a": shared,
            "b": {"c": shared},
            "s": torch.Size([2]),
            "set": {1},
            "h": Holder(torch.ones(2)),
            "e": [],
        }
        copy = copied(source)
        shared[1].append(3)
        source["h"].tensor.zero_()
        source["e"].append(1)
        assert copy["a"] == [1, [2]]
        assert copy["a"] is copy["b"]["c"]
        assert copy["s"] == torch.Size([2])
        assert copy["set"] == {1}
        assert copy["h"].tensor.tolist() == [1, 1]
        assert copy["e"] == []

    def test_editing_the_copy_s_containers_does_not_reach_the_next_one(self, stager):
        """Containers are new each time, though tensors are reused."""
        state = {"x": {"y": torch.ones(2)}, "l": [1]}
        first = stager.snapshot(state)
        first.state_dict["x"]["z"] = first.state_dict["l"].append(2)
        first.release()
        assert_same(plain(state), stager.snapshot(state).state_dict)

    def test_wrapper_subclasses_wrap_the_copies_of_their_parts(self, stager):
        """By torch's flatten protocol; a tied wrapper is one object too."""
        source = TwoTensor(torch.ones(2, 3), torch.zeros(2, 3)).requires_grad_()
        copy = staged(stager, {"x": source, "y": source})
        assert type(copy["x"]) is TwoTensor
        assert copy["x"] is copy["y"]
        assert not copy["x"].requires_grad
        assert torch.equal(copy["x"].a, torch.ones(2, 3))
        assert copy["x"].a.data_ptr() != source.a.data_ptr()

    def test_a_subclass_without_data_of_its_own_becomes_a_tensor(self, copied):
        """The values are what counts."""
        copy = copied(torch.arange(3).as_subclass(Named))
        assert type(copy) is Tensor
        assert copy.tolist() == [0, 1, 2]

    # -- what cannot be staged

    @pytest.mark.parametrize(
        ("make_value", "reason"),
        [
            (lambda: torch.eye(2).to_sparse(), "sparse_coo"),
            (lambda: torch.eye(2).to_sparse_csr(), "sparse_csr"),
            (lambda: torch.empty(2, device="meta"), "meta"),
            (lambda: torch.eye(2).to_mkldnn(), "mkldnn"),
            (lambda: torch.nn.parameter.UninitializedParameter(), "UninitializedParameter"),
            (lambda: threading.Lock(), "cannot be deep-copied"),
        ],
        ids=["coo", "csr", "meta", "mkldnn", "lazy", "lock"],
    )  # fmt: skip
    @pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
    def test_what_cannot_be_staged_is_named_by_its_key(self, stager, make_value, reason):
        """Also when a state of the same keys went well before; afterwards the stager works as before."""
        stager.snapshot({"a": {"b": [torch.eye(2), {"c": torch.eye(2)}]}}).release()
        with pytest.raises(StagingError, match=rf"'a\.b\.1\.c'.*{reason}"):
            stager.snapshot({"a": {"b": [torch.eye(2), {"c": make_value()}]}})
        assert "0 lent" in repr(stager)
        assert staged(stager, {"x": torch.ones(1)})["x"].item() == 1

    def test_a_container_in_itself_is_an_error_that_names_it(self, stager):
        """Not endless recursion."""
        loop: dict[str, Any] = {"x": torch.ones(1)}
        loop["self"] = [loop]
        with pytest.raises(StagingError, match=r"'outer\.self\.0\.self.*contains itself"):
            stager.snapshot({"outer": loop})

    # -- later changes do not reach the copy

    @pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"amsgrad": True}], ids=str)
    def test_training_on_does_not_reach_the_copy(self, stager, options):
        """Forward, BatchNorm statistics, backward, step, and again."""
        model, optimizer = model_and_optimizer(**options)
        state = state_of(model, optimizer)
        before = plain(state)
        snapshot = stager.snapshot(state)
        for _ in range(2):
            train(model, optimizer)
        snapshot.wait()
        assert_same(before, snapshot.state_dict)

    def test_what_is_edited_right_after_the_call_does_not_reach_the_copy(self, stager):
        """AdamW's step counts, plain tensors, an EMA copy and a tensor lr, while backward runs in another thread."""
        model, optimizer = model_and_optimizer()
        backward_thread = threading.Thread(target=backward, args=(model,))
        state = {**state_of(model, optimizer), "ema": copy.deepcopy(model.state_dict()), "plain": torch.ones(1 << 18)}
        state["optimizer"]["param_groups"][0]["lr"] = torch.tensor(0.5)
        before = plain(state)
        backward_thread.start()
        snapshot = stager.snapshot(state)
        state["plain"].zero_()
        state["optimizer"]["param_groups"][0]["lr"].zero_()
        for value in optimizer.state.values():
            value["step"] += 100
        for value in state["ema"].values():
            value.mul_(0)
        backward_thread.join()
        snapshot.wait()
        statistics = {"model.1.running_mean", "model.1.running_var", "model.1.num_batches_tracked"}
        for key in statistics:  # backward's forward changes them at any time
            del before["model"][key[6:]], snapshot.state_dict["model"][key[6:]]
        assert_same(before, snapshot.state_dict)

    def test_batch_norm_s_forward_right_after_does_not_reach_the_copy(self, stager):
        """Statistics change in forward, so they cannot wait for the step; native batch_norm does not count changes."""
        norm = torch.nn.BatchNorm1d(1 << 15)
        optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
        optimizer.step()
        before = plain(norm.state_dict())
        snapshot = stager.snapshot(norm.state_dict())
        norm(torch.randn(4, 1 << 15))
        snapshot.wait()
        assert_same(before, snapshot.state_dict)

    def test_gradients_that_go_on_accumulating_do_not_reach_the_copy(self, stager):
        """They are no optimizer state."""
        model, optimizer = model_and_optimizer()
        backward(model)
        state = {"grads": {name: p.grad for name, p in model.named_parameters()}, **state_of(model, optimizer)}
        before = plain(state)
        snapshot = stager.snapshot(state)
        backward(model)
        snapshot.wait()
        assert_same(before["grads"], snapshot.state_dict["grads"])

    def test_the_step_of_any_of_two_optimizers_does_not_reach_the_copy(self, stager):
        """Each steps its own model."""
        first, second = model_and_optimizer(), model_and_optimizer()
        state = {"first": state_of(*first), "second": state_of(*second)}
        before = plain(state)
        snapshot = stager.snapshot(state)
        train(*second)
        train(*first)
        snapshot.wait()
        assert_same(before, snapshot.state_dict)

    # -- buffers

    def test_released_buffers_are_used_again_and_steady_state_allocates_nothing(self, stager):
        """The same addresses, the same tensor objects."""
        model, optimizer = model_and_optimizer()
        stager.prewarm(state_of(model, optimizer))
        tensors = []
        for _ in range(3):
            train(model, optimizer)
            snapshot = stager.snapshot(state_of(model, optimizer))
            tensors.append([id(t) for t in _tensors(snapshot.state_dict)])
            snapshot.release()
            assert "1 idle, 0 lent" in repr(stager)
        assert tensors[0] == tensors[1] == tensors[2]

    def test_prewarm_makes_the_buffers_of_several_snapshots(self, stager):
        """And none of them is allocated again."""
        state = {"x": torch.ones(1000)}
        stager.prewarm(state, num_snapshots=2)
        assert "2 idle, 0 lent" in repr(stager)
        snapshots = [stager.snapshot(state), stager.snapshot(state)]
        assert "0 idle, 2 lent" in repr(stager)
        assert snapshots[0].state_dict["x"].data_ptr() != snapshots[1].state_dict["x"].data_ptr()

    def test_a_snapshot_s_buffer_is_not_lent_before_it_is_released(self, stager):
        """However many snapshots there are."""
        snapshots = [stager.snapshot({"x": torch.full((4,), i)}) for i in range(3)]
        assert [s.state_dict["x"][0].item() for s in snapshots] == [0, 1, 2]

    def test_releasing_twice_lends_the_buffer_once(self, stager):
        """Also from several threads."""
        state = {"x": torch.ones(4)}
        snapshot = stager.snapshot(state)
        threads = [threading.Thread(target=snapshot.release) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        snapshot.release()
        assert "1 idle, 0 lent" in repr(stager)
        pair = stager.snapshot(state), stager.snapshot(state)
        assert pair[0].state_dict["x"].data_ptr() != pair[1].state_dict["x"].data_ptr()

    def test_a_lost_snapshot_takes_its_buffer_along(self, stager):
        """Its tensors may be in use, so the pool does not lend their memory again."""
        state = {"x": torch.ones(4)}
        kept = stager.snapshot(state).state_dict["x"]
        gc.collect()
        assert "0 idle, 0 lent" in repr(stager)
        assert stager.snapshot({"x": torch.zeros(4)}).state_dict["x"].data_ptr() != kept.data_ptr()
        assert kept.tolist() == [1] * 4

    def test_staged_buffers_come_back_when_the_last_tensor_is_garbage(self, stager):
        """A view of one, or its storage, keeps them."""
        state = {"x": torch.ones(1 << 16), "y": torch.zeros(3)}
        copy = staged(stager, state)
        address, last = copy["x"].data_ptr(), copy["y"][1:].untyped_storage()
        del copy
        gc.collect()
        assert "0 idle, 1 lent" in repr(stager)
        del last
        gc.collect()
        assert "1 idle, 0 lent" in repr(stager)
        assert staged(stager, state)["x"].data_ptr() == address

    def test_the_cap_refuses_what_would_pass_it_and_says_the_sizes(self):
        """Nothing is copied; once a buffer is free there is room."""
        with self.make(max_bytes=3 << 20) as stager:
            state = {"x": torch.ones(1 << 19)}
            snapshot = stager.snapshot(state)
            with pytest.raises(StagingError, match=r"needs 2\.0 MiB, and 2\.0 MiB of at most 3\.0 MiB are in use by 1"):
                stager.snapshot(state)
            snapshot.release()
            stager.snapshot(state).release()
            stager.snapshot({"x": torch.ones(1 << 18)}).release()

    def test_a_state_that_grew_replaces_the_buffers_it_outgrew(self):
        """Within the cap, though both together would pass it."""
        with self.make(max_bytes=3 << 20) as stager:
            for size in (1 << 18, 1 << 19, 3 << 18):
                stager.snapshot({"x": torch.ones(size)}).release()
            assert "1 idle, 0 lent, 3.0 MiB of 3.0 MiB" in repr(stager)

    def test_a_closed_stager_refuses_and_frees_what_comes_back(self):
        """`close` is idempotent; snapshots stay valid until released."""
        stager = self.make()
        snapshot = stager.snapshot({"x": torch.ones(3)})
        stager.close()
        stager.close()
        assert snapshot.state_dict["x"].tolist() == [1] * 3
        snapshot.release()
        assert "0 idle, 0 lent" in repr(stager)
        with pytest.raises(StagingError, match="closed"):
            stager.snapshot({"x": torch.ones(3)})

    # -- structure

    def test_structure_stays_while_only_values_change(self, stager):
        """New tensors of the same form, other numbers, a longer list of numbers."""
        first = {"a": torch.ones(2, 3), "n": 1, "l": [1.0], "z": None, "d": {}}
        second = {"a": torch.zeros(2, 3), "n": 2.5, "l": [1.0, 2.0, (3,)], "z": "s", "d": {}}
        assert stager.snapshot(first).structure == stager.snapshot(second).structure

    @pytest.mark.parametrize(
        "other",
        [
            {"b": torch.ones(2, 3), "n": torch.ones(1)},
            {"a": torch.ones(3, 2), "n": torch.ones(1)},
            {"a": torch.ones(3, 2).t(), "n": torch.ones(1)},
            {"a": torch.ones(2, 3).double(), "n": torch.ones(1)},
            {"a": torch.ones(2, 3), "n": 1.0},
            {"n": torch.ones(1), "a": torch.ones(2, 3)},
            {"a": torch.ones(2, 3), "n": [torch.ones(1)]},
            {"a": torch.ones(2, 3), "n": torch.ones(1), "m": 1},
            {"a": torch.ones(2, 3), "n": TwoTensor(torch.ones(1), torch.ones(1))},
        ],
        ids=["key", "shape", "stride", "dtype", "kind", "order", "nesting", "more", "subclass"],
    )
    def test_structure_changes_with(self, stager, other):
        """And the copy is right again at once."""
        first = stager.snapshot({"a": torch.ones(2, 3), "n": torch.ones(1)})
        second = stager.snapshot(other)
        assert first.structure != second.structure
        assert list(second.state_dict) == list(other)

    def test_structure_changes_when_tensors_are_tied_or_untied(self, stager):
        """As they are then one tensor, or two."""
        weight = torch.ones(3)
        tied = stager.snapshot({"a": weight, "b": weight})
        untied = stager.snapshot({"a": weight, "b": weight.clone()})
        assert tied.structure != untied.structure
        assert untied.state_dict["a"] is not untied.state_dict["b"]


def _tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return [tensor for value in values for tensor in _tensors(value)]
