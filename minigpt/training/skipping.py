"""Skip optimizer steps whose loss or gradient is NaN or inf (if ``on_nan`` is skip)."""

from dataclasses import dataclass

from minigpt.training.events import Event
from minigpt.training.run import Run
from minigpt.training.step_metrics import Metrics

MAX_SKIPPED_IN_A_ROW = 10
"""Number of consecutive skipped steps after which a run counts as diverged."""


@dataclass(frozen=True)
class SkipEvent(Event):
    """The update of a step was skipped; its batch is not repeated. Fields as in StepEvent."""

    kind = "skip"
    train_loss: float
    lr: float
    grad_norm: float
    n_skipped: int
    """Number of steps skipped in this run so far."""
    elapsed_s: float

    def describe(self) -> str:
        return (
            f"skipped: loss {self.train_loss:.4g}, gradient norm {self.grad_norm:.4g}, "
            f"lr {self.lr:.1e}  {self.n_skipped} so far"
        )


class Skipping:
    """Counts skipped optimizer steps, and stops training after several in a row."""

    def __init__(self, run: Run, metrics: Metrics) -> None:
        self._run, self._metrics = run, metrics
        self._step, self._n_in_a_row = 0, 0

    def event(self) -> SkipEvent:
        """Count the last step, which was skipped, and return its event.

        Raises: DivergedError if too many steps in a row were skipped.
        """
        run, metrics = self._run, self._metrics.last()
        self._n_in_a_row = self._n_in_a_row + 1 if self._step == run.step - 1 else 1
        self._step = run.step
        if self._n_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            what = f"{metrics}, and {self._n_in_a_row} steps in a row were skipped"
            raise self._metrics.divergence_error(what)
        run.n_skipped += 1
        return SkipEvent(
            step=run.step,
            train_loss=metrics.loss,
            lr=metrics.lr,
            grad_norm=metrics.grad_norm,
            n_skipped=run.n_skipped,
            elapsed_s=run.elapsed_s,
        )
