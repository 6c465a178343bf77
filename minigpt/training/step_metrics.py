"""Loss and gradient norm of the optimizer steps, and the detection of divergence.

They stay on the device, and are read, which synchronizes with it, only when a log line is due.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from minigpt.errors import DivergedError
from minigpt.rings import find_ring
from minigpt.training.events import StepEvent
from minigpt.training.run import Run
from minigpt.training.world import full_tensor

DIVERGED_LOSS = 100
"""Divergence threshold of the loss, as a multiple of ln(vocab_size), the untrained loss."""


class StepMetrics(NamedTuple):
    """Loss and gradient norm of one step, the same on every rank; units as in ``StepEvent``."""

    step: int
    lr: float
    loss: float
    grad_norm: float

    @property
    def is_finite(self) -> bool:
        """Whether neither loss nor gradient norm is NaN or inf."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def __str__(self) -> str:
        numbers = f"loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}, lr {self.lr:.3g}"
        return f"at step {self.step}: {numbers}"


class Metrics:
    """Metrics of the steps of a run; every rank must read them at the same steps."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pending: list[tuple[int, float, Tensor, Tensor]] = []
        self._last: StepMetrics | None = None
        # Steps, seconds and progress at the start of this process, and at the last log line.
        self._begun = self._logged = (run.step, run.elapsed_s, run.progress)
        self.before_divergence: Callable[[], None] = lambda: None
        """Called before the error of a divergence is created, which names the last checkpoint."""

    def add(self, step: int, lr: float, loss: Tensor, grad_norm: Tensor) -> None:
        """Add a step. Args: loss, the mean over this rank's part of the batch."""
        self._pending.append((step, lr, loss, grad_norm))

    def last(self) -> StepMetrics:
        """Return the metrics of the last step; raise as ``check``."""
        self.check()
        assert self._last is not None
        return self._last

    def check(self) -> None:
        """Wait for the device, and read the metrics of the steps since the last call.

        Raises: DivergedError if one of them diverged.
        """
        if not self._pending:
            return
        world, config = self._run.world, self._run.config
        threshold = DIVERGED_LOSS * math.log(max(config.model.vocab_size, 3))
        steps, lrs, losses, norms = zip(*self._pending, strict=True)
        self._pending = []
        loss = world.mean(torch.stack(losses))
        norm = torch.stack([full_tensor(norm) for norm in norms])
        for values in zip(steps, lrs, *torch.stack([loss, norm]).tolist(), strict=True):
            self._last = metrics = StepMetrics(*values)
            if not metrics.is_finite and config.training.on_nan == "stop":
                remedy = "Try a lower --lr, or --on-nan skip to skip these steps."
                raise self.divergence_error(str(metrics), remedy)
            if metrics.is_finite and metrics.loss > threshold:
                raise self.divergence_error(str(metrics))

    def step_event(self) -> StepEvent:
        """Return the event of the last step, with the throughput since the previous event."""
        run, metrics = self._run, self.last()
        now = (run.step, run.elapsed_s, run.progress)
        n_steps, seconds, _ = (a - b for a, b in zip(now, self._logged, strict=True))
        _, all_seconds, used = (a - b for a, b in zip(now, self._begun, strict=True))
        self._logged = now
        tokens_per_s = n_steps * run.config.step_tokens / seconds
        mfu = None
        if cost := find_ring("model.cost"):
            model = replace(run.config.model, context_length=run.context_length)
            rank_tokens_per_s = tokens_per_s / run.world.size
            mfu = cost.utilization(model, rank_tokens_per_s, run.device, run.dtype)
        return StepEvent(
            step=run.step,
            progress=run.progress,
            train_loss=metrics.loss,
            lr=metrics.lr,
            grad_norm=metrics.grad_norm,
            tokens_per_s=tokens_per_s,
            mfu=mfu,
            elapsed_s=run.elapsed_s,
            remaining_s=all_seconds / used * (1 - run.progress) if used else 0.0,
        )

    def divergence_error_now(self, what: str) -> DivergedError:
        """Return the error for a divergence found at the current step, such as NaN in a sample."""
        run, last = self._run, self._last
        norm = f"gradient norm {last.grad_norm:.4g}, " if last else ""
        lr = run.config.training.lr * run.lr_scale
        return self.divergence_error(f"at step {run.step}: {what}, {norm}lr {lr:.3g}")

    def divergence_error(self, what: str, remedy: str = "Try a lower --lr.") -> DivergedError:
        """Return the error for a divergence. Args: what, with its step."""
        self.before_divergence()
        saved = self._run.folder.steps()
        kept = f"The checkpoint of step {saved[-1]} is kept." if saved else "Nothing was saved yet."
        return DivergedError(f"training diverged {what}. {kept} {remedy}")
