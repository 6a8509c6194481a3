"""Events as lines of JSON beside a run: what storage alone cannot tell later, of stalls, times and faults.

`EventFile` is a sink that writes them, one file for each start of a process, and `read_logs` reads them for a report.
A file is `<url>/events/<time>-<rank>-<hex>.jsonl`: nothing there is taken for a step, and no clean-up deletes it. Its
first line is `Started`. What the events mean is events.py's affair; this file draws nothing and judges nothing.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from asyncckpt.errors import CheckpointError
from asyncckpt.events import Event
from asyncckpt.exits import at_exit
from asyncckpt.parallel import for_each
from asyncckpt.storage import Storage, open_storage, redact, secrets_of
from asyncckpt.storage_local import LocalStorage
from asyncckpt.version import __version__

logger = logging.getLogger("asyncckpt")

FOLDER = "events"
FLUSH_S = 10.0  # A guess: 8,640 small PUTs a day are some cents, and as much may be lost to SIGKILL
PART_BYTES = 1 << 20  # about 1,000 saves; so that no rewriting of a file costs more than 1 MiB
MAX_PARTS = 8  # kept in memory while storage refuses them
_MAX_TEXT, _MAX_ITEMS = 4000, 100  # of one value: an error may quote a million keys
_FILE = re.compile(r"(?:.*/)?([0-9]{8}T[0-9]{6}Z)-([0-9]{1,9})-([0-9a-f]{8})(?:\.([0-9]{1,6}))?\.jsonl\Z", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """The first line of a file: a process made its sink. rank and url are those of its first event."""

    pid: int
    asyncckpt: str
    torch: str


class EventFile:
    """A sink for one manager: every event, one line each, in a file beside the run.

    In a folder each line is there when the event is over, so SIGKILL loses none. Elsewhere a thread rewrites the file
    every `flush_s` seconds in which something happened, in parts of 1 MiB; SIGKILL loses what came since. What storage
    refuses is logged once and tried again; it never harms a save.

    url, storage_options: the run's, as the manager has them. The values in it of what looks like a secret, and those in
    the environment, are not written.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None, *, flush_s: float = FLUSH_S) -> None:
        self._storage = open_storage(url, storage_options)
        self._secrets = secrets_of(url, storage_options or {})
        self._flush_s = flush_s
        self._started_s = time.time()
        self._lock = threading.Lock()
        self._file: LineFile | _Parts | None = None
        self._has_told = False
        at_exit(self, EventFile._end)  # after the manager, which is made later than its sinks

    def __repr__(self) -> str:
        return f"<EventFile {self._storage.url}/{FOLDER}>"

    def __call__(self, event: Event) -> None:
        line = self._line(event)
        try:
            with self._lock:
                if self._file is None:
                    self._file = self._open(event)
            self._file.add(line)
            self._has_told = False
        except OSError as exc:
            if not self._has_told:
                logger.warning("events are not written to %s: %s", self._storage.url, exc)
            self._has_told = True

    def flush(self) -> None:
        """Write what is not yet written, and wait for it. OSError if storage refuses."""
        if isinstance(self._file, _Parts):
            self._file.flush()

    def _end(self) -> None:
        if isinstance(self._file, _Parts):
            self._file.end()

    def _open(self, first: Event) -> LineFile | _Parts:
        started = Started(
            url=first.url, step=-1, rank=first.rank, time_s=self._started_s,
            pid=os.getpid(), asyncckpt=__version__, torch=torch.__version__,
        )  # fmt: skip
        when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self._started_s))
        stem = f"{FOLDER}/{when}-{first.rank}-{secrets.token_hex(4)}"
        if isinstance(self._storage, LocalStorage):
            return LineFile(os.path.join(self._storage.root, f"{stem}.jsonl"), self._line(started))
        parts = _Parts(self._storage, stem, self._flush_s)
        parts.add(self._line(started))
        return parts

    def _line(self, event: Event) -> bytes:
        values = {field.name: self._plain(getattr(event, field.name)) for field in dataclasses.fields(event)}
        return json.dumps({"event": type(event).__name__, **values}, separators=(",", ":")).encode() + b"\n"

    def _plain(self, value: Any) -> Any:
        if isinstance(value, BaseException):
            value = f"{type(value).__name__}: {value}"
        if isinstance(value, str):
            return redact(value, self._secrets)[:_MAX_TEXT]
        if isinstance(value, tuple):
            return [self._plain(item) for item in value[:_MAX_ITEMS]]
        return None if isinstance(value, float) and not math.isfinite(value) else value


class LineFile:
    """A local file to which whole lines are appended: each by one write, so that a killed process leaves no half one.

    head: what an empty file begins with. A half line at the end of an older file, left by a full disk, is cut off.
    """

    def __init__(self, path: str, head: bytes = b"") -> None:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        weakref.finalize(self, os.close, self._descriptor)
        self._lock = threading.Lock()
        size = os.fstat(self._descriptor).st_size
        tail = os.pread(self._descriptor, PART_BYTES, max(0, size - PART_BYTES))
        whole = size - len(tail) + tail.rfind(b"\n") + 1
        if whole < size:
            os.ftruncate(self._descriptor, whole)
        if whole == 0:
            self.add(head)

    def add(self, line: bytes) -> None:
        with self._lock:
            size = os.fstat(self._descriptor).st_size
            written = os.write(self._descriptor, line)
            if written < len(line):
                os.ftruncate(self._descriptor, size)
                raise OSError(f"the disk took {written} of {len(line)} bytes")


