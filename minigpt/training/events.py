"""The events that a training loop yields."""

from dataclasses import dataclass
from pathlib import Path

from minigpt.model.language_model import LanguageModel


@dataclass(frozen=True)
class StepEvent:
    """An optimizer step was taken and its log line is due."""

    step: int
    """Number of steps taken, including this one."""
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
class SkipEvent:
    """The update of a step was skipped because its loss or gradient was NaN or inf."""

    step: int
    """Number of steps taken, including this one, whose batch is not repeated."""
    train_loss: float
    """Mean cross-entropy over the step's batch, in nats/token."""
    lr: float
    """Learning rate of the matrices."""
    grad_norm: float
    """Global gradient norm before clipping."""
    n_skipped: int
    """Number of steps skipped in this run so far."""
    elapsed_s: float
    """Seconds of training, without evaluation and saving."""


@dataclass(frozen=True)
class EvalEvent:
    """The validation loss was computed."""

    step: int
    """Number of steps taken."""
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
class EarlyStopEvent:
    """Training stops early, because the validation loss has not fallen for ``patience`` epochs."""

    step: int
    """Number of steps taken."""
    best_step: int
    """Step of the lowest validation loss."""
    epochs_since: float
    """Epochs since that step."""


@dataclass(frozen=True)
class SaveEvent:
    """A checkpoint was written."""

    step: int
    """Number of steps taken."""
    folder: Path
    """Folder of the checkpoint."""
    val_loss: float | None
    """Validation loss of the checkpoint, in nats/token. None without a validation text."""
    is_best: bool
    """Whether it has the lowest validation loss of the run's checkpoints."""


@dataclass(frozen=True)
class SampleEvent:
    """A sample is due; the loop waits while the consumer generates it."""

    step: int
    """Number of steps taken."""
    model: LanguageModel
    """The model with full parameters."""


Event = StepEvent | SkipEvent | EvalEvent | EarlyStopEvent | SaveEvent | SampleEvent
