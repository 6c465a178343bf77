"""minigpt checkpoints; the docstring of each command under it is its --help."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from minigpt.commands.layout import group
from minigpt.commands.options import Json, Option, command
from minigpt.errors import CheckpointError


def _argument(metavar: str, text: str) -> Any:
    return typer.Argument(metavar=metavar, help=text, show_default=False)


@command
def list_(
    folder: Annotated[
        str | None,
        _argument("FOLDER", "Folder of runs and models, or one of them [checkpoints]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """List runs and models with their losses.

    Of each step: the loss over the validation text (nats/token and bits/byte), the size of all
    its files, and when it was written. The newest comes first.

    A name given as --model means the step marked best; --resume goes on from the one marked
    latest. Marked damaged is a step that has not its files, each in its size; verify looks closer.
    """
    from minigpt.checkpoint.resolve import ROOT
    from minigpt.checkpoint.tools.inventory import inventory_of, take_inventory
    from minigpt.commands import output
    from minigpt.commands.checkpoints.views import inventory_lines

    entries = take_inventory(ROOT) if folder is None else inventory_of(folder)
    if as_json:
        output.write_json({"folder": folder or ROOT, "entries": [asdict(e) for e in entries]})
    elif entries:
        output.show(inventory_lines(entries, output.line_width()))
    else:
        output.note("no checkpoint is here yet. Make one with `minigpt train`.")


@command
def show(
    model: Annotated[
        str | None, _argument("MODEL", "Model folder, or the name of a run [the newest run]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a model's shape, cost and tensors.

    All of it comes from config.json and the headers of the weights: no weight is read. Compute
    is for one token of a full context; blocks that are alike are shown as one. --json lists every
    tensor.
    """
    from minigpt.checkpoint.resolve import resolve_model
    from minigpt.checkpoint.tools.inspection import describe
    from minigpt.commands import output
    from minigpt.commands.checkpoints.views import model_lines, model_record

    facts = describe(resolve_model(model))
    if as_json:
        output.write_json(model_record(facts))
    else:
        output.show(model_lines(facts, output.line_width()))


@command
def verify(
    models: Annotated[
        list[str] | None,
        _argument("MODEL", "Runs, of which every step, and model folders [all in checkpoints]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that checkpoints are as they were written.

    Every byte of a checkpoint is compared with the SHA-256 in its manifest. A model folder from
    elsewhere has no manifest: its tensors' names, shapes and dtypes are compared with its
    config.json.

    A line for each; the exit code is 4 if any is bad.
    """
    from minigpt.checkpoint.resolve import ROOT, find_model, resolve_model
    from minigpt.checkpoint.tools.inspection import check
    from minigpt.checkpoint.tools.inventory import entry_of, take_inventory
    from minigpt.commands import output
    from minigpt.commands.checkpoints.views import verdict_line

    if models:
        entries = [entry_of(find_model(spec) or resolve_model(spec)) for spec in models]
    else:
        entries = take_inventory(ROOT)
    checkpoints = [checkpoint for entry in entries for checkpoint in entry.checkpoints]
    n_bad = 0
    for checkpoint in checkpoints:
        verdict = check(checkpoint.folder, is_step=checkpoint.step is not None)
        if verdict.problem and not checkpoint.folder.exists():  # pruned by its run meanwhile
            continue
        n_bad += verdict.problem is not None
        if as_json:
            output.write_json(asdict(verdict))
        else:
            output.show([verdict_line(verdict)])
    if n_bad:
        raise CheckpointError(
            f"bad checkpoints: {n_bad} of {len(checkpoints)}. Use another one, or write or "
            "download it again."
        )


@command
def prune(
    run: Annotated[str, _argument("RUN", "Name of a run, or its folder")],
    keep: Annotated[int, Option("Keep the newest N besides best and latest", "Run")] = 0,
    dry_run: Annotated[bool, Option("Only list what would be removed", "Run")] = False,
    yes: Annotated[bool, Option("Remove without asking", "Run")] = False,
    as_json: Json = False,
) -> None:
    """Remove steps of a run but the best and the latest.

    Says what would be removed, and asks. Steps that are damaged stay: something of them may be
    saved by hand. Nothing is removed while the run is trained, or if a step that would stay is
    not as it was written.
    """
    from minigpt.commands.checkpoints.prune import prune_run

    prune_run(run, keep, dry_run=dry_run, yes=yes, as_json=as_json)


@command
def average(
    run: Annotated[str, _argument("RUN", "Name of a run, or its folder")],
    last: Annotated[int, Option("Average the newest N checkpoints", "Run")] = 5,
    until: Annotated[
        int | None, Option("Leave out checkpoints after step N", "Run", shown="the latest")
    ] = None,
    out: Annotated[
        Path | None, Option("New folder for the mean", "Run", "FOLDER", shown="RUN-mean")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the mean of a run's last checkpoints.

    Near its end a run goes to and fro about weights that are better than any at which it stops,
    and the mean of its last checkpoints is nearer to them; `minigpt evaluate` says whether it is.
    Let training save often enough, and keep enough: --save-every, --set training.keep=N. Where the
    loss has risen since the best step, --until that one.

    The mean is a model folder, of which `--model` takes the name. It cannot be resumed.
    """
    from minigpt.commands.checkpoints.average import average_run

    average_run(run, last, until, out, as_json=as_json)


checkpoints = group(
    "checkpoints",
    {"list": list_, "show": show, "verify": verify, "prune": prune, "average": average},
)
"""The command, made of these five."""
