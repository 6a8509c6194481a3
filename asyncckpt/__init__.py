"""Asynchronous, verified, resumable checkpoints for PyTorch training, to any fsspec URL.

General layout, in the order in which a save passes through it (each module imports only what stands before it):

    errors, events, version           what is raised and reported
    dcp_log                           the same in DCP's own log
    exits                             the end of the process
    policy                            when to save, what to keep: pure decisions
    storage                           bytes at a URL: the seam, and who serves which URL
    parallel                          the same work on many things, on a few threads
    local_file, storage_local         a folder
    client_errors, retries            for the next: what clients of object stores raise, and when to try again
    client_requests                   their requests, each with a deadline
    s3_settings, s3_upload            where obstore does what s3fs would; large files to S3 without it
    s3_obstore                        the bytes of S3 through obstore
    storage_fsspec                    every other URL
    framing, chunks                   the format: items, and columns of what there is of them;
    tiling                            that these make up their tensors;
    unpickle                          pickles that others wrote, without running what they ask for;
    manifest, dcp_metadata            the index of a step, the stock index
    steps, index                      what a listing says; which steps there are
    store_keys                        what ranks leave for each other in the store
    gloo_group                        their messages
    ranks, sync_point, preemption     how ranks agree, and SIGTERM
    per_rank                          values that each rank keeps for itself
    shard_layout, objects             where items lie in files; what may be saved
    global_plan, plan                 who writes what: rank 0's decision, and how the ranks come to it
    shard, files                      items to bytes; files that a user gives, too
    torch_file, safetensors_file      the same as torch.save and safetensors write it: streams of views
    selection                         which keys a restore takes
    read, read_items                  and back: ranges of files; load plans
    boxes, read_whole                 which chunks make up a rank's part of a tensor; what needs no plan
    slices                            a part of a tensor, and which of its bytes that is
    sharing, read_once                which rank reads what several want; and passes it on
    restore, commit                   one step: read; made visible, and what is over cleared away
    lookup                            what is in a step, and one value of it
    save, verify                      the writer thread's half of a manager; the bytes of a step, all looked at
    fetch                             the files that a step was given, into a folder
    stream, export, imports           tensors as a file's bytes; a step as files that others read, and from them
    prime, optimizer_layout           an optimizer's state: made before the first step; nested or flat, as DCP has it
    named_state                       a model's and an optimizer's state under their parameters' names
    weights, checkpoint               a model's weights alone; a step without a run
    rng, loader                       random streams, the place in the data
    object_state                      any other object's state
    train_state, state                all of a run's state as one; a user's state as what is saved
    arguments, writer                 what users pass in; the background thread
    restorer, manager                 a restore on all ranks; the order of calls
    dcp                               the same format under stock dcp.save and dcp.load
    event_file, trace                 what happened, as lines beside the run; as a timeline
    overview, outline                 a run's steps at a glance, for people; a step's keys
    pruning, copying, differing       steps deleted by hand; copied, verified; compared
    report, report_page               what is known of a run, and whether it is in order; as a page
    testing                           what every storage must do, for our tests and yours
    cli, __main__                     the command

The package `stagers` copies state to host memory and knows nothing of this one. `integrations` (trainers, torch_xla,
sinks) stand last: each is imported by users alone, and may use all of the above.
"""

from asyncckpt.checkpoint import Checkpoint, open_checkpoint
from asyncckpt.dcp import ShardReader, ShardWriter
from asyncckpt.errors import (
    CheckpointError,
    CommitError,
    DamagedStepError,
    KeyNotFoundError,
    RestoreError,
    SaveError,
    StateMismatchError,
    StepNotFoundError,
    UnsafeObjectError,
    WriteError,
)
from asyncckpt.event_file import EventFile
from asyncckpt.events import (
    Committed,
    Delayed,
    Event,
    Failed,
    Merged,
    Pruned,
    Restored,
    Skipped,
    Staged,
    Unguarded,
    Written,
    log_events,
)
from asyncckpt.files import BytesFile, File
from asyncckpt.lookup import Saved
from asyncckpt.manager import CheckpointManager
from asyncckpt.per_rank import PerRank
from asyncckpt.policy import (
    CommittedStep,
    KeepAny,
    KeepBest,
    KeepEvery,
    KeepLast,
    KeepPolicy,
    KeepYounger,
    SaveAny,
    SaveEvery,
    SaveEverySeconds,
    SavePolicy,
)
from asyncckpt.prime import prime_optimizer
from asyncckpt.trace import TraceFile
from asyncckpt.train_state import TrainState
from asyncckpt.verify import VerifyReport
from asyncckpt.version import __version__

__all__ = [
    "CheckpointManager",
    "open_checkpoint",
    "Checkpoint",
    "Saved",
    "TrainState",
    "PerRank",
    "File",
    "BytesFile",
    "prime_optimizer",
    "ShardWriter",
    "ShardReader",
    "VerifyReport",
    "CheckpointError",
    "SaveError",
    "WriteError",
    "CommitError",
    "RestoreError",
    "StepNotFoundError",
    "DamagedStepError",
    "KeyNotFoundError",
    "StateMismatchError",
    "UnsafeObjectError",
    "SavePolicy",
    "SaveEvery",
    "SaveEverySeconds",
    "SaveAny",
    "KeepPolicy",
    "KeepLast",
    "KeepEvery",
    "KeepBest",
    "KeepYounger",
    "KeepAny",
    "CommittedStep",
    "Event",
    "Staged",
    "Written",
    "Committed",
    "Delayed",
    "Pruned",
    "Failed",
    "Restored",
    "Merged",
    "Skipped",
    "Unguarded",
    "log_events",
    "EventFile",
    "TraceFile",
    "__version__",
]
