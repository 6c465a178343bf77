"""The training loop, which yields events and never prints."""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.checkpoint.folder import WEIGHTS_ONLY, RunFolder
from minigpt.checkpoint.model_folder import (
    Carried,
    read_model,
    write_full_precision,
    write_model,
)
from minigpt.config import RunConfig
from minigpt.errors import CheckpointError, DataError, DivergedError
from minigpt.evaluation import Evaluation, evaluate, windows_at_once
from minigpt.model.cost import training_flops_per_token
from minigpt.model.device import autocast, has_fast_bfloat16, peak_flops, save_dtype, to_device
from minigpt.model.language_model import LanguageModel
from minigpt.model.registry import model_class
from minigpt.rings import has_ring, ring
from minigpt.text.batches import NO_TARGET, batch, require_length, validation_windows
from minigpt.text.shards import PreparedData
from minigpt.training.events import (
    EarlyStopEvent,
    EvalEvent,
    Event,
    SampleEvent,
    SaveEvent,
    SkipEvent,
    StepEvent,
)
from minigpt.training.optim import make_optimizers, scale_learning_rates
from minigpt.training.schedule import (
    Seam,
    lr_scale,
    patience_steps,
    progress,
    with_evaluations,
    with_max_steps,
)
from minigpt.training.selection import Lowest, WeightAverage
from minigpt.training.state import (
    TrainingState,
    computed_on,
    optimizer_tensors,
    restore_state,
    write_state,
)
from minigpt.training.step_metrics import MAX_SKIPPED_IN_A_ROW, PendingMetrics, StepMetrics
from minigpt.training.world import ALONE, World

DIVERGED_LOSS = 100
"""Divergence threshold of the loss, as a multiple of ln(vocab_size), the loss of guessing."""


