"""Files of others into a step of ours: safetensors, in one file or several, or one of torch.save.

What the files hold is known from their headers (of torch.save's: from its pickle, which runs nothing), so the step is
laid out before a tensor is read, and each goes from source to target in pieces. The step is committed as any other; who
restores it, with DTensors on however many ranks, cannot tell it from one that was saved. Called by the command line
(cli/formats.py) and by users; export.py is the way back.
"""

from __future__ import annotations

import io
import json
import struct
import threading
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import MetadataIndex

from asyncckpt.chunks import ChunkTable, Key, Keys, Numbers, Path, payload_bytes_of
from asyncckpt.commit import commit_step, make_manifest
from asyncckpt.errors import DamagedStepError, SaveError, UnsafeObjectError
from asyncckpt.export import Rename, renaming
from asyncckpt.framing import Layout, encode_object
from asyncckpt.manifest import Head
from asyncckpt.objects import check_object, load_structure
from asyncckpt.restore import join
from asyncckpt.safetensors_file import Stored, header_length, read_header
from asyncckpt.shard import VIEW_BYTES, Regions, in_views, payload_view, write_shard
from asyncckpt.shard_layout import ALIGNED_PAYLOAD_BYTES, ShardLayout
from asyncckpt.steps import attempt_name, check_sequence, new_token, read_listing, summarise
from asyncckpt.storage import Storage, check_path
from asyncckpt.stream import Buffers
from asyncckpt.verify import RangeFile, Tell
from asyncckpt.version import __version__
from stagers.layout import contiguous_stride

AHEAD = 4
"""Pieces of VIEW_BYTES that are read before they are asked for."""
BUFFER_BYTES = 1 << 20  # of a torch file's directory and small records


@dataclass(frozen=True, slots=True)
class Imported:
    """num_bytes: of the tensors, each counted once."""

    step: int
    num_tensors: int
    num_objects: int
    num_bytes: int


# -- safetensors


def import_safetensors(
    source: Storage,
    path: str,
    target: Storage,
    step: int = 0,
    *,
    prefix: str = "",
    rename: Rename = {},  # noqa: B006
    metadata: Mapping[str, Any] | None = None,
    tell: Tell = lambda num_bytes: None,
) -> Imported:
    """Make safetensors files a committed step of the run at `target`.

    path: below `source`, of a file, of an index (`model.safetensors.index.json`), or of a folder that holds the one or
    the other ("" for the root). rename: as in `export_safetensors`, of the names in the files; the inverse of its pairs
    gives the old names back. prefix: the key below which the tensors go: with "model" they restore into
    {"model": model.state_dict()}. Tied names that an export left out are tied again.
    metadata: of the step. tell: hears of bytes that were read.

    Raises SaveError (there is such a step: none is overwritten), ValueError (a file is no safetensors, or does not fit
    its index), OSError; then there is no step.
    """
    new_name = renaming(rename)
    tensors: dict[str, _Tensor] = {}
    ties: dict[str, str] = {}
    for file, wanted in _safetensors_at(source, path).items():
        stored, notes = _header_at(source, file)
        if wanted is not None and (lost := sorted(wanted - stored.keys())):
            raise ValueError(f"{file} at {source.url} lacks {lost[0]!r}, which the index says it has")
        for name, (kind, offset) in stored.items():
            if wanted is not None and name not in wanted:
                continue
            layout = Layout(str(kind.dtype)[6:], kind.shape, contiguous_stride(kind.shape))
            _add(tensors, prefix, new_name(name), _Tensor(file, offset, layout))
        names = stored.keys() if wanted is None else wanted
        ties |= {name: kept for name, kept in notes.items() if kept in names and name not in stored}
    for name, kept in ties.items():
        if _key(prefix, new_name(name)) not in tensors:
            _add(tensors, prefix, new_name(name), tensors[_key(prefix, new_name(kept))])
    paths: dict[str, Path] = {key: (prefix, key.removeprefix(f"{prefix}.")) if prefix else (key,) for key in tensors}
    return _Import(source, target, step, metadata or {}, tell).run(paths, tensors, {})


