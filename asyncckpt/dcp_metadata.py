"""The stock `.metadata` file: written for stock readers, read (by a restricted unpickler) only where it is not ours.

DCP keeps its index as a pickle. We write exactly torch's own classes, so that an unmodified torch needs nothing of
ours; of a foreign step we unpickle with an allow-list that holds those classes and nothing else (the globals that torch
2.13 was seen to write). Our own steps are restored from the manifest, never from here.
"""

from __future__ import annotations

import io
import pathlib
import pickle
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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

from asyncckpt.errors import UnsafeObjectError
from asyncckpt.manifest import Chunk, Key

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


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UnsafeObjectError(
            f"the stock metadata asks for {module}.{name}, which DCP does not write. Nothing was run. "
            "If you trust the file, load the step with torch.distributed.checkpoint itself."
        )


def unpickle_metadata(data: bytes) -> Metadata:
    """A stock `.metadata`. UnsafeObjectError: it needs a global that DCP does not write; ValueError: it is broken."""
    try:
        metadata = _RestrictedUnpickler(io.BytesIO(data)).load()
    except UnsafeObjectError:
        raise
    except Exception as exc:  # pickle raises nearly anything on damaged bytes
        raise ValueError(f"no readable DCP metadata: {type(exc).__name__}: {exc}") from exc
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError("the stock metadata has no storage data")  # noqa: TRY004 - bad bytes, not a bad argument
    return metadata


def pickle_metadata(keys: Mapping[str, Key], chunks: Sequence[Chunk], attempt: str, save_id: str) -> bytes:
    """`.metadata` for stock readers. The same manifest gives the same bytes, so a lost or stale file can be made again
    and still has the checksum that the manifest states."""
    metadata = metadata_of(keys, chunks)
    paths: dict[str, str] = {}
    metadata.storage_data = {
        index: _StorageInfo(paths.setdefault(chunk.file, f"{attempt}/{chunk.file}"), chunk.offset, chunk.length)
        for index, chunk in metadata.storage_data.items()
    }
    metadata.storage_meta = StorageMeta(save_id=save_id)
    return pickle.dumps(metadata, protocol=4)


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
