"""The index of one committed step: `<step>/manifest-<sequence>.json`. This docstring is its specification, version 1.

One JSON object, ASCII, no newline. Its last member is `"crc32"`, eight hex digits: the CRC32 of every byte before the
`,"crc32"` that introduces it. Members, in order:

    head      format "asyncckpt", version 1, step, sequence, attempt (the data folder, "<sequence>-<hex>"), save_id,
              time (ISO 8601, UTC), world_size, torch, asyncckpt (versions), metadata (the user's), metrics
    keys      the tree. Columns of equal length: fqn (each once); path (index into paths); kind (index into kinds;
              -1: an object)
    paths     how the state dict nests. A row has, for each part of a path, its length in the fqn, where a dot follows;
              a negative length: the part is an int (of a list). Or [path], where the parts do not make up the fqn
    kinds     rows [dtype, shape] of a whole tensor
    chunks    columns of equal length: key (index into keys); box (index into boxes; -1: an object); layout (index into
              layouts; -1: an object); file (index into files); offset and length of the item in the file
    boxes     rows: the offsets of a chunk in its tensor
    layouts   rows [dtype, shape, stride, head_bytes]: how a chunk's payload lies in memory, and the framing before it
    payload_crc32  eight hex digits for each chunk: of its payload (an object's item is its payload)
    item_crc32     likewise, of the whole item
    block_crc32    likewise, for each 4 MiB of each payload that is longer, in order
    files     columns: name (below `<step>/<attempt>/`, each once), size, crc32 of the whole file. Those behind the last
              that a chunk names are opaque: bytes that a user gave, under a name that may have "/" in it
              (`check_file_name`)
    dcp_metadata   size and crc32 of the stock `.metadata` that was written with this step

A payload starts at offset + head_bytes and is as long as its dtype and shape say; its strides are dense. The chunks of
a tensor make it up, each element once, and an object has one. No member stands twice, and no number is NaN or infinite.
The presence of the file is the commit: it is created, never overwritten, after all it names is durable. A reader
refuses a version it does not know.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, repeat, starmap
from typing import Any

import numpy as np
import torch

from asyncckpt.chunks import (
    HUGE,
    Checksums,
    ChunkTable,
    Key,
    Keys,
    Numbers,
    Path,
    Placement,
    numbers,
)
from asyncckpt.errors import CheckpointError
from asyncckpt.framing import Layout, crc32
from asyncckpt.tiling import MAX_DIMS, check_tiling

FORMAT, VERSION = "asyncckpt", 1
_CRC_MEMBER = re.compile(rb',"crc32":"([0-9a-f]{8})"\}\Z')
_MEMBERS = {
    "head", "keys", "paths", "kinds", "chunks", "boxes", "layouts", "payload_crc32", "item_crc32", "block_crc32",
    "files", "dcp_metadata", "crc32",
}  # fmt: skip
_WRONG = (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError, OverflowError)
_ATTEMPT = re.compile(r"([0-9]{8,18})-[0-9a-f]{16}\Z")
_DATA_NAME = re.compile(r"(?!\.)[A-Za-z0-9_.-]+\Z")
_PART = re.compile(r"(?!\.{1,2}\Z)(?!\.tmp-)[A-Za-z0-9_.=+@,()~ -]{1,200}\Z")
_TAKEN = re.compile(r"(__[0-9]+_[0-9]+\.distcp|dead)(/|\Z)")
MAX_NAME = 512
"""Letters of a file's name; a key of S3 has 1024 bytes at most, the run's prefix among them."""
_NAMES_PER_CALL = 8192
"""What one call into C turns into text: about 1 ms, for which it holds the GIL beside a training loop."""

Columns = Mapping[str, Sequence[Any] | Numbers]


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
class FileRecord:
    name: str
    size: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Manifest:
    head: Head
    keys: Mapping[str, Key]
    chunks: ChunkTable
    files: Sequence[FileRecord]
    dcp_metadata_size: int
    dcp_metadata_crc32: int

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def opaque(self) -> list[FileRecord]:
        """The files that a user gave."""
        return list(self.files[len(self.chunks.placement.files) :])


def check_file_name(name: Any) -> str:
    """`name` as it is. ValueError unless an opaque file may have it, in every storage: parts of letters, digits and
    `_.=+@,()~ -` between slashes, none of them "." or ".." or with the start of a storage's own (".tmp-"), and no name
    of ours at the beginning."""
    if type(name) is not str or len(name) > MAX_NAME or not all(map(_PART.match, name.split("/"))):
        raise ValueError(
            f"{name!r:.600} is no name for a file: it takes at most {MAX_NAME} ASCII letters, digits, and any of "
            '"_.=+@,()~ -", in parts of at most 200 with "/" between them; "." and ".." are none, nor is ".tmp-..."'
        )
    if _TAKEN.match(name):
        raise ValueError(f"{name!r} is no name for a file: files of our own are called so. Put it into a folder")
    return name


def check_folders(names: Iterable[str]) -> None:
    """ValueError if a name is also the folder of another: a file system cannot hold both."""
    known = set(names)
    for name in known:
        parts = name.split("/")
        for end in range(1, len(parts)):
            if (folder := "/".join(parts[:end])) in known:
                raise ValueError(f"{folder!r} is a file, and {name!r} lies in a folder of that name")


def encode_manifest(manifest: Manifest) -> bytes:
    """With the keys of an earlier call, what has not changed since is taken from there."""
    keys = Keys.of(manifest.keys)
    _check_order(manifest.chunks.placement, manifest.files)
    members = [
        b'"head":' + _dumps({"format": FORMAT, "version": VERSION, **asdict(manifest.head)}),
        keys.kept.get("text", (), lambda: _keys_text(keys)),
        _placement_text(manifest.chunks.placement, keys),
        _checksums_text(manifest.chunks),
        b'"files":{%b}' % _members(_file_columns(manifest.files)),
        b'"dcp_metadata":' + _dumps({"size": manifest.dcp_metadata_size, "crc32": manifest.dcp_metadata_crc32}),
    ]
    body = [b"{", members[0]]
    for member in members[1:]:
        body += b",", member
    checksum = functools.reduce(lambda value, piece: crc32(piece, value), body, 0)
    return b"".join([*body, b',"crc32":"%08x"}' % checksum])


def decode_manifest(data: bytes) -> Manifest:
    """Raises ManifestError for anything that is not, byte for byte, what `encode_manifest` wrote."""
    check_crc(data)
    try:
        document = json.loads(
            data.decode("ascii"), object_pairs_hook=members_once, parse_constant=_finite, parse_float=_finite
        )
        head = _decode_head(document)
        box = _numbers(document["chunks"]["box"], low=-1)
        keys = _decode_keys(document)
        files = _decode_files(document["files"])
        placement = _decode_placement(document, keys.fqns, files)
        _check_names(files, len(placement.files))
        chunks = _decode_chunks(document, placement)
        layouts = [layout for layout, _ in placement.layouts]
        check_tiling(keys, placement.key, box, list(map(tuple, document["boxes"])), placement.layout, layouts)
        stock = document["dcp_metadata"]
        manifest = Manifest(head, keys, chunks, files, _natural(stock["size"]), _natural(stock["crc32"]))
    except _WRONG as exc:
        raise ManifestError(f"its structure is wrong: {type(exc).__name__}: {str(exc)[:500]}") from exc
    return manifest


def check_crc(data: bytes) -> None:
    """That the bytes are those of a whole manifest: ManifestError."""
    found = _CRC_MEMBER.search(data, max(0, len(data) - 32))
    if found is None:
        raise ManifestError("it is cut short or is no manifest: the closing checksum is missing")
    if crc32(memoryview(data)[: found.start()]) != int(found[1], 16):
        raise ManifestError(f"its bytes do not have the checksum {found[1].decode()} that it states")


def decode_head(start: bytes) -> Head | None:
    """The head, off the first bytes of a manifest; None: they end before it does. Only `check_crc` of all of it tells
    whether it is what was written. ManifestError: these are no first bytes of one."""
    opening = b'{"head":'
    if not start.startswith(opening):
        raise ManifestError(f"it begins with {start[:16]!r}")
    try:
        document, _ = _DECODER.raw_decode(start[len(opening) :].decode("ascii"))
    except ValueError:
        return None
    try:
        return _made_head(document)
    except _WRONG as exc:
        raise ManifestError(f"its head is wrong: {type(exc).__name__}: {str(exc)[:500]}") from exc


def decode_file_sizes(end: bytes) -> dict[str, int] | None:
    """{name: size} of the files, off the last bytes of a manifest, as `decode_head`; None: they begin before these."""
    opening = b',"files":'
    if (at := end.rfind(opening + b"{")) < 0:  # inside a text the quotes would have backslashes
        return None
    try:
        document, _ = _DECODER.raw_decode(end[at + len(opening) :].decode("ascii"))
        return {file.name: file.size for file in _decode_files(document)}
    except _WRONG as exc:
        raise ManifestError(f"its list of files is wrong: {type(exc).__name__}: {str(exc)[:500]}") from exc


def members_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Which of two members of one name holds differs from reader to reader."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member stands there twice")
    return members


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} where a number belongs")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=members_once, parse_constant=_finite, parse_float=_finite)


def _decode_head(document: Mapping[str, Any]) -> Head:
    made = _made_head(document["head"])
    if document.keys() != _MEMBERS:
        raise ValueError(f"it has the members {sorted(document)}")
    return made


def _made_head(document: Mapping[str, Any]) -> Head:
    head = dict(document)
    made_by = head.pop("format"), head.pop("version")
    if made_by != (FORMAT, VERSION) or type(made_by[1]) is not int:
        raise ValueError(f"format {made_by[0]!r} version {made_by[1]!r} is newer")
    made = Head(**head)
    for number in (made.step, made.sequence, made.world_size):
        _natural(number)
    for text in (made.save_id, made.torch, made.asyncckpt, made.time, made.attempt):
        if type(text) is not str:
            raise TypeError(f"{type(text).__name__} where a text belongs")
    if (found := _ATTEMPT.match(made.attempt)) is None or int(found[1]) != made.sequence:
        raise ValueError(f"attempt {made.attempt!r} of sequence {made.sequence}")
    if type(made.metadata) is not dict or type(made.metrics) is not dict:
        raise TypeError("metadata and metrics are no objects")
    if not {int, float}.issuperset(map(type, made.metrics.values())):
        raise ValueError("metrics are no numbers")
    if not math.isfinite(made.time_s):
        raise ValueError(f"time {made.time!r}")
    return made


class _ColumnText:
    """JSON of a column, of which only slices that differ from last time are written again."""

    def __init__(self) -> None:
        self._values = numbers([])
        self._pieces: list[bytes] = []
        self._text = b"[]"

    def of(self, values: Numbers) -> bytes:
        if self._values is not values:
            slices = [slice(start, start + _NAMES_PER_CALL) for start in range(0, len(values), _NAMES_PER_CALL)]
            self._pieces = [
                piece if np.array_equal(self._values[part], values[part]) else _dumps(values[part].tolist())[1:-1]
                for part, piece in zip(slices, chain(self._pieces, repeat(b"")), strict=False)
            ]
            self._values, self._text = values, b"[%b]" % b",".join(self._pieces)
        return self._text


def _keys_text(keys: Keys) -> bytes:
    """The members "keys", "paths" and "kinds"."""
    rows: dict[Path, int] = {}
    path = [rows.setdefault(_cuts(*pair), len(rows)) for pair in zip(keys.fqns, keys.paths, strict=True)]
    columns: Columns = {"fqn": keys.fqns, "path": path, "kind": keys.kind}
    return b'"keys":{%b},"paths":%b,"kinds":%b' % (_members(columns), _column(list(rows)), _column(keys.kinds))


def _checksums_text(chunks: ChunkTable) -> bytes:
    """The members "payload_crc32", "item_crc32" and "block_crc32"."""
    in_blocks = np.flatnonzero(chunks.placement.num_blocks).tolist()
    blocks = b"".join(np.array(chunks.blocks[number], ">u4").tobytes() for number in in_blocks)
    crcs = _hex(chunks.crc32), _hex(chunks.item_crc32), blocks.hex().encode()
    return b'"payload_crc32":"%b","item_crc32":"%b","block_crc32":"%b"' % crcs


def _placement_text(placement: Placement, keys: Keys) -> bytes:
    """The members "chunks", "boxes" and "layouts"."""
    kept = keys.kept
    box, boxes = kept.get("box", (placement.offsets,), lambda: _distinct(placement.offsets))
    kept.get("tiled", (placement.offsets, placement.layouts, placement.layout), lambda: _check_written(keys, placement))
    layouts = kept.get("layouts", (placement.layouts,), lambda: _column(_layout_rows(placement)))
    columns = {
        "key": keys.numbers_of(placement),
        "box": box,
        "layout": placement.layout,
        "file": placement.file,
        "offset": placement.offset,
        "length": placement.length,
    }
    texts = (
        b'"%b":%b' % (name.encode(), kept.get(f"column {name}", (), _ColumnText).of(column))
        for name, column in columns.items()
    )
    return b'"chunks":{%b},"boxes":%b,"layouts":%b' % (b",".join(texts), boxes, layouts)


def _check_written(keys: Keys, placement: Placement) -> bool:
    """ValueError if a reader would refuse the chunks: a planner of a user's may leave some out."""
    boxes = dict.fromkeys(box for box in placement.offsets if box is not None)
    box, _ = keys.kept.get("box", (placement.offsets,), lambda: _distinct(placement.offsets))
    layouts = [layout for layout, _ in placement.layouts]
    check_tiling(keys, keys.numbers_of(placement), box, list(boxes), placement.layout, layouts)
    return True


