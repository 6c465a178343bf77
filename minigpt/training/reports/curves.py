"""Read loss curves from the metrics.jsonl of a finished or running run."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from minigpt.checkpoint.folder import CONFIG_FILE, METRICS_FILE
from minigpt.checkpoint.resolve import MAKE_ONE, ROOT, remedy
from minigpt.config import RunConfig
from minigpt.errors import CheckpointError, ConfigError
from minigpt.files import read_lines, resource_errors
from minigpt.settings import build, read_toml

_LOSSES = {"step": "train_loss", "eval": "val_loss"}


@dataclass(frozen=True)
class LossPoint:
    """A loss, and the training steps, tokens and seconds before it."""

    steps: int
    tokens: int | None
    """Number of training tokens. None if config.toml cannot be read."""
    seconds: float
    """Seconds of training, without evaluation and saving."""
    loss: float
    """Mean cross-entropy, in nats/token."""
    bits_per_byte: float | None = None
    """Validation loss in bits per byte of text. None for a training loss."""


@dataclass(frozen=True)
class LossCurves:
    """The losses of a run, by step."""

    folder: Path
    tokenizer: str | None
    """Name of the tokenizer, ``bpe`` with its size, or None if config.toml cannot be read. Losses
    per token cannot be compared between tokenizers."""
    train: tuple[LossPoint, ...]
    """Losses of one batch each."""
    val: tuple[LossPoint, ...]


def find_run(spec: str | None, root: Path = ROOT) -> Path:
    """Return the folder of a run that has metrics.

    Args: spec, the folder, or a name under root; None for the newest run under root.
    Raises: CheckpointError if there is none.
    """
    known = {path.parent: path.lstat().st_mtime_ns for path in root.glob(f"*/{METRICS_FILE}")}
    if spec is None:
        if not known:
            raise CheckpointError(f"there is no run in {str(root)!r} yet. {MAKE_ONE}")
        return max(known, key=lambda folder: known[folder])
    for folder in (Path(spec), root / spec):
        if os.path.lexists(folder / METRICS_FILE):  # False for impossible names
            return folder
    advice = remedy(Path(spec).name, sorted(folder.name for folder in known))
    raise CheckpointError(f"there is no run with a {METRICS_FILE} at {spec[:120]!r}. {advice}")


def read_curves(run: Path) -> LossCurves:
    """Read the losses of a run, without an incomplete last line.

    Raises: CheckpointError if another line is not an event with numeric losses, or the file cannot
        be read; ResourceError if permission to read it is denied.
    """
    try:
        config = build(RunConfig, read_toml(run / CONFIG_FILE))
    except ConfigError:  # missing, or of another version
        config = None
    curves: dict[str, list[LossPoint]] = {name: [] for name in _LOSSES.values()}
    path = run / METRICS_FILE
    try:
        with resource_errors(path):
            for number, line in enumerate(read_lines(path), start=1):
                if line.endswith(b"\n"):  # else it is being written, or was torn by a kill
                    _add_point(curves, line, config, f"line {number} of {str(path)!r}")
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read: {error.strerror}. Rename or remove it: train --resume "
            "writes a new one."
        ) from None
    train, val = map(tuple, curves.values())
    tokenizer = config.data.tokenizer if config else None
    if config and tokenizer == "bpe":  # a model fine-tuned from this one names it with its size
        tokenizer = f"bpe:{config.model.vocab_size}"
    return LossCurves(run, tokenizer, train, val)


def _add_point(
    curves: dict[str, list[LossPoint]], line: bytes, config: RunConfig | None, name: str
) -> None:
    """Add the loss of a line of metrics, if it has one. Args: name, of the line, for messages."""
    try:
        event = json.loads(line.decode("utf-8", errors="replace"))
        kind = _LOSSES.get(event["event"])
        if kind is None:
            return
        steps, bits = int(event["step"]), event.get("bits_per_byte")
        point = LossPoint(
            steps,
            tokens=steps * config.step_tokens if config else None,
            seconds=float(event["elapsed_s"]),
            loss=float(event[kind]),
            bits_per_byte=None if bits is None else float(bits),
        )
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise CheckpointError(f"{name} is not a line of metrics. Delete it.") from None
    if math.isfinite(point.loss) and math.isfinite(point.seconds):
        curves[kind].append(point)
