"""The index of one committed step: `<step>/manifest-<sequence>.json`. This docstring is its specification, version 1.

One JSON object, ASCII, no newline. Its last member is `"crc32"`, eight hex digits: the CRC32 of every byte before the
`,"crc32"` that introduces it. Members, in order:

    head      format "asyncckpt", version 1, step, sequence, attempt (the data folder, "<sequence>-<hex>"), save_id,
              time (ISO 8601, UTC), world_size, torch, asyncckpt (versions), metadata (the user's), metrics
    keys      the tree, as columns of equal length: fqn; path (list of str and int, how the state dict nests);
              dtype and shape (of the whole tensor; null, null: an object)
    layouts   rows [dtype, shape, stride, head_bytes]: how a chunk's payload lies in memory, and the framing before it
    chunks    columns: key (index into keys); offsets (of the chunk's box in the tensor; null: an object);
              layout (index; -1: an object); file (index into files); offset and length of the item in the file;
              crc32 of the payload (an object's item is its payload); item_crc32 of the whole item; blocks: the CRC32
              of each 4 MiB of a larger payload, else []
    files     columns: name (below `<step>/<attempt>/`), size, crc32 of the whole file
    dcp_metadata   size and crc32 of the stock `.metadata` that was written with this step

A payload starts at offset + head_bytes and is as long as its dtype and shape say. The presence of the file is the
commit: it is created, never overwritten, after all it names is durable. A reader refuses a version it does not know.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from asyncckpt.errors import CheckpointError
from asyncckpt.framing import BLOCK_BYTES, Layout, crc32

FORMAT, VERSION = "asyncckpt", 1
_CRC_MEMBER = re.compile(rb',"crc32":"([0-9a-f]{8})"\}\Z')
_FILE_NAME = re.compile(r"[A-Za-z0-9_.-]+\Z")


class ManifestError(CheckpointError):
    """The bytes are no manifest of ours; the message says why. Callers add step and URL (DamagedStepError)."""


@dataclass(frozen=True, slots=True)
class Head:
    step: int
    sequence: int
    attempt: str
    save_id: str
    world_size: int
    torch: str
    asyncckpt: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    time: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat())

    @property
    def time_s(self) -> float:
        return datetime.datetime.fromisoformat(self.time).timestamp()


@dataclass(frozen=True, slots=True)
class Key:
    """dtype, shape: of the whole tensor; None for an object."""

    path: tuple[str | int, ...]
    dtype: str | None
    shape: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """One item in a file: a box of a tensor, or an object (`layout` and `offsets` None)."""

    key: str
    offsets: tuple[int, ...] | None
    layout: Layout | None
    head_bytes: int
    file: str
    offset: int
    length: int
    crc32: int
    item_crc32: int
    blocks: tuple[int, ...] = ()

    @property
    def payload_offset(self) -> int:
        return self.offset + self.head_bytes

    @property
    def block_crcs(self) -> tuple[int, ...]:
        """The CRC32 of each block of BLOCK_BYTES of the payload."""
        return self.blocks or (self.crc32,)


@dataclass(frozen=True, slots=True)
class FileRecord:
    name: str
    size: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Manifest:
    head: Head
    keys: Mapping[str, Key]
    chunks: Sequence[Chunk]
    files: Sequence[FileRecord]
    dcp_metadata_size: int
    dcp_metadata_crc32: int

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)


def keys_of(metadata: Metadata) -> dict[str, Key]:
    """The tree of keys from what DCP's planner made."""
    paths: Mapping[str, Any] = metadata.planner_data or {}
    keys: dict[str, Key] = {}
    for fqn, entry in metadata.state_dict_metadata.items():
        path = tuple(paths.get(fqn, (fqn,)))
        if isinstance(entry, TensorStorageMetadata):
            keys[fqn] = Key(path, str(entry.properties.dtype)[6:], tuple(entry.size))
        else:
            keys[fqn] = Key(path, None, None)
    return keys


def encode_manifest(manifest: Manifest) -> bytes:
    index = {fqn: number for number, fqn in enumerate(manifest.keys)}
    document = {
        "head": {"format": FORMAT, "version": VERSION, **asdict(manifest.head)},
        "keys": {
            "fqn": list(manifest.keys),
            "path": [key.path for key in manifest.keys.values()],
            "dtype": [key.dtype for key in manifest.keys.values()],
            "shape": [key.shape for key in manifest.keys.values()],
        },
        **_encode_records(manifest.chunks, manifest.files, index),
        "dcp_metadata": {"size": manifest.dcp_metadata_size, "crc32": manifest.dcp_metadata_crc32},
    }
    body = _dumps(document)[:-1]
    return body + b',"crc32":"%08x"}' % crc32(body)