def _distinct(offsets: Sequence[tuple[int, ...] | None]) -> tuple[Numbers, bytes]:
    """(the column "box", "boxes")"""
    boxes = list(dict.fromkeys(box for box in offsets if box is not None))
    number_of = {None: -1} | {box: number for number, box in enumerate(boxes)}
    return numbers(map(number_of.__getitem__, offsets)), _column(boxes)


def _layout_rows(placement: Placement) -> list[tuple[object, ...]]:
    return [(layout.dtype, layout.shape, layout.stride, head_bytes) for layout, head_bytes in placement.layouts]


def encode_records(chunks: ChunkTable, files: Sequence[FileRecord], known: Placement | None = None) -> bytes:
    """What one rank tells the coordinator after writing, as two lines: what its chunks are, the same for as long as its
    placements are alike, and where they lie this time.

    files: the opaque ones last. known: of the last report, if the coordinator surely has it. What has not changed since
    then is left out.
    """
    placement = chunks.placement
    _check_order(placement, files)
    line = b"" if known is not None and placement.is_like(known) else _line(placement)
    columns = [] if known is placement else [placement.file, placement.offset, placement.length]
    places = np.array(columns, "<i8").tobytes().hex().encode()
    members = _checksums_text(chunks), _members(_file_columns(files))
    num_opaque = len(files) - len(placement.files)
    return b'%b\n{"places":"%b",%b,"files":{%b},"num_opaque":%d}' % (line, places, *members, num_opaque)


