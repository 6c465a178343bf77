"""Scalars for TensorBoard, in event files beside a run's metrics.jsonl."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt.errors import ConfigError
from minigpt.training.events import EvalEvent, Event, SaveEvent, SkipEvent, StepEvent

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_FLUSH_S = 10


def summary_writer() -> "type[SummaryWriter]":
    """Import and return TensorBoard's writer of event files.

    Raises: ConfigError if TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "--report-to tensorboard needs TensorBoard. Install it: pip install "
            "'minigpt[tensorboard]'; or report to none."
        ) from None
    return SummaryWriter


class TensorBoardLog:
    """Adds events to a run's scalars. A resumed run hides the points after its checkpoint."""

    def __init__(self, folder: Path, *, from_step: int | None = None) -> None:
        """Begin an event file.

        Args: from_step, the step that the run resumes from; None for a new run.
        Raises: ConfigError if TensorBoard is not installed.
        """
        # TensorBoard drops the points of earlier files from purge_step on.
        purge_step = 0 if from_step is None else from_step + 1
        self._writer = summary_writer()(str(folder), purge_step=purge_step, flush_secs=_FLUSH_S)

    def write(self, event: Event) -> None:
        """Add the scalars of an event, and flush the file at each checkpoint."""
        match event:
            case StepEvent():
                self._add(
                    event.step,
                    {
                        "loss/train": event.train_loss,
                        "lr": event.lr,
                        "grad_norm": event.grad_norm,
                        "tokens_per_s": event.tokens_per_s,
                        "mfu": event.mfu,
                    },
                )
            case SkipEvent():
                self._add(event.step, {"skipped_steps": event.n_skipped})
            case EvalEvent():
                losses = {"loss/val": event.val_loss, "bits_per_byte/val": event.bits_per_byte}
                self._add(event.step, losses)
            case SaveEvent():
                self._writer.flush()

    def _add(self, step: int, scalars: Mapping[str, float | None]) -> None:
        for tag, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()
