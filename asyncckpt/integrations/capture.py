"""A trainer's own save code, run for its files without writing them.

Inside `capture(folder)` that code thinks that it writes into a local folder. What `torch.save`, `save_file` of
safetensors and `dcp.save` would write there is kept, tensors as they are, for a manager to stage and write later; what
else it writes (JSON, text) is really written and read back. So hooks of users and files of new versions come along. For
this thread only; other threads and other paths notice nothing. Called by accelerate.py and transformers.py.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from asyncckpt.files import File
from asyncckpt.integrations.capture_dcp import CapturingWriter
from asyncckpt.safetensors_file import SafetensorsFile
from asyncckpt.torch_file import TorchFile
from stagers import StagingError
from stagers.flatten import flatten

SMALL_BYTES = 1024 * 1024
"""Of tensors in what torch.save is given; below it the file is made at once, as torch makes it, with every class of
container and object in it. A guess: copying so much costs about as much as pickling it."""
_SAVE_FILE_NAMES = ("save_file", "safe_save_file")  # under which modules import it: Accelerate, transformers, peft, ...
_open = threading.local()  # .captured: this thread's innermost Captured
_lock = threading.Lock()
_restores: list[Callable[[], None]] = []
_num_open = 0


class Captured:
    """The files of one capture; made by `capture`."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = os.path.abspath(folder)
        self._kept: dict[str, File | bytes] = {}

    def files(self) -> dict[str, File | bytes]:
        """Every file, under its path relative to the folder with "/". Those really written are read now."""
        written = [Path(base, name) for base, _, names in os.walk(self._folder) for name in names]
        return {self._name(path): path.read_bytes() for path in written} | self._kept

    def holds(self, path: Any) -> bool:
        """Whether `path` is one below the folder."""
        if not isinstance(path, str | os.PathLike):
            return False
        return os.path.abspath(os.fspath(path)).startswith(self._folder + os.sep)

    def keep(self, path: str | os.PathLike[str], file: File | bytes) -> None:
        self._kept[self._name(path)] = file

    def _name(self, path: str | os.PathLike[str]) -> str:
        return Path(os.path.relpath(os.path.abspath(path), self._folder)).as_posix()


@contextmanager
def capture(folder: str | os.PathLike[str]) -> Iterator[Captured]:
    """Keep what this thread saves below `folder` until the block ends; `captured.files()` gives it, in the block or
    after it, as long as the folder is there. Tensors are the live ones: hand the files on before any of them changes.

    Not kept but really written: torch.save to an open file, in the old format, or with a pickle module.
    """
    captured, outer = Captured(folder), getattr(_open, "captured", None)
    _install()
    _open.captured = captured
    try:
        yield captured
    finally:
        _open.captured = outer
        _uninstall()


def _captured(path: Any) -> Captured | None:
    captured: Captured | None = getattr(_open, "captured", None)
    return captured if captured is not None and captured.holds(path) else None


def _install() -> None:
    """Counted, as threads may capture side by side."""
    global _num_open
    with _lock:
        _num_open += 1
        if _num_open == 1:
            _wrap(torch, "save", _capturing_torch_save)
            _wrap(dcp, "FileSystemWriter", _capturing_writer)
            save_file = safetensors.torch.save_file
            for module in list(sys.modules.values()):
                for name in _SAVE_FILE_NAMES:
                    if getattr(module, "__dict__", {}).get(name) is save_file:
                        _wrap(module, name, _capturing_save_file)


def _uninstall() -> None:
    global _num_open
    with _lock:
        _num_open -= 1
        while not _num_open and _restores:
            _restores.pop()()


def _wrap(module: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    original = getattr(module, name)
    _restores.append(partial(setattr, module, name, original))
    setattr(module, name, wrap(original))


def _capturing_torch_save(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        captured = None if args or kwargs else _captured(f)
        if captured is None:
            original(obj, f, *args, **kwargs)
        else:
            captured.keep(f, _torch_file(obj, original))

    return save


def _torch_file(obj: Any, save: Callable[..., None]) -> File | bytes:
    try:
        is_large = sum(tensor.nbytes for tensor in flatten({"": obj}).tensors) >= SMALL_BYTES
    except StagingError:  # sparse, for example
        is_large = False
    if is_large:
        return File(obj, TorchFile)
    buffer = io.BytesIO()
    save(obj, buffer)
    return buffer.getvalue()


def _capturing_save_file(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def save_file(tensors: Mapping[str, Any], filename: Any, metadata: Mapping[str, str] | None = None) -> None:
        captured = _captured(filename)
        if captured is None:
            original(tensors, filename, metadata)
        else:
            captured.keep(filename, File(dict(tensors), partial(SafetensorsFile, metadata=metadata)))

    return save_file


def _capturing_writer(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original, updated=())
    def file_system_writer(path: Any, *args: Any, **kwargs: Any) -> Any:
        captured = _captured(path)
        if captured is None:
            return original(path, *args, **kwargs)
        return CapturingWriter(os.fspath(path), captured.keep)

    return file_system_writer
