"""Reduce overfitting: settings that depend on text size, weight averaging, early stopping."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from minigpt.config import RunConfig
from minigpt.errors import MinigptError
from minigpt.model.cost import parameter_count
from minigpt.model.language_model import model_class
from minigpt.settings import build, given, merge, to_dict
from minigpt.text.tokens import PreparedData
from minigpt.training.checkpoints import Checkpoints
from minigpt.training.events import EvalEvent, Event, SaveEvent
from minigpt.training.run import Run
from minigpt.training.schedule import is_due
from minigpt.training.step_metrics import Metrics
from minigpt.training.world import to_local

LARGE_TEXT = 2.0
"""Training tokens per parameter from which a text counts as large."""
SMALL_TEXT = 0.025
"""Training tokens per parameter below which a text counts as small."""
EVAL_SHARE = 0.1
"""Maximum FLOPs of evaluation, as a fraction of those of training."""
MIN_EVAL_STEPS = 5
"""Default minimum of steps between evaluations, unless an epoch has fewer."""
MIN_EVAL_TOKENS = 8192
"""Default minimum of validation tokens per pass, unless the text has fewer."""
SHORT_RUN = 50
"""Steps that every run is expected to take, and steps between evaluations of a short run."""
STEPS_PER_MINUTE = 1000
"""Assumed steps per minute of a run with a time limit, to plan evaluations; a CPU takes fewer."""
MAX_EPOCHS, MIN_STEPS, MIN_TOKENS = 6.0, 200, 4096
MIN_PATIENCE = 100
"""Minimum number of steps without a lower validation loss before a run stops early."""


def with_text_settings(
    config: RunConfig, overrides: Mapping[str, Any], data: PreparedData
) -> RunConfig:
    """Set the settings that depend on text size, such as dropout, unless the user set them."""
    n_train_tokens = len(data.tokens.split(config.data.val_fraction)[0])
    n_parameters = parameter_count(config.model)
    suited = text_settings(max(n_train_tokens, 1), n_parameters, config.step_tokens)
    if given(overrides, "model", "dropout") is not None:
        suited["training"].pop("dropout_start", None)  # the user's dropout begins at once
    own = {
        table: {key: value for key, value in values.items() if given(overrides, table, key) is None}
        for table, values in suited.items()
    }
    return build(RunConfig, merge(to_dict(config), own))


def text_settings(n_train_tokens: int, n_parameters: int, step_tokens: int) -> dict[str, Any]:
    """Return the settings against overfitting, which depend on the size of the text.

    They depend on the text and the model, never on the budget, so that a larger budget gives the
    same run with a longer schedule. The epochs are limited to a number beyond which the validation
    loss did not fall. docs/training.md has the measurements.

    Args: step_tokens, tokens per step.
    Returns: settings, nested as in RunConfig; ``training.max_epochs`` is an upper limit.
    """
    size = n_train_tokens / n_parameters
    training: dict[str, Any] = {"average": 0.98, "patience": 4.0}
    if size >= LARGE_TEXT:
        return {"training": training}
    training["dropout_start"] = 1.5
    if n_train_tokens >= MIN_TOKENS:  # shorter texts are only for trying things out
        training["max_epochs"] = max(MAX_EPOCHS, MIN_STEPS * step_tokens / n_train_tokens)
    return {"model": {"dropout": 0.25 if size < SMALL_TEXT else 0.1}, "training": training}


def with_evaluations(config: RunConfig, n_train_tokens: int, n_val_tokens: int) -> RunConfig:
    """Derive ``eval_every`` and ``eval_tokens`` where they are None.

    To find the best step, a run is evaluated at least once per epoch (or per hundredth of the run,
    if that is longer), and more often if the validation text is short. Evaluation adds at most a
    tenth of the training FLOPs, unless ``MIN_EVAL_TOKENS`` requires more. A time limit may end a
    run long before its last step, so a pass then costs no more than in a run of ``SHORT_RUN``
    steps.
    """
    training = config.training
    n_steps = training.max_steps
    if training.max_minutes:
        by_clock = math.ceil(STEPS_PER_MINUTE * training.max_minutes)
        n_steps = min(n_steps, by_clock) if n_steps else by_clock
    # A forward pass is a third of a training step. The averaged weights need one too.
    share = 3 * EVAL_SHARE / (2 if training.average else 1)
    step_tokens = config.step_tokens
    every, n_tokens = training.eval_every, training.eval_tokens
    if every is None:
        often = min(math.ceil(n_train_tokens / step_tokens), max(SHORT_RUN, n_steps // 20))
        if n_val_tokens:
            affordable = math.ceil(n_val_tokens / (share * step_tokens))
            often = min(often, max(MIN_EVAL_STEPS, affordable))
        every = max(1, often, min(n_steps, training.max_steps) // 100)
    if n_tokens is None:
        between = min(every or n_steps, SHORT_RUN if training.max_minutes else n_steps)
        n_tokens = max(MIN_EVAL_TOKENS, int(share * between * step_tokens))
    return replace(config, training=replace(training, eval_every=every, eval_tokens=n_tokens))


def enable(run: Run) -> None:
    """Enable weight averaging and early stopping of a run, as set in its config."""
    if run.config.training.average:
        run.average = WeightAverage(run.model, run.config.training.average)
    run.early_stop = EarlyStop()


_SHARE_OF_LATEST = 8
"""Weight of the latest step in a short run's average, as a multiple of that in a plain mean."""