class _Parts:
    """Lines on storage that cannot append: the newest part is rewritten, full ones are left behind."""

    def __init__(self, storage: Storage, stem: str, flush_s: float) -> None:
        self._storage, self._stem, self._flush_s = storage, stem, flush_s
        self._lock = threading.Lock()  # of the next five
        self._lines: list[bytes] = []
        self._number = self._num_bytes = 0
        self._full: deque[tuple[str, bytes]] = deque(maxlen=MAX_PARTS)
        self._is_new = False
        self._thread: threading.Thread | None = None
        self._is_ending = threading.Event()
        self._writing = threading.Lock()  # one at a time: an older state must not replace a newer one
        self._has_told = False

    def add(self, line: bytes) -> None:
        with self._lock:
            self._lines.append(line)
            self._num_bytes += len(line)
            self._is_new = True
            if self._num_bytes >= PART_BYTES:
                self._full.append((self._name, b"".join(self._lines)))
                self._lines, self._num_bytes, self._is_new = [], 0, False
                self._number += 1
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="asyncckpt-events", daemon=True)
                self._thread.start()

    @property
    def _name(self) -> str:
        return f"{self._stem}.{self._number}.jsonl"

    def _run(self) -> None:
        """As long as there is something to write: an idle thread would keep this object alive."""
        while True:
            self._is_ending.wait(self._flush_s)
            try:
                self.flush()
                self._has_told = False
            except Exception as exc:  # tried again after the next event
                if not self._has_told:
                    logger.warning("events are not written to %s: %s", self._storage.url, exc)
                self._has_told = True
            with self._lock:
                if self._has_told or not (self._is_new or self._full):
                    self._thread = None
                    return

    def flush(self) -> None:
        with self._writing:
            with self._lock:
                full = list(self._full)
                newest = (self._name, b"".join(self._lines)) if self._is_new else None
                self._full.clear()
                self._is_new = False
            try:
                while full:
                    self._storage.replace(*full[0])
                    del full[0]
                if newest is not None:
                    self._storage.replace(*newest)
            except BaseException:
                with self._lock:
                    self._full.extendleft(reversed(full))
                    self._is_new |= newest is not None and newest[0] == self._name
                raise

    def end(self) -> None:
        """At the end of the process, after its managers have finished their saves."""
        self._is_ending.set()
        with self._lock:
            thread = self._thread
        if thread is not None:  # it writes once more; where storage is gone, twice would hold up the process twice
            thread.join()
            return
        try:
            self.flush()
        except Exception as exc:
            logger.warning("the last events are not written to %s: %s", self._storage.url, exc)


# -- reading


@dataclass(frozen=True)
class EventLog:
    """Of one process. num_unreadable: lines that are none of ours, or cut."""

    name: str
    rank: int
    events: list[Event]
    num_unreadable: int = 0


def log_files(files: Iterable[str]) -> list[str]:
    """Of a listing, the paths of files that an EventFile wrote, in order of time; of a file's parts, of their
    number."""
    found = [(match, path) for path in files if (match := _FILE.match(path))]
    return [path for match, path in sorted(found, key=lambda one: (*one[0].group(1, 2, 3), int(one[0][4] or 0)))]


def read_logs(
    storage: Storage, paths: Iterable[str], tell: Callable[[int], None] = lambda num_bytes: None
) -> list[EventLog]:
    """What `paths` (of `log_files`) hold, the parts of one file together. A file that is gone by now is left out.

    Raises OSError. The values in a file are of the types that the events say, whoever wrote it.
    """
    contents: dict[str, bytes] = {}

    def read(path: str) -> None:
        try:
            contents[path] = storage.read_file(path)
        except FileNotFoundError:
            return
        tell(len(contents[path]))

    paths = list(paths)
    for_each(read, paths, num_threads=8)
    logs: dict[str, EventLog] = {}
    for path in paths:
        if (match := _FILE.match(path)) is None or path not in contents:
            continue
        name = "-".join(match.group(1, 2, 3))
        before = logs.get(name, EventLog(name, int(match[2]), []))
        lines = [_decode(line) for line in contents[path].splitlines()]
        events = [event for event in lines if event is not None]
        unreadable = before.num_unreadable + len(lines) - len(events)
        logs[name] = EventLog(name, before.rank, before.events + events, unreadable)
    return list(logs.values())


def _decode(line: bytes) -> Event | None:
    """None: not an event that this version knows, whole and with values of the right types."""
    try:
        values = json.loads(line)
        kind, readers = _KINDS[values["event"]]
        return kind(**{name: read(values[name]) for name, read in readers.items() if name in values})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _int(value: Any) -> int:
    if type(value) is not int or abs(value) >= 2**63:
        raise ValueError(f"{value!r:.40} where a whole number belongs")
    return value


def _float(value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e15:  # a NaN compares false
        raise ValueError(f"{value!r:.40} where a number belongs")
    return float(value)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"{type(value).__name__} where a text belongs")
    return value


def _bool(value: Any) -> bool:
    if type(value) is not bool:
        raise TypeError(f"{type(value).__name__} where true or false belongs")
    return value


_READ: dict[str, Callable[[Any], Any]] = {
    "int": _int,
    "float": _float,
    "str": _text,
    "bool": _bool,
    "tuple[int, ...]": lambda values: tuple(map(_int, values)),
    "tuple[str, ...]": lambda values: tuple(map(_text, values)),
    "BaseException": lambda value: CheckpointError(_text(value)),
}
"""By how events.py writes the type of a field."""
_KINDS = {
    kind.__name__: (kind, {field.name: _READ[str(field.type)] for field in dataclasses.fields(kind)})
    for kind in Event.__subclasses__()
}
