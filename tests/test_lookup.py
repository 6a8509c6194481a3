"""One value of a step, looked up: whatever part of whatever tensor in whatever shards, it is what torch's own index of
the whole tensor gives; and what that costs."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType

from asyncckpt import (
    CheckpointError,
    CheckpointManager,
    DamagedStepError,
    KeyNotFoundError,
    PerRank,
    ShardWriter,
    UnsafeObjectError,
)
from asyncckpt.chunks import Key, Keys
from asyncckpt.commit import commit_step, make_manifest
from asyncckpt.lookup import Saved, look, nest, read_object, read_tensor, read_value, saved_in
from asyncckpt.manifest import Head
from asyncckpt.restore import OpenStep, open_step
from asyncckpt.shard import write_items
from asyncckpt.slices import boxes_between, part_of
from asyncckpt.steps import attempt_name, new_token
from asyncckpt.storage import open_storage
from asyncckpt.testing import RecordingStorage
from tests.states import assert_same, every_kind, raw_bytes, tensor_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


class Counting(RecordingStorage):
    """Keeps the ranges asked for."""

    def __init__(self, url: str, options: dict[str, Any] | None = None) -> None:
        super().__init__(open_storage(url, options))
        self.ranges: list[tuple[str, int, int]] = []

    def read_into(
        self, path: str, ranges: Sequence[tuple[int, memoryview]], filled: Callable[[int], None] | None = None
    ) -> None:
        self.ranges += ((path, start, len(view)) for start, view in ranges)
        super().read_into(path, ranges, filled)

    def take_bytes(self) -> int:
        """Asked for since the last call."""
        total = sum(size for _, _, size in self.ranges)
        self.ranges.clear()
        return total


# -- which part


sizes = st.integers(0, 7)
entries = st.one_of(
    st.integers(-9, 9),
    st.none(),
    st.just(Ellipsis),
    st.builds(slice, st.none() | st.integers(-9, 9), st.none() | st.integers(-9, 9), st.none() | st.integers(1, 4)),
)


@given(st.lists(sizes, max_size=4), st.lists(entries, max_size=5))
def test_an_index_means_what_it_means_to_torch(shape: list[int], index: list[Any]) -> None:
    """Of any shape any index: the same elements in the same shape, or an IndexError as there."""
    tensor = torch.arange(int(np.prod(shape))).reshape(shape)
    try:
        part = part_of(shape, tuple(index))
    except IndexError:
        if sum(entry is Ellipsis for entry in index) < 2:  # torch takes the second one for a whole dimension
            with pytest.raises(IndexError):
                tensor[tuple(index)]
        return
    found = tensor
    for dim, wanted in enumerate(part.ranges):
        found = found.index_select(dim, torch.tensor(list(wanted), dtype=torch.int64))
    assert torch.equal(found[part.view], tensor[tuple(index)])


@pytest.mark.parametrize(
    ("index", "error", "text"),
    [
        (slice(None, None, -1), ValueError, "not above 0"),
        (slice(5, 1, 0), ValueError, "not above 0"),
        (torch.tensor([1, 2]), TypeError, "Read the rows, then index them"),
        ([0, 1], TypeError, "list is no index"),
        (True, TypeError, "bool is no index"),
        ("rows", TypeError, "str is no index"),
        (9, IndexError, "out of range for dimension 0 with size 9"),
        ((0, 0, 0, 0), IndexError, "more dimensions than the 3"),
    ],
)
def test_what_is_no_index_here_is_told(index: Any, error: type[Exception], text: str) -> None:
    """Wrong kinds, negative steps, and what torch refuses, too."""
    with pytest.raises(error, match=text):
        part_of((9, 8, 7), index)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_boxes_between_are_what_lies_there_each_once(data: st.DataObject) -> None:
    """Of elements of a dense payload, in any order of its dimensions."""
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    strides = [int(np.prod(shape[dim + 1 :])) for dim in range(len(shape))]
    wanted = [
        range(
            *data.draw(
                st.slices(size).filter(lambda s, n=size: len(range(*s.indices(n))) > 0 and (s.step or 1) > 0)
            ).indices(size)
        )
        for size in shape
    ]
    total = int(np.prod(shape))
    start, stop = sorted((data.draw(st.integers(-2, total + 2)), data.draw(st.integers(-2, total + 2))))
    found = [
        sum(stride * one[at] for stride, one, at in zip(strides, wanted, position, strict=True))
        for box in boxes_between(start, stop, strides, wanted)
        for position in product(*(range(side.start, side.stop) for side in box))
    ]
    every = [sum(s * i for s, i in zip(strides, position, strict=True)) for position in product(*wanted)]
    assert sorted(found) == sorted(element for element in every if start <= element < stop)


# -- any part of any shards


class Chunks(SavePlanner):
    """Gives out what it holds, as a planner does: {(key, offsets): the chunk}."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self.items: list[WriteItem] = []
        self.keys: dict[str, Key] = {}

    def add(self, key: str, tensor: torch.Tensor, pieces: Sequence[tuple[tuple[int, ...], torch.Tensor]]) -> None:
        """pieces: [(offsets, chunk)]"""
        self.keys[key] = Key((key,), str(tensor.dtype)[6:], tuple(tensor.shape))
        for offsets, piece in pieces:
            self.found[key, offsets] = piece
            self.items.append(WriteItem(MetadataIndex(key, torch.Size(offsets)), WriteItemType.SHARD))

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self.found[write_item.index.fqn, tuple(write_item.index.offset or ())]

    def save(self, url: str) -> tuple[Counting, OpenStep]:
        storage = open_storage(url)
        attempt = attempt_name(1, new_token())
        chunks, files = write_items(storage, f"1/{attempt}", 0, self.items, self)
        head = Head(1, 1, attempt, "", 1, torch.__version__, "0")
        manifest, stock = make_manifest(head, Keys.of(self.keys), chunks, files)
        commit_step(storage, "1", manifest, stock)
        counting = Counting(url)
        return counting, open_step(counting, "1")

    set_up_planner = create_local_plan = create_global_plan = finish_plan = None  # type: ignore[assignment]


