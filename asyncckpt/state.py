"""What a save and a restore see of a user's state."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch.distributed.checkpoint.stateful import Stateful


def for_save(state, rank: int) -> dict[str, Any]:
    return {k: v.state_dict() if isinstance(v, Stateful) else v for k, v in state.items()}


def for_restore(state, keys: Collection[str], rank: int) -> dict[str, Any]:
    return for_save(state, rank)


def restored(state, target: dict[str, Any], step: int) -> None:
    for k, v in state.items():
        if isinstance(v, Stateful):
            v.load_state_dict(target[k])
        else:
            state[k] = target[k]
