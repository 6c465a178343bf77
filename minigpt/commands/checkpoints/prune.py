"""What minigpt checkpoints prune does once its options are read."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

import typer

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.manifest import verify
from minigpt.checkpoint.tools.inventory import Checkpoint, entry_of, run_named
from minigpt.commands import output
from minigpt.commands.checkpoints.views import removal_lines, total
from minigpt.errors import CheckpointError, ConfigError, LockedError


def prune_run(spec: str, keep: int, *, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Remove steps of a run, having asked, or only say which.

    Raises: ConfigError if nobody can be asked, or it is no run; CheckpointError if there is none
        of that name, or what would stay is bad; LockedError if it is being trained.
    """
    if keep < 0:
        raise ConfigError(f"--keep must be at least 0: it is {keep}.")
    if not (yes or dry_run or sys.stdin.isatty()):
        raise ConfigError(
            "prune asks before it removes, and standard input is no terminal. Give --yes to "
            "remove, or --dry-run to see what."
        )
    run = RunFolder(run_named(spec).folder)
    doomed = _doomed(run, keep) if dry_run else _prune(run, keep, is_asked=not yes)
    kept = _kept_steps(run, doomed)
    if as_json:
        facts = ("step", "folder", "n_bytes")
        removed = [{name: getattr(item, name) for name in facts} for item in doomed]
        output.write_json(
            {"run": run.path, "is_dry_run": dry_run, "removed": removed, "kept_steps": kept}
        )
        return
    word = "would remove" if dry_run else "removed"
    output.show(removal_lines(word, doomed))
    output.note(f"{word} {total(doomed)}; {_stays(kept)}" if doomed else "nothing to remove")


def _prune(run: RunFolder, keep: int, *, is_asked: bool) -> list[Checkpoint]:
    """Remove, under the run's lock, what is named in the question; return what it was."""
    try:
        with run.lock():
            doomed = _doomed(run, keep)
            if doomed and is_asked:
                _ask(run, doomed)
            run.prune(keep)
            return doomed
    except LockedError:
        raise LockedError(
            f"the run {run.path.name!r} is being trained. Prune it when that has ended."
        ) from None


def _doomed(run: RunFolder, keep: int) -> list[Checkpoint]:
    """Return what is to be removed, having read to the last byte what is to stay."""
    steps = run.prunable(keep)
    checkpoints = entry_of(run.path).checkpoints
    for checkpoint in checkpoints:
        if steps and (checkpoint.is_best or checkpoint.is_latest):
            try:
                verify(checkpoint.folder, hashes=True)
            except CheckpointError as error:
                raise CheckpointError(
                    f"nothing is removed while what would stay is bad: {error}"
                ) from None
    return [checkpoint for checkpoint in checkpoints if checkpoint.step in steps]


def _ask(run: RunFolder, doomed: Sequence[Checkpoint]) -> None:
    """Say what would go, and end the program if it is to stay."""
    for line in removal_lines("to remove:", doomed):
        output.note(line.plain)
    output.note(_stays(_kept_steps(run, doomed)))
    with redirect_stdout(sys.stderr):  # err=True would still put a space on stdout
        is_confirmed = typer.confirm(f"Remove {total(doomed)}?")
    if not is_confirmed:
        output.note("nothing was removed")
        raise typer.Exit(1)


def _kept_steps(run: RunFolder, doomed: Sequence[Checkpoint]) -> list[int]:
    return sorted(set(run.steps()) - {checkpoint.step for checkpoint in doomed})


def _stays(steps: Sequence[int]) -> str:
    numbers = ", ".join(map(str, steps))
    return f"step {numbers} stays" if len(steps) == 1 else f"steps {numbers} stay"
