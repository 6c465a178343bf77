"""Loss and gradient norm of the optimizer steps.

They are computed on the device, and reading them waits for it. They are read when a line of the log
is due, for all steps since the last line, or at every step if ``on_nan`` is skip.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt.training.world import World

MAX_SKIPPED_IN_A_ROW = 10
"""Number of consecutive skipped steps after which a run counts as diverged."""


@dataclass(frozen=True)
class StepMetrics:
    """Loss and gradient norm of one step, the same on every rank."""

    step: int
    """Number of steps taken, including this one."""
    lr: float
    """Learning rate of the matrices."""
    loss: float
    """Mean cross-entropy over the batch, in nats/token."""
    grad_norm: float
    """Global gradient norm before clipping."""

    @property
    def is_finite(self) -> bool:
        """Whether neither loss nor gradient norm is NaN or inf."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def __str__(self) -> str:
        return (
            f"at step {self.step}: loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}, "
            f"lr {self.lr:.3g}"
        )


class PendingMetrics:
    """Metrics of recent steps that are still on the device."""

    def __init__(self, world: World) -> None:
        """Args: world, whose ranks all call ``read`` at the same steps."""
        self._world = world
        self._pending: list[tuple[int, float, Tensor, Tensor]] = []

    def add(self, step: int, lr: float, loss: Tensor, grad_norm: Tensor) -> None:
        """Add a step. Args: loss, the mean over this rank's part of the batch."""
        self._pending.append((step, lr, loss, grad_norm))

    def read(self) -> list[StepMetrics]:
        """Wait for the device and return the steps since the last call, in order."""
        if not self._pending:
            return []
        steps, lrs, losses, norms = zip(*self._pending, strict=True)
        self._pending = []
        loss = self._world.mean(torch.stack(losses))
        norm = torch.stack([self._world.full_tensor(norm) for norm in norms])
        numbers = torch.stack([loss, norm]).tolist()
        return [StepMetrics(*values) for values in zip(steps, lrs, *numbers, strict=True)]
