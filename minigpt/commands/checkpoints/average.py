"""What minigpt checkpoints average does once its options are read."""

import os
from pathlib import Path

from rich.text import Text

from minigpt.checkpoint.folder import RunFolder, writing_folder
from minigpt.checkpoint.manifest import verify
from minigpt.checkpoint.model_folder import write_model
from minigpt.checkpoint.tools.averaging import average
from minigpt.checkpoint.tools.inventory import run_named
from minigpt.commands import output
from minigpt.errors import ConfigError


def average_run(
    spec: str, last: int, until: int | None, out: Path | None, *, as_json: bool
) -> None:
    """Write the mean of a run's newest checkpoints as a model folder, and say where.

    Args: until, leave out those of later steps; out, None for the run's own path with -mean after
        it.
    Raises: ConfigError if it is no run, it has fewer checkpoints, or out is there already;
        CheckpointError if there is no such run, or one of the checkpoints is damaged.
    """
    if last < 2:
        raise ConfigError(f"--last must be at least 2: it is {last}.")
    entry = run_named(spec)
    run = RunFolder(entry.folder)
    steps = [step for step in run.steps() if until is None or step <= until][-last:]
    if len(steps) < last:
        which = "" if until is None else f" up to step {until}"
        noun = "checkpoint" if len(steps) == 1 else "checkpoints"
        raise ConfigError(
            f"--last {last}: the run {entry.name!r} has {len(steps)} {noun}{which}. Give fewer, or "
            "let training keep more of them (training.keep)."
        )
    if out is None:
        place = run.path if run.path.name.strip(".") else run.path.resolve()  # it may be . or ..
        out = place.with_name(f"{place.name}-mean")
    if os.path.lexists(out):
        raise ConfigError(f"{str(out)!r} is there already. Choose another --out.")
    folders = [run.step_folder(step) for step in steps]
    for folder in folders:
        verify(folder, hashes=True)
    mean = average(folders)
    with writing_folder(out, {"mean_of_steps": steps}) as folder:
        write_model(folder, mean.model, mean.tokenizer)
    if as_json:
        output.write_json({"run": run.path, "steps": steps, "folder": out})
    else:
        what = f"the mean of {len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}"
        output.show([Text(f"{what}, is in {output.one_line(str(out))}")])