def decode_manifest(data: bytes) -> Manifest:
    """Raises ManifestError for anything that is not, byte for byte, what `encode_manifest` wrote."""
    found = _CRC_MEMBER.search(data, max(0, len(data) - 32))
    if found is None:
        raise ManifestError("it is cut short or is no manifest: the closing checksum is missing")
    if crc32(memoryview(data)[: found.start()]) != int(found[1], 16):
        raise ManifestError(f"its bytes do not have the checksum {found[1].decode()} that it states")
    try:
        document = json.loads(data)
        head = dict(document["head"])
        if (head.pop("format"), head.pop("version")) != (FORMAT, VERSION):
            raise ManifestError(
                f"format {document['head']['format']!r} version {document['head']['version']!r} is newer"
            )
        keys = {
            fqn: Key(tuple(path), dtype, None if shape is None else tuple(shape))
            for fqn, path, dtype, shape in zip(*_columns(document["keys"], "fqn path dtype shape"), strict=True)
        }
        chunks, files = _decode_records(document, list(keys))
        stock = document["dcp_metadata"]
        _check_kinds(keys, chunks)
        manifest = Manifest(Head(**head), keys, chunks, files, stock["size"], stock["crc32"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as exc:
        raise ManifestError(f"its structure is wrong: {type(exc).__name__}: {exc}") from exc
    return manifest


def encode_records(chunks: Sequence[Chunk], files: Sequence[FileRecord]) -> bytes:
    """What one rank tells the coordinator after writing: the same columns as in the manifest."""
    fqns = list(dict.fromkeys(chunk.key for chunk in chunks))
    index = {fqn: number for number, fqn in enumerate(fqns)}
    return _dumps({"fqn": fqns, **_encode_records(chunks, files, index)})


def decode_records(data: bytes) -> tuple[list[Chunk], list[FileRecord]]:
    document = json.loads(data)
    return _decode_records(document, document["fqn"])


def _encode_records(
    chunks: Sequence[Chunk], files: Sequence[FileRecord], key_index: Mapping[str, int]
) -> dict[str, Any]:
    file_index = {file.name: number for number, file in enumerate(files)}
    layouts: dict[tuple[Layout | None, int], int] = {}
    return {
        "chunks": {
            "key": [key_index[chunk.key] for chunk in chunks],
            "offsets": [chunk.offsets for chunk in chunks],
            "layout": [
                -1 if chunk.layout is None else layouts.setdefault((chunk.layout, chunk.head_bytes), len(layouts))
                for chunk in chunks
            ],
            "file": [file_index[chunk.file] for chunk in chunks],
            "offset": [chunk.offset for chunk in chunks],
            "length": [chunk.length for chunk in chunks],
            "crc32": [chunk.crc32 for chunk in chunks],
            "item_crc32": [chunk.item_crc32 for chunk in chunks],
            "blocks": [chunk.blocks for chunk in chunks],
        },
        "layouts": [[x.dtype, x.shape, x.stride, head_bytes] for x, head_bytes in layouts if x is not None],
        "files": {
            "name": [file.name for file in files],
            "size": [file.size for file in files],
            "crc32": [file.crc32 for file in files],
        },
    }


def _decode_records(document: Mapping[str, Any], fqns: Sequence[str]) -> tuple[list[Chunk], list[FileRecord]]:
    files = [
        FileRecord(name, _natural(size), crc)
        for name, size, crc in zip(*_columns(document["files"], "name size crc32"), strict=True)
    ]
    for file in files:
        if not _FILE_NAME.match(file.name) or file.name.startswith("."):
            raise ValueError(f"file name {file.name!r}")
    layouts = [
        (Layout(dtype, tuple(map(_natural, shape)), tuple(map(_natural, stride))), _natural(head_bytes))
        for dtype, shape, stride, head_bytes in document["layouts"]
    ]
    names = "key offsets layout file offset length crc32 item_crc32 blocks"
    chunks = []
    for key, offsets, layout, file, offset, length, crc, item_crc, blocks in zip(
        *_columns(document["chunks"], names), strict=True
    ):
        frame, head_bytes = (None, 0) if layout == -1 else layouts[_natural(layout)]
        record = files[_natural(file)]
        if _natural(offset) + _natural(length) > record.size:
            raise ValueError(f"an item of {fqns[key]!r} ends at {offset + length}, {record.name} at {record.size}")
        box = None if offsets is None else tuple(map(_natural, offsets))
        chunks.append(
            Chunk(
                fqns[_natural(key)], box, frame, head_bytes, record.name, offset, length, crc, item_crc, tuple(blocks)
            )
        )
    _check_payloads(chunks)
    return chunks, files


def _check_payloads(chunks: Iterable[Chunk]) -> None:
    """A payload lies inside its item and has a checksum per block: a reader may rely on both."""
    for chunk in chunks:
        if chunk.layout is None:
            continue
        payload_bytes = payload_bytes_of(chunk.layout)
        num_blocks = -(-payload_bytes // BLOCK_BYTES)
        if chunk.head_bytes + payload_bytes > chunk.length:
            raise ValueError(f"the payload of {chunk.key!r} is longer than its item")
        if len(chunk.blocks) != (num_blocks if num_blocks > 1 else 0) or chunk.offsets is None:
            raise ValueError(f"the chunk of {chunk.key!r} has {len(chunk.blocks)} block checksums")


def _check_kinds(keys: Mapping[str, Key], chunks: Iterable[Chunk]) -> None:
    for chunk in chunks:
        if (keys[chunk.key].dtype is None) != (chunk.layout is None):
            raise ValueError(f"{chunk.key!r} is an object and a tensor at once")


def payload_bytes_of(layout: Layout) -> int:
    numel = 1
    for size in layout.shape:
        numel *= size
    return numel * layout.torch_dtype.itemsize


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} where a count, an index or an offset belongs")
    return value


def _columns(table: Mapping[str, Any], names: str) -> list[list[Any]]:
    return [table[name] for name in names.split()]


def _dumps(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
