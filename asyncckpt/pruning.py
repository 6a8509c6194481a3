"""Retention by hand: what a policy would drop of a run, and dropping it as the run itself does.

Another run may write there meanwhile: steps go by commit.py's rules, so a step that it saves again stays, and a writer
that is taken for dead finds the mark before it commits. What does not read is never deleted and never counted as one to
keep, as it may be all there is. Called by the command line, which asks first.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from asyncckpt import events
from asyncckpt.commit import Committer
from asyncckpt.errors import CheckpointError
from asyncckpt.index import RunIndex
from asyncckpt.overview import Glance, Run, look
from asyncckpt.policy import CommittedStep, KeepPolicy, prunable
from asyncckpt.steps import attempt_sequence, may_be_swept, summarise


class PruneError(CheckpointError):
    """Something could not be deleted; what was not is as it was, or goes with the next try."""


@dataclass(frozen=True, slots=True)
class DeadSave:
    """A save that was never committed. age_s: since its last file was written; None: that is not known."""

    step: int
    attempt: str
    num_files: int
    num_bytes: int
    age_s: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to go, oldest commit first, and what stays. damaged: committed steps that do not read, which stay."""

    drop: Sequence[Glance] = ()
    keep: Sequence[Glance] = ()
    damaged: Sequence[Glance] = ()
    dead: Sequence[DeadSave] = field(default=())


def plan_steps(run: Run, policy: KeepPolicy, now_s: float | None = None) -> Plan:
    """What `policy` would drop: never the newest whole step, and none that does not read or is not ours. Reads the ends
    of every manifest."""
    committed = [step for step, files in run.steps.items() if files.sequence is not None]
    seen = list(look(run, committed).values())
    whole = [glance for glance in seen if not glance.damage]
    steps = [
        CommittedStep(glance.step, glance.sequence, glance.head.time_s, glance.head.metrics)
        for glance in whole
        if glance.head is not None
    ]
    drop = set(prunable(steps, policy, protected=(), now_s=time.time() if now_s is None else now_s))
    return Plan(
        [glance for glance in whole if glance.step in drop],
        [glance for glance in whole if glance.step not in drop],
        [glance for glance in seen if glance.damage],
    )


def find_dead(run: Run, grace_s: float) -> list[DeadSave]:
    """Saves that never commit: what took its number before a commit that came, and else what got no file for `grace_s`
    seconds, by the storage's clock."""
    found = []
    for step, files in run.steps.items():
        for attempt in files.unfinished():
            paths = [f"{step}/{name}" for name in files.attempts[attempt]]
            age_s = _age_s(run, paths)
            is_over = attempt_sequence(attempt) < run.newest_sequence
            if is_over or (age_s is not None and age_s >= grace_s):
                found.append(DeadSave(step, attempt, len(paths), sum(run.sizes[path] for path in paths), age_s))
    return found


def _age_s(run: Run, paths: Sequence[str]) -> float | None:
    try:
        return time.time() - max(run.storage.modified_s(path) for path in paths)
    except FileNotFoundError:  # somebody deletes it
        return 0.0
    except OSError:
        return None


def prune(run: Run, plan: Plan) -> list[events.Pruned]:
    """Delete it: manifests first. What was deleted; PruneError names what was not."""
    told: list[events.Event] = []
    index = RunIndex()
    index.load(summarise(run.steps), run.steps)
    committer = Committer(run.storage, index, None, told.append, rank=0, world_size=1)
    try:
        committer.retire([glance.step for glance in plan.drop])
        committer.delete_leftovers()
        if plan.dead:
            committer.bury({(save.step, save.attempt) for save in plan.dead})
            run.storage.sweep(lambda path: may_be_swept(path, run.newest_sequence))
    except OSError as exc:
        raise PruneError(f"nothing more was deleted: {exc}", url=run.storage.url) from exc
    if failed := [event for event in told if isinstance(event, events.Failed)]:
        left = sorted({leftover.step for leftover in committer.leftovers})
        raise PruneError(
            f"step {', '.join(map(str, left))} at {run.storage.url} could not be deleted: {failed[0].error}. What is "
            "left of it is not listed, or is whole. Check the permissions, and prune again.",
            url=run.storage.url,
        )
    return [event for event in told if isinstance(event, events.Pruned)]
