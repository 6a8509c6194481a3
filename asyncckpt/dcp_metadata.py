"""The stock `.metadata` file: written for stock readers, read (by unpickle.py) only where it is not ours.

DCP keeps its index as a pickle. We write exactly torch's own classes, so that an unmodified torch needs nothing of
ours; of a foreign step we unpickle with an allow-list that holds those classes and nothing else (the globals that torch
2.13 was seen to write). Our own steps are restored from the manifest, never from here.
"""

from __future__ import annotations

import math
import pathlib
import pickle
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from asyncckpt.chunks import HUGE, Chunk, ChunkTable, Key, Keys, Numbers, Path, Placement
from asyncckpt.errors import UnsafeObjectError
from asyncckpt.unpickle import unpickle

_ALLOWED: dict[tuple[str, str], Any] = {
    (cls.__module__, cls.__qualname__): cls
    for cls in (
        Metadata,
        TensorStorageMetadata,
        TensorProperties,
        ChunkStorageMetadata,
        BytesStorageMetadata,
        MetadataIndex,
        StorageMeta,
        _MEM_FORMAT_ENCODING,
        _StorageInfo,
    )
} | {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): dict,
    # Written by FileSystemWriter as the checkpoint's id; never opened by us.
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib", "WindowsPath"): pathlib.PureWindowsPath,
}
_CLASSES_WITH_STATE = (
    Metadata, TensorStorageMetadata, TensorProperties, ChunkStorageMetadata, BytesStorageMetadata, MetadataIndex,
    StorageMeta, _StorageInfo,
)  # fmt: skip
T = TypeVar("T")


