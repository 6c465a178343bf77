"""The processes that train one model, as the training loop sees them."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from math import gcd
from typing import Any, Self

import torch
from torch import Tensor, nn

from minigpt.config import TrainingConfig
from minigpt.evaluation import Evaluation
from minigpt.model.language_model import LanguageModel

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class World:
    """One process that trains alone: most of its methods return their argument.

    The subclass in distributed.py is one of several under torchrun: only rank 0 writes files and
    messages, and all ranks call the same methods in the same order, because each call may wait for
    the others.
    """

    rank: int = 0
    """Index of this process, 0 to size - 1."""
    size: int = 1
    """Number of processes."""
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    """Device of this rank."""
    is_sharded: bool = False
    """Whether each rank has only a shard of every parameter."""

    def on(self, device: torch.device, *, shard: bool) -> Self:
        """Return this world with its device set.

        Args: shard, whether to shard parameters, gradients and optimizer state among the ranks.
        """
        return replace(self, device=device)

    def micro_batch_size(self, config: TrainingConfig) -> int:
        """Return the sequences per forward pass of a rank, which divide its part of a batch."""
        return gcd(config.batch_size // self.size, config.micro_batch_size)

    def broadcast(self, number: float) -> float:
        """Return rank 0's number on every rank."""
        return number

    def max(self, number: int) -> int:
        """Return the largest of the ranks' numbers on every rank."""
        return number

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of the ranks' values on every rank."""
        return value

    def evaluate(
        self, model: nn.Module, evaluate: Callable[[Batches], Evaluation], batches: Batches
    ) -> Evaluation:
        """Evaluate a model on batches, divided among the ranks."""
        return evaluate(batches)

    def place(self, model: LanguageModel) -> LanguageModel:
        """Move a model to this rank's device, or shard it among the ranks."""
        return model.to(self.device)

    def replicate(self, model: nn.Module) -> nn.Module:
        """Return the module whose backward pass averages gradients over the ranks."""
        return model

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return the context of a backward pass after which gradients are not yet averaged."""
        return nullcontext()

    def gather(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return named full tensors on rank 0, and an empty dict on the others."""
        return dict(tensors)

    def full_model(self, model: LanguageModel) -> LanguageModel | None:
        """Return the model with full parameters on rank 0, and None on the others."""
        return model


ALONE = World()
"""The world of a single process."""


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this rank has only a shard of a tensor: a DTensor."""
    return hasattr(tensor, "placements")


def full_tensor(tensor: Any) -> Tensor:
    """Return the full tensor, gathered from all ranks if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def to_local(tensor: Any) -> Tensor:
    """Return this rank's shard of a tensor, for in-place updates."""
    return tensor.to_local() if is_sharded(tensor) else tensor
