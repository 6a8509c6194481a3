"""`PerRank`: values that each rank keeps for itself, and how they look in a checkpoint: under `<key>/rank_<k>`.

DCP keeps one of the values that ranks save under the same key, without a word; a key of its own for each rank prevents
that. Called by state.py for plain state dicts, and by train_state.py.

Restored on another number of ranks, every value of a rank (random streams, places in the data, `PerRank`) follows one
rule, and nothing is merged or averaged:

    a rank that was there at the save       takes its own
    rank k, which was not                   takes that of the k-th modulo n, of the n that were, and warns
    what is left of ranks that are gone     stays in the checkpoint; rank 0 warns

What it makes of another rank's value: random streams are derived from it, unlike that rank's (rng.py); a place in the
data is taken over, and converted if the data is divided anew (loader.py); anything else is taken as it is.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_RANK_KEY = re.compile(r"(.*?)/rank_(\d+)(?=\.|$)")


class PerRank:
    """A value of this rank alone. A restore sets `value`; anything that may stand in a state dict may be in it.

    Restored on more ranks than saved, rank k takes the value of rank k modulo those that were there; on fewer, some
    values are left over. Both with a warning.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"


def expand_per_rank(
    state_dict: Mapping[str, Any], rank: int, saved: Iterable[str] | None = None, world_size: int = 1
) -> dict[str, Any]:
    """`state_dict` with each PerRank under "k" replaced by its value under "k/rank_<rank>".

    saved: the keys of the checkpoint to restore, for choosing another rank where they lack this one; None: saving.
    Dicts with a PerRank below them are copied, others are not; `collect_per_rank` brings back what was loaded.
    """
    if not _holds_per_rank(state_dict):
        return dict(state_dict)
    ranks = None if saved is None else saved_ranks(saved)

    def source(key: str) -> int:
        return rank if ranks is None else source_rank(key, rank, ranks, world_size)

    return _expand(state_dict, "", source)


def collect_per_rank(state_dict: dict[str, Any], loaded: Mapping[str, Any]) -> None:
    """Set every PerRank in `state_dict`, and all else that was copied, from what `expand_per_rank` made of it."""
    named = [key for key in loaded if "/rank_" in key]
    of_ranks = {found[1]: loaded[key] for key in named if (found := _RANK_KEY.fullmatch(key))}
    for key, value in state_dict.items():
        if isinstance(value, PerRank):
            value.value = of_ranks[key]
        elif isinstance(value, dict) and loaded[key] is not value:
            collect_per_rank(value, loaded[key])
        else:
            state_dict[key] = loaded[key]


def saved_ranks(keys: Iterable[str]) -> dict[str, set[int]]:
    """{key without rank: ranks that saved it} from flattened keys."""
    ranks: dict[str, set[int]] = {}
    for key in keys:
        if "/rank_" in key and (found := _RANK_KEY.match(key)):
            ranks.setdefault(found[1], set()).add(int(found[2]))
    return ranks


def source_rank(key: str, rank: int, ranks: Mapping[str, set[int]], world_size: int) -> int:
    """The rank to take `key` from. `rank` itself where no rank saved it: restoring then reports the missing key."""
    saved = ranks.get(key, {rank})
    in_order = sorted(saved)

    def source(of: int) -> int:
        return of if of in saved else in_order[of % len(saved)]

    if rank == 0 and (left := saved.difference(map(source, range(world_size)))):
        warnings.warn(
            f"{key!r} was saved by {len(saved)} ranks, and {world_size} restore it: what {len(left)} of them had, from "
            f"rank {min(left)} on, stays in the checkpoint",
            stacklevel=4,
        )
    if source(rank) != rank:
        warnings.warn(
            f"{key!r} was saved by {len(saved)} ranks; rank {rank} was not there and takes rank {source(rank)}'s",
            stacklevel=4,
        )
    return source(rank)


def _expand(node: Mapping[str, Any], prefix: str, source: Callable[[str], int]) -> dict[str, Any]:
    expanded: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, PerRank):
            expanded[f"{key}/rank_{source(f'{prefix}{key}')}"] = value.value
        elif isinstance(value, Mapping) and _holds_per_rank(value):
            expanded[key] = _expand(value, f"{prefix}{key}.", source)
        else:
            expanded[key] = value
    return expanded


def _holds_per_rank(node: Mapping[str, Any]) -> bool:
    kinds = [kind for kind in set(map(type, node.values())) if issubclass(kind, PerRank | Mapping)]
    if not kinds:  # a dict of tensors only, of which there may be thousands
        return False
    values = [value for value in node.values() if type(value) in kinds]
    return any(isinstance(value, PerRank) or _holds_per_rank(value) for value in values)
