"""`asyncckpt export` and `asyncckpt import`: a step as the files of other programs, and such files as a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer
from rich.filesize import decimal

from asyncckpt.cli.app import (
    AsJson,
    StorageOptions,
    Url,
    app,
    counted,
    fail,
    listed,
    opened,
    output,
    print_json,
    progress,
)
from asyncckpt.cli.show import chosen_step
from asyncckpt.export import MAX_SHARD_SIZE, Exported, export_files, export_safetensors, export_torch
from asyncckpt.imports import Imported, import_safetensors, import_torch
from asyncckpt.lookup import saved_in
from asyncckpt.restore import open_step
from asyncckpt.storage import Storage, redact

TORCH_ENDINGS = (".pt", ".pth", ".bin", ".ckpt")
SAFETENSORS_ENDINGS = (".safetensors", ".safetensors.index.json")

TargetOptions = Annotated[
    list[str],
    typer.Option("--target-option", metavar="KEY=VALUE", help="As --storage-option, for the target."),
]
Renames = Annotated[
    list[str],
    typer.Option(
        "--rename",
        metavar="FROM=TO",
        help="Applied to each name, in turn: a regular expression, and what takes its place. May be repeated.",
    ),
]
Prefix = Annotated[str, typer.Option("--prefix", metavar="KEY", help="The subtree that is meant, as in model.")]


@app.command("export")
def export_(
    url: Url,
    rest: Annotated[
        list[str],
        typer.Argument(
            metavar="[STEP] TARGET",
            help="The step, without it the one committed last; and a folder or URL, or a file there.",
            show_default=False,
        ),
    ],
    format_: Annotated[
        Literal["safetensors", "torch", "files"] | None,
        typer.Option(
            "--format", help="Without it, by the target's ending; of a folder safetensors.", show_default=False
        ),
    ] = None,
    prefix: Prefix = "",
    rename: Renames = [],  # noqa: B006
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Of a file of safetensors; split as huggingface_hub does.")
    ] = MAX_SHARD_SIZE,
    only_tensors: Annotated[
        bool, typer.Option("--only-tensors", help="Leave out what safetensors cannot hold: objects.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another export that is there.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file of safetensors back and compare it.")
    ] = False,
    storage_option: StorageOptions = [],  # noqa: B006
    target_option: TargetOptions = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Write a step as safetensors, as one file of torch.save, or as the files that it was given.

    safetensors: model.safetensors, or several and model.safetensors.index.json, into the folder TARGET; another name
    with TARGET a file. torch: one file that torch.load(weights_only=True, mmap=True) reads. files: those of an
    Accelerate or Trainer checkpoint, as the stock tool loads them.

    Everything is verified while it is read. An export that was interrupted goes on where it was; a file appears whole
    or not at all, the index last.

    --json: {"url", "step", "target", "format", "files": {name: bytes}, "kept": [name], "left_out": [key]}.

    Exit status: 0: done. 2: wrong usage, another export is there, the step is damaged, or storage failed.
    130: interrupted.
    """
    step, target_url = _step_and_target(rest)
    storage = opened(url, storage_option)
    step = chosen_step(listed(storage, "export"), step, "export")
    chosen = format_ or ("torch" if target_url.endswith(TORCH_ENDINGS) else "safetensors")
    folder, name = _split(target_url, SAFETENSORS_ENDINGS[:1] if chosen == "safetensors" else TORCH_ENDINGS)
    target = opened(folder, target_option)
    with progress("export", _num_bytes(storage, str(step), prefix, files=chosen == "files")) as tell:
        if chosen == "safetensors":
            done = export_safetensors(
                storage, str(step), target, name.removesuffix(".safetensors") or "model",
                prefix=prefix, rename=_renames(rename), max_shard_size=max_shard_size, only_tensors=only_tensors,
                overwrite=overwrite, verify=verify, tell=tell,
            )  # fmt: skip
        elif chosen == "torch":
            done = export_torch(
                storage, str(step), target, name or "state.pt", prefix=prefix, overwrite=overwrite, tell=tell
            )
        else:
            done = export_files(storage, str(step), target, overwrite=overwrite, tell=tell)
    if as_json:
        document = {"files": done.files, "kept": list(done.kept), "left_out": list(done.left_out)}
        print_json({"url": redact(url), "step": step, "target": redact(target_url), "format": chosen, **document})
    else:
        _tell_export(step, target, done)


