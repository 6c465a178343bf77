"""minigpt checkpoints; the docstring of each command under it is its --help."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from minigpt import console
from minigpt.checkpoint.resolve import MAKE_ONE, ROOT, find_model, resolve_model
from minigpt.checkpoint.tools.inventory import Entry, entry_of, inventory_of, take_inventory
from minigpt.commands import tables
from minigpt.commands.checkpoints.converting import export, import_
from minigpt.commands.checkpoints.views import (
    check_line,
    inventory_lines,
    model_lines,
    model_record,
)
from minigpt.commands.checkpoints.writing import average, prune
from minigpt.commands.options import Json, argument, command
from minigpt.commands.registry import COMMANDS, add, show_help
from minigpt.errors import CheckpointError, ResourceError
from minigpt.rings import find_ring

if TYPE_CHECKING:  # imports torch, which a list does not need
    from minigpt.checkpoint.tools.inspection import Check


@command
def list_(
    folder: Annotated[
        str | None, argument("FOLDER", "Folder of runs and models, or one of them [checkpoints]")
    ] = None,
    as_json: Json = False,
) -> None:
    """List runs and models with their losses.

    For each step: the validation loss (nats/token and bits/byte), the size of its files, and when
    it was written. The newest comes first.

    --model NAME uses the step marked best; --resume continues from the one marked latest. A step
    marked damaged has a missing file, or one of the wrong size; verify checks every byte.
    """
    entries = take_inventory(ROOT) if folder is None else inventory_of(folder)
    if as_json:
        tables.write_json({"folder": folder or ROOT, "entries": [asdict(e) for e in entries]})
    elif entries:
        tables.show(inventory_lines(entries, tables.line_width()))
    else:
        console.note(f"there is no checkpoint here yet. {MAKE_ONE}")


@command
def show(
    model: Annotated[
        str | None, argument("MODEL", "Model folder, or the name of a run [the newest run]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the shape, cost and tensors of a model.

    Reads config.json and the headers of the weights, but no weights. Compute is per token at full
    context; identical blocks are shown as one. --json lists every tensor.
    """
    from minigpt.checkpoint.tools.inspection import describe  # imports torch; list does not

    facts = describe(resolve_model(model))
    if as_json:
        tables.write_json(model_record(facts))
    else:
        tables.show(model_lines(facts, tables.line_width()))


@command
def verify(
    models: Annotated[
        list[str] | None,
        argument("MODEL", "Runs, with all their steps, or model folders [all in checkpoints]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check checkpoints for damage.

    Compares every byte of a checkpoint with the SHA-256 in its manifest. A model folder from
    elsewhere has no manifest: the names, shapes and dtypes of its tensors are compared with its
    config.json, and its tokenizer with its embedding.

    Prints one line each; the exit code is 4 if any is damaged or cannot be found.
    """
    n_checked = n_bad = 0
    for result in _checked(models):
        n_checked += 1
        n_bad += result.problem is not None
        if as_json:
            tables.write_json(asdict(result))
        else:
            tables.show([check_line(result)])
    if n_bad:
        raise CheckpointError(
            f"bad checkpoints: {n_bad} of {n_checked}. Use another one, or write or download it "
            "again."
        )


def _checked(models: Sequence[str] | None) -> Iterator["Check"]:
    """Check all checkpoints of these models, or all in the root; a name that is no model fails."""
    from minigpt.checkpoint.tools.inspection import Check, check  # imports torch; list does not

    found: list[Entry | Check] = [] if models else [*take_inventory(ROOT)]
    for spec in models or ():
        try:
            found.append(entry_of(find_model(spec) or resolve_model(spec)))
        except (CheckpointError, ResourceError) as error:
            found.append(Check(Path(spec), has_manifest=False, problem=str(error)))
    for item in found:
        if isinstance(item, Check):
            yield item
            continue
        for checkpoint in item.checkpoints:
            result = check(checkpoint.folder, is_step=checkpoint.step is not None)
            is_pruned = result.problem and not checkpoint.folder.exists()  # by its run meanwhile
            if not is_pruned:
                yield result


_pages = find_ring("commands.help.pages")
checkpoints = typer.Typer(
    cls=_pages.Group if _pages else TyperGroup,
    help=COMMANDS["checkpoints"],
    callback=show_help,
    invoke_without_command=True,
    rich_markup_mode=None,
    add_completion=False,
)
"""Command group, with the commands below."""
add(checkpoints, "list", list_)
for function in (show, verify, prune, average, export):
    add(checkpoints, function.__name__, function)
add(checkpoints, "import", import_)