def _key(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _add(tensors: dict[str, _Tensor], prefix: str, name: str, tensor: _Tensor) -> None:
    key = _key(prefix, name)
    if key in tensors:
        raise ValueError(f"two tensors would have the key {key!r}. Nothing was written. Rename one of the two")
    tensors[key] = tensor


def _safetensors_at(source: Storage, path: str) -> dict[str, set[str] | None]:
    """{file: the tensors wanted of it; None: all}"""
    if path.endswith(".safetensors"):
        return {path: None}
    if path.endswith(".index.json"):
        return _indexed(source, path)
    found = sorted(name for name in source.list_files(path) if "/" not in name.removeprefix(f"{path}/"))
    files = [name for name in found if name.endswith(".safetensors")]
    indices = [name for name in found if name.endswith(".safetensors.index.json")]
    if len(indices) == 1:
        return _indexed(source, indices[0])
    if len(files) == 1 and not indices:
        return {files[0]: None}
    raise ValueError(
        f"{join(source.url, path)} holds {len(files)} files of safetensors and {len(indices)} indices. Nothing was "
        "written. Name the file or the index to be imported"
    )


def _indexed(source: Storage, path: str) -> dict[str, set[str] | None]:
    folder, found = path.rpartition("/")[0], dict[str, set[str] | None]()
    try:
        for name, file in json.loads(source.read_file(path))["weight_map"].items():
            wanted = found.setdefault(join(folder, check_path(file)), set())
            assert wanted is not None
            wanted.add(name)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as exc:
        raise ValueError(f"{path} at {source.url} is no index of safetensors files: {str(exc)[:200]}") from exc
    return found


def _header_at(source: Storage, path: str) -> tuple[dict[str, Stored], dict[str, str]]:
    file_bytes = _size_of(source, path)
    try:
        length = header_length(_read(source, path, 0, 8), file_bytes)
        return read_header(_read(source, path, 0, 8 + length), file_bytes)
    except (ValueError, EOFError) as exc:
        raise ValueError(f"{path} at {source.url} is no whole file of safetensors: {exc}") from exc


def _size_of(source: Storage, path: str) -> int:
    size = source.list_files(path.rpartition("/")[0]).get(path)
    if size is None:
        raise FileNotFoundError(f"there is no file {path} at {source.url}")
    return size


def _read(source: Storage, path: str, offset: int, size: int) -> bytes:
    data = bytearray(size)
    source.read_into(path, [(offset, memoryview(data))])
    return bytes(data)


# -- torch.save


def import_torch(
    source: Storage,
    path: str,
    target: Storage,
    step: int = 0,
    *,
    prefix: str = "",
    rename: Rename = {},  # noqa: B006
    metadata: Mapping[str, Any] | None = None,
    safe_globals: Iterable[Any] = (),
    tell: Tell = lambda num_bytes: None,
) -> Imported:
    """Make a file of torch.save, which holds a nested dict, a committed step of the run at `target`.

    Nothing in it is run: objects are what `weights_only` and `safe_globals` allow, else UnsafeObjectError. The zip's
    CRC32s, where it has them, are compared for every tensor that has a storage to itself. prefix: the key below which
    all goes. rename: as in `import_safetensors`, of keys joined by dots; what it changes is flat below the prefix.
    Otherwise as there.
    """
    records = _records_of(source, path)
    sizes = {name: record.size for name, record in records.items()}
    if "data.pkl" not in records:
        raise ValueError(f"{path} at {source.url} is no file of torch.save: it has no record data.pkl")
    byteorder = records.get("byteorder")
    if byteorder is not None and _read(source, path, byteorder.offset, byteorder.size) != b"little":
        raise ValueError(f"{path} at {source.url} was saved on a machine of another byte order. Load it with torch")
    pickled = _read(source, path, records["data.pkl"].offset, records["data.pkl"].size)
    state, record_of = load_structure(pickled, sizes, safe_globals)
    if not isinstance(state, dict):
        raise ValueError(f"{path} at {source.url} holds a {type(state).__name__} and no dict, which a step is made of")  # noqa: TRY004
    file = _TorchSource(source, path, records, record_of)
    flat, places = flatten_state_dict({prefix: state} if prefix else state)
    new_name, paths = renaming(rename), dict[str, Path]()
    tensors: dict[str, _Tensor] = {}
    objects: dict[str, bytes] = {}
    for old, value in flat.items():
        name = old.removeprefix(f"{prefix}.") if prefix else old
        key = _key(prefix, new_name(name))
        if key in paths:
            raise ValueError(f"two values would have the key {key!r}. Nothing was written. Rename one of the two")
        paths[key] = tuple(places[old]) if key == old else (prefix, new_name(name)) if prefix else (new_name(name),)
        if isinstance(value, torch.Tensor):
            tensors[key] = file.tensor(key, value)
        else:
            whole = file.filled(value)
            check_object(whole, safe_globals, key)
            objects[key] = encode_object(whole)
    return _Import(source, target, step, metadata or {}, tell).run(paths, tensors, objects)


@dataclass(frozen=True, slots=True)
class _Record:
    """Of a zip: where its bytes are. crc32: 0 where torch was told to write none."""

    offset: int
    size: int
    crc32: int


def _records_of(source: Storage, path: str) -> dict[str, _Record]:
    """By their names without the archive's. Reads the directory, and of each record its head."""
    size = _size_of(source, path)
    try:
        with zipfile.ZipFile(io.BufferedReader(RangeFile(source, path, 0, size), BUFFER_BYTES)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OverflowError, EOFError) as exc:
        raise ValueError(f"{path} at {source.url} is no file of torch.save: {exc}") from exc
    heads = bytearray(_LOCAL_HEADER_BYTES * len(entries))
    views = [memoryview(heads)[at : at + _LOCAL_HEADER_BYTES] for at in range(0, len(heads), _LOCAL_HEADER_BYTES)]
    source.read_into(path, [(entry.header_offset, view) for entry, view in zip(entries, views, strict=True)])
    records: dict[str, _Record] = {}
    for entry, head in zip(entries, views, strict=True):
        start = entry.header_offset + _LOCAL_HEADER_BYTES + sum(struct.unpack_from("<HH", head, 26))
        is_plain = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
        name = entry.filename.partition("/")[2]
        if not is_plain or entry.flag_bits & 1 or start + entry.file_size > size or name in records:
            raise ValueError(f"{path} at {source.url} is no file of torch.save: record {entry.filename!r} is packed")
        records[name] = _Record(start, entry.file_size, entry.CRC)
    return records


_LOCAL_HEADER_BYTES = 30  # before the name and what is added to it


@dataclass(frozen=True, slots=True)
class _TorchSource:
    """The tensors of one file. record_of: {_cdata of a storage: its record's name}"""

    source: Storage
    path: str
    records: Mapping[str, _Record]
    record_of: Mapping[int, str]

    def tensor(self, key: str, meta: torch.Tensor) -> _Tensor:
        if meta.layout is not torch.strided or meta.is_quantized or meta.is_neg() or meta.is_conj():
            raise UnsafeObjectError(
                f"{key!r} is a sparse, quantized, negated or conjugated tensor, whose bytes are not its elements. "
                "Nothing was written. Load the file with torch, make it dense and save it again"
            )
        record = self.records[self.record_of[meta.untyped_storage()._cdata]]
        offset = record.offset + int(meta.storage_offset()) * meta.element_size()
        layout = Layout.of(meta)
        if layout.is_dense:
            crc = record.crc32 if record.size == meta.nbytes else 0
            return _Tensor(self.path, offset, layout, crc32=crc)
        span = sum((size - 1) * stride for size, stride in zip(meta.shape, meta.stride(), strict=True)) + 1
        dense = Layout(layout.dtype, layout.shape, contiguous_stride(layout.shape))
        return _Tensor(self.path, offset, dense, layout.stride, span * meta.element_size())

    def filled(self, value: Any) -> Any:
        """An object with the bytes of the tensors in it."""
        if isinstance(value, torch.Tensor):
            return self.tensor("", value).read(self.source)
        if type(value) in (list, tuple, set):
            return type(value)(map(self.filled, value))
        if isinstance(value, dict):
            return type(value)((self.filled(key), self.filled(inner)) for key, inner in value.items())
        return value


# -- the step


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Where its payload lies, as `layout` has it. strides, span: if it does not: those it has there, and of how many
    bytes. crc32: of the payload; 0: not known."""

    file: str
    offset: int
    layout: Layout
    strides: tuple[int, ...] | None = None
    span: int = 0
    crc32: int = 0

    @property
    def num_bytes(self) -> int:
        return payload_bytes_of(self.layout)

    def read(self, source: Storage) -> torch.Tensor:
        memory = bytearray(self.num_bytes if self.strides is None else self.span)
        if not self.num_bytes:
            return torch.empty(self.layout.shape, dtype=self.layout.torch_dtype)
        source.read_into(self.file, [(self.offset, memoryview(memory))])
        flat = torch.frombuffer(memory, dtype=self.layout.torch_dtype)
        strided = flat.as_strided(self.layout.shape, self.strides or self.layout.stride)
        return strided if self.strides is None else strided.contiguous()


@dataclass(frozen=True, slots=True)
class _Import:
    source: Storage
    target: Storage
    step: int
    metadata: Mapping[str, Any]
    tell: Tell

    def run(self, paths: Mapping[str, Path], tensors: Mapping[str, _Tensor], objects: Mapping[str, bytes]) -> Imported:
        sequence = self._sequence()
        head = Head(
            self.step, sequence, attempt_name(sequence, new_token()), uuid.uuid4().hex, 1, torch.__version__,
            __version__, dict(self.metadata),
        )  # fmt: skip
        rows = [tensors.get(key) for key in paths]
        first: dict[_Tensor, int] = {}
        same_as = [row if t is None or not t.num_bytes else first.setdefault(t, row) for row, t in enumerate(rows)]
        indices = [_index(key, tensor) for key, tensor in zip(paths, rows, strict=True)]
        layouts = [None if tensor is None else tensor.layout for tensor in rows]
        layout = ShardLayout(indices, layouts, same_as, rank=0, max_file_bytes=self.target.max_file_bytes)
        folder = f"{self.step}/{head.attempt}"
        try:
            with _Payloads(self.source, rows, self.tell) as payloads:
                items = [objects[key] for key in paths if key in objects]
                chunks, files = write_shard(self.target, folder, layout, payloads, items, Regions())
            self._check_crcs(indices, rows, chunks)
            keys = Keys.of({key: _key_of(path, tensors.get(key)) for key, path in paths.items()})
            manifest, stock = make_manifest(head, keys, chunks, files)
            commit_step(self.target, str(self.step), manifest, stock)
        except BaseException:
            with suppress(OSError):  # what stays is partial, never listed, and goes with the next commit of a run
                self.target.delete(self.target.list_files(folder))
            raise
        return Imported(self.step, len(tensors), len(objects), sum(tensor.num_bytes for tensor in first))

    def _check_crcs(self, indices: Sequence[MetadataIndex], rows: Sequence[_Tensor | None], chunks: ChunkTable) -> None:
        for index, tensor, crc in zip(indices, rows, chunks.crc32.tolist(), strict=True):
            if tensor is not None and tensor.crc32 not in (0, crc):
                raise DamagedStepError(
                    f"{tensor.file} at {self.source.url} is damaged: the bytes of {index.fqn!r} have CRC32 {crc:08x}, "
                    f"its zip says {tensor.crc32:08x}. No step was made"
                )

    def _sequence(self) -> int:
        self.target.check_writable()
        steps = read_listing(self.target.list_files())
        there = steps.get(self.step)
        if there is not None and (there.sequence is not None or there.is_foreign):
            raise SaveError(
                f"there is a step {self.step} at {self.target.url} already, and an import overwrites none. Nothing was "
                "written. Give another number",
                step=self.step, url=self.target.url,
            )  # fmt: skip
        return check_sequence(summarise(steps).next_sequence)


def _index(key: str, tensor: _Tensor | None) -> MetadataIndex:
    return MetadataIndex(key, None if tensor is None else torch.Size([0] * len(tensor.layout.shape)))


def _key_of(path: Path, tensor: _Tensor | None) -> Key:
    return Key(path, None, None) if tensor is None else Key(path, tensor.layout.dtype, tensor.layout.shape)


@dataclass
class _Payloads:
    """The tensors' bytes (shard.Payloads), read as they are asked for, and large ones some pieces ahead.

    Never on the thread that asks: obstore pulls what it writes on a thread of its own, on which it cannot read.
    """

    source: Storage
    rows: Sequence[_Tensor | None]
    tell: Tell
    _order: list[tuple[int, int]] = field(default_factory=list)
    """(row, where in it) of each piece, as the writer will ask for them."""
    _number: dict[tuple[int, int], int] = field(default_factory=dict)
    _reading: dict[int, Future[memoryview]] = field(default_factory=dict)
    _begun: int = 0

    def __post_init__(self) -> None:
        known = set[_Tensor]()
        for row, tensor in enumerate(self.rows):
            if tensor is None or tensor.strides or tensor.num_bytes < ALIGNED_PAYLOAD_BYTES or tensor in known:
                continue
            known.add(tensor)
            self._order += ((row, at) for at in range(0, tensor.num_bytes, VIEW_BYTES))
        self._number = {piece: number for number, piece in enumerate(self._order)}
        self._buffers = Buffers(VIEW_BYTES)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="asyncckpt-ahead")

    def __enter__(self) -> _Payloads:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def small(self, rows: Numbers) -> list[memoryview]:
        return self._pool.submit(self._read_small, rows).result()

    def _read_small(self, rows: Numbers) -> list[memoryview]:
        tensors = [self.rows[row] for row in rows.tolist()]
        views: dict[int, memoryview] = {}
        wanted: dict[str, list[tuple[int, memoryview]]] = {}
        for number, tensor in enumerate(tensors):
            assert tensor is not None
            if tensor.strides is not None:
                views[number] = payload_view(tensor.read(self.source))
            else:
                views[number] = memoryview(bytearray(tensor.num_bytes))
                wanted.setdefault(tensor.file, []).append((tensor.offset, views[number]))
        for file, ranges in wanted.items():
            self.source.read_into(file, sorted((pair for pair in ranges if len(pair[1])), key=lambda pair: pair[0]))
        self.tell(sum(map(len, views.values())))
        return [views[number] for number in range(len(tensors))]

    def large(self, row: int) -> Iterator[memoryview]:
        tensor = self.rows[row]
        assert tensor is not None
        if tensor.strides is not None:
            memory = payload_view(self._pool.submit(tensor.read, self.source).result())
            yield from in_views(memory)
            self.tell(len(memory))
            return
        for at in range(0, tensor.num_bytes, VIEW_BYTES):
            yield self._begin_at(self._number[row, at]).result()

    def _begin_at(self, number: int) -> Future[memoryview]:
        """The piece of that number; the reading of those behind it begins."""
        with self._lock:
            for ahead in range(max(number, self._begun), min(number + AHEAD, len(self._order))):
                self._reading[ahead] = self._pool.submit(self._read, *self._order[ahead])
            self._begun = max(self._begun, number + AHEAD)
            if number not in self._reading:  # files that are written side by side ask in no order
                self._reading[number] = self._pool.submit(self._read, *self._order[number])
            return self._reading.pop(number)

    def _read(self, row: int, at: int) -> memoryview:
        tensor = self.rows[row]
        assert tensor is not None
        view = self._buffers.take(min(VIEW_BYTES, tensor.num_bytes - at), 0)
        self.source.read_into(tensor.file, [(tensor.offset + at, view)])
        self.tell(len(view))
        return view
