"""Which Python objects may stand in a checkpoint: those that load again without running code.

`torch.load(weights_only=True)` plus the user's `safe_globals` is the one rule, for saving (checked before anything is
written) and for restoring. Used by plan.py and restore.py.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import torch

from asyncckpt.errors import UnsafeObjectError
from asyncckpt.framing import encode_object

_PLAIN = (int, float, complex, str, bool, bytes, type(None))


def is_plain(value: Any) -> bool:
    """Whether a value is made of the types that always load again, so that no trial is needed."""
    kind = type(value)
    if kind in _PLAIN:
        return True
    if kind in (list, tuple, set):
        return all(map(is_plain, value))
    if kind is torch.Tensor:
        return value.layout is torch.strided and not value.is_quantized
    return kind is dict and all(is_plain(key) and is_plain(item) for key, item in value.items())


def load_object(data: bytes, safe_globals: Iterable[Any], key: str) -> Any:
    """The value of an object item. UnsafeObjectError names the key and what it asks for."""
    try:
        with torch.serialization.safe_globals(list(safe_globals)):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as exc:  # UnpicklingError, and whatever a __setstate__ raises
        raise UnsafeObjectError(
            f"the object at {key!r} does not load without running code: {_reason(exc)}. "
            "Store plain values or tensors, or pass the classes you trust as safe_globals=[...]."
        ) from exc


def check_object(value: Any, safe_globals: Iterable[Any], key: str) -> None:
    """Raise UnsafeObjectError if the value could not be saved, or not be loaded back."""
    if is_plain(value):
        return
    try:
        data = encode_object(value)
    except Exception as exc:  # pickle raises PicklingError, TypeError, AttributeError, ...
        raise UnsafeObjectError(
            f"the object at {key!r} ({type(value).__module__}.{type(value).__qualname__}) cannot be stored: {exc}. "
            "Nothing was written. Leave it out of the state dict, or store plain values and tensors instead."
        ) from exc
    load_object(data, safe_globals, key)


def _reason(exc: Exception) -> str:
    """The line of torch's long message that names the class."""
    lines = [line.strip() for line in str(exc).splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return lines[0] if lines else f"{type(exc).__name__}: {str(exc).strip().splitlines()[0] if str(exc) else ''}"
