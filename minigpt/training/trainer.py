"""The training loop, which yields events and never prints."""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.model.device import autocast, to_device
from minigpt.model.language_model import LanguageModel
from minigpt.rings import find_ring, ring
from minigpt.text.batches import NO_TARGET, batch
from minigpt.training.checkpoints import Checkpoints
from minigpt.training.events import Event, SampleEvent
from minigpt.training.optim import scale_learning_rates, set_momentum
from minigpt.training.run import Run
from minigpt.training.schedule import is_due, momentum
from minigpt.training.step_metrics import Metrics


class TrainingLoss(nn.Module):
    """The loss of a model on a batch: a module, so that torch.compile fuses it with the model."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, inputs: Tensor, targets: Tensor, *, recompute: bool = False, is_sum: bool = False
    ) -> Tensor:
        """Return the cross-entropy in nats, its mean over tokens or its sum.

        Args: inputs and targets (B, T); targets of NO_TARGET are ignored; recompute, whether to use
            activation checkpointing.
        """
        logits = self.model(inputs, recompute=recompute).float().flatten(0, 1)
        reduction = "sum" if is_sum else "mean"
        return F.cross_entropy(logits, targets.flatten(), reduction=reduction)


class Trainer(Run):
    """Takes the steps of a run, and evaluates and saves it on schedule."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """Start a run, or resume it. Args and errors: those of ``Run``."""
        super().__init__(*args, **options)
        loss = TrainingLoss(self.model)
        self._replica = self.world.replicate(loss)
        self._loss_of: Any = self._replica
        if compiling := find_ring("training.compiling"):
            self._loss_of = compiling.loss_of(self, loss, self._replica)
        self._stop_is_requested = False
        self.metrics = Metrics(self)
        self.skipping: Any = None
        if self.config.training.on_nan == "skip":
            self.skipping = ring("training.skipping").Skipping(self, self.metrics)
        overfitting = find_ring("training.overfitting")
        checkpoints = overfitting.KeptCheckpoints if overfitting else Checkpoints
        self.checkpoints = checkpoints(self, self.metrics)
        self.metrics.before_divergence = self.checkpoints.rescue

    def run(self) -> Iterator[Event]:
        """Train until the budget is used or a stop is requested, then save.

        On an error, the best weights since the last checkpoint are saved, for inference only.

        Raises: DivergedError on NaN or inf, or on a loss above the divergence threshold.
        """
        try:
            yield from self._run()
        except Exception:
            self.checkpoints.rescue()
            raise

    def _run(self) -> Iterator[Event]:
        config = self.config.training
        self.model.train()
        if self.config.from_ and self.saved_step is None and len(self.val_tokens):
            yield self.checkpoints.evaluate()  # the loss before fine-tuning
        while self.progress < 1 and not self.is_early_stop_due and not self._must_stop():
            is_taken = self.take_step()
            is_last = self.progress >= 1
            if not is_taken:
                yield self.skipping.event()
            elif is_last or is_due(self.step, config.log_every):
                yield self.metrics.step_event()
            if is_due(self.step, config.eval_every) and not is_last and len(self.val_tokens):
                yield self.checkpoints.evaluate()
            if is_due(self.step, config.save_every) and not is_last:
                yield from self.checkpoints.evaluate_and_save()
            if is_due(self.step, config.sample_every) or (config.sample_every and is_last):
                model = self.world.full_model(self.model)
                if model is not None:
                    yield SampleEvent(self.step, model.to(self.device))
            if self.is_early_stop_due:
                yield self.early_stop.event(self)
        if self.saved_step != self.step:
            yield from self.checkpoints.evaluate_and_save()

    def take_step(self) -> bool:
        """Take one optimizer step on the next batch; return False if its update was skipped.

        Raises: DivergedError, as ``run``, if ``on_nan`` is skip.
        """
        config = self.config.training
        started = time.perf_counter()
        self.last_lr_scale = scale = self.lr_scale
        scale_learning_rates(self.optimizers, scale)
        set_momentum(self.optimizers, momentum(config, self.step))
        self.set_dropout()
        loss = self._accumulate_gradients()
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
        self.metrics.add(self.step + 1, config.lr * scale, loss, norm)
        is_taken = not self.skipping or self.metrics.last().is_finite
        for optimizer in self.optimizers:
            if is_taken:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.average and is_taken:
            self.average.update(self.step + 1)
        if self.device.type == "cuda" and is_due(self.step + 1, config.log_every):
            torch.cuda.synchronize()
        self.step += 1
        # One clock for all ranks, which must agree on the last step.
        self.elapsed_s = self.world.broadcast(self.elapsed_s + time.perf_counter() - started)
        return is_taken

    def _accumulate_gradients(self) -> Tensor:
        """Accumulate the gradients of this rank's part of a batch; return its mean loss."""
        config, context_length = self.config.training, self.context_length
        # With a shorter context, use more sequences: the tokens per step stay the same.
        n_times = self.config.sequence_length // context_length
        inputs, targets = batch(
            self.train_tokens,
            context_length,
            config.batch_size * n_times,
            seed=config.seed,
            step=self.step,
            rank=self.world.rank,
            world_size=self.world.size,
        )
        inputs, targets = to_device((inputs, targets), self.device)
        n_counted = None
        if self.data.manifest.loss_on == "completion":
            # The mean is over the counted tokens of all micro-batches and ranks.
            n_counted = self.world.mean((targets != NO_TARGET).sum().float()).clamp(min=1)
        options = {"recompute": config.recompute, "is_sum": n_counted is not None}
        total = torch.zeros((), device=self.device)
        size = self.micro_batch_size * n_times
        micro_batches = list(zip(inputs.split(size), targets.split(size), strict=True))
        for number, (micro_inputs, micro_targets) in enumerate(micro_batches, start=1):
            is_last = number == len(micro_batches)
            with nullcontext() if is_last else self.world.no_sync(self._replica):
                with autocast(self.device, self.dtype):
                    loss = self._loss_of(micro_inputs, micro_targets, **options)
                loss = loss / (len(micro_batches) if n_counted is None else n_counted)
                loss.backward()
            total += loss.detach()
        return total

    def request_stop(self) -> None:
        """Ask ``run`` to save after the current step and return; safe in a signal handler."""
        self._stop_is_requested = True

    @property
    def was_stopped(self) -> bool:
        """Whether ``request_stop`` ended the run before its budget was used."""
        return self._stop_is_requested and self.progress < 1 and not self.is_early_stop_due

    def _must_stop(self) -> bool:
        """Return whether any rank was asked to stop, so that all stop at the same step."""
        # A signal that arrives during the reduction waits for the next call, so that ranks agree.
        if not self.world.max(int(self._stop_is_requested)):
            return False
        self._stop_is_requested = True
        return True
