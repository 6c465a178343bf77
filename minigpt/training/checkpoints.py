"""Compute the validation loss of a run and save its checkpoints."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from minigpt.checkpoint.folder import WEIGHTS_ONLY
from minigpt.checkpoint.model_folder import write_model
from minigpt.errors import DataError
from minigpt.evaluation import Evaluation, evaluate, windows_at_once
from minigpt.model.language_model import LanguageModel
from minigpt.rings import find_ring, ring
from minigpt.text.batches import validation_windows
from minigpt.training.events import EvalEvent, Event, SaveEvent
from minigpt.training.run import Run
from minigpt.training.step_metrics import Metrics


class Checkpoints:
    """Evaluates the weights of a run, and saves them."""

    def __init__(self, run: Run, metrics: Metrics) -> None:
        self._run, self._metrics = run, metrics
        self._resume = find_ring("training.state")
        self._evaluation: EvalEvent | None = None

    def evaluate(self) -> EvalEvent:
        """Compute the validation loss of the weights."""
        run = self._run
        self._metrics.check()  # report an earlier divergence with its own step
        started = time.perf_counter()
        result = self.validation()
        if not result.n_tokens:
            raise DataError(
                "no token of the validation text counts in the loss: the evaluated part has no "
                "assistant answer. Give more text, or a larger eval_tokens."
            )
        if not math.isfinite(result.nats):
            raise self._metrics.divergence_error_now(f"validation loss {result.nats_per_token:.4g}")
        self._evaluation = EvalEvent(
            step=run.step,
            val_loss=result.nats_per_token,
            bits_per_byte=result.bits_per_byte,
            n_tokens=result.n_tokens,
            elapsed_s=run.elapsed_s,
            eval_s=time.perf_counter() - started,
        )
        return self._evaluation

    def validation(self) -> Evaluation:
        """Evaluate the model's current weights on the validation windows, the same every time."""
        run, length = self._run, self._run.config.sequence_length
        batches = validation_windows(
            run.val_tokens,
            length,
            run.config.training.eval_tokens or len(run.val_tokens),
            batch_size=windows_at_once(run.config.model.vocab_size, length, run.device.type),
        )
        lengths = run.data.tokenizer.token_byte_lengths
        return run.world.evaluate(
            run.model, lambda part: evaluate(run.model, part, lengths, dtype=run.dtype), batches
        )

    def evaluate_and_save(self) -> Iterator[Event]:
        """Save a checkpoint with its validation loss."""
        run, evaluation = self._run, self._evaluation
        if not len(run.val_tokens):
            evaluation = None
        elif evaluation is None or evaluation.step != run.step:
            yield (evaluation := self.evaluate())
        yield from self.save(evaluation)
        run.world.max(0)  # wait for rank 0
        run.saved_step = run.step

    def save(self, evaluation: EvalEvent | None) -> Iterator[SaveEvent]:
        """Save a checkpoint; rank 0 yields its event. Args: evaluation, that of this step."""
        run, resume = self._run, self._resume
        state = run.world.gather(resume.training_tensors(run) if resume else ())
        if model := run.world.full_model(run.model):
            yield self._write(model, evaluation, state)

    def rescue(self) -> None:
        """Save weights that a failing run would lose; only ``KeptCheckpoints`` has such weights."""

    def _write(
        self,
        model: LanguageModel,
        evaluation: EvalEvent | None,
        state: dict[str, Tensor] | None = None,
    ) -> SaveEvent:
        """Write the checkpoint of this step, or weights kept from an earlier evaluation.

        Args: state, the optimizers' tensors; None for weights that a run cannot resume from.
        """
        run = self._run
        step, losses = run.step, {}
        if evaluation:
            step = evaluation.step
            losses = {"val_loss": evaluation.val_loss, "bits_per_byte": evaluation.bits_per_byte}
        facts: dict[str, Any] = dict(losses)
        if state is None:
            facts[WEIGHTS_ONLY] = True
        if evaluation and evaluation.is_averaged:
            facts["is_averaged"] = True
        with run.folder.writing_step(step, **facts) as folder:
            is_rounded = self._write_model(folder, model)
            if cards := find_ring("checkpoint.tools.model_card"):
                cards.write_card(folder, run, step, losses)
            if self._resume and state is not None:
                exact = model if is_rounded else None
                self._resume.write_state(folder, state, self._resume.training_state(run), exact)
        if state is not None:
            run.folder.point("latest", step, **facts)
        if not evaluation:  # without a validation text, the latest checkpoint counts as the best
            run.folder.point("best", step)
        best = run.folder.best()
        assert best is not None
        run.folder.point("best", best.step, **best.facts)
        if state is not None and (pruning := find_ring("checkpoint.tools.pruning")):
            pruning.prune(run.folder, run.config.training.keep)
        return SaveEvent(
            step=step,
            folder=run.folder.step_folder(step),
            val_loss=evaluation.val_loss if evaluation else None,
            is_best=best.step == step,
        )

    def _write_model(self, folder: Path, model: LanguageModel) -> bool:
        """Write the files of a Hugging Face model; return whether its weights were rounded."""
        run, dtype, is_rounded = self._run, self._run.config.training.save_dtype, False
        if run.carried or dtype != "auto":
            write_as = ring("checkpoint.rewriting").write_as
            is_rounded = write_as(folder, model, run.data.tokenizer, run.carried, dtype)
        else:
            write_model(folder, model, run.data.tokenizer)
        if template := run.data.manifest.chat_template:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return is_rounded
