"""What `torch.save(obj)` writes, as a stream: its size known at once, the tensors' memory never copied.

The zip's skeleton, all but the payloads, is made by torch.save itself, which skips the data and leaves a gap for each
storage; payloads go into the gaps, and their CRC32s, which follow them in the zip, into descriptors and directory. The
one thing that differs from torch's own bytes is the record ".data/serialization_id", a hash that nothing reads back.
Used by files.py's callers (a file of a step) and export.py (a whole step); framing.py does the same for one tensor.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias

import torch

from asyncckpt.errors import CheckpointError
from asyncckpt.framing import BLOCK_BYTES, PayloadCrc, crc32
from asyncckpt.shard import in_views

_DESCRIPTOR, _DIRECTORY_ENTRY = b"PK\x07\x08", b"PK\x01\x02"
_END, _END_64 = b"PK\x05\x06", b"PK\x06\x06"
_IN_END_64 = 0xFFFFFFFF


class Slot(NamedTuple):
    """Where in a file the bytes of a storage go, which has some."""

    storage: torch.UntypedStorage
    offset: int


Payload: TypeAlias = tuple[int | None, Iterable[memoryview]]
"""The bytes of a storage, in views, and their CRC32, if it is known without them."""
Payloads: TypeAlias = Callable[[Sequence[Slot]], Iterator[Payload]]


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """pieces: the bytes between the payloads, one more than there are. crc_at: where in the last piece each payload's
    CRC32 goes once more."""

    pieces: list[bytearray]
    slots: list[Slot]
    crc_at: list[int]


class TorchFile:
    """The content of a file (files.FileContent): the zip that `torch.save(obj)` writes, CRC32s filled in.

    obj: held, and pickled here; its tensors are on the CPU and stay as they are for as long as views are. As with
    torch.save a storage that several tensors share is written once, and that of a view whole: staged tensors have no
    more than they show. payloads: where the bytes of FakeTensors come from; None: the storages have them.
    """

    def __init__(self, obj: Any, *, payloads: Payloads | None = None) -> None:
        self._obj = obj  # keeps the storages
        self._payloads = payloads or _memory
        self._skeleton, self.size = _skeleton_of(obj)

    def views(self) -> Iterator[memoryview]:
        """`size` bytes; the payloads in views of the storages' memory."""
        pieces, crcs = iter(self._skeleton.pieces), list[int]()
        yield memoryview(next(pieces))
        for (known, payload), piece in zip(self._payloads(self._skeleton.slots), pieces, strict=True):
            crc = PayloadCrc()
            for view in payload:
                for at in range(0, len(view) if known is None else 0, BLOCK_BYTES):
                    block = view[at : at + BLOCK_BYTES]
                    crc.add(crc32(block), len(block))
                yield view
            crcs.append(crc.value if known is None else known)
            follows = bytearray(piece)
            struct.pack_into("<L", follows, len(_DESCRIPTOR), crc.value)
            if len(crcs) == len(self._skeleton.slots):
                for at, value in zip(self._skeleton.crc_at, crcs, strict=True):
                    struct.pack_into("<L", follows, at, value)
            yield memoryview(follows)


def _memory(slots: Sequence[Slot]) -> Iterator[Payload]:
    for storage, _ in slots:
        memory = torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data
        yield None, in_views(memory)


def _skeleton_of(obj: Any) -> tuple[_Skeleton, int]:
    """And the size of the file."""
    sink, found = _Gaps(), dict[str, torch.UntypedStorage]()
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(obj, sink, pickle_module=_pickle_telling(found))  # type: ignore[arg-type]  # it asks for less
    storages = {f"data/{name}".encode(): storage for name, storage in found.items() if storage.nbytes()}
    gaps = [storage.nbytes() for storage in storages.values()]
    is_known = sink.gap_bytes == gaps and all(piece.startswith(_DESCRIPTOR) for piece in sink.pieces[1:])
    crc_at = _crc_positions(sink.pieces[-1], sink.position) if is_known else {}
    if not is_known or not storages.keys() <= crc_at.keys():
        raise CheckpointError(f"torch {torch.__version__} writes files in a way asyncckpt does not know: report it")
    elsewhere = {storage.device.type for storage in found.values()} - {"cpu", "meta"}  # FakeTensors say "meta"
    if elsewhere:
        raise ValueError(f"its tensors are on {', '.join(sorted(elsewhere))}. Nothing was written. Stage them first")
    slots = list(map(Slot, storages.values(), sink.gaps))
    return _Skeleton(sink.pieces, slots, [crc_at[name] for name in storages]), sink.position


def _pickle_telling(found: dict[str, torch.UntypedStorage]) -> Any:
    """The module `pickle` for torch.save, whose own pickler derives from this one; tells {key: storage} in order."""

    class Pickler(pickle.Pickler):
        def __init_subclass__(cls) -> None:
            name_of: Callable[[Any, Any], Any] = cls.persistent_id

            def persistent_id(self: pickle.Pickler, value: Any) -> Any:
                name = name_of(self, value)
                if name is not None:
                    found.setdefault(name[2], getattr(value, "_untyped_storage", value))
                return name

            cls.persistent_id = persistent_id  # type: ignore[method-assign]  # torch's, and what it gave is heard

    return SimpleNamespace(Pickler=Pickler, __name__="pickle")


class _Gaps(io.RawIOBase):
    """Takes the writes of torch.save, which seeks over what it skips. pieces: what was written between the gaps, of
    which there are where each begins and how long it is."""

    def __init__(self) -> None:
        self.position = 0
        self.pieces = [bytearray()]
        self.gaps: list[int] = []
        self.gap_bytes: list[int] = []
        self._skipped = 0

    def write(self, data: Any) -> int:
        if self._skipped:
            self.gaps.append(self.position - self._skipped)
            self.gap_bytes.append(self._skipped)
            self.pieces.append(bytearray())
            self._skipped = 0
        self.pieces[-1] += data
        self.position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        target = offset + (self.position if whence == io.SEEK_CUR else 0)
        if target < self.position:
            raise ValueError("torch.save went back in its file")
        self._skipped += target - self.position
        self.position = target
        return target

    def tell(self) -> int:
        return self.position


def _crc_positions(tail: bytearray, size: int) -> dict[bytes, int]:
    """{a record's name in the archive: where the directory has its CRC32}, in the tail of a file of `size` bytes."""
    end = tail.rfind(_END)
    (start,) = struct.unpack_from("<L", tail, end + 16)
    if start == _IN_END_64:
        (start,) = struct.unpack_from("<Q", tail, tail.rfind(_END_64, 0, end) + 48)
    at, found = start - (size - len(tail)), dict[bytes, int]()
    while tail[at : at + 4] == _DIRECTORY_ENTRY:
        name_bytes, extra, comment = struct.unpack_from("<3H", tail, at + 28)
        name = bytes(tail[at + 46 : at + 46 + name_bytes])
        found[name.partition(b"/")[2]] = at + 16
        at += 46 + name_bytes + extra + comment
    return found