class WeightAverage:
    """Exponential moving average of a model's weights, over fewer steps at the start of a run.

    Training oscillates around weights that are better than those of any single step, and on a small
    text the average overfits later. It covers about an eighth of the steps taken, until the decay
    covers fewer: the first weights of a short run are far from its last.

    Source: Polyak and Juditsky 1992, doi:10.1137/0330046; Izmailov et al. 2018, arXiv:1803.05407;
        Shamir and Zhang 2013, arXiv:1212.1824, section 4.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start from a model's current weights. Args: decay, per step, in (0, 1)."""
        self._decay = decay
        self.tensors = {p: p.detach().clone() for p in model.parameters()}
        """Average of each parameter, sharded as the parameter is."""
        self.is_in_model = False
        """Whether the two are swapped: the model has the average, ``tensors`` the weights."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after a step. Args: step, number of steps taken."""
        weight = max(1 - self._decay, _SHARE_OF_LATEST / (step + _SHARE_OF_LATEST))
        averages, weights = self._local()
        torch._foreach_lerp_(averages, weights, weight)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Swap the model's weights and their averages within the block."""
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
        self.is_in_model = not self.is_in_model

    def _local(self) -> tuple[list[Tensor], list[Tensor]]:
        averages = [to_local(average) for average in self.tensors.values()]
        weights = [to_local(p.detach()) for p in self.tensors]
        return averages, weights


@dataclass(frozen=True)
class EarlyStopEvent(Event):
    """Training stops early, because the validation loss has not fallen for ``patience`` epochs."""

    kind = "early_stop"
    best_step: int
    """Step of the lowest validation loss."""
    epochs_since: float
    """Epochs since that step."""

    def describe(self) -> str:
        return (
            f"stopped early: no lower validation loss since step {self.best_step}, "
            f"{self.epochs_since:.1f} epochs ago (--patience 0 trains on)"
        )


