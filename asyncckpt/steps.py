"""Which steps a run has, read off one listing: the grammar of names, and what is whole, partial or foreign.

Pure: takes {path: size} and gives records; does no I/O. DESIGN.md's rules live here: a manifest's presence is the
commit, its highest sequence number wins, a folder of ours without one is partial, and stock DCP folders are foreign.
Used by manager.py (constructor, refresh), commit.py (what to delete) and dcp.py (a single step folder).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from asyncckpt.errors import SaveError

DCP_METADATA = ".metadata"
DEAD_MARK = "dead"
"""The name of a file in an attempt's folder that tells its writer, if it lives after all: these data are going."""
MAX_NUMBER = 10**18 - 1
"""Of a step, and of a sequence number: more digits make no name of ours. The ranks tell each other int64s."""
_STEP = r"(0|[1-9][0-9]{0,17})"
_STEP_PATH = re.compile(rf"{_STEP}/(.+)\Z", re.DOTALL)
_MANIFEST = re.compile(r"manifest-([0-9]{8,18})\.json\Z")
_DATA = re.compile(r"__[0-9]+_[0-9]+\.distcp\Z")
_HALF_MADE = re.compile(rf"{_STEP}(?:/([0-9]{{1,18}})-[0-9a-f]+(/.+)?)?\Z", re.DOTALL)
_ATTEMPT_FILE = re.compile(r"(([0-9]{1,18})-[0-9a-f]+)/(.+)\Z", re.DOTALL)


def new_token() -> int:
    """63 random bits: fit a signed int64, so that the ranks agree on an attempt's name in one small tensor."""
    return secrets.randbits(63)


def attempt_name(sequence: int, token: int) -> str:
    """A data folder that nobody else has. Padded: names have one length and sort in commit order."""
    return f"{sequence:08d}-{token:016x}"


def check_sequence(sequence: int) -> int:
    """SaveError where there is no further number: somebody put a file with the largest one there."""
    if sequence > MAX_NUMBER:
        raise SaveError(
            f"a file or folder there is named by the sequence number {sequence - 1}, and no larger one has a name. "
            "Nothing was written. Remove it, or save under another path."
        )
    return sequence


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
        if (found := _MANIFEST.match(name)) and name == manifest_name(int(found[1])):
            self.manifests[int(found[1])] = name
        elif found := _ATTEMPT_FILE.match(name):
            self.attempts.setdefault(found[1], []).append(name)
        else:
            self.other.append(name)

    def in_deletion_order(self) -> list[list[str]]:
        """All files of its saves in groups, each deleted before the next: a crash between leaves a partial step, never
        one that lists as whole or reads as foreign. None of an attempt without a manifest: it may be another run's that
        is just about to commit."""
        stock = [name for name in self.other if name == DCP_METADATA]
        data = [name for attempt in self.attempts if self._is_committed(attempt) for name in self.attempts[attempt]]
        return [sorted(self.manifests.values()), stock, data]

    @property
    def has_unfinished(self) -> bool:
        return not all(map(self._is_committed, self.attempts))

    def _is_committed(self, attempt: str) -> bool:
        return attempt_sequence(attempt) in self.manifests

    def beside(self, committed: str) -> list[str]:
        """Files of other attempts with the number of the committed one: two runs took it, and one was refused."""
        return [
            name
            for attempt, names in self.attempts.items()
            if attempt != committed and attempt_sequence(attempt) == self.sequence
            for name in names
        ]

    @property
    def has_rivals(self) -> bool:
        return sum(attempt_sequence(attempt) == self.sequence for attempt in self.attempts) > 1

    def unfinished(self, newest_committed: int = MAX_NUMBER + 1) -> list[str]:
        """Attempts that never committed and, unless their writer was only slow, never will: their sequence number is
        below the newest committed one. Without that, also those that may be under way."""
        numbers = {name: attempt_sequence(name) for name in self.attempts}
        return [name for name, number in numbers.items() if number < newest_committed and number not in self.manifests]

    def leftovers(self, newest_committed: int, spared: Container[str] = ()) -> list[list[str]]:
        """Files of saves that are over, in order of deletion: an older save of a step that was saved again, and the
        data of attempts that are unfinished, but for the `spared`.

        Of a partial step `.metadata` goes before the data: alone it would read as a foreign checkpoint. It stays beside
        an attempt that stays, whose writer may have written it.
        """
        current = self.sequence
        manifests = [name for sequence, name in self.manifests.items() if sequence != current]
        over = [
            attempt
            for attempt in self.attempts
            if current != attempt_sequence(attempt) < newest_committed and attempt not in spared
        ]
        data = [name for attempt in over for name in self.attempts[attempt]]
        is_all = current is None and data and len(over) == len(self.attempts)
        stock = [name for name in self.other if name == DCP_METADATA and is_all]
        return [group for group in (manifests, stock, data) if group]


def may_be_swept(path: str, newest_committed: int) -> bool:
    """Whether an empty folder, or an upload that nobody completed, can go: folders of steps and attempts, and uploads
    of attempts that are over.

    An empty folder that a live writer has just made is made again. An upload may go with the number of the newest
    committed one, too: no listing showed it, so it may have been given twice.
    """
    found = _HALF_MADE.match(path)
    return found is not None and (found[3] is None or int(found[2]) <= newest_committed)


def is_data_of_ranks(name: str) -> bool:
    """Whether a file of an attempt holds a rank's tensors and objects, by its name; else it was given as a file."""
    return _DATA.match(name) is not None


def belongs_to(name: str, sequence: int) -> bool:
    """Whether a file of a step folder is part of the committed save `sequence`."""
    if found := _ATTEMPT_FILE.match(name):
        return int(found[2]) == sequence
    return name in (DCP_METADATA, manifest_name(sequence))


@dataclass(frozen=True, slots=True)
class Listing:
    """What one listing says of a run. sequences: of the committed steps. next_sequence: larger than all seen."""

    sequences: Mapping[int, int]
    foreign: frozenset[int]
    next_sequence: int


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


def summarise(steps: Mapping[int, StepFiles]) -> Listing:
    return Listing(
        {step: files.sequence for step, files in steps.items() if files.sequence is not None},
        frozenset(step for step, files in steps.items() if files.is_foreign),
        1 + max((files.max_sequence() for files in steps.values()), default=0),
    )
