"""What a step's loss and gradient norm were, and whether they are numbers at all.

They are computed on the device, and reading them waits for it. So they are read when a line of the
log is due, of all steps since the last one, and at every step only if ``on_nan`` is skip.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt.training.distributed import World, whole

MOST_SKIPPED = 10
"""Steps without finite numbers in a row after which a run that skips them gives up."""


@dataclass(frozen=True)
class Reading:
    """One step, in numbers that every rank has."""

    step: int
    """Steps done with it."""
    lr: float
    """Learning rate of the matrices."""
    loss: float
    """Mean cross-entropy over the step's batch, nats/token."""
    grad_norm: float
    """Global norm of the gradient before clipping."""

    @property
    def is_finite(self) -> bool:
        """Whether the step is one that a run can go on from."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def __str__(self) -> str:
        return (
            f"at step {self.step}: loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}, "
            f"lr {self.lr:.3g}"
        )


class Readings:
    """Steps whose numbers are still on the device."""

    def __init__(self, world: World) -> None:
        """Args: world, whose ranks read at the same steps."""
        self._world = world
        self._waiting: list[tuple[int, float, Tensor, Tensor]] = []

    def add(self, step: int, lr: float, loss: Tensor, grad_norm: Tensor) -> None:
        """Remember a step. Args: loss, of this rank's part of the batch."""
        self._waiting.append((step, lr, loss, grad_norm))

    def read(self) -> list[Reading]:
        """Wait for the device, and return the steps since the last call, in order."""
        if not self._waiting:
            return []
        steps, lrs, losses, norms = zip(*self._waiting, strict=True)
        self._waiting = []
        mean = self._world.mean(torch.stack(losses))
        norm = torch.stack([whole(norm) for norm in norms])
        numbers = torch.stack([mean, norm]).tolist()
        return [Reading(*values) for values in zip(steps, lrs, *numbers, strict=True)]
