"""What the table of `scripts/torture` is made of: rows of attempts, each repeatable from a seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

Outcome: TypeAlias = Literal["survived", "detected"]
"""survived: the work went on, or what was restored is right, bit for bit. detected: an error of ours said what is
wrong, and nothing committed was lost. What else happens is an exception, and counts as lost."""


@dataclass(frozen=True)
class Row:
    """One kind of fault.

    key: names it on the command line. what: in words, for the table. quick, full: attempts in either run. attempt:
    makes number `n`, counted from 0, and tells what came of it, of each try if it makes several; the seed of the
    campaign and `n` decide everything in it. Whatever it raises means that something was lost.
    """

    key: str
    what: str
    quick: int
    full: int
    attempt: Callable[[int], Outcome | Counter[Outcome]]


def draws(seed: int, key: str, number: int) -> random.Random:
    """Of one attempt, and of no other."""
    return random.Random(f"{seed} {key} {number}")


@contextmanager
def noted(what: str) -> Iterator[None]:
    """What an attempt did, told with what it raises."""
    try:
        yield
    except BaseException as exc:
        exc.add_note(what)
        raise
