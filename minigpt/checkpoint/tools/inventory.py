"""List a folder of checkpoints: runs with their steps, and single model folders.

Reads names, sizes, dates and losses only, no weights, and does not import torch.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.manifest import MANIFEST, read_facts, verify
from minigpt.checkpoint.resolve import ROOT, find_model, models_in, names_in, remedy
from minigpt.errors import CheckpointError, ConfigError, MinigptError
from minigpt.files import read_json

_CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One model folder: a step of a run, or a single model."""

    folder: Path
    step: int | None = None
    """Optimizer steps done; None for a single model."""
    layout: str | None
    """Model type in config.json; None if there is none."""
    val_loss: float | None = None
    """Validation loss in nats/token; None if it is not known."""
    bits_per_byte: float | None = None
    n_bytes: int
    """Bytes of all files of the checkpoint."""
    written_at: datetime
    is_best: bool = False
    """Whether --model with the run's name selects this step."""
    is_latest: bool = False
    """Whether the run resumes from this step."""
    damage: str | None
    """Damage that the file sizes show; None if there is none."""


@dataclass(frozen=True)
class Entry:
    """A run, or a single model folder."""

    name: str
    folder: Path
    is_run: bool
    checkpoints: tuple[Checkpoint, ...]
    """Checkpoints, the newest step first; exactly one for a single model."""

    @property
    def written_at(self) -> datetime:
        """Time when the newest checkpoint was written."""
        return max(checkpoint.written_at for checkpoint in self.checkpoints)


def take_inventory(folder: Path) -> list[Entry]:
    """Return the runs in a folder, newest first, followed by the single models.

    Raises: ResourceError if the folder cannot be read.
    """
    entries = [entry_of(place) for place in models_in(folder)]
    # A run whose steps were pruned in the meantime has no checkpoints.
    present = [entry for entry in entries if entry.checkpoints]
    return sorted(present, key=lambda entry: (entry.is_run, entry.written_at), reverse=True)


def inventory_of(spec: str, root: Path = ROOT) -> list[Entry]:
    """Return the entries of a folder, or the entry of a run or model given by path or name.

    Raises: CheckpointError if there is no such folder, run or model; ResourceError.
    """
    if find_model(spec, root) is None and os.path.isdir(spec):
        return take_inventory(Path(spec))
    return [entry_of(_require_model(spec, root))]


def run_named(spec: str) -> Entry:
    """Return the run with this path, or with this name under the root.

    Raises: CheckpointError if there is none; ConfigError if it is a single model.
    """
    entry = entry_of(_require_model(spec))
    if not entry.is_run:
        raise ConfigError(
            f"{str(entry.folder)!r} is a model folder, not a run, so it has no steps. Name a run."
        )
    return entry


def entry_of(folder: Path) -> Entry:
    """Return the entry of a run folder or a model folder."""
    name = folder.name or folder.resolve().name  # the working directory's
    if (folder / _CONFIG).is_file():
        return Entry(name, folder, False, tuple(_existing_checkpoint(folder)))
    run = RunFolder(folder)
    best, latest = run.best(), run.latest()
    checkpoints: list[Checkpoint] = []
    for step in reversed(run.steps()):
        facts: dict[str, Any] = {
            "step": step,
            "is_best": best is not None and best.step == step,
            "is_latest": latest is not None and latest.step == step,
            **_losses(run.step_folder(step)),
        }
        checkpoints += _existing_checkpoint(run.step_folder(step), **facts)
    return Entry(name, folder, True, tuple(checkpoints))


def _existing_checkpoint(folder: Path, **facts: Any) -> Iterator[Checkpoint]:
    """Yield the checkpoint in a folder, or nothing if it was removed in the meantime."""
    layout, damage = None, None
    try:
        named = read_json(folder / _CONFIG).get("model_type")
        layout = named if isinstance(named, str) else None
        if "step" in facts or (folder / MANIFEST).is_file():
            verify(folder)
    except MinigptError as error:
        damage = str(error)
    # The file of a checkpoint that is written last, if it exists.
    files = (path for path in (folder / MANIFEST, folder / _CONFIG) if path.exists())
    last = next(files, folder)
    with suppress(FileNotFoundError):
        yield Checkpoint(
            folder=folder,
            layout=layout,
            n_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            written_at=_date(last.stat().st_mtime),
            damage=damage,
            **facts,
        )


def _date(seconds: float) -> datetime:
    """Return the date of a file's timestamp, or the nearest valid one in every time zone."""
    first, last = (datetime(*day, tzinfo=UTC) for day in ((1, 1, 3), (9999, 12, 29)))
    return datetime.fromtimestamp(min(max(seconds, first.timestamp()), last.timestamp()), UTC)


def _losses(folder: Path) -> dict[str, float]:
    """Return the val_loss and bits_per_byte in the manifest of a step, if it has them."""
    facts: dict[str, Any] = {}
    with suppress(CheckpointError):
        facts = read_facts(folder)
    losses = {name: facts.get(name) for name in ("val_loss", "bits_per_byte")}
    return {n: loss for n, loss in losses.items() if isinstance(loss, float) and isfinite(loss)}


def _require_model(spec: str, root: Path = ROOT) -> Path:
    """Return the run folder or model folder with this path, or with this name under root."""
    if place := find_model(spec, root):
        return place
    raise CheckpointError(
        f"there is no run or model {spec[:120]!r}. {remedy(spec, names_in(root))}"
    )
