"""The manifest: what is written is read, and nothing else is."""

from __future__ import annotations

import json
import pickle
from dataclasses import is_dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import StorageMeta

from asyncckpt.dcp_metadata import metadata_of, pickle_metadata, unpickle_metadata
from asyncckpt.framing import Layout, crc32
from asyncckpt.manifest import (
    Chunk,
    ChunkTable,
    FileRecord,
    Head,
    Key,
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
        (lambda d: d["layouts"].__setitem__(0, ["float32", [10**9, 10**9], [1, 1], 704]), "longer than its item"),
        (lambda d: d["layouts"].__setitem__(0, ["os", [1], [1], 704]), "unknown dtype"),
        (lambda d: d["chunks"].update(layout=[True, 0, -1]), "True"),
        (lambda d: d.pop("keys"), "KeyError"),
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
    """A tree as DCP's planner flattens it, or any other, and chunks of some of its keys in any order."""
    parts = st.text(max_size=4) | st.integers(0, 3) | st.integers()
    numbers = st.integers(0, 300) | st.integers(0, 2**62 - 1)
    paths = draw(
        st.lists(st.lists(parts, max_size=4).map(tuple), max_size=6, unique_by=lambda p: ".".join(map(str, p)))
    )
    joins = draw(st.booleans())
    keys: dict[str, Key] = {}
    chunks: list[Chunk] = []
    for number, path in enumerate(paths):
        fqn = ".".join(map(str, path)) if joins else f"key {number}"
        dtype, ndim = (
            draw(st.sampled_from([None, "float32", "bfloat16", "complex128", "bool"])),
            draw(st.integers(0, 3)),
        )
        shapes = st.lists(st.integers(0, 4), min_size=ndim, max_size=ndim).map(tuple)
        offsets = st.lists(numbers, min_size=ndim, max_size=ndim).map(tuple)
        keys[fqn] = Key(path, dtype, None if dtype is None else draw(st.lists(numbers, max_size=3).map(tuple)))
        for box in draw(st.lists(offsets, max_size=3)):
            layout = None if dtype is None else Layout(dtype, draw(shapes), draw(shapes))
            file, head_bytes = draw(st.sampled_from(["a", "b", "c"])), 0 if layout is None else 704
            place = file, draw(st.integers(0, 2**61)), draw(st.integers(20_000, 2**60)), draw(st.integers(0, 2**32 - 1))
            chunks.append(Chunk(fqn, None if layout is None else box, layout, head_bytes, *place, 7))
    return keys, ChunkTable.of(draw(st.permutations(chunks)))


def files_of(chunks: ChunkTable) -> list[FileRecord]:
    return [FileRecord(name, 2**62 - 1, number) for number, name in enumerate(("c", "unused", "a", "b"))]


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
