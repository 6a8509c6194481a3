"""Everything asyncckpt raises on purpose, as one tree.

    CheckpointError
      SaveError                 a save failed; the last committed step is untouched
        WriteError              bytes did not reach storage
        CommitError             the bytes are there, the step could not be made visible
      RestoreError              a restore failed
        StepNotFoundError       also a FileNotFoundError
        DamagedStepError        the step is listed, but its manifest or data is missing or wrong
        KeyNotFoundError        also a KeyError: the step has no value of that name
        StateMismatchError      the checkpoint and the state dict do not fit together; nothing was changed
        UnsafeObjectError       an object that `weights_only` plus `safe_globals` does not load

Every message says what happened, what is still safe and what to do next. Wrong arguments are `ValueError`/`TypeError`.
"""

from __future__ import annotations

UNCHANGED = "Nothing was changed."


class CheckpointError(Exception):
    """Base of the tree. Attributes are None where they do not apply.

    step: the step concerned. url: the run's URL, without credentials. rank: the rank where it happened.
    outcome: what became of the state being restored, a sentence that ends the text's first line; "" where the rest of
    the text says it.
    """

    def __init__(
        self,
        message: str,
        *,
        step: int | None = None,
        url: str | None = None,
        rank: int | None = None,
        outcome: str = "",
    ) -> None:
        super().__init__(message)
        self.step = step
        self.url = url
        self.rank = rank
        self.outcome = outcome

    @property
    def what(self) -> str:
        """The text without `outcome`."""
        return super().__str__()

    def __str__(self) -> str:
        if not self.outcome:
            return self.what
        first, newline, rest = self.what.partition("\n")
        return f"{first.removesuffix('.')}. {self.outcome}{newline}{rest}"


class SaveError(CheckpointError):
    """A save failed; the last committed step is untouched."""


class WriteError(SaveError):
    """Bytes did not reach storage."""


class CommitError(SaveError):
    """The bytes are in storage, but the step could not be made visible."""


class RestoreError(CheckpointError):
    """A restore failed."""


class StepNotFoundError(RestoreError, FileNotFoundError):
    """The step is not there. `known` lists the steps that are."""

    def __init__(self, message: str, *, known: list[int], step: int | None = None, url: str | None = None) -> None:
        super().__init__(message, step=step, url=url)
        self.known = known


class DamagedStepError(RestoreError):
    """The step is listed, but a file of it is missing or differs from its checksum."""


class KeyNotFoundError(RestoreError, KeyError):
    """The step has no value of that name. `near` lists names that are like it."""

    def __init__(self, message: str, *, near: list[str]) -> None:
        super().__init__(message)
        self.near = near

    @property
    def what(self) -> str:
        return str(self.args[0])  # a KeyError's own text is a repr


class StateMismatchError(RestoreError):
    """Keys, shapes or dtypes of the checkpoint and of the state dict differ; nothing was changed."""


class UnsafeObjectError(CheckpointError):
    """An object needs code that `weights_only` loading plus `safe_globals` does not allow."""


def located(error: Exception, step: int, url: str, rank: int) -> Exception:
    """`error`, saying where it happened."""
    if isinstance(error, CheckpointError):
        error.step, error.url, error.rank = step, url, rank
    return error
