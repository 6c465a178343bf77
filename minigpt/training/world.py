"""The processes that train one model, as the training loop sees them.

``World`` is one process that trains alone, and most of its methods return their argument. Under
torchrun, ``join`` returns the subclass in distributed.py instead. Every rank must call the same
methods in the same order, because each call may wait for the other ranks.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from math import gcd
from typing import Any, Self

import torch
from torch import Tensor, nn

from minigpt.errors import ConfigError
from minigpt.evaluation import Evaluation
from minigpt.model.language_model import LanguageModel
from minigpt.rings import ring

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class World:
    """The processes of a run, seen by one of them. Only rank 0 writes files and messages."""

    rank: int = 0
    """Index of this process, 0 to size - 1."""
    size: int = 1
    """Number of processes."""
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    """Device of this rank."""
    is_sharded: bool = False
    """Whether each rank holds only a shard of every parameter."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def on(self, device: torch.device, *, shard: bool) -> Self:
        """Return this world on a device.

        Args: shard, whether ranks share parameters, gradients and optimizer state.
        Raises: ConfigError if there are fewer GPUs than processes.
        """
        return replace(self, device=device)

    def micro_batch_size(self, batch_size: int, largest: int) -> int:
        """Return the sequences per forward pass of a rank: equal parts of at most ``largest``.

        Raises: ConfigError if the batch cannot be divided equally among the ranks.
        """
        if batch_size % self.size:
            raise ConfigError(
                f"--batch-size {batch_size} cannot be divided among {self.size} processes. Use a "
                f"multiple of {self.size}."
            )
        return gcd(batch_size // self.size, largest)

    def send_plan(self, plan: dict[str, Any]) -> None:
        """Send the plan of a run from rank 0 to the others. An empty plan tells them to exit."""

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

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """Return the full tensor, which may be sharded."""
        return tensor

    def close(self) -> None:
        """Leave the process group at the end of a run."""


ALONE = World()
"""One process."""


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this rank holds only a shard of a tensor: a DTensor."""
    return hasattr(tensor, "placements")


def to_local(tensor: Any) -> Tensor:
    """Return this rank's shard of a tensor, for in-place updates."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return local


def join() -> World:
    """Return the world of the processes that torchrun started; ``ALONE`` without torchrun.

    Raises: ConfigError if there are several and training/distributed.py is missing.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    world: World = ring("training.distributed").join()
    return world
