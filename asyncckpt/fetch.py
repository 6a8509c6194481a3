"""The files that a step was given, brought into a local folder: all of them right, or the folder as it was.

They are read in parallel by verify.py, which compares sizes and checksums, into a folder `.tmp-...` beside their
places, and take those only when all are there. A process that is killed meanwhile leaves that folder, which anybody may
delete. Called by restorer.py for a manager, and by whoever has a Storage alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from asyncckpt.errors import UNCHANGED, DamagedStepError, RestoreError, StepNotFoundError
from asyncckpt.framing import BLOCK_BYTES, crc32
from asyncckpt.manifest import FileRecord
from asyncckpt.restore import OpenStep, join, open_step
from asyncckpt.storage import TEMP_PREFIX, Storage
from asyncckpt.verify import FileCheck, Tell, data_files, file_problems

Select = Callable[[str], bool]
SAVED_AGAIN = "was saved again by another run each time it was read. Take another step, or end one of the two runs"


def fetch_files(
    storage: Storage,
    step: str,
    folder: str | os.PathLike[str],
    select: Select = lambda name: True,
    tell: Tell = lambda num_bytes: None,
) -> int:
    """Bring a step's files into `folder`; the bytes that storage gave. step: its folder in the storage.

    Raises as CheckpointManager.fetch does; OSError: storage failed.
    """
    for _ in range(3):  # once more if another run saves the step anew while we read it
        with Download(storage, open_step(storage, step), folder, select) as download:
            try:
                num_bytes = download.load(tell)
            except DamagedStepError:
                if open_step(storage, step).sequence != download.step.sequence:
                    continue
                raise
            download.publish()
            return num_bytes
    raise RestoreError(f"step {step} at {storage.url} {SAVED_AGAIN}", outcome=UNCHANGED)


def given_files(storage: Storage, step: OpenStep) -> list[FileRecord]:
    """StepNotFoundError for a checkpoint of another writer."""
    if step.manifest is None:
        raise StepNotFoundError(
            f"{join(storage.url, step.folder)} holds a checkpoint of another writer, which has no files of ours; all "
            "that it has is what the folder shows",
            known=[], url=storage.url,
        )  # fmt: skip
    return step.manifest.opaque


class Download:
    """Files of a step on their way into a folder: `load`, then `publish`; leaving the context removes what was not."""

    def __init__(self, storage: Storage, step: OpenStep, folder: str | os.PathLike[str], select: Select) -> None:
        self.step = step
        self._storage = storage
        self._folder = Path(_check_local(folder))
        self._records = {file.name: file for file in given_files(storage, step) if select(file.name)}
        self._temporary: Path | None = None
        self._places: dict[str, Path] = {}

    def __enter__(self) -> Download:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def load(self, tell: Tell = lambda num_bytes: None) -> int:
        """Read what the folder lacks, beside it; the bytes read. DamagedStepError names what is missing or differs."""
        step = self.step
        assert step.manifest is not None
        with self._writing():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._temporary = Path(tempfile.mkdtemp(prefix=TEMP_PREFIX, dir=self._folder))
            lacking = {name for name, record in self._records.items() if not _is_file(self._folder / name, record)}
            for number, name in enumerate(sorted(lacking)):
                self._places[name] = self._temporary / str(number)
                self._places[name].touch()
        files = [file for file in data_files(step, step.manifest) if file.record.name in lacking]
        problems = list(file_problems(self._storage, step, step.manifest, files, tell, self._put))
        if problems:
            raise DamagedStepError("; ".join(problems), url=self._storage.url, outcome=UNCHANGED)
        return sum(file.record.size for file in files)

    def publish(self) -> None:
        """Give every file its name. One that is there is replaced."""
        with self._writing("It may have some files of this step by now: fetch them again."):
            for name, place in self._places.items():
                target = self._folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(place, target)

    def _put(self, file: FileCheck, start: int, view: memoryview) -> None:
        with self._writing(), open(self._places[file.record.name], "r+b", buffering=0) as target:
            target.seek(start)
            while len(view):
                view = view[target.write(view) or 0 :]

    @contextlib.contextmanager
    def _writing(self, outcome: str = UNCHANGED) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise RestoreError(f"{self._folder} cannot be written to: {exc}", outcome=outcome) from exc


def _check_local(folder: str | os.PathLike[str]) -> str:
    folder = os.fspath(folder)
    if "://" in folder:
        raise ValueError(f"{folder} is a URL: files are fetched into a local folder")
    return folder


def _is_file(path: Path, record: FileRecord) -> bool:
    """Whether a file of these bytes is there."""
    if not path.is_file() or path.stat().st_size != record.size:
        return False
    value = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            value = crc32(block, value)
    return value == record.crc32
