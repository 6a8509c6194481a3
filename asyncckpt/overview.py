"""What a run's steps are, at a glance: one listing, and the two ends of each manifest that somebody wants to see.

A manifest of a million chunks has 100 MB; its first bytes tell who made it and when, its last ones which files must be
there. So damage that a listing shows is found, and no more: `find_damage` (verify.py) reads the rest. It never writes.
Called by the command line (ls, watch, prune).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from asyncckpt.manifest import Head, ManifestError, check_crc, decode_file_sizes, decode_head
from asyncckpt.parallel import for_each
from asyncckpt.steps import StepFiles, is_data_of_ranks, read_listing
from asyncckpt.storage import Storage

Kind = Literal["committed", "foreign", "partial"]
READ_THREADS = 16
WHOLE_BYTES = 64 << 10
"""A manifest of no more bytes is read as one: an answer of a store takes 10 ms or more, and 64 KiB under 1 ms of it."""
_HEAD_BYTES, _TAIL_BYTES = 4 << 10, 32 << 10  # A guess: metadata and metrics of tens of values; the names of 600 files


@dataclass(frozen=True, slots=True)
class Glance:
    """One step. num_bytes: of all that lies in its folder. sequence: its place in the order of commits; of a partial
    one the place that it had taken, of a foreign one 0. head: None unless it is committed and reads. damage: what is
    wrong by the listing and the ends of the manifest, or "". holds: what was saved; "" where that is not known.
    num_unfinished: saves in the folder that are under way, or dead.
    """

    step: int
    kind: Kind
    sequence: int
    num_bytes: int
    num_unfinished: int = 0
    head: Head | None = None
    damage: str = ""
    holds: Literal["", "tensors", "files", "both"] = ""


@dataclass(frozen=True, slots=True)
class Run:
    """What one listing says. sizes: {path: bytes}. steps: in order of commit, the foreign ones first."""

    storage: Storage
    sizes: Mapping[str, int]
    steps: Mapping[int, StepFiles]

    @property
    def newest_sequence(self) -> int:
        """Of the committed steps; 0: there is none."""
        return max((files.sequence or 0 for files in self.steps.values()), default=0)


def kind_of(files: StepFiles) -> Kind | None:
    """None: nothing in the folder is of a checkpoint."""
    if files.sequence is not None:
        return "committed"
    return "foreign" if files.is_foreign else "partial" if files.attempts else None


def list_run(storage: Storage) -> Run:
    """One listing. OSError."""
    sizes = storage.list_files()
    found = [(step, files) for step, files in read_listing(sizes).items() if kind_of(files)]
    return Run(storage, sizes, dict(sorted(found, key=lambda one: (_place(one[1]), one[0]))))


def _place(files: StepFiles) -> int:
    return files.max_sequence() if files.sequence is None else files.sequence


def look(run: Run, steps: Iterable[int]) -> dict[int, Glance]:
    """Of `steps`, in their order; one or two small reads for each that is committed, some at a time. A step that went
    since the listing is left out. OSError where storage does not answer."""
    wanted = list(steps)
    found: dict[int, Glance | None] = {}

    def work(step: int) -> None:
        found[step] = _look(run, step)

    for_each(work, wanted, READ_THREADS)
    return {step: glance for step in wanted if (glance := found[step]) is not None}


def _look(run: Run, step: int) -> Glance | None:
    files = run.steps[step]
    kind = kind_of(files)
    assert kind is not None
    unfinished = len(files.unfinished())
    if files.sequence is None:
        return Glance(step, kind, _place(files), files.num_bytes, unfinished)
    path = f"{step}/{files.manifests[files.sequence]}"
    try:
        head, sizes = _read_ends(run.storage, path, run.sizes[path])
    except FileNotFoundError:
        return None
    except (ManifestError, EOFError) as exc:
        return Glance(step, kind, files.sequence, files.num_bytes, unfinished, None, f"{path} is damaged: {exc}")
    damage = _moved(head, step, files.sequence) or _missing(run.sizes, f"{step}/{head.attempt}", sizes)
    return Glance(step, kind, files.sequence, files.num_bytes, unfinished, head, damage, _holds(sizes))


def _read_ends(storage: Storage, path: str, size: int) -> tuple[Head, Mapping[str, int]]:
    """(head, {file: size}). Of a small manifest, or where the ends do not suffice, all is read, and its checksum
    compared. ManifestError, FileNotFoundError, EOFError."""
    if size > WHOLE_BYTES:
        start, end = bytearray(_HEAD_BYTES), bytearray(_TAIL_BYTES)
        storage.read_into(path, [(0, memoryview(start)), (size - _TAIL_BYTES, memoryview(end))])
        head, sizes = decode_head(bytes(start)), decode_file_sizes(bytes(end))
        if head is not None and sizes is not None:
            return head, sizes
    data = storage.read_file(path)
    check_crc(data)
    head, sizes = decode_head(data), decode_file_sizes(data)
    if head is None or sizes is None:
        raise ManifestError("it lacks its head or its files")
    return head, sizes


def _moved(head: Head, step: int, sequence: int) -> str:
    if (head.step, head.sequence) == (step, sequence):
        return ""
    return f"its manifest is of step {head.step}, save {head.sequence}: it was moved or renamed"


def _missing(listed: Mapping[str, int], folder: str, sizes: Mapping[str, int]) -> str:
    wrong = [name for name, size in sizes.items() if listed.get(f"{folder}/{name}") != size]
    return f"{len(wrong)} of {len(sizes)} files are missing or cut: {folder}/{wrong[0]}" if wrong else ""


def _holds(sizes: Mapping[str, int]) -> Literal["", "tensors", "files", "both"]:
    kinds = {is_data_of_ranks(name) for name in sizes}
    return "both" if len(kinds) == 2 else "tensors" if True in kinds else "files" if kinds else ""