def cut(
    tensor: torch.Tensor, edges: Sequence[Sequence[int]], order: Sequence[int]
) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """[(offsets, chunk)]: cut at these places of each dimension; the memory of each in the order of dimensions
    `order`."""
    back = [list(order).index(dim) for dim in range(tensor.dim())]
    sides = [list(pairwise([0, *places, size])) for places, size in zip(edges, tensor.shape, strict=True)]
    return [
        (
            tuple(start for start, _ in box),
            tensor[tuple(slice(*side) for side in box)].permute(*order).contiguous().permute(*back),
        )
        for box in product(*sides)
    ]


@st.composite
def part_shapes(draw: st.DrawFn) -> tuple[list[int], list[list[int]], list[int], tuple[Any, ...]]:
    """(shape, where it is cut, order of dimensions in memory, an index of it)"""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    edges = [sorted(draw(st.sets(st.integers(1, size - 1), max_size=2))) if size > 1 else [] for size in shape]
    index = [
        draw(
            st.one_of(
                st.integers(-size, size - 1), st.builds(slice, *[st.none() | st.integers(-9, 9)] * 2, st.integers(1, 4))
            )
        )
        for size in shape
    ]
    return shape, edges, draw(st.permutations(range(len(shape)))), tuple(index)


@settings(max_examples=25, deadline=None)
@given(part_shapes(), st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]))
def test_any_part_of_a_tensor_in_any_shards_is_torchs_own(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: tuple[list[int], list[list[int]], list[int], tuple[Any, ...]],
    dtype: torch.dtype,
) -> None:
    """Whatever the shards, the order of their memory, the dtype and the index."""
    shape, edges, order, index = drawn
    tensor = tensor_of(dtype, *shape, seed=1)
    chunks = Chunks()
    chunks.add("other", torch.ones(3), [((0,), torch.ones(3))])
    chunks.add("w", tensor, cut(tensor, edges, order))
    storage, step = chunks.save(str(tmp_path_factory.mktemp("run")))
    assert_equal(read_tensor(storage, step, "w", index), tensor[index])
    assert_equal(read_tensor(storage, step, "w"), tensor)


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert found.is_contiguous()
    assert raw_bytes(found) == raw_bytes(expected.clone(memory_format=torch.contiguous_format))


LARGE = (6, 600, 1100)
BLOCK = 4 << 20


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Counting, OpenStep, torch.Tensor]:
    """One tensor of 15.8 MB three times: in one piece, in one whose memory is turned, in shards of several blocks."""
    tensor = tensor_of(torch.float32, *LARGE, seed=2)
    chunks = Chunks()
    chunks.add("whole", tensor, cut(tensor, [[], [], []], (0, 1, 2)))
    chunks.add("turned", tensor, cut(tensor, [[], [], []], (2, 0, 1)))
    chunks.add("shards", tensor, cut(tensor, [[3], [], [317]], (0, 1, 2)))
    return *chunks.save(str(tmp_path_factory.mktemp("large"))), tensor