def _line(placement: Placement) -> bytes:
    def make() -> bytes:
        box, boxes = _distinct(placement.offsets)
        chunks = _members({"key": placement.key, "box": box, "layout": placement.layout})
        tables = _column(placement.fqns), boxes, _column(_layout_rows(placement))
        return b'{"chunks":{%b},"fqn":%b,"boxes":%b,"layouts":%b}' % (chunks, *tables)

    return placement.kept.get("line", (), make)


def decode_records(data: bytes, before: Placement | None = None) -> tuple[ChunkTable, list[FileRecord]]:
    """before: of the same rank's last report, of which is kept what has not changed. Raises ManifestError."""
    try:
        return _decode_records(data, before)
    except _WRONG as exc:
        raise ManifestError(f"a rank's report is wrong: {type(exc).__name__}: {str(exc)[:500]}") from exc


def _decode_records(data: bytes, before: Placement | None) -> tuple[ChunkTable, list[FileRecord]]:
    line, rest = data.split(b"\n", 1)
    document = json.loads(rest)
    files = _decode_files(document["files"])
    names = tuple(file.name for file in files[: len(files) - _natural(document["num_opaque"])])
    if before is not None and not line and not document["places"]:
        _check_places(before, files)
        return _decode_chunks(document, before), files
    file, offset, length = np.frombuffer(bytes.fromhex(document["places"]), "<i8").astype(np.int64).reshape(3, -1)
    if before is None or (line and _line(before) != line):
        contents = json.loads(line)
        placement = Placement(*_decode_contents(contents, tuple(contents["fqn"])), names, file, offset, length)
        placement.kept.get("line", (), lambda: line)
    elif before.files == names and np.array_equal([before.file, before.offset, before.length], [file, offset, length]):
        placement = before
    else:
        placement = before.moved(names, file, offset, length)
    _check_places(placement, files)
    return _decode_chunks(document, placement), files


