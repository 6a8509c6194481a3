"""The two layouts that DCP has for an optimizer's state under its parameters' names, and the way between them.

    nested   {"state": {fqn: {key: value}}, "param_groups": [{"params": [fqn, ...], option: value}]}
    flat     {"state.<fqn>.<key>": value, "param_groups.<fqn>.<option>": value}

In a checkpoint the keys of `state` are the same in both. Those of the groups are not: nested, all ranks write to the
same few keys, so that only ranks with the same parameters can; flat is for the stages of a pipeline. A checkpoint of
either is restored by either. Pure; called by named_state.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from asyncckpt.errors import StateMismatchError

T = TypeVar("T")


def is_saved_flat(saved: Iterable[str], prefix: str, default: bool) -> bool:
    """Whether the keys of a checkpoint that begin with `prefix` are of a flat state; default: there are none."""
    if f"{prefix}param_groups.0.params" in saved:
        return False
    return default or any(key.startswith(f"{prefix}param_groups.") for key in saved)


def flat(osd: Mapping[str, Any]) -> dict[str, Any]:
    """A nested state, flat. Source: DCP's `_flatten_optim_state_dict`, which refuses more kinds of values."""
    found: dict[str, Any] = {}
    for name, entry in osd.get("state", {}).items():
        _flatten_into(found, f"state.{name}", entry)
    for group in osd.get("param_groups", ()):
        for name in group["params"]:
            found |= {f"param_groups.{name}.{option}": v for option, v in group.items() if option != "params"}
    return found


def with_groups(osd: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A state of either layout, nested, with the parameters of `groups` in groups as there.

    The options of a group are those that its parameters were saved with. Raises StateMismatchError where a flat state
    has two for one group.
    """
    names = [name for group in groups for name in group["params"]]
    if "param_groups" in osd:
        loaded, state = osd["param_groups"], dict(osd.get("state", {}))
        options = {name: group for group in loaded for name in group["params"]}
    else:
        loaded, state = [], {name: _unflatten(entry) for name, entry in by_name(osd, "state.", names).items()}
        options = by_name(osd, "param_groups.", names)
        for group in groups:
            _check_same(options, group["params"])
    taken = [_options(options, loaded, number, group["params"]) for number, group in enumerate(groups)]
    own = ("params", "param_names")  # the latter are torch's, of wrapped modules
    return {
        "state": state,
        "param_groups": [
            {**{option: v for option, v in found.items() if option not in own}, "params": group["params"]}
            for found, group in zip(taken, groups, strict=True)
        ],
    }


def by_name(entries: Mapping[str, T], prefix: str, names: Iterable[str]) -> dict[str, dict[str, T]]:
    """{name: {rest of the key: entry}} of the keys `<prefix><name>.<rest>`; names and rests may have dots."""
    known = set(names)
    found: dict[str, dict[str, T]] = {}
    for key, entry in entries.items():
        if key.startswith(prefix):
            name, rest = _split_name(key.removeprefix(prefix), known)
            found.setdefault(name, {})[rest] = entry
    return found


def _flatten_into(found: dict[str, Any], prefix: str, entry: Mapping[Any, Any]) -> None:
    for key, value in entry.items():
        if isinstance(value, Mapping):
            _flatten_into(found, f"{prefix}.{key}", value)
        else:
            found[f"{prefix}.{key}"] = value


def _unflatten(entries: Mapping[str, Any]) -> dict[Any, Any]:
    """{path with dots: value} as nested dicts. A number in a path is a key, as lists are not taken apart."""
    nested: dict[Any, Any] = {}
    for path, value in entries.items():
        *outer, last = (int(part) if part.isdigit() else part for part in path.split("."))
        inner = nested
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return nested


def _split_name(rest: str, names: set[str]) -> tuple[str, str]:
    """A parameter's name and what follows, both with dots; ("", rest) for none of ours."""
    parts = rest.split(".")
    for length in range(1, len(parts)):
        if (name := ".".join(parts[:length])) in names:
            return name, ".".join(parts[length:])
    return "", rest


def _options(
    options: Mapping[str, Mapping[str, Any]], loaded: Sequence[Mapping[str, Any]], number: int, names: Sequence[str]
) -> Mapping[str, Any]:
    if (name := next((name for name in names if name in options), None)) is not None:
        return options[name]
    if number >= len(loaded):
        return {}
    if names:
        warnings.warn(
            f"the checkpoint does not say in which parameter group {names[0]!r} was: it is nested, and ranks with "
            f"different parameters saved it. Group {number} takes the options of the saved group {number}. "
            "StateDictOptions(flatten_optimizer_state_dict=True) saves those of each parameter.",
            stacklevel=5,
        )
    return loaded[number]


def _check_same(options: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
    known = [name for name in names if name in options]
    for name in known[1:]:
        for option, value in options[name].items():
            first = options[known[0]].get(option, value)
            is_same = torch.equal(first, value) if isinstance(first, torch.Tensor) else first == value
            if not is_same:
                raise StateMismatchError(
                    f"{known[0]!r} and {name!r} are in one parameter group, but were saved with {option}={first!r} and "
                    f"{value!r}. Make the groups as the saved run did",
                    outcome="The state is half restored: do not train on.",
                )
