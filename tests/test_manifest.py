"""The manifest: what is written is read, and nothing else is."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from itertools import accumulate, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import StorageMeta

from asyncckpt.chunks import Chunk, ChunkTable, Key, Keys, Placement, merge
from asyncckpt.dcp_metadata import metadata_of, pickle_metadata, unpickle_metadata
from asyncckpt.framing import Layout, crc32
from asyncckpt.manifest import (
    FileRecord,
    Head,
    Manifest,
    ManifestError,
    decode_manifest,
    decode_records,
    encode_manifest,
    encode_records,
)


def example() -> Manifest:
    big = Layout("float32", (3, 1048576), (1048576, 1))
    chunks = [
        Chunk("model.w", (0, 0), big, 704, "__0_0.distcp", 3392, 12_600_000, 17, 18, (1, 2, 3)),
        Chunk("model.w", (3, 0), big, 704, "__1_0.distcp", 3392, 12_600_000, 19, 20, (4, 5, 6)),
        Chunk("lr", None, None, 0, "__0_0.distcp", 0, 1300, 21, 21),
    ]
    keys = {"model.w": Key(("model", "w"), "float32", (6, 1048576)), "lr": Key(("lr", 0), None, None)}
    files = [FileRecord("__0_0.distcp", 12_700_000, 7), FileRecord("__1_0.distcp", 12_700_000, 8)]
    head = Head(40, 3, "00000003-0123456789abcdef", "id", 2, "2.13.0", "0.1.0", {"note": "ü"}, {"loss": 1.5})
    return Manifest(head, keys, ChunkTable.of(chunks), files, 900, 22)


def resealed(document: dict) -> bytes:
    """A manifest with a right checksum over wrong contents."""
    document.pop("crc32", None)
    body = json.dumps(document, separators=(",", ":")).encode()[:-1]
    return body + b',"crc32":"%08x"}' % crc32(body)


def test_a_manifest_survives_a_round_trip() -> None:
    """Every field, types included."""
    made = example()
    again = decode_manifest(encode_manifest(made))
    assert list(again.chunks) == list(made.chunks)
    assert replace(again, chunks=made.chunks) == made


def test_a_manifest_is_one_json_object() -> None:
    """Anyone can read it without us."""
    document = json.loads(encode_manifest(example()))
    assert document["head"]["format"] == "asyncckpt"
    assert document["keys"]["fqn"] == ["model.w", "lr"]


def test_a_rank_report_survives_a_round_trip() -> None:
    """What the ranks send the coordinator."""
    manifest = example()
    chunks, files = decode_records(encode_records(manifest.chunks, manifest.files))
    assert (list(chunks), files) == (list(manifest.chunks), manifest.files)


def test_every_flipped_bit_and_every_cut_is_refused() -> None:
    """The manifest checks itself."""
    data = encode_manifest(example())
    for at in range(len(data)):
        for bit in (1, 16, 128):
            broken = bytearray(data)
            broken[at] ^= bit
            with pytest.raises(ManifestError):
                decode_manifest(bytes(broken))
        with pytest.raises(ManifestError):
            decode_manifest(data[:at])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["head"].update(version=2), "is newer"),
        (lambda d: d["files"].update(name=["../../x", "y"]), "file name"),
        (lambda d: d["files"].update(name=["a/b", "y"]), "file name"),
        (lambda d: d["chunks"].update(offset=[-1, 0, 0]), "-1"),
        (lambda d: d["chunks"].update(offset=[10**18, 0, 0]), "ends at"),
        (lambda d: d["chunks"].update(file=[0, 9, 0]), "IndexError"),
        (lambda d: d["chunks"].update(key=[0, 0]), "ValueError"),
        (lambda d: d.update(block_crc32=""), "block checksums"),
        (lambda d: d["layouts"].__setitem__(0, ["float32", [10**9, 10**9], [10**9, 1], 704]), "longer than its item"),
        (lambda d: d["layouts"].__setitem__(0, ["os", [1, 1], [1, 1], 704]), "unknown dtype"),
        (lambda d: d["chunks"].update(layout=[True, 0, -1]), "True"),
        (lambda d: d.pop("keys"), "members"),
        (lambda d: d["keys"].update(kind=[-1, -1]), "object and a tensor"),
    ],
)
def test_a_manifest_with_a_right_checksum_and_wrong_contents_is_refused(change, reason: str) -> None:
    """A hostile or buggy writer gets a ManifestError, whatever it wrote."""
    document = json.loads(encode_manifest(example()))
    change(document)
    with pytest.raises(ManifestError, match=reason):
        decode_manifest(resealed(document))


def test_the_stock_metadata_can_be_made_again_from_the_manifest_byte_for_byte() -> None:
    """A stale `.metadata` is mended, and then has the checksum that the manifest states."""
    made = example()
    again = decode_manifest(encode_manifest(made))
    first = pickle_metadata(made.keys, made.chunks, made.head.attempt, made.head.save_id)
    assert pickle_metadata(again.keys, again.chunks, again.head.attempt, again.head.save_id) == first


@st.composite
def keys_and_chunks(draw: st.DrawFn) -> tuple[dict[str, Key], ChunkTable]:
    """A tree as DCP's planner flattens it, or any other, and chunks that make up its keys, in any order."""
    parts = st.text(max_size=4) | st.integers(0, 3) | st.integers()
    paths = draw(
        st.lists(st.lists(parts, max_size=4).map(tuple), max_size=6, unique_by=lambda p: ".".join(map(str, p)))
    )
    joins = draw(st.booleans())
    keys: dict[str, Key] = {}
    chunks: list[Chunk] = []
    for number, path in enumerate(paths):
        fqn = ".".join(map(str, path)) if joins else f"key {number}"
        dtype = draw(st.sampled_from([None, "float32", "bfloat16", "complex128", "bool"]))
        sides = [] if dtype is None else draw(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=2), max_size=3))
        keys[fqn] = Key(path, dtype, None if dtype is None else tuple(map(sum, sides)))
        for box in product(*(zip(accumulate([0, *side[:-1]]), side, strict=True) for side in sides)):
            shape = tuple(size for _, size in box)
            layout = None if dtype is None else Layout(dtype, shape, draw(dense_strides(shape)))
            file, head_bytes = draw(st.sampled_from(["a", "b", "c"])), 0 if layout is None else 704
            place = file, draw(st.integers(0, 2**61)), draw(st.integers(20_000, 2**60)), draw(st.integers(0, 2**32 - 1))
            offsets = None if layout is None else tuple(start for start, _ in box)
            chunks.append(Chunk(fqn, offsets, layout, head_bytes, *place, 7))
    return keys, ChunkTable.of(draw(st.permutations(chunks)))


