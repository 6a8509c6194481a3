"""A model's weights at a URL, as Accelerate and transformers lay them out in a folder; and back into a model.

Their own code runs under `capture`, and what it would have written is streamed to the URL before the call returns. The
files lie at the URL itself, for others to read: no step, no manifest, and a process that dies in the call leaves a part
of them. Called by accelerate.py, and by users (`load_checkpoint_in_model`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import accelerate

from asyncckpt.errors import RestoreError, WriteError
from asyncckpt.files import BytesFile, File
from asyncckpt.integrations.capture import capture
from asyncckpt.storage import Storage, open_storage
from asyncckpt.stream import file_views
from stagers import BlockingAsyncStager

_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5,}-of-\d{5,})?\.(safetensors|bin)|[^\s/]+\.index\.json")


def is_url(path: Any) -> bool:
    return isinstance(path, str | os.PathLike) and "://" in os.fspath(path)


@contextmanager
def to_url(url: str, storage_options: Mapping[str, Any] | None, *, replaces: bool = True) -> Iterator[str]:
    """A local folder; what this process saves there lies at the URL when the block has ended well.

    replaces: weights that lie there under other names, of an earlier save in more or fewer files, are then deleted.
    WriteError: storage failed.
    """
    with TemporaryDirectory(prefix="asyncckpt-") as scratch:
        with capture(scratch) as captured:
            yield scratch
        files = captured.files()
    if files:
        _upload(open_storage(url, storage_options), files, replaces)


def _upload(storage: Storage, files: Mapping[str, File | bytes], replaces: bool) -> None:
    stager = BlockingAsyncStager()
    staged = stager.snapshot({name: file.value for name, file in files.items() if isinstance(file, File)})
    try:
        for name in sorted(files, key=lambda name: name.endswith(".json")):  # an index when all is there
            file = files[name]
            content = BytesFile(file) if isinstance(file, bytes) else file.format(staged.state_dict[name])
            storage.replace_file(name, content.size, iter(content.views()))
        if replaces:
            storage.delete([name for name in storage.list_files() if _WEIGHTS.fullmatch(name) and name not in files])
    except OSError as exc:
        raise WriteError(
            f"the model could not be saved to {storage.url}: {exc}. A part of it may be there. "
            "Check the permissions and the network, and save it again.",
            url=storage.url,
        ) from exc
    finally:
        staged.release()
        stager.close()


def load_checkpoint_in_model(
    model: Any,
    checkpoint: str | os.PathLike[str],
    device_map: Any = None,
    *args: Any,
    storage_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """`accelerate.load_checkpoint_in_model`, from a URL too: of a folder, or of one file in it.

    What is needed of it is brought to a scratch folder (TMPDIR), then Accelerate's own function reads it. RestoreError:
    it could not be read; the model was not changed.
    """
    if not is_url(checkpoint):
        return accelerate.load_checkpoint_in_model(model, checkpoint, device_map, *args, **kwargs)
    url, name = os.fspath(checkpoint).rstrip("/"), ""
    if _WEIGHTS.fullmatch(url.rpartition("/")[2]):
        url, _, name = url.rpartition("/")
    with TemporaryDirectory(prefix="asyncckpt-") as scratch:
        download(open_storage(url, storage_options), scratch, lambda n: _WEIGHTS.fullmatch(n) is not None)
        path = os.path.join(scratch, name) if name else scratch
        return accelerate.load_checkpoint_in_model(model, path, device_map, *args, **kwargs)


def download(storage: Storage, folder: str, select: Callable[[str], bool]) -> None:
    """Files that nothing says the checksums of. RestoreError: there is none, or storage failed."""
    try:
        sizes = {name: size for name, size in storage.list_files().items() if select(name)}
        for name, size in sizes.items():
            target = os.path.join(folder, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(target, "wb") as file:
                for view in file_views(storage, name, size):
                    file.write(view)
    except (OSError, EOFError) as exc:
        raise RestoreError(f"{storage.url} could not be read: {exc}. Nothing was changed.", url=storage.url) from exc
    if not sizes:
        raise RestoreError(
            f"there is no checkpoint at {storage.url}. Nothing was changed. Check the path.", url=storage.url
        )
