"""Which steps a run has, read off one listing: the grammar of names, and what is whole, partial or foreign.

Pure: takes {path: size} and gives records; does no I/O. DESIGN.md's rules live here: a manifest's presence is the
commit, its highest sequence number wins, a folder of ours without one is partial, and stock DCP folders are foreign.
Used by manager.py (constructor, refresh), commit.py (what to delete) and dcp.py (a single step folder).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

DCP_METADATA = ".metadata"
_STEP = r"(0|[1-9][0-9]*)"
_STEP_PATH = re.compile(rf"{_STEP}/(.+)\Z", re.DOTALL)
_MANIFEST = re.compile(r"manifest-([0-9]+)\.json\Z")
_ATTEMPT_FILE = re.compile(r"(([0-9]+)-[0-9a-f]+)/(.+)\Z", re.DOTALL)


def new_attempt(sequence: int) -> str:
    """The name of a data folder that nobody else has. The sequence number is padded, so that names have one length
    (cached `.metadata` bytes are patched in place) and sort in commit order."""
    return f"{sequence:08d}-{secrets.token_hex(8)}"


def manifest_name(sequence: int) -> str:
    return f"manifest-{sequence:08d}.json"


@dataclass(slots=True)
class StepFiles:
    """The files of one step folder, relative to it, sorted by what they are.

    manifests: {sequence: name}. attempts: {attempt: [paths]}. other: all else, `.metadata` among them.
    """

    manifests: dict[int, str] = field(default_factory=dict)
    attempts: dict[str, list[str]] = field(default_factory=dict)
    other: list[str] = field(default_factory=list)
    num_bytes: int = 0

    @property
    def sequence(self) -> int | None:
        """Of the committed save; None: there is none."""
        return max(self.manifests, default=None)

    @property
    def is_foreign(self) -> bool:
        """A checkpoint that is not ours (stock DCP, torch_xla): read, shown, never listed or deleted."""
        if self.manifests or self.attempts:
            return False
        return any(name == DCP_METADATA or name.endswith(".distcp") for name in self.other)

    def max_sequence(self) -> int:
        """The largest sequence number seen, committed or not; 0 if none."""
        return max([0, *self.manifests, *(attempt_sequence(name) for name in self.attempts)])

    def add(self, name: str, size: int) -> None:
        self.num_bytes += size
        if found := _MANIFEST.match(name):
            self.manifests[int(found[1])] = name
        elif found := _ATTEMPT_FILE.match(name):
            self.attempts.setdefault(found[1], []).append(name)
        else:
            self.other.append(name)

    def in_deletion_order(self) -> list[list[str]]:
        """All files in groups, each deleted before the next: a crash between leaves a partial step, never one that
        lists as whole or reads as foreign."""
        stock = [name for name in self.other if name == DCP_METADATA]
        data = [name for names in self.attempts.values() for name in names]
        return [sorted(self.manifests.values()), stock, data]

    def superseded(self) -> list[list[str]]:
        """Files of older saves of a committed step, manifests first, oldest first; left by a crash while re-saving."""
        newest = self.sequence
        assert newest is not None
        manifests = [name for sequence, name in sorted(self.manifests.items()) if sequence < newest]
        data = [
            name for attempt, names in self.attempts.items() if attempt_sequence(attempt) < newest for name in names
        ]
        return [manifests, data]

    def dead_attempts(self, newest_committed: int) -> list[str]:
        """Data of saves that never committed and never will: their sequence is below the newest committed one."""
        return [
            name
            for attempt, names in self.attempts.items()
            if attempt_sequence(attempt) < newest_committed and attempt_sequence(attempt) not in self.manifests
            for name in names
        ]


def attempt_sequence(attempt: str) -> int:
    return int(attempt.split("-", 1)[0])


def read_step_files(files: Mapping[str, int]) -> StepFiles:
    """Sort the files of one step folder; paths are relative to it."""
    step = StepFiles()
    for name, size in files.items():
        step.add(name, size)
    return step


def read_listing(files: Mapping[str, int]) -> dict[int, StepFiles]:
    """Sort the files of a run into its steps; anything that is not below a step folder is not ours and ignored."""
    steps: dict[int, StepFiles] = {}
    for path, size in files.items():
        if found := _STEP_PATH.match(path):
            steps.setdefault(int(found[1]), StepFiles()).add(found[2], size)
    return steps


def next_sequence(steps: Iterable[StepFiles]) -> int:
    return 1 + max((step.max_sequence() for step in steps), default=0)