def slices_of(size: int) -> st.SearchStrategy[slice]:
    number = st.none() | st.integers(-size, size)
    return st.builds(slice, number, number, st.one_of(st.none(), st.integers(1, 5), st.just(size // 3)))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["whole", "turned", "shards"]),
    st.tuples(*(st.one_of(slices_of(size), st.integers(-size, size - 1)) for size in LARGE)),
)
def test_a_part_of_several_blocks_is_put_together(
    large: tuple[Counting, OpenStep, torch.Tensor], key: str, index: tuple[Any, ...]
) -> None:
    """And no byte is asked for twice."""
    storage, step, tensor = large
    assert_equal(read_tensor(storage, step, key, index), tensor[index])
    asked = sorted(storage.ranges)
    storage.ranges.clear()
    assert all(a[0] != b[0] or a[1] + a[2] <= b[1] for a, b in pairwise(asked))


@pytest.mark.parametrize(
    ("key", "index", "num_blocks"),
    [
        ("whole", (0, 0, 0), 1),
        ("whole", slice(0, 1), 1),  # 2.6 MB of the first block
        ("whole", slice(3, 4), 2),
        ("whole", (slice(None), 0, 0), 4),  # one element in 2.6 MB: every block
        ("whole", (slice(0, 6, 5), 0, 0), 2),  # the first block and the last
        ("turned", (..., 0), 1),  # a column is a row there
        ("turned", (..., slice(0, 1100, 600)), 2),
    ],
)
def test_a_part_costs_the_blocks_that_hold_it(
    large: tuple[Counting, OpenStep, torch.Tensor], key: str, index: Any, num_blocks: int
) -> None:
    """Of 4 MiB, whatever is between them."""
    storage, step, tensor = large
    storage.ranges.clear()
    assert_equal(read_tensor(storage, step, key, index), tensor[index])
    assert len(storage.ranges) == num_blocks
    assert storage.take_bytes() <= num_blocks * BLOCK


def test_small_shards_of_a_file_come_in_one_read(tmp_path: pathlib.Path) -> None:
    """A request costs more than the bytes between."""
    tensor = torch.arange(4000).reshape(100, 40)
    chunks = Chunks()
    chunks.add("w", tensor, cut(tensor, [range(1, 100), []], (0, 1)))
    storage, step = chunks.save(str(tmp_path))
    assert_equal(read_tensor(storage, step, "w", (slice(0, 100, 3), 5)), tensor[::3, 5])
    assert len(storage.ranges) == 1


def test_a_flipped_bit_in_what_is_read_is_found_and_elsewhere_is_not(tmp_path: pathlib.Path) -> None:
    """The block that holds it is damaged; a slice of others is whole."""
    tensor = tensor_of(torch.float32, 3000, 1000, seed=3)
    chunks = Chunks()
    chunks.add("w", tensor, [((0, 0), tensor)])
    storage, step = chunks.save(str(tmp_path))
    assert step.manifest is not None
    (chunk,) = step.manifest.chunks
    path = tmp_path / step.data_folder / chunk.file
    data = bytearray(path.read_bytes())
    data[chunk.payload_offset + BLOCK + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedStepError, match=rf"'w' at offset {chunk.payload_offset + BLOCK} have CRC32"):
        read_tensor(storage, step, "w", slice(1048, 1050))
    assert_equal(read_tensor(storage, step, "w", slice(0, 1048)), tensor[:1048])


# -- names


def test_the_tree_is_what_was_saved_with_shapes_in_place_of_tensors(tmp_path: pathlib.Path) -> None:
    """Dicts, lists and each rank's own; bytes as they are stored."""
    state = {
        "model": {"layers": [{"w": torch.zeros(2, 3)}, {"w": torch.zeros(4, dtype=torch.bfloat16)}], "n": 3},
        "mine": PerRank("own"),
    }
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, state)
        tree = manager.tree(1)
    assert tree["model"]["layers"][0]["w"] == Saved(
        "model.layers.0.w", ("model", "layers", 0, "w"), (2, 3), torch.float32, 24, 1
    )
    assert tree["model"]["layers"][1]["w"].dtype == torch.bfloat16
    assert (tree["model"]["n"].shape, tree["model"]["n"].dtype, tree["model"]["n"].num_chunks) == (None, None, 1)
    assert tree["model"]["n"].num_bytes > 100
    assert tree["mine/rank_0"].key == "mine/rank_0"


def test_a_step_of_another_writer_has_the_same_tree(tmp_path: pathlib.Path) -> None:
    """But for what its index does not know."""
    state = every_kind(1)
    dcp.save(state, checkpoint_id=tmp_path / "1")
    dcp.save(state, storage_writer=ShardWriter(tmp_path / "2"))
    storage = open_storage(str(tmp_path))
    theirs, ours = (saved_in(open_step(storage, folder)) for folder in ("1", "2"))
    assert sorted(one[:4] for one in map(tuple, theirs) if one[2] is not None) == sorted(
        one[:4] for one in map(tuple, ours) if one[2] is not None
    )
    assert {one.key for one in theirs} == {one.key for one in ours}


@pytest.mark.parametrize("folder", ["0", "foreign"])
def test_every_value_is_read_as_it_was_saved(tmp_path: pathlib.Path, folder: str) -> None:
    """One by one, by subtree and in one go; from a step of stock DCP, too."""
    state = every_kind(2)
    writer = ShardWriter(tmp_path / folder) if folder == "0" else None
    dcp.save(state, checkpoint_id=tmp_path / folder, storage_writer=writer)
    storage = open_storage(str(tmp_path))
    step = open_step(storage, folder)
    found = read_value(storage, step)
    assert_same(found["model"], read_value(storage, step, "model"))
    for saved in saved_in(step):
        one = read_value(storage, step, saved.key)
        here = found
        for part in saved.path:
            here = here[part]
        assert_same(here, one)
        if saved.shape and 0 not in saved.shape and saved.num_bytes < 1_000_000:
            assert_equal(read_tensor(storage, step, saved.key, -1), one[-1])
            assert_equal(read_tensor(storage, step, saved.key, (..., slice(None, None, 2))), one[..., ::2])
    for name, tensor in state["model"].items():
        if isinstance(tensor, torch.Tensor):
            assert raw_bytes(found["model"][name]) == raw_bytes(tensor)


@pytest.fixture
def manager(tmp_path: pathlib.Path) -> Iterator[CheckpointManager]:
    with CheckpointManager(str(tmp_path), chkpt_on_preemption=False) as manager:
        manager.save(1, {"model": {"layers.0.w": torch.ones(2), "layers.0.b": torch.zeros(3), "head": 5}, "step": 7})
        yield manager


def test_a_subtree_may_end_within_a_name(manager: CheckpointManager) -> None:
    """A model's state dict is flat: its modules' names are parts of keys."""
    found = manager.read(1, "model.layers.0")
    assert_same({"w": torch.ones(2), "b": torch.zeros(3)}, found)
    assert list(manager.read(1, "model")) == ["layers.0.w", "layers.0.b", "head"]
    assert manager.read(1)["step"] == 7
    assert manager.read(1, "model.head") == 5


@pytest.mark.parametrize(
    ("key", "near"), [("layers.0.w", "model.layers.0.w"), ("modle", "model"), ("model.layers.0.ww", "model.layers.0.w")]
)
def test_an_unknown_key_is_told_with_those_like_it(manager: CheckpointManager, key: str, near: str) -> None:
    """And how many there are; it is a KeyError, too."""
    with pytest.raises(KeyNotFoundError, match="among the 4 of the step") as caught:
        manager.read(1, key)
    assert near in caught.value.near
    assert near in str(caught.value)
    assert isinstance(caught.value, KeyError)
    assert (caught.value.step, caught.value.url) == (1, manager.url)


def test_an_object_has_no_parts(manager: CheckpointManager) -> None:
    """Nor is a tensor an object."""
    with pytest.raises(TypeError, match="is an object"):
        manager.read(1, "step", 0)
    storage = open_storage(manager.url)
    with pytest.raises(TypeError, match="is a tensor"):
        read_object(storage, open_step(storage, "1"), "model.layers.0.w")


def test_dtype_and_device_are_converted_when_asked_for(manager: CheckpointManager) -> None:
    """Of several values the floating-point tensors alone."""
    assert manager.read(1, "model.layers.0.w", dtype=torch.float16).dtype == torch.float16
    found = manager.read(1, "model", dtype=torch.bfloat16, device="meta")
    assert (found["layers.0.w"].dtype, found["layers.0.w"].device.type, found["head"]) == (torch.bfloat16, "meta", 5)


def test_an_object_that_needs_code_is_not_read(tmp_path: pathlib.Path) -> None:
    """Unless its class is trusted; what lies beside it is read."""
    with CheckpointManager(str(tmp_path), safe_globals=[Trusted]) as manager:
        manager.save(1, {"a": Trusted(), "w": torch.ones(2)})
        assert isinstance(manager.read(1, "a"), Trusted)
    with CheckpointManager(str(tmp_path)) as manager:
        with pytest.raises(UnsafeObjectError, match="safe_globals"):
            manager.read(1, "a")
        assert manager.read(1, "w").tolist() == [1, 1]


class Trusted:
    pass


def test_a_step_that_is_not_there_cannot_be_read(manager: CheckpointManager) -> None:
    """As in restore."""
    with pytest.raises(CheckpointError, match="no whole step 2"):
        manager.read(2, "model")
    with pytest.raises(CheckpointError, match="no whole step 2"):
        manager.tree(2)


def test_a_lost_file_names_what_it_held(manager: CheckpointManager) -> None:
    """Found by the listing, before anything is read."""
    for path in pathlib.Path(manager.url).glob("1/*/*.distcp"):
        path.unlink()
    with pytest.raises(DamagedStepError, match="is missing"):
        manager.read(1, "model")
    with pytest.raises(DamagedStepError, match="is missing"):
        manager.read(1, "model.layers.0.w", 0)


def test_a_step_saved_anew_by_another_run_is_read_anew(manager: CheckpointManager) -> None:
    """The reader is between manifest and data when the old data goes."""
    storage = open_storage(manager.url)
    looks: list[int] = []

    def work(step: OpenStep) -> Any:
        looks.append(step.sequence)
        if len(looks) == 1:
            with CheckpointManager(manager.url, chkpt_on_preemption=False) as other:
                other.save(1, {"w": torch.full((2,), 9.0)})
        return read_value(storage, step, "w" if len(looks) > 1 else "model")

    assert look(storage, "1", work).tolist() == [9, 9]
    assert len(looks) == 2


def test_nesting_takes_what_a_foreign_index_may_say() -> None:
    """A huge number in a path makes no long list, and a value where a container is asked for stays beside it."""
    assert nest([(("a", 10**12), 1), (("b", 1), 2), (("b", 0), 3)]) == {"a": {10**12: 1}, "b": [3, 2]}
    assert nest([(("a",), 1), (("a", "b"), 2), (("c", 0, 0), 3)]) == {"a": 1, "a.b": 2, "c": [[3]]}


# -- cost


def test_a_tensor_costs_its_bytes_and_the_manifest(tmp_path: pathlib.Path) -> None:
    """One listing, the manifest, and of the data what is asked for."""
    state = {f"w{i}": torch.full((500, 1000), float(i)) for i in range(20)}
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, state)
        manager._storage = storage = Counting(str(tmp_path))
        assert_equal(manager.read(1, "w7"), state["w7"])
        assert storage.take_bytes() == 2_000_000
        assert [storage.count(verb) for verb in ("list_files", "read_file", "read_into")] == [1, 1, 1]
        assert_equal(manager.read(1, "w8", 3), state["w8"][3])
        assert [storage.count(verb) for verb in ("list_files", "read_file", "read_into")] == [1, 1, 2]
        manager.save(1, state | {"w8": torch.zeros(3)}, force=True)
        manager.join()
        assert manager.read(1, "w8").tolist() == [0, 0, 0]  # of the save that is the step now


def test_from_s3_a_slice_costs_its_blocks(s3_url: str, s3_options: dict[str, Any]) -> None:
    """A tensor of 4 MB in its bytes; rows of a large one in their blocks, one more at each end."""
    state = {
        "large": tensor_of(torch.float32, 6000, 1000, seed=1),
        **{f"w{i}": torch.ones(1000, 1000) for i in range(4)},
    }
    with CheckpointManager(s3_url, storage_options=s3_options) as manager:
        manager.save(1, state)
        manager._storage = storage = Counting(s3_url, s3_options)
        assert_equal(manager.read(1, "w3"), state["w3"])
        assert storage.take_bytes() == 4_000_000
        assert_equal(manager.read(1, "large", slice(3000, 4000)), state["large"][3000:4000])
        assert storage.take_bytes() <= 4_000_000 + 2 * BLOCK
        assert_equal(manager.read(1, "large", slice(0, 1)), state["large"][:1])
        assert storage.take_bytes() == BLOCK