def _check_order(placement: Placement, files: Sequence[FileRecord]) -> None:
    """Opaque ones come last, and a placement does not know them."""
    if placement.files != tuple(file.name for file in files[: len(placement.files)]):
        raise ValueError("the files of a placement and their records differ")


def _file_columns(files: Sequence[FileRecord]) -> Columns:
    return {
        "name": [file.name for file in files],
        "size": [file.size for file in files],
        "crc32": [file.crc32 for file in files],
    }


def _cuts(fqn: str, path: Path) -> tuple[Any, ...]:
    """A path as a row of "paths"."""
    parts: Any = path
    try:
        cuts, joined = tuple(map(len, parts)), ".".join(parts)
    except TypeError:  # an int, which is a place in a list
        cuts = tuple(len(part) if isinstance(part, str) else -len(str(part)) for part in path)
        joined = ".".join(map(str, path))
    return cuts if joined == fqn else (path,)


@dataclass(frozen=True, slots=True)
class _Paths(Sequence[Path]):
    """The paths of keys, cut out of the fqns when asked."""

    fqns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    row: Numbers

    def __len__(self) -> int:
        return len(self.fqns)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[each] for each in range(len(self))[number]]
        row = self.rows[self.row[number]]
        if row and isinstance(row[0], tuple):
            return row[0]
        fqn, parts, at = self.fqns[number], [], 0
        for length in row:
            part = fqn[at : at + abs(length)]
            parts.append(part if length >= 0 else int(part))
            at += abs(length) + 1
        return tuple(parts)


