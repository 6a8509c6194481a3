"""Which keys a restore takes, and which of them a checkpoint may lack: patterns, or the user's own function.

Pure. Called by restore.py and train_state.py; the arguments are a manager's `restore`'s.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from asyncckpt.errors import UNCHANGED, StateMismatchError

KeyFilter = str | Iterable[str] | Callable[[str], bool]
"""A pattern, several, or a function that is asked about each key.

A pattern is a key, or the start of one up to a dot or "/rank_<k>", with "*", "?" and "[...]" as in a shell; "*" also
stands for dots."""


@dataclass(frozen=True)
class Selection:
    """takes: None: every key. may_lack: keys that may be missing in the checkpoint, and then keep their values.
    patterns: those of `takes`, each of which must be of some use."""

    takes: Callable[[str], bool] | None = None
    may_lack: Callable[[str], bool] | None = None
    patterns: Sequence[str] = ()

    @classmethod
    def of(cls, keys: KeyFilter | None, allow_missing: bool | KeyFilter) -> Selection:
        """ValueError, TypeError: neither patterns nor a function."""
        if keys is None and allow_missing is False:
            return EVERYTHING
        patterns = [keys] if isinstance(keys, str) else [] if keys is None or callable(keys) else list(keys)
        takes = None if keys is None else keys if callable(keys) else matcher(patterns)
        if isinstance(allow_missing, bool):
            return cls(takes, _every if allow_missing else None, patterns)
        lacking = [allow_missing] if isinstance(allow_missing, str) else allow_missing
        return cls(takes, lacking if callable(lacking) else matcher(lacking), patterns)

    def has(self, key: str) -> bool:
        return self.takes is None or self.takes(key)

    def below(self, prefix: str) -> Selection:
        """The same for keys that are asked about without `prefix`."""
        takes, may_lack = self.takes, self.may_lack
        return Selection(
            None if takes is None else lambda key: takes(prefix + key),
            None if may_lack is None else lambda key: may_lack(prefix + key),
        )

    def check_used(self, saved: Iterable[str], asked: Iterable[str], where: str) -> None:
        """StateMismatchError: a pattern that none of the keys matches, so that a slip of the pen restores nothing in
        silence. The checkpoint's keys count, as ranks may differ in theirs; of a rank's own those it may lack."""
        if not self.patterns:
            return
        keys = [*saved, *filter(self.may_lack or (lambda key: False), asked)]
        for pattern in self.patterns:
            if not any(map(matcher([pattern]), keys)):
                raise StateMismatchError(
                    f"no key of {where} matches {pattern!r}; it has {len(keys)}, {', '.join(map(repr, keys[:3]))}, ...",
                    outcome=UNCHANGED,
                )


EVERYTHING = Selection()


def matcher(patterns: Iterable[str]) -> Callable[[str], bool]:
    """Whether a key is matched by one of the patterns. TypeError: one is no text."""
    patterns = list(patterns)
    if wrong := [pattern for pattern in patterns if not isinstance(pattern, str)]:
        raise TypeError(f"keys are chosen by patterns or by one function, and {wrong[0]!r} is no pattern")
    wholes = (fnmatch.translate(pattern + end) for pattern in patterns for end in ("", ".*", "/rank_[0-9]*"))
    compiled = re.compile("|".join(wholes) or r"(?!)")
    return lambda key: compiled.match(key) is not None


def _every(key: str) -> bool:
    return True
