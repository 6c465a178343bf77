"""The training loop: it yields what happens, and leaves showing it to others."""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.model_folder import read_model, write_model
from minigpt.checkpoint.tools.model_card import model_card
from minigpt.config import RunConfig
from minigpt.errors import CheckpointError, DataError, DivergedError
from minigpt.evaluation import Evaluation, evaluate, windows_at_once
from minigpt.model.device import autocast, has_fast_bfloat16
from minigpt.model.language_model import LanguageModel
from minigpt.model.registry import model_class
from minigpt.text.batches import batch, require_length, validation_windows
from minigpt.text.shards import PreparedData
from minigpt.training.distributed import ALONE, World, accumulating
from minigpt.training.events import EvalEvent, Event, SampleEvent, SaveEvent, SkipEvent
from minigpt.training.optim import make_optimizers
from minigpt.training.readings import MOST_SKIPPED, Reading, Readings
from minigpt.training.schedule import lr_scale, progress, with_max_steps
from minigpt.training.speed import Stopwatch
from minigpt.training.state import (
    Progress,
    computed_on,
    optimizer_tensors,
    read_state,
    write_state,
)

HIGHEST_LOSS = 100
"""A loss of so many times that of guessing is of a run that has diverged."""


class Trainer:
    """One run: a model, its optimizers and its place in the data. ``run`` moves it.

    On several ranks each has a Trainer of its own, all of the same run: see distributed.py.
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
        world: World = ALONE,
    ) -> None:
        """Start a run, or take one up from the checkpoint ``resume_from``.

        Args: start_from, a float32 model of the config's shape, whose weights training moves; None
            draws them; world, the ranks that share the work.
        Raises: DataError if the corpus is too short or not the one that the run began with;
            CheckpointError if the checkpoint is damaged or of another model; ConfigError if the
            ranks cannot share the batch, or there are more of them than GPUs.
        """
        self.data = data
        self.folder = run
        self.world = world.on(device, shard=config.training.shard)
        self.device = self.world.device
        self.dtype = dtype
        self.train_tokens, self.val_tokens = data.tokens.split(config.data.val_fraction)
        self.config = config = with_max_steps(config, len(self.train_tokens))
        for span in (self.train_tokens, self.val_tokens):
            require_length(span, config.sequence_length)
        self.micro_batch_size = world.micro_batch_size(
            config.training.batch_size, config.training.micro_batch_size
        )
        """Sequences per forward pass of a rank."""
        if resume_from:
            model = self._load(resume_from)
        else:
            model = self._take(start_from) if start_from else self._make()
        self.model = self.world.place(model)
        product_dtype = torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
        self.optimizers = make_optimizers(
            self.model, config.training, product_dtype, self.world.mesh
        )
        self.step = 0
        self.elapsed_s = 0.0
        self.n_skipped = 0
        """Steps that were left out, as ``on_nan`` says."""
        self.computed_on = computed_on(self.world, dtype)
        self.moved_from: str | None = None
        """Where the checkpoint was computed, if that makes the bits from here on differ."""
        if resume_from:
            self._restore(resume_from)
        forward: Any = torch.compile(self.model) if config.training.compile else self.model
        self._forward = self.world.averaging(forward)
        self._stop_is_requested = False
        self._saved_step = self.step if resume_from else None
        self._last_evaluation: tuple[int, Evaluation] | None = None
        self._readings = Readings(self.world)
        self._last_reading: Reading | None = None

    def _make(self) -> LanguageModel:
        model = model_class(self.config.model)(self.config.model)
        # Drawn on the CPU: every device starts from the same weights.
        model.init_weights(torch.Generator().manual_seed(self.config.training.seed))
        return model

    def _take(self, model: LanguageModel) -> LanguageModel:
        # Dropout has no weights, and may change from one part of a run to the next.
        assert replace(model.config, dropout=self.config.model.dropout) == self.config.model
        return model_class(self.config.model).from_tensors(self.config.model, model.state_dict())

    def _load(self, folder: Path) -> LanguageModel:
        model = read_model(folder, dtype=torch.float32).model
        if replace(model.config, dropout=self.config.model.dropout) != self.config.model:
            raise CheckpointError(
                f"{str(folder)!r} is not of the shape that the run's config says. "
                "Resume with the run's own settings."
            )
        return self._take(model)

    def _restore(self, folder: Path) -> None:
        state = read_state(folder, self.model, self.optimizers)
        if state.corpus != self.data.tokens.fingerprint:
            raise DataError(
                "the corpus is not the one that this run began with. Give the same text, or "
                "start a new run under another --name."
            )
        self.step, self.elapsed_s = state.step, state.elapsed_s
        self.n_skipped = state.n_skipped
        if state.computed_on not in ("", self.computed_on):
            self.moved_from = state.computed_on

    @property
    def progress(self) -> float:
        """Share of the budget used, 0 to 1."""
        return progress(self.config.training, self.step, self.elapsed_s)

    @property
    def context_length(self) -> int:
        """Tokens per sequence of the next step.

        Short sequences at first give more, and more independent, gradients for the same time
        (Li et al. 2021, arXiv:2108.06084).
        """
        config = self.config.training
        if config.context_warmup_length and self.progress < config.context_warmup_fraction:
            return config.context_warmup_length
        return self.config.sequence_length

    def request_stop(self) -> None:
        """Ask ``run`` to save at the next step's end and return; safe in a signal handler."""
        self._stop_is_requested = True

    @property
    def _lr(self) -> float:
        return self.config.training.lr * lr_scale(self.config.training, self.progress)

    @property
    def was_stopped(self) -> bool:
        """Whether ``run`` ended because of ``request_stop`` and not because it was done."""
        return self._stop_is_requested and self.progress < 1

    def _must_stop(self) -> bool:
        """Tell whether any rank was asked to stop, so that all stop at the same step."""
        is_agreed = bool(self.world.largest(int(self._stop_is_requested)))
        # A signal that comes while the ranks agree is for the next time: the others know nothing
        # of it yet, and it must not be forgotten.
        if is_agreed:
            self._stop_is_requested = True
        return is_agreed

    def run(self) -> Iterator[Event]:
        """Train until the budget is used or a stop is requested, then save.

        Raises: DivergedError if loss or gradient leave the finite numbers, or the loss all reason.
        """
        config = self.config.training
        self.model.train()
        stopwatch = Stopwatch(self)
        n_skipped_in_a_row = 0
        if self.config.from_ and self._saved_step is None:
            yield self._evaluate()  # what it is before, so that one sees what training gained
        while self.progress < 1 and not self._must_stop():
            if self.take_step():
                n_skipped_in_a_row = 0
            else:
                n_skipped_in_a_row += 1
                yield self._skipped(n_skipped_in_a_row)
            is_last = self.progress >= 1
            if not n_skipped_in_a_row and (is_last or _is_due(self.step, config.log_every)):
                yield stopwatch.event(self._read())
            if _is_due(self.step, config.eval_every) and not is_last:
                yield self._evaluate()
            if _is_due(self.step, config.save_every) and not is_last:
                yield from self._evaluate_and_save()
            if _is_due(self.step, config.sample_every) or (config.sample_every and is_last):
                yield from self._sample()
        if self._saved_step != self.step:
            yield from self._evaluate_and_save()

    def take_step(self) -> bool:
        """Take one optimizer step on the next batch; tell if its update was made, and not skipped.

        Raises: DivergedError as ``run``, where ``on_nan`` is skip.
        """
        config = self.config.training
        started = time.perf_counter()
        scale = lr_scale(config, self.progress)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scale
        if self.config.model.dropout:
            # The masks too are a pure function of seed, step and rank, so that resume is exact.
            torch.manual_seed(config.seed + 1_000_003 * (self.step + 1) + self.world.rank)
        loss = self._accumulate_gradients()
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
        self._readings.add(self.step + 1, config.lr * scale, loss, norm)
        is_taken = config.on_nan != "skip" or self._read().is_finite
        for optimizer in self.optimizers:
            if is_taken:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda" and _is_due(self.step + 1, config.log_every):
            torch.cuda.synchronize()
        self.step += 1
        # One clock for all: the ranks must agree on which step is the last.
        self.elapsed_s = self.world.from_first(self.elapsed_s + time.perf_counter() - started)
        return is_taken

    def _read(self) -> Reading:
        """Return the numbers of the last step, when those of all before it are known to be good."""
        self._check()
        assert self._last_reading is not None
        return self._last_reading

    def _check(self) -> None:
        config = self.config
        highest = HIGHEST_LOSS * math.log(max(config.model.vocab_size, 3))
        for reading in self._readings.read():
            self._last_reading = reading
            if not reading.is_finite and config.training.on_nan == "stop":
                remedy = "Try a lower --lr, or --on-nan skip to leave such steps out."
                raise self.diverged(str(reading), remedy)
            if reading.is_finite and reading.loss > highest:
                raise self.diverged(str(reading))

    def _skipped(self, n_in_a_row: int) -> SkipEvent:
        """Count a step that was left out; too many in a row are a diverged run."""
        reading = self._read()
        if n_in_a_row >= MOST_SKIPPED:
            raise self.diverged(f"{reading}, and {n_in_a_row} steps in a row were skipped")
        self.n_skipped += 1
        return SkipEvent(
            step=self.step,
            train_loss=reading.loss,
            lr=reading.lr,
            grad_norm=reading.grad_norm,
            n_skipped=self.n_skipped,
            elapsed_s=self.elapsed_s,
        )

    def _accumulate_gradients(self) -> Tensor:
        """Add up the gradients of this rank's part of a batch; return that part's mean loss."""
        config = self.config.training
        context_length = self.context_length
        # A short context takes as many more sequences: the tokens of a step stay the same.
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
        total = torch.zeros((), device=self.device)
        size = self.micro_batch_size * n_times
        micro_batches = list(zip(inputs.split(size), targets.split(size), strict=True))
        for number, (micro_inputs, micro_targets) in enumerate(micro_batches, start=1):
            with accumulating(self._forward, is_last=number == len(micro_batches)):
                loss = self._loss(micro_inputs, micro_targets) / len(micro_batches)
                loss.backward()
            total += loss.detach()
        return total

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        # A function of its own, so that the logits are gone before the backward pass begins.
        recompute = self.config.training.recompute
        with autocast(self.device, self.dtype):
            logits = self._forward(inputs.to(self.device), recompute=recompute)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.to(self.device).flatten())

    def _evaluate(self) -> EvalEvent:
        config = self.config.training
        self._check()  # what went wrong before is not to be met as a loss of this text
        started = time.perf_counter()
        length = self.config.sequence_length
        n_at_once = windows_at_once(self.config.model.vocab_size, length)
        batches = validation_windows(
            self.val_tokens, length, config.eval_tokens, batch_size=n_at_once
        )
        lengths = self.data.tokenizer.token_byte_lengths
        result = self.world.evaluate(
            lambda part: evaluate(self.model, part, lengths, dtype=self.dtype), batches
        )
        if not math.isfinite(result.nats):
            raise self.diverged(self._facts(f"validation loss {result.nats_per_token:.4g}"))
        self._last_evaluation = self.step, result
        return EvalEvent(
            step=self.step,
            val_loss=result.nats_per_token,
            bits_per_byte=result.bits_per_byte,
            n_tokens=result.n_tokens,
            elapsed_s=self.elapsed_s,
            eval_s=time.perf_counter() - started,
        )

    def _evaluate_and_save(self) -> Iterator[Event]:
        """Save this step; every checkpoint has its validation loss, and the least one is best."""
        if self._last_evaluation is None or self._last_evaluation[0] != self.step:
            yield self._evaluate()
        assert self._last_evaluation is not None
        model = self.world.whole_model(self.model)
        moments = self.world.gather(optimizer_tensors(self.model, self.optimizers))
        if model is not None:
            yield self._save(model, moments, self._last_evaluation[1])
        self.world.wait()
        self._saved_step = self.step

    def _save(
        self, model: LanguageModel, moments: dict[str, Tensor], result: Evaluation
    ) -> SaveEvent:
        facts = {"val_loss": result.nats_per_token, "bits_per_byte": result.bits_per_byte}
        state = Progress(
            step=self.step,
            elapsed_s=self.elapsed_s,
            n_skipped=self.n_skipped,
            corpus=self.data.tokens.fingerprint,
            computed_on=self.computed_on,
        )
        with self.folder.writing_step(self.step, **facts) as folder:
            write_model(folder, model, self.data.tokenizer)
            (folder / "README.md").write_text(self._model_card(result), encoding="utf-8")
            write_state(folder, moments, state)
        self.folder.point("latest", self.step, **facts)
        best = self.folder.best()
        assert best is not None
        self.folder.point("best", best.step, **best.facts)
        self.folder.prune(self.config.training.keep)
        return SaveEvent(
            step=self.step,
            folder=self.folder.step_folder(self.step),
            val_loss=facts["val_loss"],
            is_best=best.step == self.step,
        )

    def _sample(self) -> Iterator[Event]:
        model = self.world.whole_model(self.model)
        if model is not None:
            yield SampleEvent(self.step, model.to(self.device))

    def _model_card(self, result: Evaluation) -> str:
        return model_card(
            self.config,
            name=self.folder.path.name,
            step=self.step,
            val_loss=result.nats_per_token,
            bits_per_byte=result.bits_per_byte,
            n_train_tokens=len(self.train_tokens),
        )

    def diverged(self, facts: str, remedy: str = "Try a lower --lr.") -> DivergedError:
        """Return the error that ends a run whose numbers are no longer finite, or beyond reason."""
        saved = self.folder.steps()
        kept = f"The checkpoint of step {saved[-1]} is kept." if saved else "Nothing was saved yet."
        return DivergedError(f"training diverged {facts}. {kept} {remedy}")

    def sample_is_not_finite(self) -> DivergedError:
        """Return the error that ends a run whose model gives logits that are no numbers."""
        return self.diverged(self._facts("a sample's logits are no finite numbers"))

    def _facts(self, fact: str) -> str:
        """Return what was seen at this step, with the numbers of the last update."""
        last = self._last_reading
        norm = f"gradient norm {last.grad_norm:.4g}, " if last else ""
        return f"at step {self.step}: {fact}, {norm}lr {self._lr:.3g}"


def _is_due(step: int, every: int | None) -> bool:
    return step % every == 0 if every else False