@dataclass(kw_only=True)
class EarlyStop:
    """Stops a run whose validation loss has not fallen for ``patience`` epochs.

    Only scheduled evaluations count.
    """

    best_step: int = 0
    val_loss: float | None = None
    """Lowest validation loss, in nats/token. None before the first evaluation."""
    evaluated_step: int = 0
    """Step of the latest scheduled evaluation."""

    def add(self, step: int, val_loss: float) -> None:
        """Add an evaluation. An equal loss is no improvement."""
        self.evaluated_step = step
        if self.val_loss is None or val_loss < self.val_loss:
            self.best_step, self.val_loss = step, val_loss

    def is_due(self, run: Run) -> bool:
        """Return whether the run should stop."""
        patience = run.config.training.patience
        if not patience:
            return False
        n_steps = math.ceil(patience * len(run.train_tokens) / run.config.step_tokens)
        return self.evaluated_step - self.best_step >= max(MIN_PATIENCE, n_steps)

    def event(self, run: Run) -> EarlyStopEvent:
        """Return the event that reports early stopping."""
        return EarlyStopEvent(run.step, self.best_step, run.epochs(run.step - self.best_step))


class KeptCheckpoints(Checkpoints):
    """Also evaluates the averaged weights, and saves the best weights between two checkpoints.

    The weights with the lowest validation loss since the last checkpoint are kept in memory.
    """

    def __init__(self, run: Run, metrics: Metrics) -> None:
        super().__init__(run, metrics)
        best = run.folder.best() if run.saved_step is not None else None
        loss = best.facts.get("val_loss") if best else None
        self._lowest = run.world.broadcast(loss if isinstance(loss, float) else math.inf)
        self._kept: tuple[EvalEvent, dict[str, Tensor]] | None = None
        """An evaluation and its weights, which are only on rank 0."""

    def evaluate(self) -> EvalEvent:
        """Compute the validation loss of the weights, or of their average if it is lower.

        Between checkpoints, the best weights so far are kept.
        """
        run, config = self._run, self._run.config.training
        event = super().evaluate()
        if run.average:
            started = time.perf_counter()
            with run.average.in_model():
                averaged = self.validation()
            loss, bits = averaged.nats_per_token, averaged.bits_per_byte
            if loss < event.val_loss:
                event = replace(event, val_loss=loss, bits_per_byte=bits, is_averaged=True)
            event = replace(event, eval_s=event.eval_s + time.perf_counter() - started)
        self._evaluation = event
        is_due_now = is_due(run.step, config.eval_every)
        if is_due_now or is_due(run.step, config.save_every):
            run.early_stop.add(run.step, event.val_loss)
        if is_due_now and run.step and run.progress < 1 and event.val_loss < self._lowest:
            self._lowest = event.val_loss
            with self._weights_of(event):
                gathered = run.world.gather(run.model.state_dict().items())
                copies = {name: w.detach().to("cpu", copy=True) for name, w in gathered.items()}
            self._kept = event, copies
        return event

    def save(self, evaluation: EvalEvent | None) -> Iterator[SaveEvent]:
        """Save the best weights since the last checkpoint, and a checkpoint."""
        # Before the latest checkpoint: if a crash prevents this, the resumed run repeats the step.
        yield from self._save_kept(evaluation)
        with self._weights_of(evaluation):
            saved = list(super().save(evaluation))
        yield from saved

    def rescue(self) -> None:
        """Save the best weights if possible; errors are ignored in favor of the run's own."""
        with suppress(MinigptError, OSError):
            self._save_kept(None)

    def _save_kept(self, latest: EvalEvent | None) -> list[SaveEvent]:
        """Save the kept weights, unless those of the checkpoint that follows are as good."""
        run, kept = self._run, self._kept
        self._kept = None
        if latest and latest.val_loss < self._lowest:
            self._lowest, kept = latest.val_loss, None
        if not kept or (latest and kept[0].step == run.step) or run.world.rank:
            return []
        config = run.config.model
        return [self._write(model_class(config).from_tensors(config, kept[1]), kept[0])]

    def _weights_of(self, evaluation: EvalEvent | None) -> AbstractContextManager[None]:
        """Return a context in which the model has the weights of an evaluation at this step."""
        is_averaged = evaluation is not None and evaluation.is_averaged
        return self._run.average.in_model() if is_averaged else nullcontext()