def _step_and_target(rest: list[str]) -> tuple[int | None, str]:
    *steps, target = rest
    if len(steps) > 1 or not all(step.isdecimal() for step in steps):
        fail(f"{' '.join(rest)}: a step, which is a number, and a target were expected, or a target alone")
    return int(steps[0]) if steps else None, target


def _split(url: str, endings: tuple[str, ...]) -> tuple[str, str]:
    """(folder, name of a file, "" if it has none of the endings)"""
    if not url.endswith(endings):
        return url, ""
    folder, slash, name = url.rpartition("/")
    return folder or slash or ".", name


def _renames(pairs: list[str]) -> dict[str, str]:
    rules = {}
    for pair in pairs:
        pattern, equals, replacement = pair.partition("=")
        if not pattern or not equals:
            fail(f"--rename takes FROM=TO, not {pair!r}")
        rules[pattern] = replacement
    return rules


def _num_bytes(storage: Storage, folder: str, prefix: str, *, files: bool) -> int:
    step = open_step(storage, folder)
    if files:
        return 0 if step.manifest is None else sum(file.size for file in step.manifest.opaque)
    return sum(one.num_bytes for one in saved_in(step) if f"{one.key}.".startswith(f"{prefix}." if prefix else ""))


def _tell_export(step: int, target: Storage, done: Exported) -> None:
    console = output()
    console.print(f"step {step} is at {target.url}: {counted(len(done.files), 'file')}, {decimal(done.num_bytes)}")
    for name in list(done.files)[:20]:
        console.print(f"  {name}{'  (was there)' if name in done.kept else ''}", soft_wrap=True)
    if done.left_out:
        console.print(f"left out, as they are no tensors: {counted(len(done.left_out), 'value')}", style="yellow")


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A file of safetensors, its index, or the folder of one; or a file of torch.save. Any URL.",
        ),
    ],
    url: Url,
    step: Annotated[int, typer.Argument(metavar="STEP", min=0, help="The number of the step to be made.")] = 0,
    format_: Annotated[
        Literal["safetensors", "torch"] | None,
        typer.Option(
            "--format", help="Without it, by the source's ending; of a folder safetensors.", show_default=False
        ),
    ] = None,
    prefix: Annotated[
        str, typer.Option("--prefix", metavar="KEY", help="The key below which all goes, as in model.")
    ] = "",
    rename: Renames = [],  # noqa: B006
    storage_option: StorageOptions = [],  # noqa: B006
    source_option: Annotated[
        list[str],
        typer.Option("--source-option", metavar="KEY=VALUE", help="As --storage-option, for the source."),
    ] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Make safetensors files, or one of torch.save, a step that restore reads, on any number of ranks.

    Nothing in the files is run. A step that is there is never overwritten.

    --json: {"source", "url", "step", "tensors", "objects", "bytes"}.

    Exit status: 0: done. 2: wrong usage, the step is there, the files are no such files, or storage failed.
    130: interrupted.
    """
    is_torch = format_ == "torch" or (format_ is None and source.endswith(TORCH_ENDINGS))
    folder, name = _split(source, TORCH_ENDINGS if is_torch else SAFETENSORS_ENDINGS)
    files, target = opened(folder, source_option), opened(url, storage_option)
    read: Callable[..., Imported] = import_torch if is_torch else import_safetensors
    with progress("import", None) as tell:
        done = read(files, name, target, step, prefix=prefix, rename=_renames(rename), tell=tell)
    counts: dict[str, Any] = {"tensors": done.num_tensors, "objects": done.num_objects, "bytes": done.num_bytes}
    if as_json:
        print_json({"source": redact(source), "url": redact(url), "step": step, **counts})
    else:
        output().print(
            f"step {step} is at {target.url}: {counted(done.num_tensors, 'tensor')}, "
            f"{counted(done.num_objects, 'object')}, {decimal(done.num_bytes)}"
        )