def _decode_keys(document: Mapping[str, Any]) -> Keys:
    columns = document["keys"]
    fqns = tuple(columns["fqn"])
    if not set(map(type, fqns)) <= {str} or len(set(fqns)) != len(fqns):
        raise ValueError("a key is no name, or stands there twice")
    kinds = tuple((_dtype(dtype), _shape(shape)) for dtype, shape in document["kinds"])
    rows = tuple(map(_decode_row, document["paths"]))
    row = _numbers(columns.pop("path"), stop=len(rows))
    kind = _numbers(columns.pop("kind"), low=-1, stop=len(kinds))
    if not len(fqns) == len(row) == len(kind):
        raise ValueError("the columns of the keys differ in length")
    keys = Keys(fqns, _Paths(fqns, rows, row), kinds, kind)
    _check_paths(fqns, rows, row)
    return keys


def _decode_row(row: Any) -> tuple[Any, ...]:
    if len(row) == 1 and isinstance(row[0], list):
        row = row[0]
        if not set(map(type, row)) <= {int, str}:
            raise ValueError(f"the path {row!r}")
        return (tuple(row),)
    if not set(map(type, row)) <= {int}:
        raise ValueError(f"the path {row!r}")
    return tuple(row)


def _check_paths(fqns: tuple[str, ...], rows: tuple[tuple[Any, ...], ...], row: Numbers) -> None:
    """Each fqn is as long as its path says, and ints are where the path says so."""
    cut = numbers(-1 if row and isinstance(row[0], tuple) else sum(map(abs, row)) + len(row) - 1 for row in rows)[row]
    lengths = numbers(map(len, fqns))
    wrong = np.flatnonzero((cut != lengths) & (cut >= 0))
    if len(wrong):
        raise ValueError(f"the path of {fqns[wrong[0]]!r} is not as long as it is")
    has_int = np.array([any(isinstance(part, int) and part < 0 for part in row) for row in rows], bool)
    paths = _Paths(fqns, rows, row)
    for number in np.flatnonzero(has_int[row]).tolist():
        paths[number]


