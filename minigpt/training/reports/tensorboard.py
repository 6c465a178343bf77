"""Events -> TensorBoard: the scalars of a run, in event files beside its metrics.jsonl."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt.errors import ConfigError
from minigpt.training.events import EvalEvent, Event, SaveEvent, SkipEvent, StepEvent

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TENSORBOARD_FOLDER = "tensorboard"
"""Where the event files of a run lie, in its folder."""
_FLUSH_S = 10


def summary_writer() -> "type[SummaryWriter]":
    """Return what writes event files; it is imported only when it is asked for.

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
    """Adds events to a run's scalars; a resumed run hides the points past where it resumes."""

    def __init__(self, folder: Path, *, from_step: int | None = None) -> None:
        """Begin an event file that takes over after ``from_step``; None is a new run.

        Raises: ConfigError if TensorBoard is not installed.
        """
        # A reader of the folder drops what earlier files say of purge_step and later.
        purge_step = 0 if from_step is None else from_step + 1
        self._writer = summary_writer()(str(folder), purge_step=purge_step, flush_secs=_FLUSH_S)

    def write(self, event: Event) -> None:
        """Add what an event has to say; what is known at a checkpoint is on the disk with it."""
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
        """Write what is left."""
        self._writer.close()
