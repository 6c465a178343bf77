"""Prune the checkpoints of a run: ``--keep`` and ``checkpoints prune``."""

import os

from minigpt.checkpoint.folder import RunFolder
from minigpt.files import WRITING, remove, resource_errors


def prunable(run: RunFolder, keep: int) -> list[int]:
    """Return the intact steps except best, latest and the newest ``keep`` others.

    Damaged ones are kept, since parts of them may be recovered by hand.
    """
    protected = {pointer.step for pointer in (run.best(), run.latest()) if pointer}
    others = [step for step in run.steps() if step not in protected]
    intact = [step for step in others if run.intact(step)]
    return intact[: max(len(intact) - keep, 0)]


def prune(run: RunFolder, keep: int) -> None:
    """Delete the ``prunable`` checkpoints of a run that the caller has locked."""
    with resource_errors(run.path):
        for step in prunable(run, keep):
            folder = run.step_folder(step)
            aside = folder.with_name(f"{WRITING}{folder.name}")
            os.rename(folder, aside)  # a partly deleted step must not look like a step
            remove(aside)