def _decode_files(columns: Mapping[str, Any]) -> list[FileRecord]:
    names, sizes, crcs = columns["name"], columns["size"], columns["crc32"]
    files = list(starmap(FileRecord, zip(names, _numbers(sizes).tolist(), _numbers(crcs).tolist(), strict=True)))
    if not set(map(type, names)) <= {str} or len(set(names)) != len(files):
        raise ValueError("a file name is none, or stands there twice")
    return files


def _check_names(files: Sequence[FileRecord], num_data: int) -> None:
    for file in files[:num_data]:
        if not _DATA_NAME.match(file.name):
            raise ValueError(f"file name {file.name!r}")
    for file in files[num_data:]:
        check_file_name(file.name)
    check_folders(file.name for file in files)


Contents = tuple[
    tuple[str, ...], Numbers, Sequence[tuple[int, ...] | None], tuple[tuple[Layout, int], ...], Numbers
]  # fmt: skip


def _decode_contents(document: Mapping[str, Any], fqns: tuple[str, ...]) -> Contents:
    """What a Placement begins with."""
    columns = document["chunks"]
    boxes = [*map(_shape, document["boxes"]), None]
    layouts = tuple(
        (_layout(dtype, shape, stride), _natural(head_bytes))
        for dtype, shape, stride, head_bytes in document["layouts"]
    )
    key = _numbers(columns.pop("key"), stop=len(fqns))
    box = _numbers(columns.pop("box"), low=-1, stop=len(boxes) - 1)
    layout = _numbers(columns.pop("layout"), low=-1, stop=len(layouts))
    if not len(key) == len(box) == len(layout):
        raise ValueError("the columns of the chunks differ in length")
    dims_of_boxes = numbers([*(len(offsets) for offsets in boxes if offsets is not None), -1])
    dims_of_layouts = numbers([*(len(frame.shape) for frame, _ in layouts), -1])
    for number in np.flatnonzero(dims_of_boxes[box] != dims_of_layouts[layout]):
        raise ValueError(f"a chunk of {fqns[key[number]]!r} has a box of other dimensions than its layout")
    return fqns, key, list(map(boxes.__getitem__, box.tolist())), layouts, layout


def _decode_placement(document: Mapping[str, Any], fqns: tuple[str, ...], files: Sequence[FileRecord]) -> Placement:
    columns = document["chunks"]
    contents = _decode_contents(document, fqns)
    file, offset, length = (_numbers(columns.pop(name)) for name in ("file", "offset", "length"))
    # Not more, as what is made of a placement (`.metadata`) has the names of its files.
    names = tuple(record.name for record in files[: int(file.max()) + 1 if len(file) else 0])
    placement = Placement(*contents, names, file, offset, length)
    _check_places(placement, files)
    return placement


def _check_places(placement: Placement, files: Sequence[FileRecord]) -> None:
    """Each item lies inside its file and each payload inside its item: a reader may rely on both."""
    file, offset, length = placement.file, placement.offset, placement.length
    if not len(placement) == len(file) == len(offset) == len(length):
        raise ValueError("the columns of the chunks differ in length")
    if len(file) and not 0 <= int(file.min()) <= int(file.max()) < len(placement.files):
        raise IndexError(f"file {file.min()} to {file.max()} of {len(placement.files)}")
    sizes = numbers(record.size for record in files)[file]
    for number in np.flatnonzero((offset < 0) | (length < 0) | (offset > sizes) | (length > sizes - offset)):
        end, name = int(offset[number]) + int(length[number]), placement.files[file[number]]
        raise ValueError(f"an item of {placement.key_of(number)!r} ends at {end}, {name} at {sizes[number]}")
    for number in np.flatnonzero(placement.head_bytes > length - placement.payload_bytes):
        raise ValueError(f"the payload of {placement.key_of(number)!r} is longer than its item")


