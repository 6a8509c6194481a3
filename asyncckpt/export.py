"""A step as files that other programs read: safetensors, in one file or several with an index, or one of torch.save.

Streamed: tensors are read ahead in the order of the target file, each right to where it lies in a piece of that file,
verified on the way, and the piece goes out as it is. So memory holds a few pieces, and of a tensor larger than one no
more than two. A file appears under its name when it is whole, and the index when all its files have. Called by the
command line (cli/formats.py) and by users; what is in a step is lookup.py's to say, and imports.py is the way back.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from asyncckpt.errors import DamagedStepError, RestoreError
from asyncckpt.fetch import given_files
from asyncckpt.framing import crc32
from asyncckpt.lookup import Saved, read_values, tree_of
from asyncckpt.manifest import FileRecord
from asyncckpt.restore import OpenStep, join, open_step
from asyncckpt.safetensors_file import Header, Kind, header_of
from asyncckpt.storage import Storage
from asyncckpt.stream import Place, chunks_of, file_views, stream
from asyncckpt.torch_file import Payload, Slot, TorchFile
from asyncckpt.verify import Tell

Rename: TypeAlias = Mapping[str, str] | Callable[[str], str]
"""{regular expression: what takes its place}, each applied to a key in turn, as re.sub does; or a function."""

MAX_SHARD_SIZE = "5GB"  # as huggingface_hub has it
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True, slots=True)
class Exported:
    """files: {name: size} of all files of the export; kept: those that were there, whole, and were not written again.
    left_out: keys that are no tensors."""

    files: Mapping[str, int]
    kept: Sequence[str] = ()
    left_out: Sequence[str] = ()

    @property
    def num_bytes(self) -> int:
        return sum(self.files.values())


# -- safetensors


def export_safetensors(
    source: Storage,
    folder: str,
    target: Storage,
    name: str = "model",
    *,
    prefix: str = "",
    rename: Rename = {},  # noqa: B006
    max_shard_size: int | str = MAX_SHARD_SIZE,
    only_tensors: bool = False,
    overwrite: bool = False,
    verify: bool = False,
    tell: Tell = lambda num_bytes: None,
) -> Exported:
    """Write `<name>.safetensors`, or `<name>-00001-of-0000N.safetensors` and `<name>.safetensors.index.json`.

    folder: the step's, below `source`: ours or stock DCP's, saved by however many ranks. prefix: the subtree of this
    key, which is taken off the names ("" for all). max_shard_size: bytes, or as "5GB"; files are split as
    huggingface_hub splits them. only_tensors: leave out objects, which the format does not have; else they are a
    ValueError. Of tied tensors the first name is kept, and the others are in the file's metadata, as
    `safetensors.torch.save_model` has them.

    A file that is there already is kept if it is of this very save of the step and of the same tensors, which its size
    and header tell, so an export that was interrupted goes on; files appear whole or not at all. verify: every file is
    read back and compared with the step, those that were there too, and written again if it differs. Another export of
    that name is FileExistsError, or with `overwrite` removed first. tell: hears of the bytes of files that were written
    or found.

    Raises StepNotFoundError, DamagedStepError (what was read differs from its checksums), ValueError, OSError. What is
    at `target` then is no whole export: the file that all others need, the index or the only one, is missing.
    """
    step = open_step(source, folder)
    tensors, left_out = _tensors_below(step, prefix, rename)
    if left_out and not only_tensors:
        raise ValueError(
            f"{len(left_out)} values are no tensors, which is all that safetensors has: {_some(left_out)}. Nothing was "
            "written. Export a subtree of tensors (prefix), leave them out (only_tensors), or use the format torch"
        )
    kept_of = _tied(step, tensors)
    groups = _split({new: saved for new, saved in tensors.items() if new not in kept_of}, max_shard_size)
    paths = _paths(name, len(groups))
    files = {path: _file_of(step, group, kept_of) for path, group in zip(paths, groups, strict=True)}
    writing = _Writing(source, step, target, tell)
    index_path, index = f"{name}.safetensors.index.json", _index_of(files)
    kept = writing.begin(_of_this_name(target, name), files, index_path, index, overwrite)
    for path, file in files.items():
        if path in kept:
            tell(file.size)
        else:
            writing.write(path, file)
        if verify and not writing.is_right(path, file):
            writing.write(path, file)
            if not writing.is_right(path, file):
                raise RestoreError(f"{path} at {target.url} reads as something else than was written, twice")
    if index:
        target.replace(index_path, index)  # last: it says that all is there
    sizes = {path: file.size for path, file in files.items()} | ({index_path: len(index)} if index else {})
    return Exported(sizes, kept, left_out)


@dataclass(frozen=True, slots=True)
class _File:
    """A safetensors file to be. names: of its tensors, in the order of the step."""

    header: Header
    places: Sequence[Place]
    names: Sequence[str]

    @property
    def size(self) -> int:
        return self.header.size

    def views(self, source: Storage, step: OpenStep) -> Iterator[memoryview]:
        yield memoryview(self.header.data)
        for piece in stream(source, step, self.places):
            yield piece.memory


def _tensors_below(step: OpenStep, prefix: str, rename: Rename) -> tuple[dict[str, Saved], list[str]]:
    """({new name: tensor}, keys of objects). ValueError where two would have one name."""
    found: dict[str, Saved] = {}
    objects: list[str] = []
    give_name = renaming(rename)
    for saved in _leaves(tree_of(step, prefix)):
        if saved.dtype is None:
            objects.append(saved.key)
            continue
        new = give_name(_stripped(saved.key, prefix))
        if new in found:
            raise ValueError(f"{found[new].key!r} and {saved.key!r} would both be named {new!r}. Nothing was written")
        found[new] = saved
    if not found:
        raise ValueError(f"there are no tensors below {prefix!r}: nothing to export")
    return found, objects


def _stripped(key: str, prefix: str) -> str:
    if not prefix or key == prefix:
        return key.rpartition(".")[2] if prefix else key
    return key.removeprefix(f"{prefix}.")


def renaming(rename: Rename) -> Callable[[str], str]:
    if callable(rename):
        return rename
    rules = [(re.compile(pattern), replacement) for pattern, replacement in rename.items()]

    def renamed(key: str) -> str:
        for pattern, replacement in rules:
            key = pattern.sub(replacement, key)
        return key

    return renamed


def _leaves(tree: Any) -> Iterator[Saved]:
    if isinstance(tree, Saved):
        yield tree
    else:
        for inner in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(inner)


def _tied(step: OpenStep, tensors: Mapping[str, Saved]) -> dict[str, str]:
    """{name: the first, by name, of those that are saved as one with it}"""
    if step.manifest is None:
        return {}
    place = step.manifest.chunks.placement
    where: dict[int, list[Any]] = {}
    columns = (step.keys.numbers_of(place), place.file, place.offset, place.layout)
    for key, *chunk in zip(*(column.tolist() for column in columns), strict=True):
        where.setdefault(key, []).append(tuple(chunk))
    first: dict[Any, str] = {}
    kept = {
        name: first.setdefault((tensors[name].shape, *sorted(where[step.keys.number[tensors[name].key]])), name)
        for name in sorted(tensors)
        if tensors[name].num_bytes
    }
    return {name: other for name, other in kept.items() if other != name}


def _split(tensors: Mapping[str, Saved], max_shard_size: int | str) -> list[dict[str, Saved]]:
    """As huggingface_hub's split_state_dict_into_shards_factory: in order, a new file when the next does not fit, and
    one that is too large by itself in one of its own, before what is being filled."""
    limit = _bytes_of(max_shard_size)
    groups: list[dict[str, Saved]] = []
    group: dict[str, Saved] = {}
    size = 0
    for name, saved in tensors.items():
        if saved.num_bytes > limit:
            groups.append({name: saved})
            continue
        if size + saved.num_bytes > limit:
            groups.append(group)
            group, size = {}, 0
        group[name] = saved
        size += saved.num_bytes
    return [*groups, group] if group else groups


def _bytes_of(size: int | str) -> int:
    if isinstance(size, int):
        return size
    number, unit = size.strip()[:-2], size.strip()[-2:].upper()
    try:
        return int(float(number) * _UNITS[unit])
    except (KeyError, ValueError) as exc:
        raise ValueError(f"{size!r} is no size of a file: give bytes, or a number and KB, MB, GB or TB") from exc


def _file_of(step: OpenStep, group: Mapping[str, Saved], kept_of: Mapping[str, str]) -> _File:
    """Its header says of which save it is: one of another that has the same tensors is not taken for it."""
    metadata = {"format": "pt", **_origin(step)} | {name: kept for name, kept in kept_of.items() if kept in group}
    kinds = {name: _kind_of(saved) for name, saved in group.items()}
    header = header_of(kinds, metadata)
    at, places = len(header.data), []
    for name in header.names:
        places.append(Place(group[name].key, at, kinds[name]))
        at += kinds[name].num_bytes
    return _File(header, places, list(group))


def _kind_of(saved: Saved) -> Kind:
    assert saved.dtype is not None
    assert saved.shape is not None
    return Kind(saved.dtype, saved.shape)


def _origin(step: OpenStep) -> dict[str, str]:
    if step.manifest is not None:
        head = step.manifest.head
        return {"asyncckpt.step": str(head.step), "asyncckpt.save_id": head.save_id}
    save_id = getattr(step.metadata.storage_meta, "save_id", None)
    return {"asyncckpt.save_id": str(save_id)} if save_id else {}


def _paths(name: str, count: int) -> list[str]:
    if count == 1:
        return [f"{name}.safetensors"]
    return [f"{name}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _index_of(files: Mapping[str, _File]) -> bytes:
    """As huggingface_hub has it; of one file there is none."""
    if len(files) == 1:
        return b""
    total = sum(place.kind.num_bytes for file in files.values() for place in file.places)
    weight_map = {name: path for path, file in files.items() for name in file.names}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode()


def _of_this_name(target: Storage, name: str) -> dict[str, int]:
    """What is there of an export of that name: all that a reader may take for part of it."""
    pattern = re.compile(rf"{re.escape(name)}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?\Z")
    folder = name.rpartition("/")[0]
    return {path: size for path, size in target.list_files(folder).items() if pattern.match(path)}


@dataclass(frozen=True, slots=True)
class _Writing:
    source: Storage
    step: OpenStep
    target: Storage
    tell: Tell

    def begin(
        self, there: Mapping[str, int], files: Mapping[str, _File], index_path: str, index: bytes, overwrite: bool
    ) -> list[str]:
        """Which files are there already. What is in the way is removed, the index first: it would speak of two."""
        kept = [path for path, file in files.items() if there.get(path) == file.size and self._has_header(path, file)]
        other = [path for path in there if path not in kept]
        is_whole = len(kept) == len(files) and index and index_path in there
        if is_whole and self.target.read_file(index_path) == index:
            other.remove(index_path)
        if other and not overwrite:
            raise FileExistsError(
                f"{self.target.url} holds another export: {_some(other)}. Nothing was written. Give another folder or "
                "name, or overwrite it"
            )
        other.sort(key=lambda path: path != index_path)
        for path in other:  # one by one: the order counts
            self.target.delete([path])
        return kept

    def _has_header(self, path: str, file: _File) -> bool:
        found = memoryview(bytearray(len(file.header.data)))
        self.target.read_into(path, [(0, found)])
        return found == file.header.data

    def write(self, path: str, file: _File) -> None:
        self.target.replace_file(path, file.size, self.told(file.views(self.source, self.step)))

    def told(self, views: Iterator[memoryview]) -> Iterator[memoryview]:
        for view in views:
            yield view
            self.tell(len(view))

    def is_right(self, path: str, file: _File) -> bool:
        """Whether it holds what the step has, which is read again."""
        return _crc32_of(file.views(self.source, self.step)) == _crc32_of(file_views(self.target, path, file.size))


def _crc32_of(views: Iterable[memoryview]) -> int:
    return functools.reduce(lambda value, view: crc32(view, value), views, 0)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")


# -- torch.save


def export_torch(
    source: Storage,
    folder: str,
    target: Storage,
    path: str,
    *,
    prefix: str = "",
    safe_globals: Iterable[Any] = (),
    overwrite: bool = False,
    tell: Tell = lambda num_bytes: None,
) -> Exported:
    """Write one file that `torch.load(weights_only=True, mmap=True)` reads: the nested dict as it was saved.

    prefix: the subtree of this key alone. Tied tensors are tied in the file. safe_globals: classes that objects in the
    step may be made of besides plain ones. The file is there when it is whole; one that is there is FileExistsError, or
    with `overwrite` replaced. Otherwise as `export_safetensors`.
    """
    step = open_step(source, folder)
    if not overwrite and path in target.list_files(path.rpartition("/")[0]):
        raise FileExistsError(f"{target.url} holds {path} already. Nothing was written. Overwrite it, or name another")
    tree = tree_of(step, prefix)
    tensors = {saved.key: saved for saved in _leaves(tree) if saved.dtype is not None}
    objects = [saved.key for saved in _leaves(tree) if saved.dtype is None]
    values: dict[str, Any] = read_values(source, step, objects, safe_globals)
    with FakeTensorMode():
        values |= {key: torch.empty(saved.shape or (), dtype=saved.dtype) for key, saved in tensors.items()}
    values |= {name: values[kept] for name, kept in _tied(step, tensors).items()}
    saved_of = {values[key].untyped_storage()._cdata: saved for key, saved in tensors.items()}

    def payloads(slots: Sequence[Slot]) -> Iterator[Payload]:
        places = [Place(saved.key, at, _kind_of(saved)) for at, saved in
                  ((slot.offset, saved_of[slot.storage._cdata]) for slot in slots)]  # fmt: skip
        views = (pair for piece in stream(source, step, places) for pair in piece.tensors)
        for place, parts in groupby(views, key=lambda pair: pair[0]):  # a large one comes in several pieces
            yield _crc32_in(step, place.key), (view for _, view in parts)

    content = TorchFile(_filled(tree, values), payloads=payloads)
    target.replace_file(path, content.size, _Writing(source, step, target, tell).told(content.views()))
    return Exported({path: content.size})


def _crc32_in(step: OpenStep, key: str) -> int | None:
    """Of the tensor's bytes in row-major order, if the manifest says it; reading compares them with it."""
    chunks = chunks_of(step, key)
    is_whole = len(chunks) == 1 and chunks[0].layout is not None and chunks[0].layout.is_contiguous
    return chunks[0].crc32 if is_whole else None


