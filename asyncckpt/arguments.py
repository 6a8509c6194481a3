"""What users pass to the manager, checked at the call: a ValueError with the value, before anything is done."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from asyncckpt.steps import MAX_NUMBER


def check_arguments(
    save_interval: int,
    max_to_keep: int,
    max_pending_async: int,
    num_of_threads: int | None,
    on_busy: str,
    timeout: float,
    grace_period: float | None,
) -> None:
    for name, value, least in (
        ("save_interval", save_interval, 1),
        ("max_to_keep", max_to_keep, 0),
        ("max_pending_async", max_pending_async, 1),
        ("num_of_threads", 1 if num_of_threads is None else num_of_threads, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of {least} or more, got {value!r}")
    if on_busy not in ("wait", "skip"):
        raise ValueError(f'on_busy must be "wait" or "skip", got {on_busy!r}')
    if not isinstance(timeout, int | float) or not timeout > 0:
        raise ValueError(f"timeout must be above 0 seconds, got {timeout!r}")
    if grace_period is not None and not (isinstance(grace_period, int | float) and 0 < grace_period < math.inf):
        raise ValueError(f"grace_period must be a finite number of seconds above 0, or None, got {grace_period!r}")


def check_retry_timeout(retry_timeout: float) -> None:
    if not isinstance(retry_timeout, int | float) or not 0 <= retry_timeout < math.inf:
        raise ValueError(f"retry_timeout must be a finite number of seconds, 0 or more, got {retry_timeout!r}")


def check_step(step: int) -> None:
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= MAX_NUMBER:
        raise ValueError(f"step must be a whole number of 0 or more, of at most 18 digits, got {step!r}")


def json_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        copied: dict[str, Any] = json.loads(json.dumps(dict(metadata or {}), allow_nan=False))
    except (TypeError, ValueError) as exc:
        raise ValueError(f"metadata must be JSON values: {exc}. Nothing was written.") from exc
    return copied


def finite_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    try:
        numbers = {str(name): float(value) for name, value in (metrics or {}).items()}
    except (TypeError, ValueError) as exc:
        raise ValueError(f"metrics must be numbers: {exc}. Nothing was written.") from exc
    return {name: value for name, value in numbers.items() if math.isfinite(value)}