class TrainingLoss(nn.Module):
    """The loss of a model on a batch: a module, so that torch.compile fuses it with the model."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, inputs: Tensor, targets: Tensor, *, recompute: bool = False, is_sum: bool = False
    ) -> Tensor:
        """Return the cross-entropy in nats, its mean over tokens or its sum.

        Args: inputs and targets (B, T); targets may be NO_TARGET, which count nothing; recompute,
            activation checkpointing.
        """
        logits = self.model(inputs, recompute=recompute).float().flatten(0, 1)
        reduction = "sum" if is_sum else "mean"
        return F.cross_entropy(logits, targets.flatten(), reduction=reduction)


class Trainer:
    """One run: a model, its optimizers and its position in the data.

    With several processes, each has a Trainer of the same run (see world.py).
    """

    def __init__(
        self,
        config: RunConfig,
        data: PreparedData,
        run: RunFolder,
        *,
        device: torch.device,
        dtype: torch.dtype,
        start_from: LanguageModel | None = None,
        resume_from: Path | None = None,
        carried: Carried | None = None,
        world: World = ALONE,
    ) -> None:
        """Start a run, or resume it from a checkpoint.

        Args: dtype of autocast (weights stay float32); start_from, a float32 model to fine-tune
            (None for random weights); resume_from, a checkpoint folder; carried, from the folder of
            the model to fine-tune or of the checkpoint; world, the process group.
        Raises: DataError if the corpus is too short, or differs from that of the checkpoint;
            CheckpointError if the checkpoint is damaged or has another model; ConfigError if the
            batch cannot be divided among the ranks, or there are fewer GPUs than ranks.
        """
        self.data = data
        self.folder = run
        self.world = world.on(device, shard=config.training.shard)
        self.device = self.world.device
        self.dtype = dtype
        self.carried = carried
        self.train_tokens, self.val_tokens = data.tokens.split(config.data.val_fraction)
        config = with_max_steps(config, len(self.train_tokens))
        self.config = config = with_evaluations(config, len(self.train_tokens))
        for tokens in (self.train_tokens, self.val_tokens):
            if len(tokens) or tokens is self.train_tokens:  # there may be no validation text
                require_length(tokens, config.sequence_length)
        self.micro_batch_size = world.micro_batch_size(
            config.training.batch_size, config.training.micro_batch_size
        )
        """Sequences per forward pass of a rank."""
        self.model = self.world.place(self._make_model(start_from, resume_from))
        product_dtype = torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
        self.optimizers = make_optimizers(self.model, config.training, product_dtype, self.world)
        self.step = 0
        self.elapsed_s = 0.0
        self.n_skipped = 0
        """Number of steps skipped because of NaN or inf."""
        self.computed_on = computed_on(self.world, dtype)
        self.moved_from: str | None = None
        """Where the checkpoint was computed, if resume is not bit-exact for that reason."""
        self.average: WeightAverage | None = None
        if config.training.average:
            self.average = WeightAverage(self.model, config.training.average, self.world)
        self._lowest, self._best_loss = Lowest(), math.inf
        self._unsaved_best: tuple[EvalEvent, dict[str, Tensor]] | None = None
        """The best evaluation since the last checkpoint, and its weights, which only rank 0 has."""
        self.seam: Seam | None = None
        """Where a change of the schedule is smoothed, in this process or an earlier one."""
        self._last_lr_scale: float | None = None
        if resume_from:
            self._restore(resume_from)
        self._replica = self.world.replicate(TrainingLoss(self.model))
        # Compiled around DDP, which then averages some gradients while others are computed.
        is_compiled = config.training.compile
        self._loss_of: Any = torch.compile(self._replica) if is_compiled else self._replica
        self._stop_is_requested = False
        self._begun = self._logged = (self.step, self.elapsed_s, self.progress)
        """Steps, seconds and progress when this process began, and at the last log line."""
        self._saved_step = self.step if resume_from else None
        self._evaluation: EvalEvent | None = None
        self._evaluated_step = self.step
        self._dropouts = [
            module for module in self.model.modules() if isinstance(module, nn.Dropout)
        ]
        self._pending = PendingMetrics(self.world)
        self._last_metrics: StepMetrics | None = None

    def _make_model(
        self, start_from: LanguageModel | None, resume_from: Path | None
    ) -> LanguageModel:
        config = self.config.model
        if resume_from:
            start_from = read_model(resume_from, dtype=torch.float32, is_exact=True).model
        if start_from is None:
            model = model_class(config)(config)
            # On the CPU, so that every device starts from the same weights.
            model.init_weights(torch.Generator().manual_seed(self.config.training.seed))
            return model
        # Dropout has no weights, and may be changed when a run is resumed.
        if replace(start_from.config, dropout=config.dropout) != config:
            raise CheckpointError(
                f"{str(resume_from)!r} has a model of another shape than the run's config. "
                "Resume with the run's own settings."
            )
        return model_class(config).from_tensors(config, start_from.state_dict())

    def _restore(self, folder: Path) -> None:
        state = restore_state(folder, self.model, self.optimizers, self.world, self.average)
        if state.corpus != self.data.tokens.fingerprint:
            raise DataError(
                "the corpus is not the one that this run started with. Give the same text, or "
                "start a new run under another --name."
            )
        self.step, self.elapsed_s = state.step, state.elapsed_s
        self.n_skipped = state.n_skipped
        if state.computed_on not in ("", self.computed_on):
            self.moved_from = state.computed_on
        best = self.folder.best()
        best_loss = best.facts.get("val_loss") if best else None
        self._best_loss = self.world.broadcast(math.inf if best_loss is None else best_loss)
        self._lowest = state.lowest
        self.seam, self._last_lr_scale = state.seam, state.lr_scale
        is_changed = state.next_lr_scale not in (None, self.lr_scale)
        if is_changed and state.lr_scale is not None:
            self.seam = Seam(step=self.step, lr_scale=state.lr_scale, is_warm=state.is_warm)

    @property
    def progress(self) -> float:
        """Fraction of the budget used, in [0, 1]."""
        return progress(self.config.training, self.step, self.elapsed_s)

    @property
    def lr_scale(self) -> float:
        """Learning rate of the next step as a fraction of the peak."""
        scale = lr_scale(self.config.training, self.progress)
        return self.seam.limit(scale, self.step) if self.seam else scale

    @property
    def context_length(self) -> int:
        """Tokens per sequence of the next step.

        Short sequences at the start give more, and more independent, gradients in the same time
        (Li et al. 2021, arXiv:2108.06084).
        """
        config = self.config.training
        is_warm = self.progress >= config.context_warmup_fraction
        if config.context_warmup_length and not is_warm and not (self.seam and self.seam.is_warm):
            return config.context_warmup_length
        return self.config.sequence_length

    def request_stop(self) -> None:
        """Ask ``run`` to save after the current step and return; safe in a signal handler."""
        self._stop_is_requested = True

    @property
    def was_stopped(self) -> bool:
        """Whether ``request_stop`` ended the run before its budget was used."""
        return self._stop_is_requested and self.progress < 1 and not self.has_run_out

    @property
    def has_run_out(self) -> bool:
        """Whether the validation loss has not fallen for the epochs of ``patience``."""
        patience = patience_steps(self.config, len(self.train_tokens))
        return patience is not None and self._evaluated_step - self._lowest.step >= patience

    def run(self) -> Iterator[Event]:
        """Train until the budget is used or a stop is requested, then save.

        Raises: DivergedError on NaN or inf, or on a loss above the divergence threshold.
        """
        config = self.config.training
        self.model.train()
        if self.config.from_ and self._saved_step is None:
            yield self._evaluate()  # the loss before fine-tuning
        n_skipped_in_a_row = 0
        while self.progress < 1 and not self.has_run_out and not self._must_stop():
            is_taken = self.take_step()
            n_skipped_in_a_row = 0 if is_taken else n_skipped_in_a_row + 1
            is_last = self.progress >= 1
            if not is_taken:
                yield self._skip_event(n_skipped_in_a_row)
            elif is_last or _is_due(self.step, config.log_every):
                yield self._step_event()
            if _is_due(self.step, config.eval_every) and not is_last and len(self.val_tokens):
                yield self._evaluate_and_keep()
            if _is_due(self.step, config.save_every) and not is_last:
                yield from self._evaluate_and_save()
            if _is_due(self.step, config.sample_every) or (config.sample_every and is_last):
                model = self.world.full_model(self.model)
                if model is not None:
                    yield SampleEvent(self.step, model.to(self.device))
        if self.has_run_out and self._saved_step != self.step:
            epochs = self._epochs(self.step - self._lowest.step)
            yield EarlyStopEvent(self.step, best_step=self._lowest.step, epochs_since=epochs)
        if self._saved_step != self.step:
            yield from self._evaluate_and_save()

    def take_step(self) -> bool:
        """Take one optimizer step on the next batch, and return whether it was not skipped.

        Raises: DivergedError, as ``run``, if ``on_nan`` is skip.
        """
        config = self.config.training
        started = time.perf_counter()
        self._last_lr_scale = scale = self.lr_scale
        scale_learning_rates(self.optimizers, scale)
        if self.config.model.dropout:
            has_begun = self._epochs(self.step) >= config.dropout_start
            for dropout in self._dropouts:
                dropout.p = self.config.model.dropout if has_begun else 0.0
            # Dropout masks are a pure function of seed, step and rank, so that resume is exact.
            torch.manual_seed(config.seed + 1_000_003 * (self.step + 1) + self.world.rank)
        loss = self._accumulate_gradients()
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
        self._pending.add(self.step + 1, config.lr * scale, loss, norm)
        is_taken = config.on_nan != "skip" or self._read_metrics().is_finite
        for optimizer in self.optimizers:
            if is_taken:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.average and is_taken:
            self.average.update(self.step + 1)
        if self.device.type == "cuda" and _is_due(self.step + 1, config.log_every):
            torch.cuda.synchronize()
        self.step += 1
        # One clock for all ranks, which must agree on the last step.
        self.elapsed_s = self.world.broadcast(self.elapsed_s + time.perf_counter() - started)
        return is_taken

    def _accumulate_gradients(self) -> Tensor:
        """Accumulate the gradients of this rank's part of a batch; return its mean loss."""
        config = self.config.training
        context_length = self.context_length
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
        total = torch.zeros((), device=self.device)
        size = self.micro_batch_size * n_times
        micro_batches = list(zip(inputs.split(size), targets.split(size), strict=True))
        for number, (micro_inputs, micro_targets) in enumerate(micro_batches, start=1):
            is_last = number == len(micro_batches)
            with nullcontext() if is_last else self.world.no_sync(self._replica):
                loss = self._loss(micro_inputs, micro_targets, n_counted is not None)
                loss = loss / (len(micro_batches) if n_counted is None else n_counted)
                loss.backward()
            total += loss.detach()
        return total

    def _loss(self, inputs: Tensor, targets: Tensor, is_sum: bool) -> Tensor:
        recompute = self.config.training.recompute
        with autocast(self.device, self.dtype):
            loss: Tensor = self._loss_of(inputs, targets, recompute=recompute, is_sum=is_sum)
        return loss

    def _epochs(self, n_steps: int) -> float:
        """Return the passes over the training text that steps make."""
        step_tokens = self.config.training.batch_size * self.config.sequence_length
        return n_steps * step_tokens / len(self.train_tokens)

    def _must_stop(self) -> bool:
        """Return whether any rank was asked to stop, so that all stop at the same step."""
        # A signal that arrives during the reduction waits for the next call, so that ranks agree.
        if not self.world.max(int(self._stop_is_requested)):
            return False
        self._stop_is_requested = True
        return True

    def _read_metrics(self) -> StepMetrics:
        """Return the last step's metrics, after checking those of all steps before it."""
        self._check()
        assert self._last_metrics is not None
        return self._last_metrics

    def _check(self) -> None:
        """Raise DivergedError if a step since the last call diverged."""
        threshold = DIVERGED_LOSS * math.log(max(self.config.model.vocab_size, 3))
        for metrics in self._pending.read():
            self._last_metrics = metrics
            if not metrics.is_finite and self.config.training.on_nan == "stop":
                remedy = "Try a lower --lr, or --on-nan skip to skip these steps."
                raise self._diverged(str(metrics), remedy)
            if metrics.is_finite and metrics.loss > threshold:
                raise self._diverged(str(metrics))

    def _step_event(self) -> StepEvent:
        metrics, now = self._read_metrics(), (self.step, self.elapsed_s, self.progress)
        n_steps, seconds, _ = (a - b for a, b in zip(now, self._logged, strict=True))
        _, all_seconds, used = (a - b for a, b in zip(now, self._begun, strict=True))
        self._logged = now
        step_tokens = self.config.training.batch_size * self.config.sequence_length
        tokens_per_s = n_steps * step_tokens / seconds
        peak = peak_flops(self.device, self.dtype)
        model = replace(self.config.model, context_length=self.context_length)
        flops_per_s = tokens_per_s * training_flops_per_token(model)
        return StepEvent(
            step=self.step,
            progress=self.progress,
            train_loss=metrics.loss,
            lr=metrics.lr,
            grad_norm=metrics.grad_norm,
            tokens_per_s=tokens_per_s,
            mfu=flops_per_s / (peak * self.world.size) if peak else None,
            elapsed_s=self.elapsed_s,
            remaining_s=all_seconds / used * (1 - self.progress) if used else 0.0,
        )

    def _skip_event(self, n_in_a_row: int) -> SkipEvent:
        metrics = self._read_metrics()
        if n_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise self._diverged(f"{metrics}, and {n_in_a_row} steps in a row were skipped")
        self.n_skipped += 1
        return SkipEvent(
            step=self.step,
            train_loss=metrics.loss,
            lr=metrics.lr,
            grad_norm=metrics.grad_norm,
            n_skipped=self.n_skipped,
            elapsed_s=self.elapsed_s,
        )

    def _evaluate(self) -> EvalEvent:
        """Compute the validation loss of the weights, or of their average if it is lower."""
        self._check()  # report an earlier divergence with its own step
        started = time.perf_counter()
        result, is_averaged = self._validation(), False
        if not result.n_tokens:
            raise DataError(
                "no token of the validation text counts in the loss, as no answer of the assistant "
                "is among those evaluated. Give more text, or a larger eval_tokens."
            )
        if not math.isfinite(result.nats):
            raise self.diverged(f"validation loss {result.nats_per_token:.4g}")
        if self.average:
            with self.average.in_model():
                averaged = self._validation()
            if averaged.nats < result.nats:
                result, is_averaged = averaged, True
        self._evaluation = EvalEvent(
            step=self.step,
            val_loss=result.nats_per_token,
            bits_per_byte=result.bits_per_byte,
            n_tokens=result.n_tokens,
            elapsed_s=self.elapsed_s,
            eval_s=time.perf_counter() - started,
            is_averaged=is_averaged,
        )
        config = self.config.training
        if _is_due(self.step, config.eval_every) or _is_due(self.step, config.save_every):
            self._evaluated_step = self.step
            self._lowest = self._lowest.with_loss(self.step, result.nats_per_token)
        return self._evaluation

    def _validation(self) -> Evaluation:
        """Evaluate the model's current weights on the validation windows, always the same."""
        config, length = self.config.training, self.config.sequence_length
        batches = validation_windows(
            self.val_tokens,
            length,
            config.eval_tokens or len(self.val_tokens),
            batch_size=windows_at_once(self.config.model.vocab_size, length),
        )
        lengths = self.data.tokenizer.token_byte_lengths
        result = self.world.evaluate(
            lambda part: evaluate(self.model, part, lengths, dtype=self.dtype), batches
        )
        self.world.reshard(self.model)
        return result

    def _weights_of(self, evaluation: EvalEvent | None) -> AbstractContextManager[None]:
        """Return the context in which the model has the weights of an evaluation at this step."""
        is_averaged = self.average and evaluation and evaluation.is_averaged
        return self.average.in_model() if self.average and is_averaged else nullcontext()

    def _evaluate_and_keep(self) -> EvalEvent:
        """Evaluate, and keep the weights in memory until the next checkpoint if they are best."""
        evaluation = self._evaluate()
        if evaluation.val_loss < self._best_loss:
            self._best_loss = evaluation.val_loss
            with self._weights_of(evaluation):
                weights = self.world.gather(self.model.state_dict().items())
                copies = {name: w.detach().to("cpu", copy=True) for name, w in weights.items()}
            self._unsaved_best = evaluation, copies
        return evaluation

    def _evaluate_and_save(self) -> Iterator[Event]:
        """Save a checkpoint with its validation loss, and the best weights since the last one."""
        evaluation = self._evaluation
        if not len(self.val_tokens):
            evaluation = None
        elif evaluation is None or evaluation.step != self.step:
            yield (evaluation := self._evaluate())
        best, self._unsaved_best = self._unsaved_best, None
        if evaluation and evaluation.val_loss < self._best_loss:
            self._best_loss, best = evaluation.val_loss, None
        if best and best[0].step != self.step and self.world.is_first:
            # Before the latest checkpoint: if it is not written, resuming finds this step again.
            weights = model_class(self.config.model).from_tensors(self.config.model, best[1])
            yield self._write(weights, best[0])
        with self._weights_of(evaluation):
            is_averaged = evaluation is not None and evaluation.is_averaged
            tensors = optimizer_tensors(
                self.model, self.optimizers, self.average, is_exchanged=is_averaged
            )
            optimizer_state = self.world.gather(tensors)
            model = self.world.full_model(self.model)
            saved = self._write(model, evaluation, optimizer_state) if model else None
        if saved:
            yield saved
        self.world.max(0)  # wait for rank 0
        self._saved_step = self.step

    def _write(
        self,
        model: LanguageModel,
        evaluation: EvalEvent | None,
        optimizer_state: dict[str, Tensor] | None = None,
    ) -> SaveEvent:
        """Write the checkpoint of this step, or the weights of the step of an earlier evaluation.

        Args: optimizer_state, None for weights that a run cannot resume from.
        """
        step, losses = self.step, {}
        if evaluation:
            step = evaluation.step
            losses = {"val_loss": evaluation.val_loss, "bits_per_byte": evaluation.bits_per_byte}
        facts: dict[str, Any] = {WEIGHTS_ONLY: True} if optimizer_state is None else {}
        if evaluation and evaluation.is_averaged:
            facts["is_averaged"] = True
        with self.folder.writing_step(step, **losses, **facts) as folder:
            is_rounded = write_model(
                folder,
                model,
                self.data.tokenizer,
                carried=self.carried,
                dtype=save_dtype(self.config.training.save_dtype),
            )
            if template := self.data.manifest.chat_template:
                (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
            if has_ring("checkpoint.tools.model_card"):
                card = ring("checkpoint.tools.model_card").model_card(
                    self.config,
                    name=self.folder.path.name,
                    step=step,
                    n_train_tokens=len(self.train_tokens),
                    val_split=self.data.manifest.val_split,
                    **losses,
                )
                (folder / "README.md").write_text(card, encoding="utf-8")
            if optimizer_state is not None:
                write_state(folder, optimizer_state, self._state())
                if is_rounded:
                    write_full_precision(folder, model)
        if optimizer_state is not None:
            self.folder.point("latest", step, **losses, **facts)
        if not evaluation:  # without a validation text, the latest checkpoint counts as the best
            self.folder.point("best", step)
        best = self.folder.best()
        assert best is not None
        self.folder.point("best", best.step, **best.facts)
        if optimizer_state is not None:
            self.folder.prune(self.config.training.keep)
        return SaveEvent(
            step=step,
            folder=self.folder.step_folder(step),
            val_loss=evaluation.val_loss if evaluation else None,
            is_best=best.step == step,
        )

    def _state(self) -> TrainingState:
        return TrainingState(
            step=self.step,
            elapsed_s=self.elapsed_s,
            n_skipped=self.n_skipped,
            corpus=self.data.tokens.fingerprint,
            computed_on=self.computed_on,
            lr_scale=self._last_lr_scale,
            next_lr_scale=self.lr_scale,
            is_warm=self.context_length == self.config.sequence_length,
            lowest=self._lowest,
            seam=self.seam,
        )

    def diverged(self, fact: str) -> DivergedError:
        """Return the error for a divergence found at the current step, such as NaN in a sample."""
        config, last = self.config.training, self._last_metrics
        norm = f"gradient norm {last.grad_norm:.4g}, " if last else ""
        lr = config.lr * self.lr_scale
        return self._diverged(f"at step {self.step}: {fact}, {norm}lr {lr:.3g}")

    def _diverged(self, facts: str, remedy: str = "Try a lower --lr.") -> DivergedError:
        saved = self.folder.steps()
        kept = f"The checkpoint of step {saved[-1]} is kept." if saved else "Nothing was saved yet."
        return DivergedError(f"training diverged {facts}. {kept} {remedy}")


def _is_due(step: int, every: int | None) -> bool:
    return step % every == 0 if every else False
