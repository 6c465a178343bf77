"""The run folder: checkpoints that no crash can cost.

    NAME/step-000500/       one checkpoint: a Hugging Face folder, training_state/, manifest.json
    NAME/.writing-step-...  one that is being written; a kill leaves it, the next lock removes it
    NAME/latest.json        which step, and the facts that were known when it was written
    NAME/best.json          the same, of the step with the least validation loss

A step folder appears under its name by one rename, when all its bytes are on the disk, so that
a folder of that name is complete; the manifest tells if it was damaged afterwards, and the facts
of its step, so that a kill before the two pointers are written costs nothing.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from minigpt.checkpoint.manifest import MANIFEST, verify, write_manifest
from minigpt.errors import CheckpointError
from minigpt.files import (
    WRITING,
    locked,
    read_json,
    remove,
    resource_errors,
    sync_folder,
    to_json,
    write_atomically,
)

CONFIG_FILE = "config.toml"
"""A run's settings, resolved."""
METRICS_FILE = "metrics.jsonl"
"""A run's events, one a line."""

_STEP = re.compile(r"step-(\d{6,})")
_REPLACED, _DELETING = ".replaced-", ".deleting-"


@dataclass(frozen=True)
class Pointer:
    """An intact checkpoint of a run."""

    step: int
    """Optimizer steps done."""
    folder: Path
    """The complete checkpoint."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What is known of this step, such as its validation loss."""


class RunFolder:
    """One training run on the disk. Writing needs the lock; reading does not."""

    def __init__(self, path: Path) -> None:
        """Name the run's folder; nothing is read or made."""
        self.path = path

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run folder, made if need be, against every other writer; tidy what kills left.

        Raises: LockedError, at once, if another process or RunFolder holds it; ResourceError.
        """
        message = (
            f"another run is writing {str(self.path)!r}. Wait until it ends, or give this one "
            "another --name."
        )
        with locked(self.path / ".lock", message):
            with resource_errors(self.path):
                self._tidy()
            yield

    def _tidy(self) -> None:
        for path in self.path.glob(f"{_REPLACED}*"):
            final = self.path / path.name.removeprefix(_REPLACED)
            if not final.exists():  # killed between the two renames of _put_in_place
                os.rename(path, final)
        for prefix in (WRITING, _REPLACED, _DELETING):
            for path in self.path.glob(f"{prefix}*"):
                remove(path)

    def step_folder(self, step: int) -> Path:
        """Return where the checkpoint of a step is, or would be."""
        return self.path / f"step-{step:06d}"

    @contextmanager
    def writing_step(self, step: int, **facts: Any) -> Iterator[Path]:
        """Yield an empty folder that becomes the checkpoint of a step when the block ends well.

        After an exception nothing of it remains, and the earlier checkpoints are as they were.

        Args: facts of the step, of what JSON can hold.
        Raises: ResourceError if the disk is full or the folder is not ours to write.
        """
        with writing_folder(self.step_folder(step), facts) as folder:
            yield folder

    def point(self, name: Literal["best", "latest"], step: int, **facts: Any) -> None:
        """Let best.json or latest.json name a complete step, with facts that JSON can hold.

        Raises: ResourceError.
        """
        assert self.step_folder(step).is_dir(), f"step {step} is not written"
        write_atomically(self.path / f"{name}.json", to_json({"step": step, **facts}))

    def steps(self) -> list[int]:
        """Return the steps that have a folder, damaged or not, in ascending order."""
        if not self.path.is_dir():
            return []
        matches = (_STEP.fullmatch(path.name) for path in self.path.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def latest(self) -> Pointer | None:
        """Return the newest intact checkpoint, past damaged ones; None if there is none."""
        for step in reversed(self.steps()):
            if pointer := self._pointer(step, "latest"):
                return pointer
        return None

    def best(self) -> Pointer | None:
        """Return the intact checkpoint with the least validation loss that is known.

        Where none is, the one that best.json names, else the latest; None if there is none.
        """
        named = self._pointed("best").get("step")
        pointers = [pointer for step in self.steps() if (pointer := self._pointer(step, "best"))]
        best = min(pointers, key=lambda p: (_val_loss(p), p.step != named), default=None)
        is_known = best and (best.step == named or _val_loss(best) < math.inf)
        return best if is_known else self.latest()

    def _pointed(self, name: str) -> dict[str, Any]:
        try:
            return read_json(self.path / f"{name}.json")
        except CheckpointError:
            return {}

    def _pointer(self, step: int, name: str) -> Pointer | None:
        folder = self.step_folder(step)
        try:
            verify(folder)
            own = read_json(folder / MANIFEST).get("facts")
        except CheckpointError:
            return None
        facts = self._pointed(name)
        facts = facts if facts.pop("step", None) == step else {}
        return Pointer(step, folder, facts | (own if isinstance(own, dict) else {}))

    def prunable(self, keep: int) -> list[int]:
        """Return the steps of intact checkpoints but best, latest and the newest ``keep`` others.

        Damaged ones stay: something of them may be saved by hand.
        """
        protected = {pointer.step for pointer in (self.best(), self.latest()) if pointer}
        others = [step for step in self.steps() if step not in protected]
        intact = [step for step in others if self._pointer(step, "latest")]
        return intact[: max(len(intact) - keep, 0)]

    def prune(self, keep: int) -> None:
        """Delete the ``prunable`` checkpoints."""
        with resource_errors(self.path):
            for step in self.prunable(keep):
                folder = self.step_folder(step)
                doomed = self.path / f"{_DELETING}{folder.name}"
                os.rename(folder, doomed)  # first, so that no half of it is taken for a checkpoint
                remove(doomed)


@contextmanager
def writing_folder(final: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """Yield an empty folder that takes its place, with a manifest, when the block ends well.

    After an exception nothing of it remains, and what was in its place is as it was.

    Args: facts, of what JSON can hold.
    Raises: ResourceError if the disk is full or the folder is not ours to write.
    """
    aside = final.with_name(f"{WRITING}{final.name}")
    with resource_errors(final.parent):
        remove(aside)
        try:
            aside.mkdir(parents=True)
            yield aside
            write_manifest(aside, facts)
            _put_in_place(aside, final)
        except BaseException:
            remove(aside)
            raise


def _put_in_place(aside: Path, final: Path) -> None:
    # A folder cannot be renamed over one that has files, so an older one in its place steps aside
    # first; a run's _tidy brings it back if we are killed between the renames.
    replaced = final.with_name(f"{_REPLACED}{final.name}")
    if final.exists():
        os.rename(final, replaced)
    try:
        os.rename(aside, final)
        sync_folder(final.parent)
    except BaseException:
        if final.exists():
            os.rename(final, aside)
        if replaced.exists():
            os.rename(replaced, final)
        raise
    remove(replaced)


def _val_loss(pointer: Pointer) -> float:
    loss = pointer.facts.get("val_loss")
    return loss if isinstance(loss, float) and math.isfinite(loss) else math.inf
