"""`log_to_dcp`: an event sink that puts our phases into DCP's own log, where handlers that listen there find them.

torch notes each of `dcp.save`'s phases on a logger of its own, as a dict with the fields that `_message` fills in, and
listeners (of `torch.distributed.logging_handlers`, or added to the logger) pick them out. A sink of every manager;
where nobody listens, nothing happens. The fields are torch's private matter, here as in torch 2.9 to 2.13.
"""

from __future__ import annotations

import logging
import time
import uuid
from dataclasses import fields
from typing import Any

from torch.distributed.checkpoint.logger import _dcp_logger

from asyncckpt.events import Committed, Event, Failed, Restored, Staged, Written

_FUNC_NAMES = {"stage": "stage_state_dict", "write": "write_data", "commit": "finish_checkpoint", "restore": "load"}
"""DCP's names for phases of ours."""
_OWN_FIELDS = frozenset(field.name for field in fields(Event))


def log_to_dcp(event: Event) -> None:
    """One message at the end of each phase that DCP has, too; its ends at DEBUG, failures as "exception" at ERROR."""
    if all(isinstance(handler, logging.NullHandler) for handler in _dcp_logger.handlers):
        return  # as torch leaves it
    match event:
        case Staged():
            _dcp_logger.debug(_message(event, "stage", event.stage_s))
        case Written():
            _dcp_logger.debug(_message(event, "write", event.write_s))
        case Committed():
            _dcp_logger.debug(_message(event, "commit", event.commit_s))
            _dcp_logger.debug(_message(event, "save", event.durable_s))
        case Restored():
            _dcp_logger.debug(_message(event, "restore", event.restore_s))
        case Failed():
            _dcp_logger.error(_message(event, event.phase, 0.0) | {"event": "exception", "error": str(event.error)})


def _message(event: Event, phase: str, seconds: float) -> dict[str, Any]:
    """DCP's fields, with its units: nanoseconds. And those that the event has of its own, with ours."""
    own = {field.name: getattr(event, field.name) for field in fields(event) if field.name not in _OWN_FIELDS}
    return own | {
        "checkpoint_id": f"{event.url.rstrip('/')}/{event.step}",
        "uuid": str(uuid.uuid4().int),
        "func_name": _FUNC_NAMES.get(phase, phase),
        "event": "end",
        "time": time.time_ns(),
        "times_spent": int(seconds * 1e9),
        "log_exceptions": True,
        "global_rank": str(event.rank),
    }