@st.composite
def dense_strides(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the dimensions in any order."""
    strides, step = [0] * len(shape), 1
    for dim in draw(st.permutations(range(len(shape)))):
        strides[dim] = step
        step *= shape[dim]
    return tuple(strides)


def files_of(chunks: ChunkTable) -> list[FileRecord]:
    return [FileRecord(name, 2**62 - 1, number) for number, name in enumerate(chunks.placement.files)]


@settings(max_examples=40, deadline=None)
@given(keys_and_chunks())
def test_any_tree_and_any_chunks_survive_a_round_trip(made: tuple[dict[str, Key], ChunkTable]) -> None:
    """Through the manifest, and through a rank's report."""
    keys, chunks = made
    manifest = replace(example(), keys=keys, chunks=chunks, files=files_of(chunks))
    again = decode_manifest(encode_manifest(manifest))
    assert list(again.keys.items()) == list(keys.items())
    assert list(again.chunks) == list(chunks) == [again.chunks[number] for number in range(len(chunks))]
    assert again.files == manifest.files
    reported, _ = decode_records(encode_records(chunks, files_of(chunks)))
    assert list(reported) == list(chunks)


def contents(value: object) -> object:
    """All that an object of a `.metadata` holds, with its types, and the order of its dicts."""
    if isinstance(value, dict):
        return dict, [(contents(key), contents(entry)) for key, entry in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [contents(entry) for entry in value]
    return (type(value), contents(vars(value))) if is_dataclass(value) else (type(value), value)


@settings(max_examples=40, deadline=None)
@given(keys_and_chunks())
def test_the_stock_metadata_is_what_torch_would_have_pickled(made: tuple[dict[str, Key], ChunkTable]) -> None:
    """The opcodes written here build what `metadata_of` builds, and the restricted unpickler takes them."""
    keys, chunks = made
    expected = metadata_of(keys, chunks)
    expected.storage_data = {
        index: _StorageInfo(f"attempt/{chunk.file}", chunk.offset, chunk.length)
        for index, chunk in expected.storage_data.items()
    }
    expected.storage_meta = StorageMeta(save_id="id")
    data = pickle_metadata(keys, chunks, "attempt", "id")
    for found in (pickle.loads(data), unpickle_metadata(data)):
        assert found == expected
        assert contents(found) == contents(expected)
    manifest = replace(example(), keys=keys, chunks=chunks, files=files_of(chunks))
    again = decode_manifest(encode_manifest(manifest))
    assert pickle_metadata(again.keys, again.chunks, "attempt", "id") == data


def test_an_int_of_any_size_in_a_path_is_pickled() -> None:
    """One of more than 255 bytes has an opcode of its own."""
    keys = {"k": Key(("k", 10**700, -(10**700), "x" * 70_000), None, None)}
    found = pickle.loads(pickle_metadata(keys, ChunkTable.of([]), "attempt", "id"))
    assert found.planner_data == {"k": keys["k"].path}


def test_numbers_no_int64_holds_are_refused() -> None:
    """In every column and table that has numbers, and without much memory: they are not counts of anything."""
    for huge in (2**63, -(2**63) - 1, 10**400, 1.0, None, "1", [0]):
        for table, column in (("chunks", "offset"), ("chunks", "key"), ("files", "size"), ("keys", "kind")):
            document = json.loads(encode_manifest(example()))
            document[table][column][0] = huge
            with pytest.raises(ManifestError):
                decode_manifest(resealed(document))
        for row in (["float32", [huge, 1], [1, 1], 704], ["float32", [1, 1], [1, 1], huge]):
            document = json.loads(encode_manifest(example()))
            document["layouts"][0] = row
            with pytest.raises(ManifestError):
                decode_manifest(resealed(document))


def test_a_payload_of_more_blocks_than_there_are_checksums_is_refused() -> None:
    """Whatever size a hostile layout and file state, no memory is taken for it."""
    document = json.loads(encode_manifest(example()))
    document["files"]["size"] = [2**62 - 1, 2**62 - 1]
    document["chunks"].update(length=[2**61, 2**61, 1300], offset=[0, 0, 0])
    document["layouts"][0] = ["float32", [2**29, 2**29], [2**29, 1], 704]
    with pytest.raises(ManifestError, match="block checksums"):
        decode_manifest(resealed(document))


def moved_on(table: ChunkTable, by: int) -> ChunkTable:
    """The same chunks in the next save, where an object before them has grown, with other checksums."""
    place = table.placement
    length = np.where(place.layout < 0, place.length + by, place.length)
    placement = place.moved(place.files, place.file, place.offset + by, length) if by else place
    return ChunkTable(placement, table.crc32 + np.uint32(1), table.item_crc32, table.blocks)


@pytest.mark.parametrize("by", [0, 64])
def test_what_is_kept_from_the_last_save_changes_no_byte(by: int) -> None:
    """The manifest, the stock metadata and a rank's report are as if made afresh, whether or not something moved."""
    made = example()
    keys = Keys.of(made.keys)
    for manifest in (made, replace(made, chunks=moved_on(made.chunks, by))):
        table = manifest.chunks
        fresh = ChunkTable.of(list(table))
        assert encode_manifest(replace(manifest, keys=keys)) == encode_manifest(replace(manifest, chunks=fresh))
        assert pickle_metadata(keys, table, "a", "id") == pickle_metadata(made.keys, fresh, "a", "id")
        assert encode_records(table, made.files) == encode_records(fresh, made.files)


def test_what_the_ranks_report_is_merged_into_one_table() -> None:
    """In order of rank; what a part and the whole were last time is used again as far as it is the same."""
    whole = list(example().chunks)
    files = example().files
    first, second = ChunkTable.of(whole[:1] + whole[2:]), ChunkTable.of(whole[1:2])
    reports = [encode_records(first, files[:1]), encode_records(second, files[1:])]
    tables = [decode_records(report)[0] for report in reports]
    merged = merge(tables)
    assert list(merged) == [*first, *second]

    again = [decode_records(data, old.placement)[0] for data, old in zip(reports, tables, strict=True)]
    assert [table.placement for table in again] == [table.placement for table in tables]
    assert merge(again, merged.placement).placement is merged.placement

    later, _ = decode_records(encode_records(moved_on(first, 64), files[:1]), tables[0].placement)
    assert later.placement.is_like(tables[0].placement)
    moved = merge([later, tables[1]], merged.placement)
    assert moved.placement.is_like(merged.placement)
    assert list(moved) == [*moved_on(first, 64), *second]


def many(num_chunks: int) -> Manifest:
    """A manifest of so many keys of one chunk each."""
    layout = Layout("float32", (4,), (1,))
    chunks = [Chunk(f"m.{i}", (0,), layout, 704, "f", 2000 * i, 1500, i, i) for i in range(num_chunks)]
    keys = Keys.of({chunk.key: Key(("m", chunk.key[2:]), "float32", (4,)) for chunk in chunks})
    return replace(example(), keys=keys, chunks=ChunkTable.of(chunks), files=[FileRecord("f", 2000 * num_chunks, 1)])


def calls_during(work: Callable[[], object]) -> int:
    """How many functions Python calls, its own and those in C."""
    calls = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def test_a_report_leaves_out_what_the_coordinator_knows() -> None:
    """What stays the same is nearly all of it; a rank whose objects grew says only where everything lies now."""
    made = many(1000)
    first = encode_records(made.chunks, made.files)
    known, files = decode_records(first)
    again = encode_records(made.chunks, made.files, made.chunks.placement)
    assert len(again) < len(first) / 3
    table, _ = decode_records(again, known.placement)
    assert table.placement is known.placement
    assert list(table) == list(made.chunks)

    later = moved_on(made.chunks, 64)
    files = [replace(made.files[0], size=made.files[0].size + 64)]
    moved, _ = decode_records(encode_records(later, files, made.chunks.placement), known.placement)
    assert moved.placement.is_like(known.placement)
    assert list(moved) == list(later)


@pytest.mark.parametrize("by", [0, 64])
def test_in_steady_state_nothing_is_called_for_each_chunk(by: int) -> None:
    """Neither for the manifest nor for the stock metadata nor for a rank's report, even if objects moved the rest."""
    counts = []
    for num_chunks in (2000, 4000):
        made = many(num_chunks)
        report = encode_records(made.chunks, made.files)
        before = merge([decode_records(report)[0]] * 2).placement
        encode_manifest(made)
        pickle_metadata(made.keys, made.chunks, "a", "id")
        later = replace(made, chunks=moved_on(made.chunks, by), files=[FileRecord("f", 2001 * num_chunks, 1)])

        def save(made: Manifest = made, later: Manifest = later, before: Placement = before) -> None:
            encode_manifest(later)
            pickle_metadata(made.keys, later.chunks, "b", "id")
            report = encode_records(later.chunks, later.files)
            merge([decode_records(report, part)[0] for part in before.parts], before)

        counts.append(calls_during(save))
    assert counts[1] - counts[0] < 40
