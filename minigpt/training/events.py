"""What happens in a run, as the training loop tells it."""

from dataclasses import dataclass
from pathlib import Path

from minigpt.model.language_model import LanguageModel


@dataclass(frozen=True)
class StepEvent:
    """An optimizer step was taken."""

    step: int
    """Steps done, this one included."""
    progress: float
    """Share of the budget used, 0 to 1."""
    train_loss: float
    """Mean cross-entropy over the step's batch, nats/token, before the step."""
    lr: float
    """Learning rate of the matrices."""
    grad_norm: float
    """Global norm of the gradient before clipping."""
    tokens_per_s: float
    """Training speed since the last event."""
    mfu: float | None
    """Model FLOPs utilisation: share of the hardware's peak; None where that is unknown."""
    elapsed_s: float
    """Seconds of training so far, without evaluation and saving."""
    remaining_s: float
    """Seconds of training left, at the speed so far."""


@dataclass(frozen=True)
class SkipEvent:
    """The update of a step was left out, for its loss or gradient was no finite number."""

    step: int
    """Steps done, this one included: its batch does not come again."""
    train_loss: float
    """As of a StepEvent."""
    lr: float
    """Learning rate of the matrices."""
    grad_norm: float
    """As of a StepEvent."""
    n_skipped: int
    """Steps that the run has left out so far."""
    elapsed_s: float
    """Seconds of training so far."""


@dataclass(frozen=True)
class EvalEvent:
    """A pass over the validation text was made."""

    step: int
    val_loss: float
    """Nats/token."""
    bits_per_byte: float
    n_tokens: int
    """Validation tokens predicted."""
    elapsed_s: float
    """Seconds of training before it."""
    eval_s: float
    """Seconds that it took."""


@dataclass(frozen=True)
class SaveEvent:
    """A checkpoint is on the disk."""

    step: int
    folder: Path
    val_loss: float
    is_best: bool
    """Its validation loss is the least of the run's checkpoints."""


@dataclass(frozen=True)
class SampleEvent:
    """It is time to show a sample: the consumer draws one, and the loop waits."""

    step: int
    model: LanguageModel
    """The model as it stands, whole."""


Event = StepEvent | SkipEvent | EvalEvent | SaveEvent | SampleEvent
