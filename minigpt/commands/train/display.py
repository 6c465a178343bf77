"""A training run on stderr: live on a terminal, plain lines elsewhere."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from rich.text import Text

from minigpt.commands.status_line import FREE_CELLS, LiveLines, ProgressLine
from minigpt.config import SamplingConfig
from minigpt.console import spans_to_text
from minigpt.errors import CheckpointError
from minigpt.format import clock, count, duration, short
from minigpt.generation.decoder import Decoder
from minigpt.generation.stream import stream_text
from minigpt.model.cost import parameter_count
from minigpt.model.language_model import LanguageModel
from minigpt.rings import has_ring, ring
from minigpt.text.escape import printable
from minigpt.training.events import (
    EarlyStopEvent,
    EvalEvent,
    Event,
    SampleEvent,
    SkipEvent,
    StepEvent,
)
from minigpt.training.schedule import LARGEST_RISE, lr_scale, with_max_steps
from minigpt.training.trainer import Trainer

_SAMPLE = SamplingConfig(max_new_tokens=200, temperature=0.8)
_GLIMPSE = replace(_SAMPLE, max_new_tokens=80)
_WIDEST_GLIMPSE = 100
_BY_HEART = 0.6
"""Ratio of training to validation loss below which a text counts as learned by heart."""
_LOSSES = {"val_loss": "nats/token", "bits_per_byte": "bits/byte"}


class TrainingDisplay(ProgressLine):
    """Shows preparation and training; use it as a context."""

    def __init__(self) -> None:
        super().__init__()
        self.panel: Any = None
        """Live chart. None outside a terminal or without the ring."""
        if self.is_live and has_ring("commands.train.panel"):
            self.panel = ring("commands.train.panel").TrainingPanel(self.line)
            self.live = LiveLines(self.panel, self.console)
        self._trainer: Trainer | None = None
        self._evaluation: EvalEvent | None = None
        self._train_loss: float | None = None

    def start(self, trainer: Trainer) -> None:
        """Print the text, the model and the run, before the first step."""
        self._trainer = trainer
        config, manifest = trainer.config, trainer.data.manifest
        model = config.model
        dtype = str(trainer.dtype).removeprefix("torch.")
        world = trainer.world
        n_ranks = f"{world.size} x " if world.size > 1 else ""
        shards = ", weights in shards," if world.is_sharded else ""
        device = f"{n_ranks}{world.device.type}{shards}"
        where = f", from step {trainer.step} on" if trainer.step else ""
        is_shorter = config.sequence_length < model.context_length
        sequences = f", trained on {config.sequence_length}" if is_shorter else ""
        training = config.training
        epochs = f" ({count(training.max_epochs, 'epoch')})" if _ends_by_epochs(trainer) else ""
        limits = [f"{training.max_steps} steps{epochs}"] if training.max_steps else []
        limits += [duration(60 * training.max_minutes)] if training.max_minutes else []
        if config.from_ is not None and not trainer.step:
            self._print_fact("from", config.from_)
        chosen = training.save_dtype
        inherited = trainer.carried.dtype if trainer.carried else "float32"
        saved = inherited if chosen == "auto" else chosen
        if saved != "float32" or inherited != "float32":
            why = "as in the base; --save-dtype changes it" if chosen == "auto" else "--save-dtype"
            self._print_fact("saved", f"weights in {saved} ({why})")
        self._print_fact(
            "text",
            f"{manifest.n_tokens:,} tokens ({manifest.tokenizer}) of {manifest.n_bytes:,} "
            f"bytes; {manifest.validation(config.data.val_fraction)}",
        )
        for line in manifest.notes():
            self.note(line)
        self._print_fact(
            "model",
            f"{short(parameter_count(model))} parameters ({model.kind}): "
            f"{count(model.n_layer, 'layer')}, {count(model.n_head, 'head')}, "
            f"width {model.d_model}, context {model.context_length}{sequences}",
        )
        self._print_fact(
            "run",
            f"{trainer.folder.path}: {' or '.join(limits)} on {device} in {dtype}{where}",
        )
        if trainer.moved_from is not None:
            self.note(
                f"saved on {trainer.moved_from}, and resumed on {trainer.computed_on}: the run "
                "continues, but rounds differently than it would have"
            )
        seam, scheduled = trainer.seam, lr_scale(training, trainer.progress)
        if seam and seam.step == trainer.step and scheduled > trainer.lr_scale:
            self.note(
                f"the learning rate continues from {training.lr * seam.lr_scale:.1e} and rises by "
                f"at most {LARGEST_RISE - 1:.0%} a step until it meets the new budget's schedule"
            )
        self._note_limits(trainer)
        if trainer.progress >= 1:
            self._print_fact("", "already complete: raise --max-steps or --max-minutes to continue")
        elif trainer.has_run_out:
            self._print_fact("", "stopped early: raise --patience to continue, or 0 for no limit")
        if trainer.step and self.panel:
            self.panel.resume(trainer.folder.path)
        self.line.label, self.line.share = "train", trainer.progress
        self.line.facts = [self._place(trainer.step), "Ctrl-C saves and stops"]

    def _note_limits(self, trainer: Trainer) -> None:
        """Print what was chosen against overfitting."""
        model, training = trainer.config.model, trainer.config.training
        if model.dropout and training.dropout_start:
            self.note(
                f"dropout {model.dropout:g} after {training.dropout_start:g} epochs, for a text of "
                "this size (--dropout)"
            )
        if training.dropout_start and _ends_by_epochs(trainer) and not trainer.step:
            self.note(
                f"the text is read at most {training.max_epochs:.3g} times (--max-epochs): more "
                "does not improve the model"
            )

    def _place(self, step: int) -> str:
        assert self._trainer is not None
        max_steps = self._trainer.config.training.max_steps
        return f"{step:>{len(str(max_steps))}}/{max_steps}" if max_steps else f"step {step}"

    def note(self, text: str) -> None:
        """Print a note."""
        self._print_fact("note", text)

    def stopping(self) -> None:
        """Show that a stop was requested; safe in a signal handler."""
        self.line.label = "saving"

    def show(self, event: Event) -> None:
        """Show one event."""
        match event:
            case StepEvent():
                self._show_step(event)
            case SkipEvent():
                self._print(
                    f"step {event.step:>6}  skipped: loss {event.train_loss:.4g}, gradient norm "
                    f"{event.grad_norm:.4g}, lr {event.lr:.1e}  {event.n_skipped} so far"
                )
            case EvalEvent():
                self._evaluation = event
                if self.panel:
                    self.panel.show_evaluation(event)
                averaged = ", averaged weights" if event.is_averaged else ""
                self._print(
                    f"step {event.step:>6}  val loss {event.val_loss:.4f} nats/token, "
                    f"{event.bits_per_byte:.4f} bits/byte  after {duration(event.elapsed_s)}"
                    f"{averaged}"
                )
                self._show_glimpse()
            case EarlyStopEvent():
                self._print(
                    f"step {event.step:>6}  stopped early: no lower validation loss since "
                    f"step {event.best_step}, {event.epochs_since:.1f} epochs ago (--patience 0 "
                    "trains on)"
                )
            case SampleEvent():
                assert self._trainer is not None
                self._print(f"step {event.step:>6}  sample")
                # A bar before each line, so that model text cannot pass for our own.
                for line in draw_sample(event.model, self._trainer).splitlines():
                    self._print(f"  | {line}")

    def _show_step(self, event: StepEvent) -> None:
        self._train_loss = event.train_loss
        place, left = self._place(event.step), f"{clock(event.remaining_s)} left"
        val = self._evaluation.val_loss if self._evaluation else None
        facts = [
            place,
            f"loss {event.train_loss:.3f}",
            f"val {val:.3f}" if val is not None else "",
            f"lr {event.lr:.1e}",
            f"{short(event.tokens_per_s):>5} tok/s",
            f"MFU {event.mfu:.0%}" if event.mfu is not None else "",
            left,
        ]
        if self.panel:
            self.panel.show_step(event, [place, left])
        is_last = event.progress >= 1
        label = "saving" if is_last else self.line.label
        self.show_task(label, event.progress, [fact for fact in facts if fact], is_due=is_last)

    def _show_glimpse(self) -> None:
        """Print one line of sampled text on a terminal."""
        trainer = self._trainer
        assert trainer is not None
        # One rank cannot sample from sharded parameters. With sample_every, SampleEvents do it.
        has_samples = trainer.config.training.sample_every is not None
        if not self.is_live or trainer.world.is_sharded or has_samples:
            return
        text = " ".join(draw_sample(trainer.model, trainer, _GLIMPSE).split())
        line = Text(f"  | {printable(text)}", "dim", no_wrap=True)
        line.truncate(min(self.console.width - FREE_CELLS, _WIDEST_GLIMPSE), overflow="ellipsis")
        self.console.print(line)

    def finish(self) -> None:
        """Print the best checkpoint."""
        self.live.stop()
        assert self._trainer is not None
        best = self._trainer.folder.best()
        assert best is not None, "a run ends with a checkpoint"
        # Without the facts if best.json was damaged and the latest step replaces it.
        losses = [
            f"{best.facts[key]:.4f} {unit}" for key, unit in _LOSSES.items() if key in best.facts
        ]
        loss = f": val loss {', '.join(losses)}" if losses else ""
        self._print_fact("best", f"{best.folder}{loss}")
        if "val_loss" in best.facts:
            is_averaged = best.facts.get("is_averaged", False)
            self._explain(best.facts["val_loss"], is_averaged=is_averaged)

    def _explain(self, val_loss: float, *, is_averaged: bool) -> None:
        """Print what a validation loss means, and whether the text was learned by heart."""
        assert self._trainer is not None
        trainer, n_tokens = self._trainer, self._trainer.config.model.vocab_size
        sure = "averaged weights; " if is_averaged else ""
        sure += f"as unsure as between {math.exp(min(val_loss, 700)):.3g} tokens"
        self._print_fact(
            "", f"{sure}; guessing among all {n_tokens:,} is {math.log(n_tokens):.2f} nats/token"
        )
        evaluation, n_val = self._evaluation, len(trainer.val_tokens) - 1
        if evaluation and evaluation.n_tokens < n_val:
            self._print_fact(
                "",
                f"measured on {evaluation.n_tokens:,} of {n_val:,} validation tokens; minigpt "
                "evaluate measures all",
            )
        train_loss, last = self._train_loss, evaluation.val_loss if evaluation else val_loss
        if train_loss is not None and train_loss < _BY_HEART * last:
            self.note(
                f"the text was learned by heart: at the end the training loss was {train_loss:.2f} "
                f"and the validation loss {last:.2f} nats/token. More text, more dropout or fewer "
                "epochs help"
            )

    def propose(self, name: str, commands: Sequence[str]) -> None:
        """Print commands to run next."""
        for command in commands:
            self._print_fact(name, command)
            name = ""

    def _print_fact(self, name: str, fact: str) -> None:
        self.console.print(spans_to_text([(f"{name:<7}", "dim"), (fact, "plain")]))

    def _print(self, text: str) -> None:
        self.console.print(printable(text))


def _ends_by_epochs(trainer: Trainer) -> bool:
    """Return whether ``max_epochs`` is what limits the steps."""
    training = trainer.config.training
    unlimited = replace(trainer.config, training=replace(training, max_steps=0, max_minutes=1.0))
    limit = with_max_steps(unlimited, len(trainer.train_tokens)).training.max_steps
    return bool(training.max_epochs) and limit == training.max_steps


def draw_sample(model: LanguageModel, trainer: Trainer, config: SamplingConfig = _SAMPLE) -> str:
    """Return text sampled from a run's current model, with the run's seed."""
    tokenizer = trainer.data.tokenizer
    model.eval()
    # Without a token that begins a text, begin as the validation text does.
    first = trainer.val_tokens.windows(np.zeros(1, np.int64), 1)[0].tolist()
    prompt = tokenizer.encode_prompt("") or first
    decoder = Decoder(model, prompt, max_new_tokens=config.max_new_tokens)
    steps = decoder.generate(config, seed=trainer.config.training.seed)
    try:
        text = "".join(item.text for item in stream_text(steps, tokenizer))
    except CheckpointError:  # NaN or inf in the logits
        raise trainer.diverged("a sample's logits are NaN or inf") from None
    model.train()
    return text