def _decode_chunks(document: Mapping[str, Any], placement: Placement) -> ChunkTable:
    crcs, item_crcs, block_crcs = (_unhex(document[name]) for name in ("payload_crc32", "item_crc32", "block_crc32"))
    if not len(crcs) == len(item_crcs) == len(placement):
        raise ValueError(f"{len(placement)} chunks have {len(crcs)} and {len(item_crcs)} checksums")
    # Clipped, so that the sum of what a hostile layout says does not overflow to the right one.
    counts = np.minimum(placement.num_blocks, len(block_crcs) + 1)
    numbers = np.flatnonzero(counts)
    ends = np.cumsum(counts[numbers])
    if (int(ends[-1]) if len(ends) else 0) != len(block_crcs):
        raise ValueError(f"there are {len(block_crcs)} block checksums")
    blocks = np.split(block_crcs, ends[:-1]) if len(ends) else []
    return ChunkTable(
        placement, crcs, item_crcs,
        {number: tuple(part.tolist()) for number, part in zip(numbers.tolist(), blocks, strict=True)},
    )  # fmt: skip


def _dtype(name: Any) -> str:
    if type(name) is not str:
        raise TypeError(f"{type(name).__name__} where the name of a dtype belongs")
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(f"unknown dtype {name!r}; a newer torch may know it")  # noqa: TRY004
    return name


def _layout(dtype: Any, shape: Any, stride: Any) -> Layout:
    layout = Layout(_dtype(dtype), _shape(shape), _shape(stride))
    if not layout.is_dense:
        raise ValueError(f"the strides {stride} of a payload of shape {shape} leave gaps in it, or overlap")
    return layout


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < HUGE:
        raise ValueError(f"{value!r} where a count, an index or an offset belongs")
    return value


def _shape(values: Any) -> tuple[int, ...]:
    if type(values) is not list or len(values) > MAX_DIMS:
        raise TypeError(f"{type(values).__name__} where at most {MAX_DIMS} numbers belong")
    return tuple(map(_natural, values))


def _numbers(values: Any, *, low: int = 0, stop: int = HUGE) -> Numbers:
    """A column of whole numbers in [low, stop), checked."""
    if type(values) is not list:
        raise TypeError(f"{type(values).__name__} where a column belongs")
    if not set(map(type, values)) <= {int}:
        wrong = next(value for value in values if type(value) is not int)
        raise ValueError(f"{wrong!r} where a count, an index or an offset belongs")
    numbers = np.array(values, np.int64)
    if len(numbers) and int(numbers.min()) < low:
        raise ValueError(f"{numbers.min()} where a count, an index or an offset belongs")
    if len(numbers) and int(numbers.max()) >= stop:
        raise IndexError(f"{numbers.max()} of {stop}")
    return numbers


def _hex(crcs: Checksums) -> bytes:
    return crcs.astype(">u4").tobytes().hex().encode()


def _unhex(text: Any) -> Checksums:
    if type(text) is not str or len(text) % 8:
        raise ValueError("checksums are not of eight hex digits each")
    return np.frombuffer(bytes.fromhex(text), ">u4").astype(np.uint32)


def _members(columns: Columns) -> bytes:
    return b",".join(b'"%b":%b' % (name.encode(), _column(column)) for name, column in columns.items())


def _column(values: Sequence[Any] | Numbers) -> bytes:
    pieces = []
    for start in range(0, len(values), _NAMES_PER_CALL):
        piece = values[start : start + _NAMES_PER_CALL]
        pieces.append(_dumps(piece.tolist() if isinstance(piece, np.ndarray) else piece)[1:-1])
    return b"[" + b",".join(pieces) + b"]"


def _dumps(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