class _Rules:
    """What DCP's own classes need, as data: nothing is called but their constructors."""

    def find(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UnsafeObjectError(
            f"the stock metadata asks for {f'{module}.{name}'[:200]!r}, which DCP does not write. Nothing was run. "
            "If you trust the file, load the step with torch.distributed.checkpoint itself."
        )

    def call(self, function: Any, args: tuple[Any, ...]) -> Any:
        if function not in _ALLOWED.values():
            raise ValueError(f"a {type(function).__name__} is called")
        return function(*args)

    def new(self, cls: Any, args: tuple[Any, ...]) -> Any:
        if cls not in _CLASSES_WITH_STATE or args:
            raise ValueError("an object of no class of DCP's is made")
        return cls.__new__(cls)

    def build(self, instance: Any, state: Any) -> None:
        if type(instance) is TensorProperties:
            instance.__setstate__(state)  # type: ignore[no-untyped-call]
        elif type(instance) in _CLASSES_WITH_STATE and type(state) is dict:
            vars(instance).update(state)
        else:
            raise ValueError(f"a {type(instance).__name__} is given a state")

    def persistent(self, name: Any) -> Any:
        raise ValueError("it asks for what is stored elsewhere")


def unpickle_metadata(data: bytes) -> Metadata:
    """A stock `.metadata`, made anew of what was found to be of the right types, so that whatever walks through it can.

    UnsafeObjectError: it needs a global that DCP does not write; ValueError: it is broken.
    """
    try:
        return _checked(unpickle(data, _Rules()))
    except UnsafeObjectError:
        raise
    except Exception as exc:  # reading a pickle raises nearly anything on damaged bytes
        raise ValueError(f"no readable DCP metadata: {type(exc).__name__}: {str(exc)[:500]}") from exc


def _checked(found: Any) -> Metadata:
    found = _instance(found, Metadata)
    saved = {_instance(fqn, str): _entry(entry) for fqn, entry in _instance(found.state_dict_metadata, dict).items()}
    paths = getattr(found, "planner_data", None)
    where = {}
    for index, info in _instance(found.storage_data, dict).items():
        offset = None if (at := _instance(index, MetadataIndex).offset) is None else _shape(at)
        where[MetadataIndex(_instance(index.fqn, str), offset, index.index)] = _place(info)
    for fqn, entry in saved.items():
        boxes = [None] if isinstance(entry, BytesStorageMetadata) else [chunk.offsets for chunk in entry.chunks]
        if any(MetadataIndex(fqn, box) not in where for box in boxes):
            raise ValueError(f"it does not say where {fqn[:200]!r} is stored")
    meta = getattr(found, "storage_meta", None)
    save_id = getattr(meta, "save_id", None)
    return Metadata(
        saved, _paths_of(paths) if type(paths) is dict else None, where,
        StorageMeta(save_id=save_id if type(save_id) is str else None) if meta else None,
    )  # fmt: skip


def _entry(entry: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(entry) is BytesStorageMetadata:
        return BytesStorageMetadata()
    properties = _instance(_instance(entry, TensorStorageMetadata).properties, TensorProperties)
    size = _shape(entry.size)
    chunks = [
        ChunkStorageMetadata(_shape(_instance(chunk, ChunkStorageMetadata).offsets), _shape(chunk.sizes))
        for chunk in _instance(entry.chunks, list)
    ]
    for chunk in chunks:
        boxes = list(zip(chunk.offsets, chunk.sizes, size, strict=True))
        if any(offset + length > whole for offset, length, whole in boxes):
            raise ValueError(f"a chunk {boxes} lies outside of its tensor")
    volumes: dict[torch.Size, int] = {}  # of replicas that a writer stored twice one counts
    for chunk in chunks:
        volumes[chunk.offsets] = max(volumes.get(chunk.offsets, 0), math.prod(chunk.sizes))
    if sum(volumes.values()) < math.prod(size):
        raise ValueError(f"the chunks of a tensor {tuple(size)} do not make it up")
    return TensorStorageMetadata(TensorProperties(_instance(properties.dtype, torch.dtype)), size, chunks)


def _place(info: Any) -> _StorageInfo:
    """Where an item lies; with transforms none that we could read, which is for the caller to say."""
    info = _instance(info, _StorageInfo)
    name, transforms = _instance(info.relative_path, str), getattr(info, "transform_descriptors", None)
    offset, length = _shape((info.offset, info.length))
    return _StorageInfo(name, offset, length, list(map(str, transforms)) if transforms else None)


def _paths_of(paths: dict[Any, Any]) -> dict[str, Path]:
    """What DCP's planner keeps there. Another planner's own is not for us."""
    return {
        fqn: path
        for fqn, path in paths.items()
        if type(fqn) is str and type(path) is tuple and {str, int}.issuperset(map(type, path))
    }


def _shape(values: Any) -> torch.Size:
    if (
        not isinstance(values, tuple)
        or len(values) > 64
        or not all(type(value) is int and 0 <= value < HUGE for value in values)
    ):
        raise ValueError("there is no whole number of 0 or more where an offset, a length or a shape belongs")
    return torch.Size(values)


def _instance(value: Any, cls: type[T]) -> T:
    if type(value) is not cls:
        raise ValueError(f"there is a {type(value).__name__} where a {cls.__name__} belongs")
    return value


def pickle_metadata(keys: Mapping[str, Key], chunks: ChunkTable, attempt: str, save_id: str) -> bytes:
    """`.metadata` for stock readers: what pickles `metadata_of`, with a _StorageInfo for each chunk.

    The same manifest gives the same bytes, so a lost or stale file can be made again and still has the checksum that
    the manifest states. Written opcode by opcode, as calls of torch's own classes: pickle.dumps takes 46 us per chunk,
    and the order of a constructor's arguments is what versions of torch change least. What differs from save to save
    comes last; the rest is kept with `keys`.
    """
    keys, at = Keys.of(keys), chunks.placement
    contents = at.fqns, at.key, at.offsets, at.layouts, at.layout
    start, entry, num_values = keys.kept.get("stock", contents, lambda: _pickled_contents(keys, at))
    places = keys.kept.get("stock places", (at,), lambda: _pickled_places(at, entry, num_values))
    files = [_string(f"{attempt}/{file}") + _KEEP for file in at.files]
    return b"".join([start, *files, places, _class(StorageMeta), _NONE, _string(save_id), _CALL2, _CALL, _STOP])


# Opcodes, by their names in pickletools.
_GET, _LONG8 = b"j", b"\x8a\x08"  # LONG_BINGET and 4 bytes; LONG1 and 8 bytes
_KEEP = b"\x940"  # MEMOIZE, POP: kept in the memo under the next number instead of used where it stands
_CALL1, _CALL2, _CALL3, _CALL = b"\x85R", b"\x86R", b"\x87R", b"tR"  # TUPLE1, TUPLE2, TUPLE3, TUPLE; REDUCE
_MARK, _TUPLE, _DICT, _SETITEMS, _LIST, _APPENDS = b"(", b"t", b"}(", b"u", b"](", b"e"  # a dict, a list: with MARK
_EMPTY_CALL, _NONE, _START, _STOP = b")R", b"N", b"\x80\x04", b"."  # EMPTY_TUPLE, REDUCE; NONE; PROTO 4; STOP
_UINT32 = struct.Struct("<I")


def _get(number: int) -> bytes:
    return _GET + _UINT32.pack(number)


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return b"X%b%b" % (_UINT32.pack(len(data)), data)  # BINUNICODE


def _int(number: int) -> bytes:
    data = pickle.encode_long(number)
    return (b"\x8a%c" % len(data) if len(data) < 256 else b"\x8b" + _UINT32.pack(len(data))) + data  # LONG1, LONG4


def _part(part: str | int) -> bytes:
    return _string(part) if isinstance(part, str) else _int(part)


def _global(module: str, name: str) -> bytes:
    return _string(module) + _string(name) + b"\x93"  # STACK_GLOBAL


def _class(cls: type) -> bytes:
    return _global(cls.__module__, cls.__qualname__)


def _dtype(name: str) -> bytes:
    if not isinstance(getattr(torch, name), torch.dtype):
        raise ValueError(f"unknown dtype {name!r}")  # noqa: TRY004 - of a manifest that a newer torch wrote
    return _global("torch", name)


def _size(shape: tuple[int, ...] | None) -> bytes:
    return _NONE if shape is None else _SIZE + _MARK + b"".join(map(_int, shape)) + _TUPLE + _CALL1


_CLASSES = (
    MetadataIndex, _StorageInfo, ChunkStorageMetadata, TensorStorageMetadata, TensorProperties, BytesStorageMetadata,
    torch.Size,
)  # fmt: skip
_INDEX, _INFO, _CHUNK, _TENSOR, _PROPERTIES, _BYTES, _SIZE = map(_get, range(len(_CLASSES)))


class _Memo:
    """Values that are written once and then used by their number. text: what writes them."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self.text = [_class(cls) + _KEEP for cls in _CLASSES]

    def add(self, write: Callable[[Any], bytes], values: Sequence[Any]) -> Numbers:
        """Their numbers; no two are equal."""
        first = len(self.text)
        self.text += [write(value) + _KEEP for value in values]
        return np.arange(first, len(self.text))

    def numbers(self, write: Callable[[Any], bytes], values: Sequence[Any]) -> Numbers:
        """Their numbers; equal ones have one."""
        numbers = {value: self.number(write, value) for value in dict.fromkeys(values)}
        return np.fromiter(map(numbers.__getitem__, values), np.int64, len(values))

    def number(self, write: Callable[[Any], bytes], value: Any) -> int:
        if (write, value) not in self._numbers:
            self._numbers[write, value] = int(self.add(write, [value])[0])
        return self._numbers[write, value]


def _pickled_contents(keys: Keys, placement: Placement) -> tuple[bytes, tuple[Numbers, Numbers], int]:
    """(the pickle up to storage_data, the numbers of each chunk's key and offsets, how many numbers were given)"""
    memo = _Memo()
    fqn = memo.add(_string, keys.fqns)
    key, box = fqn[keys.numbers_of(placement)], memo.numbers(_size, placement.offsets)
    entries = list(_entries(keys, placement, memo, fqn, key, box))
    paths = list(_paths(keys, memo, fqn))
    pieces = [_START], memo.text, [_class(Metadata), _MARK, _DICT], entries, [_SETITEMS, _DICT], paths, [_SETITEMS]
    return b"".join(chain.from_iterable(pieces)), (key, box), len(memo.text)


def _pickled_places(placement: Placement, entry: tuple[Numbers, Numbers], num_values: int) -> bytes:
    """storage_data. The numbers of the files follow those given before."""
    key, box = entry
    rows = _records(
        _INDEX, _GET, key, _GET, box, _CALL2,
        _INFO, _GET, placement.file + num_values, _LONG8, placement.offset, _LONG8, placement.length, _CALL3,
    )  # fmt: skip
    return _DICT + rows.tobytes() + _SETITEMS


def _entries(
    keys: Keys, placement: Placement, memo: _Memo, fqn: Numbers, key: Numbers, box: Numbers
) -> Iterator[bytes]:
    """Of state_dict_metadata. fqn, key, box: numbers in the memo, of each key and of each chunk's key and offsets."""
    of_tensors = np.flatnonzero(placement.layout >= 0)
    order = of_tensors[np.argsort(key[of_tensors], kind="stable")]
    sizes = memo.numbers(_size, [layout.shape for layout, _ in placement.layouts])[placement.layout[order]]
    chunks = _records(_CHUNK, _GET, box[order], _GET, sizes, _CALL2)
    starts, stops = (np.searchsorted(key[order], fqn, side) * chunks.itemsize for side in ("left", "right"))

    is_tensor = keys.kind >= 0
    dtypes = memo.numbers(_dtype, [dtype for dtype, _ in keys.kinds])[keys.kind[is_tensor]]
    shapes = memo.numbers(_size, [shape for _, shape in keys.kinds])[keys.kind[is_tensor]]
    tensors = _records(_GET, fqn[is_tensor], _TENSOR, _PROPERTIES, _GET, dtypes, _CALL1, _GET, shapes, _LIST)
    heads, rows, at = tensors.tobytes(), chunks.tobytes(), 0
    for number, start, stop, tensor in zip(*(x.tolist() for x in (fqn, starts, stops, is_tensor)), strict=True):
        if tensor:
            yield heads[at : at + tensors.itemsize] + rows[start:stop] + _APPENDS + _CALL3
            at += tensors.itemsize
        else:
            yield _get(number) + _BYTES + _EMPTY_CALL


def _paths(keys: Keys, memo: _Memo, fqn: Numbers) -> Iterator[bytes]:
    """Of planner_data. Names of containers are written once; the last part is hardly ever met again."""
    known: dict[Path, bytes] = {}
    for number, path in zip(fqn.tolist(), keys.paths, strict=True):
        start = known.get(path[:-1])
        if start is None:
            parts = (_get(memo.number(_string, part)) if isinstance(part, str) else _int(part) for part in path[:-1])
            start = known[path[:-1]] = _MARK + b"".join(parts)
        last = _part(path[-1]) if path else b""
        yield _get(number) + start + last + _TUPLE


def _records(*fields: bytes | Numbers) -> npt.NDArray[np.void]:
    """Rows of bytes that differ in numbers alone: 4 bytes each behind _GET, 8 behind _LONG8."""
    types = [
        f"S{len(field)}" if isinstance(field, bytes) else "<u4" if before == _GET else "<i8"
        for before, field in zip((b"", *fields), fields, strict=False)
    ]
    count = max(len(field) for field in fields if not isinstance(field, bytes))
    rows = np.empty(count, [(str(number), kind) for number, kind in enumerate(types)])
    for number, field in enumerate(fields):
        rows[str(number)] = field
    return rows


def metadata_of(keys: Mapping[str, Key], chunks: Iterable[Chunk]) -> Metadata:
    """What DCP's load planners need. `storage_data` maps to Chunk."""
    same: dict[str, str] = {}  # pickle writes one str object once and equal ones again: equal must be one here
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    paths: dict[str, tuple[str | int, ...]] = {}
    for name, key in keys.items():
        fqn = same.setdefault(name, name)
        paths[fqn] = tuple(same.setdefault(part, part) if isinstance(part, str) else part for part in key.path)
        if key.dtype is None or key.shape is None:
            entries[fqn] = BytesStorageMetadata()
        else:
            properties = TensorProperties(dtype=getattr(torch, key.dtype))
            entries[fqn] = TensorStorageMetadata(properties, torch.Size(key.shape), chunks=[])
    storage_data: dict[MetadataIndex, Chunk] = {}
    for chunk in chunks:
        entry = entries[chunk.key]
        offset = None
        if isinstance(entry, TensorStorageMetadata):
            assert chunk.offsets is not None
            assert chunk.layout is not None
            offset = torch.Size(chunk.offsets)
            entry.chunks.append(ChunkStorageMetadata(offset, torch.Size(chunk.layout.shape)))
        storage_data[MetadataIndex(same[chunk.key], offset)] = chunk
    return Metadata(entries, planner_data=paths, storage_data=storage_data)
