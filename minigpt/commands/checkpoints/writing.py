"""Prune and average the checkpoints of a run; each docstring is the command's --help."""

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from minigpt import console
from minigpt.checkpoint.folder import WEIGHTS_ONLY, RunFolder, writing_folder
from minigpt.checkpoint.manifest import verify
from minigpt.checkpoint.tools.inventory import Checkpoint, Entry, entry_of, run_named
from minigpt.checkpoint.tools.pruning import prunable
from minigpt.checkpoint.tools.pruning import prune as delete_old
from minigpt.commands import tables
from minigpt.commands.checkpoints.views import removal_lines, total
from minigpt.commands.options import Json, Option, argument, command
from minigpt.errors import CheckpointError, ConfigError, LockedError
from minigpt.format import count
from minigpt.rings import ring
from minigpt.run_config import SaveDtype
from minigpt.text.escape import one_line


@command
def prune(
    run: Annotated[str, argument("RUN", "Name of a run, or its folder")],
    keep: Annotated[
        int, Option("Keep the newest N besides best and latest", "Run", bounds="[0, inf)")
    ] = 0,
    dry_run: Annotated[bool, Option("Only list what would be removed", "Run")] = False,
    yes: Annotated[bool, Option("Remove without asking", "Run")] = False,
    as_json: Json = False,
) -> None:
    """Remove all steps of a run except best and latest.

    Lists what would be removed, and asks. Damaged steps are kept, because parts of them may be
    recoverable by hand. Nothing is removed while the run is training, or if a step to keep is
    damaged.
    """
    if not (yes or dry_run or sys.stdin.isatty()):
        raise ConfigError(
            "prune asks before it removes, but standard input is not a terminal. Pass --yes "
            "to remove, or --dry-run to list."
        )
    folder = RunFolder(run_named(run).folder)
    chosen = _to_remove(folder, keep) if dry_run else _prune(folder, keep, is_asked=not yes)
    kept = _kept_steps(folder, chosen)
    if as_json:
        names = ("step", "folder", "n_bytes")
        removed = [{name: getattr(item, name) for name in names} for item in chosen]
        tables.write_json(
            {"run": folder.path, "is_dry_run": dry_run, "removed": removed, "kept_steps": kept}
        )
        return
    word = "would remove" if dry_run else "removed"
    tables.show(removal_lines(word, chosen))
    console.note(f"{word} {total(chosen)}; {_stays(kept)}" if chosen else "nothing to remove")


def _prune(run: RunFolder, keep: int, *, is_asked: bool) -> list[Checkpoint]:
    """Remove steps under the lock of the run, after asking; return the removed checkpoints."""
    try:
        with run.lock():
            chosen = _to_remove(run, keep)
            if chosen and is_asked:
                _ask(run, chosen)
            delete_old(run, keep)
            return chosen
    except LockedError:
        raise LockedError(
            f"the run {run.path.name!r} is training. Prune it when training has ended."
        ) from None


def _to_remove(run: RunFolder, keep: int) -> list[Checkpoint]:
    """Return the checkpoints to remove, after verifying every byte of best and latest."""
    steps = prunable(run, keep)
    checkpoints = entry_of(run.path).checkpoints
    for checkpoint in checkpoints:
        if steps and (checkpoint.is_best or checkpoint.is_latest):
            try:
                verify(checkpoint.folder, hashes=True)
            except CheckpointError as error:
                raise CheckpointError(
                    f"nothing is removed, as a step to keep is damaged: {error}"
                ) from None
    return [checkpoint for checkpoint in checkpoints if checkpoint.step in steps]


def _ask(run: RunFolder, chosen: Sequence[Checkpoint]) -> None:
    """List what would be removed, and end the program if the answer is no."""
    for line in removal_lines("to remove:", chosen):
        console.note(line.plain)
    console.note(_stays(_kept_steps(run, chosen)))
    with redirect_stdout(sys.stderr):  # err=True would still put a space on stdout
        is_confirmed = typer.confirm(f"Remove {total(chosen)}?")
    if not is_confirmed:
        console.note("nothing was removed")
        raise typer.Exit(1)


def _kept_steps(run: RunFolder, chosen: Sequence[Checkpoint]) -> list[int]:
    return sorted(set(run.steps()) - {checkpoint.step for checkpoint in chosen})


def _stays(steps: Sequence[int]) -> str:
    numbers = ", ".join(map(str, steps))
    return f"step {numbers} stays" if len(steps) == 1 else f"steps {numbers} stay"


@command
def average(
    run: Annotated[str, argument("RUN", "Name of a run, or its folder")],
    last: Annotated[int, Option("Average the newest N checkpoints", "Run", bounds="[2, inf)")] = 5,
    until: Annotated[
        int | None, Option("Leave out checkpoints after step N", "Run", shown="the latest")
    ] = None,
    out: Annotated[
        Path | None, Option("New folder for the mean", "Run", "FOLDER", shown="RUN-mean")
    ] = None,
    save_dtype: Annotated[
        SaveDtype, Option("Dtype of the mean's weights", "Run", shown="that of the checkpoints")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Average the last checkpoints of a run.

    Near its end, training oscillates around weights that are better than those of any single step.
    The mean of the last checkpoints is closer to them; `minigpt evaluate` shows whether it is
    better. Save often enough and keep enough: --save-every, --set training.keep=N. If the loss has
    risen since the best step, use --until to stop there.

    The mean is a model folder that `--model` can name. It cannot be resumed.
    """
    from minigpt.checkpoint.tools.averaging import average  # imports torch; prune does not

    entry = run_named(run)
    source = RunFolder(entry.folder)
    steps = _last_steps(entry, last, until)
    if out is None:
        place = source.path
        if not place.name.strip("."):  # . or ..
            place = place.resolve()
        out = place.with_name(f"{place.name}-mean")
    if os.path.lexists(out):
        raise ConfigError(f"{str(out)!r} exists already. Choose another --out.")
    folders = [source.step_folder(step) for step in steps]
    for folder in folders:
        verify(folder, hashes=True)
    mean = average(folders)
    with writing_folder(out, {"mean_of_steps": steps, WEIGHTS_ONLY: True}) as folder:
        carried = ring("checkpoint.carried").read_carried(folders[-1])
        write_as = ring("checkpoint.rewriting").write_as
        write_as(folder, mean.model, mean.tokenizer, carried, save_dtype)
    saved = carried.dtype if save_dtype == "auto" else save_dtype
    if as_json:
        tables.write_json({"run": source.path, "steps": steps, "folder": out})
    else:
        what = f"the mean of {len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}"
        what += "" if saved == "float32" else f", in {saved}"
        tables.show([Text(f"{what}, is in {one_line(str(out))}")])


def _last_steps(run: Entry, n: int, until: int | None) -> list[int]:
    """Return the last n steps of a run, up to the step ``until`` if it is given."""
    saved = RunFolder(run.folder).steps()
    steps = [step for step in saved if until is None or step <= until][-n:]
    if len(steps) < n:
        which = "" if until is None else f" up to step {until}"
        raise ConfigError(
            f"--last {n}: the run {run.name!r} has {count(len(steps), 'checkpoint')}{which}. "
            f"{'Give fewer, or train' if len(steps) > 1 else 'Train'} with a smaller --save-every "
            "and a larger --set training.keep=N."
        )
    return steps
