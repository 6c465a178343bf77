"""The events that a training loop yields."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from minigpt.model.language_model import LanguageModel


@dataclass(frozen=True)
class Event:
    """Base class of the events of a run; rings define further ones, with ``describe``."""

    kind: ClassVar[str] = ""
    """Name in metrics.jsonl. Empty for events that are not logged."""
    step: int
    """Number of optimizer steps taken."""

    def describe(self) -> str:
        """Return a description in one line. Empty for events of the core."""
        return ""


@dataclass(frozen=True)
class StepEvent(Event):
    """An optimizer step was taken and its log line is due."""

    kind = "step"
    progress: float
    """Fraction of the budget used, in [0, 1]."""
    train_loss: float
    """Mean cross-entropy over the step's batch, before the update, in nats/token."""
    lr: float
    """Learning rate of the matrices."""
    grad_norm: float
    """Global gradient norm before clipping."""
    tokens_per_s: float
    """Throughput since the last event, in tokens per second."""
    mfu: float | None
    """Model FLOPs utilization, in [0, 1]. None if the hardware's peak is unknown."""
    elapsed_s: float
    """Seconds of training, without evaluation and saving."""
    remaining_s: float
    """Estimated seconds of training left."""


@dataclass(frozen=True)
class EvalEvent(Event):
    """The validation loss was computed."""

    kind = "eval"
    val_loss: float
    """Mean cross-entropy over the validation tokens, in nats/token."""
    bits_per_byte: float
    """Validation loss in bits per byte of text."""
    n_tokens: int
    """Number of validation tokens predicted."""
    elapsed_s: float
    """Seconds of training before this evaluation."""
    eval_s: float
    """Seconds that this evaluation took."""
    is_averaged: bool = False
    """Whether the loss is that of the averaged weights, because it is lower."""


@dataclass(frozen=True)
class SaveEvent(Event):
    """A checkpoint was written."""

    kind = "save"
    folder: Path
    val_loss: float | None
    """Validation loss of the checkpoint, in nats/token. None without a validation text."""
    is_best: bool
    """Whether it has the lowest validation loss of the run's checkpoints."""


@dataclass(frozen=True)
class SampleEvent(Event):
    """A sample is due; the loop waits while the consumer generates it."""

    model: LanguageModel
    """The model with full parameters."""
