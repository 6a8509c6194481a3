"""The random streams of this process: Python's, numpy's, torch's on the CPU and on every accelerator device.

Values are plain or tensors, so that they load with `weights_only=True`. Which rank saves or takes which state is
train_state.py's job; loader.py replays an epoch's start with them.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch


def rng_state(*, devices: bool = True) -> dict[str, Any]:
    """All streams; nothing is drawn. devices=False leaves the accelerators out, whose state may cost a transfer."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    # Before its first use the streams of a device are not random state yet, and asking would start a context: about
    # 0.5 GiB on CUDA.
    module = _accelerator() if devices else None
    if module is not None and getattr(module, "is_initialized", lambda: True)():
        has_all = hasattr(module, "get_rng_state_all")  # MPS has one device and no such call
        state["devices"] = module.get_rng_state_all() if has_all else [module.get_rng_state()]
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` gave. Devices beyond those saved, and those saved beyond ours, are left out."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    module, saved = _accelerator(), state.get("devices", ())
    if module is not None and hasattr(module, "get_rng_state_all"):
        for index, device in zip(range(module.device_count()), saved, strict=False):
            module.set_rng_state(device, index)
    elif module is not None and saved:
        module.set_rng_state(saved[0])


def derive_rng_state(state: dict[str, Any], rank: int) -> None:
    """Seed every stream from another rank's state and our rank: repeatable, and unlike the streams of that rank."""
    digest = hashlib.sha256(state["torch"].numpy().tobytes() + str(rank).encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _accelerator() -> Any:
    if not torch.accelerator.is_available():
        return None
    module = torch.get_device_module(torch.accelerator.current_accelerator())
    return module if hasattr(module, "set_rng_state") else None
