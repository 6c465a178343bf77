"""The run folder: checkpoints that survive any crash.

    NAME/step-000500/       one checkpoint: a Hugging Face folder, training_state/, manifest.json
    NAME/.writing-step-...  unfinished or partly deleted checkpoint, removed at the next lock
    NAME/latest.json        newest step and its facts, for other programs
    NAME/best.json          the same for the step with the lowest validation loss, which may have
                            no training_state/

A step folder is renamed to its final name only when all its bytes are on disk, so a folder with
that name is complete. Its manifest reveals later damage and records the facts of the step, so a
kill before the two pointers are written loses nothing.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from minigpt.checkpoint.manifest import read_facts, verify, write_manifest
from minigpt.errors import CheckpointError, ResourceError
from minigpt.files import (
    WRITING,
    locked,
    make_folder,
    read_json,
    remove,
    resource_errors,
    sync_folder,
    to_json,
    write_atomically,
)

CONFIG_FILE = "config.toml"
"""Resolved settings of a run."""
METRICS_FILE = "metrics.jsonl"
"""Events of a run, one per line."""
WEIGHTS_ONLY = "weights_only"
"""Name of the fact that a checkpoint has no training_state/: a mean, or a best step between two."""

_STEP = re.compile(r"step-(\d{6,})")
_REPLACED = ".replaced-"


@dataclass(frozen=True)
class Pointer:
    """An intact checkpoint of a run."""

    step: int
    """Optimizer steps done."""
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)
    """Facts about this step, such as its validation loss."""


class RunFolder:
    """A training run on disk. Writing needs the lock; reading does not."""

    def __init__(self, path: Path) -> None:
        """Args: path, which is neither read nor created."""
        self.path = path
        self._locked: os.stat_result | None = None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run folder against other writers, creating it if needed; clean up after kills.

        Raises: LockedError, without waiting, if another process or RunFolder holds it;
            ResourceError.
        """
        message = (
            f"another run is writing {str(self.path)!r}. Wait until it ends, or give this one "
            "another --name."
        )
        with locked(self.path / ".lock", message):
            with resource_errors(self.path):
                for path in self.path.glob(f"{_REPLACED}*"):
                    final = self.path / path.name.removeprefix(_REPLACED)
                    if not final.exists():  # killed between the two renames of _put_in_place
                        os.rename(path, final)
                for prefix in (WRITING, _REPLACED):
                    for path in self.path.glob(f"{prefix}*"):
                        remove(path)
                self._locked = os.stat(self.path)
            yield

    def step_folder(self, step: int) -> Path:
        """Return the folder of a step's checkpoint, whether it exists or not."""
        return self.path / f"step-{step:06d}"

    @contextmanager
    def writing_step(self, step: int, **facts: Any) -> Iterator[Path]:
        """Yield an empty folder that becomes the checkpoint of a step; see ``writing_folder``."""
        # If the folder was moved since it was locked, do not create it again.
        exists = os.path.exists(self.path)
        if self._locked and not (exists and os.path.samestat(self._locked, os.stat(self.path))):
            raise moved_error(self.path)
        with writing_folder(self.step_folder(step), facts) as folder:
            yield folder

    def point(self, name: Literal["best", "latest"], step: int, **facts: Any) -> None:
        """Write best.json or latest.json: a complete step and JSON facts about it.

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

    def intact(self, step: int, *, hashes: bool = False) -> Pointer | None:
        """Return the checkpoint of a step, or None if it is damaged; see ``manifest.verify``."""
        folder = self.step_folder(step)
        try:
            verify(folder, hashes=hashes)
            return Pointer(step, folder, read_facts(folder))
        except CheckpointError:
            return None

    def latest(self, *, hashes: bool = False) -> Pointer | None:
        """Return the newest intact checkpoint that a run can resume from; None if there is none.

        Args: hashes, whether to read all its files and compare their hashes.
        """
        for step in reversed(self.steps()):
            pointer = self.intact(step, hashes=hashes)
            if pointer and not pointer.facts.get(WEIGHTS_ONLY):
                return pointer
        return None

    def best(self) -> Pointer | None:
        """Return the intact checkpoint with the lowest known validation loss.

        If no loss is known: the one that best.json names, else the latest, else None.
        """
        named = None
        with suppress(CheckpointError):
            named = read_json(self.path / "best.json").get("step")
        pointers = [pointer for step in self.steps() if (pointer := self.intact(step))]
        best = min(pointers, key=lambda p: (_val_loss(p), p.step != named), default=None)
        is_known = best and (best.step == named or _val_loss(best) < math.inf)
        return best if is_known else self.latest()


def moved_error(run: Path) -> ResourceError:
    """Return the error for a run folder that was moved while a run was writing to it."""
    return ResourceError(
        f"{str(run)!r} was moved or deleted while the run was training. Its checkpoints are where "
        "it is now: move it back, and resume the run."
    )


@contextmanager
def writing_folder(final: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """Yield an empty folder that becomes ``final``, with a manifest, if the block succeeds.

    If it fails, the folder is removed and an existing ``final`` is unchanged. Args: facts, JSON.

    Raises: ResourceError if the disk is full or the folder cannot be written.
    """
    aside = final.with_name(f"{WRITING}{final.name}")
    with resource_errors(final.parent):
        remove(aside)
        try:
            make_folder(aside)
            yield aside
            write_manifest(aside, facts)
            _put_in_place(aside, final)
        except BaseException:
            remove(aside)
            raise


def _put_in_place(aside: Path, final: Path) -> None:
    # A folder cannot be renamed over one that has files, so an older one is renamed first;
    # RunFolder.lock restores it if we are killed between the renames.
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
