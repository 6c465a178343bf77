"""Which weights a run leaves: those of a step or their moving average, from the best evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from minigpt.training.world import World


class WeightAverage:
    """Exponential moving average of a model's weights; the plain mean of its first steps.

    Training oscillates around weights that are better than those of any single step, and on a small
    text the average overfits later.

    Source: Polyak and Juditsky 1992, doi:10.1137/0330046; Izmailov et al. 2018, arXiv:1803.05407.
    """

    def __init__(self, model: nn.Module, decay: float, world: World) -> None:
        """Start from a model's current weights. Args: decay, per step, in (0, 1)."""
        self._decay = decay
        self._to_local = world.to_local
        self.tensors = {p: p.detach().clone() for p in model.parameters()}
        """Average of each parameter, sharded as the parameter is."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after a step. Args: step, number of steps taken."""
        weight = max(1 - self._decay, 1 / (step + 1))
        averages, weights = self._local()
        torch._foreach_lerp_(averages, weights, weight)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Exchange the model's weights and their averages during the block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        averages, weights = self._local()
        for average, weight in zip(averages, weights, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def _local(self) -> tuple[list[Tensor], list[Tensor]]:
        averages = [self._to_local(average) for average in self.tensors.values()]
        weights = [self._to_local(cast("Tensor", p).detach()) for p in self.tensors]
        return averages, weights


@dataclass(frozen=True, kw_only=True)
class Lowest:
    """The lowest validation loss of a run so far."""

    step: int = 0
    """Step of the loss."""
    val_loss: float | None = None
    """Loss in nats/token. None before the first evaluation."""

    def with_loss(self, step: int, val_loss: float) -> "Lowest":
        """Return the lowest loss after another evaluation. An equal loss is not lower."""
        if self.val_loss is not None and val_loss >= self.val_loss:
            return self
        return Lowest(step=step, val_loss=val_loss)
