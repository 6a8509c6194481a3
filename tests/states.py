"""State dicts that hold everything a checkpoint may hold, as pure functions of a seed, and "bitwise equal"."""

from __future__ import annotations

from typing import Any

import torch

from asyncckpt import CheckpointManager

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


def tensor_of(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_complex:
        return torch.randn(shape, dtype=dtype, generator=generator)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


def every_kind(seed: int) -> dict[str, Any]:
    """Every dtype and memory layout, tied tensors, nesting and objects; about 18 MB."""
    base = tensor_of(torch.float32, 8, 8, seed=seed)
    tied = tensor_of(torch.float32, 300, 1000, seed=seed + 1)
    return {
        "model": {
            "large": tensor_of(torch.float32, 3000, 1000, seed=seed),
            "medium": tensor_of(torch.float32, 700, 500, seed=seed),
            "tied.a": tied,
            "tied.b": tied,
            "transposed": tensor_of(torch.float32, 5, 6, seed=seed).t(),
            "channels_last": tensor_of(torch.float32, 2, 3, 4, 4, seed=seed).to(memory_format=torch.channels_last),
            "rows": base[2:4],
            "columns": base[:, 1:3],
            "strided": base[::2, ::3],
            "expanded": tensor_of(torch.float32, 1, 4, seed=seed).expand(3, 4),
            "scalar": torch.tensor(3.5 + seed),
            "empty": torch.empty(0, 3),
        },
        "dtypes": {str(dtype): tensor_of(dtype, 3, 5, seed=seed) for dtype in DTYPES},
        "optimizer": {
            "param_groups": [{"lr": 0.1 * seed, "betas": (0.9, 0.95), "name": None}, {"lr": torch.tensor(0.5 * seed)}],
            "state": {"0": {"step": torch.tensor(float(seed)), "n": seed}},
        },
        "lists": [[1, 2, seed], [{"x": seed}, torch.arange(3) + seed]],
        "name": f"run {seed}",
        "flag": seed % 2 == 0,
    }


def target_like(state: Any) -> Any:
    """The same structure with other values, every tensor contiguous and its own: something to restore into."""
    if isinstance(state, dict):
        return {key: target_like(value) for key, value in state.items()}
    if isinstance(state, list):
        return [target_like(value) for value in state]
    if isinstance(state, torch.Tensor):
        return torch.zeros(state.shape, dtype=state.dtype)
    return type(state)() if state is not None else None


def assert_same(expected: Any, found: Any, path: str = "") -> None:
    """Equal in structure, type, dtype, shape and every bit."""
    if isinstance(expected, dict):  # of any kind: model.state_dict() is an OrderedDict
        assert isinstance(found, dict), path
        assert list(expected) == list(found), path
        for key in expected:
            assert_same(expected[key], found[key], f"{path}.{key}")
    elif isinstance(expected, list):
        assert len(expected) == len(found), path
        for number, (a, b) in enumerate(zip(expected, found, strict=True)):
            assert_same(a, b, f"{path}.{number}")
    elif isinstance(expected, torch.Tensor):
        assert (expected.dtype, expected.shape) == (found.dtype, found.shape), path
        assert raw_bytes(expected) == raw_bytes(found), path
    else:
        assert (type(expected), expected) == (type(found), found), path


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The elements in row-major order, as bytes."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def state(step: int) -> dict[str, Any]:
    """A small state of one step, for tests of which step it is."""
    return {"w": torch.full((1000,), float(step)), "n": step}


def restored(manager: CheckpointManager, step: int) -> dict[str, Any]:
    """What the manager restores of a step that holds `state(step)`."""
    target = {"w": torch.zeros(1000), "n": -1}
    manager.restore(step, target)
    return target
