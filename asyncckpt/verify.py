"""Read every byte of a step and compare it with what the manifest says; nothing is loaded or run."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from asyncckpt.chunks import Chunk
from asyncckpt.errors import DamagedStepError
from asyncckpt.framing import crc32
from asyncckpt.manifest import FileRecord, Manifest
from asyncckpt.read_items import check_stock_item
from asyncckpt.restore import OpenStep, join
from asyncckpt.steps import DCP_METADATA
from asyncckpt.storage import Storage

READ_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """checksums: "manifest" (every byte was compared), or "zip" for a foreign step, whose items carry their own CRC32s
    while its `.metadata` carries none."""

    num_files: int
    num_bytes: int
    seconds: float
    checksums: str


def verify_step(storage: Storage, step: OpenStep) -> VerifyReport:
    """Raises DamagedStepError that lists every difference found: file, key, offset, expected and found."""
    started = time.perf_counter()
    if step.manifest is None:
        problems, num_files, num_bytes = _verify_foreign(storage, step)
    else:
        problems = list(_verify_files(storage, step, step.manifest))
        num_files = len(step.manifest.files) + 2
        num_bytes = step.manifest.num_bytes + step.manifest.dcp_metadata_size
    if problems:
        raise DamagedStepError(
            f"the checkpoint at {join(storage.url, step.folder)} is damaged. Nothing was changed.\n  "
            + "\n  ".join(problems),
            url=storage.url,
        )
    return VerifyReport(
        num_files, num_bytes, time.perf_counter() - started, "zip" if step.manifest is None else "manifest"
    )


def _verify_files(storage: Storage, step: OpenStep, manifest: Manifest) -> Iterable[str]:
    stock = FileRecord(DCP_METADATA, manifest.dcp_metadata_size, manifest.dcp_metadata_crc32)
    sizes = storage.list_files(step.folder)
    for folder, file in [(step.folder, stock), *((step.data_folder, file) for file in manifest.files)]:
        path = join(folder, file.name)
        if path not in sizes:
            yield f"{path} is missing"
        elif sizes[path] != file.size:
            yield f"{path} has {sizes[path]} bytes, the manifest says {file.size}"
        elif (found := _file_crc32(storage, path, file.size)) != file.crc32:
            yield f"{path} has CRC32 {found:08x}, the manifest says {file.crc32:08x}"
            yield from _damaged_items(storage, path, [chunk for chunk in manifest.chunks if chunk.file == file.name])


def _file_crc32(storage: Storage, path: str, size: int) -> int:
    buffer = memoryview(bytearray(min(size, READ_BYTES)))
    value = 0
    for start in range(0, size, READ_BYTES):
        view = buffer[: min(READ_BYTES, size - start)]
        storage.read_into(path, [(start, view)])
        value = crc32(view, value)
    return value


def _damaged_items(storage: Storage, path: str, chunks: Iterable[Chunk]) -> Iterable[str]:
    """Which items of a damaged file are hit; none, if only the zeros between them are."""
    for chunk in chunks:
        item = memoryview(bytearray(chunk.length))
        storage.read_into(path, [(chunk.offset, item)])
        if (found := crc32(item)) != chunk.item_crc32:
            yield (
                f"  its item {chunk.key!r} at offset {chunk.offset}, {chunk.length} bytes, has CRC32 {found:08x}, "
                f"the manifest says {chunk.item_crc32:08x}"
            )


def _verify_foreign(storage: Storage, step: OpenStep) -> tuple[list[str], int, int]:
    problems: list[str] = []
    paths: set[str] = set()
    num_bytes = 0
    for index, info in step.where.items():
        assert not isinstance(info, Chunk)
        path = join(step.data_folder, info.relative_path)
        item = memoryview(bytearray(info.length))
        try:
            storage.read_into(path, [(info.offset, item)])
        except (EOFError, FileNotFoundError) as exc:
            problems.append(f"{path} lacks the item {index.fqn!r} at offset {info.offset}: {exc}")
            continue
        if bad := check_stock_item(bytes(item)):
            problems.append(f"{path}: the item {index.fqn!r} at offset {info.offset} is no intact archive ({bad})")
        paths.add(path)
        num_bytes += info.length
    return problems, len(paths), num_bytes