def _filled(tree: Any, values: Mapping[str, Any]) -> Any:
    """The tree with the values in it."""
    if isinstance(tree, Saved):
        return values[tree.key]
    if isinstance(tree, dict):
        return {key: _filled(inner, values) for key, inner in tree.items()}
    return [_filled(inner, values) for inner in tree]


# -- files as they were given


def export_files(
    source: Storage,
    folder: str,
    target: Storage,
    *,
    select: Callable[[str], bool] = lambda name: True,
    overwrite: bool = False,
    tell: Tell = lambda num_bytes: None,
) -> Exported:
    """Write the files that `save(files=)` was given, as an Accelerate or Trainer checkpoint has them, under their names
    below `target`: the folder that the stock tool loads.

    Each is compared with its CRC32 on the way, and appears whole or not at all; indices, and what begins with a dot,
    last. One that is there already is kept if its bytes have that CRC32, else FileExistsError, or with `overwrite`
    replaced. select: which, by name. Raises as `export_safetensors`; ValueError: there are none.
    """
    step = open_step(source, folder)
    records = [file for file in given_files(source, step) if select(file.name)]
    if not records:
        raise ValueError(f"{join(source.url, folder)} has no files that were given as files. Export its tensors")
    records.sort(key=lambda file: _comes_last(file.name))
    there = target.list_files()
    kept = [
        file.name
        for file in records
        if there.get(file.name) == file.size and _crc32_of(file_views(target, file.name, file.size)) == file.crc32
    ]
    other = [file.name for file in records if file.name in there and file.name not in kept]
    if other and not overwrite:
        raise FileExistsError(
            f"{target.url} holds other files of these names: {_some(other)}. Nothing was written. Give another folder, "
            "or overwrite them"
        )
    writing = _Writing(source, step, target, tell)
    for file in records:
        if file.name in kept:
            tell(file.size)
        else:
            target.replace_file(file.name, file.size, writing.told(_checked(source, step, file)))
    return Exported({file.name: file.size for file in records}, kept)


def _comes_last(name: str) -> bool:
    """Whether readers take a folder without it for none."""
    name = name.rpartition("/")[2]
    return name.startswith(".") or name.endswith(".index.json")


def _checked(source: Storage, step: OpenStep, file: FileRecord) -> Iterator[memoryview]:
    """Its bytes, of which the last is only given when all have the CRC32 that the manifest says: without it there is no
    file."""
    path, crc, last = join(step.data_folder, file.name), 0, memoryview(b"")
    try:
        for view in file_views(source, path, file.size):
            crc = crc32(view, crc)
            yield last
            last = view
    except (EOFError, FileNotFoundError) as exc:
        raise DamagedStepError(f"{path} at {source.url} is missing or cut: {exc}", url=source.url) from exc
    if crc != file.crc32:
        raise DamagedStepError(
            f"{path} at {source.url} is damaged: it has CRC32 {crc:08x}, the manifest says {file.crc32:08x}",
            url=source.url,
        )
    yield last
