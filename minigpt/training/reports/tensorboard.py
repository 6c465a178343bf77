"""Scalars for TensorBoard, in event files beside a run's metrics.jsonl."""

from pathlib import Path
from typing import TYPE_CHECKING

from minigpt.errors import ConfigError, install_extra
from minigpt.training.events import Event

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_FLUSH_S = 10
_TAGS: dict[str, dict[str, str]] = {
    "step": {"train_loss": "loss/train"}
    | {name: name for name in ("lr", "grad_norm", "tokens_per_s", "mfu")},
    "skip": {"n_skipped": "skipped_steps"},
    "eval": {"val_loss": "loss/val", "bits_per_byte": "bits_per_byte/val"},
}


def summary_writer() -> "type[SummaryWriter]":
    """Import and return TensorBoard's writer of event files.

    Raises: ConfigError if TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "--report-to tensorboard needs TensorBoard. Install it: "
            f"{install_extra('tensorboard')}; or give --report-to none."
        ) from None
    return SummaryWriter


class TensorBoardLog:
    """Adds events to a run's scalars. A resumed run hides the points after its checkpoint."""

    def __init__(self, folder: Path, *, from_step: int | None = None) -> None:
        """Begin an event file.

        Args: from_step, the step that the run resumes from; None for a new run.
        """
        # TensorBoard drops the points of earlier files from purge_step on.
        purge_step = 0 if from_step is None else from_step + 1
        self._writer = summary_writer()(str(folder), purge_step=purge_step, flush_secs=_FLUSH_S)

    def write(self, event: Event) -> None:
        """Add the scalars of an event, and flush the file at each checkpoint."""
        for name, tag in _TAGS.get(event.kind, {}).items():
            value = getattr(event, name)
            if value is not None:
                self._writer.add_scalar(tag, value, event.step)
        if event.kind == "save":
            self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()
