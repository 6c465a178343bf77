"""A training run as it is seen on stderr: live on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

import numpy as np
from rich.text import Text

from minigpt.commands.status_line import FREE_CELLS, LiveLines, StatusLine
from minigpt.commands.train.panel import TRAIN_LOSS, VAL_LOSS, TrainingPanel
from minigpt.config import SamplingConfig
from minigpt.console import make_console, spans_to_text
from minigpt.errors import CheckpointError
from minigpt.format import clock, count, duration, short
from minigpt.generation.decoder import Decoder
from minigpt.generation.stream import stream_text
from minigpt.model.cost import parameter_count
from minigpt.model.language_model import LanguageModel
from minigpt.text.building import PrepareProgress
from minigpt.text.escape import printable
from minigpt.training.events import EvalEvent, Event, SampleEvent, SkipEvent, StepEvent
from minigpt.training.reports.curves import read_curves
from minigpt.training.trainer import Trainer

_SAMPLE = SamplingConfig(max_new_tokens=200, temperature=0.8)
_GLIMPSE = replace(_SAMPLE, max_new_tokens=80)
_WIDEST_GLIMPSE = 100
_PLAIN_EVERY_S = 5.0
_LOSSES = {"val_loss": "nats/token", "bits_per_byte": "bits/byte"}
_STAGES = {"download": "downloading", "train tokenizer": "learning tokens", "encode": "encoding"}


class TrainingDisplay:
    """Shows preparation and training; use it as a context."""

    def __init__(self) -> None:
        self.console = make_console(is_stderr=True)
        self.is_live = sys.stderr.isatty() and not self.console.is_dumb_terminal
        self.line = StatusLine()
        self.panel = TrainingPanel(self.line)
        self.live = LiveLines(self.panel, self.console)
        self._trainer: Trainer | None = None
        self._evaluation: EvalEvent | None = None
        self._last_line_at = time.monotonic()

    def __enter__(self) -> Self:
        if self.is_live:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.live.stop()

    def preparing(self, progress: PrepareProgress) -> None:
        """Show how far the preparation of the text is."""
        self.line.label = _STAGES.get(progress.stage, progress.stage)
        self.line.share = progress.done / progress.total if progress.total else 0.0
        facts = [f"{progress.done / 1e6:.1f} of {progress.total / 1e6:.1f} MB"]
        self._update(facts, is_due=False)

    def start(self, trainer: Trainer) -> None:
        """Say what will be trained on what."""
        self._trainer = trainer
        config, manifest = trainer.config, trainer.data.manifest
        model = config.model
        dtype = str(trainer.dtype).removeprefix("torch.")
        where = f", from step {trainer.step} on" if trainer.step else ""
        is_shorter = config.sequence_length < model.context_length
        sequences = f", trained on {config.sequence_length}" if is_shorter else ""
        if config.from_ is not None and not trainer.step:
            self._print_fact("from", config.from_)
        self._print_fact(
            "text",
            f"{manifest.n_tokens:,} tokens ({manifest.tokenizer}) of {manifest.n_bytes:,} "
            f"bytes; the last {config.data.val_fraction:.0%} validate",
        )
        self._print_fact(
            "model",
            f"{short(parameter_count(model))} parameters ({model.kind}): "
            f"{count(model.n_layer, 'layer')}, {count(model.n_head, 'head')}, "
            f"width {model.d_model}, context {model.context_length}{sequences}",
        )
        self._print_fact(
            "run",
            f"{trainer.folder.path}: {self._budget()} on {_devices(trainer)} in {dtype}{where}",
        )
        if trainer.moved_from is not None:
            self.note(
                f"saved on {trainer.moved_from}, and resumed on {trainer.computed_on}: it goes on "
                "where it was, but no longer with the bits that it would have had"
            )
        if trainer.progress >= 1:
            self._print_fact("", "nothing is left to do: give it more --max-steps or --max-minutes")
        if trainer.step and self.is_live:
            self.panel.go_on_with(read_curves(trainer.folder.path))
        self.line.label, self.line.share = "train", trainer.progress
        self.line.facts = [self._place(trainer.step), "Ctrl-C saves and stops"]

    def _budget(self) -> str:
        assert self._trainer is not None
        config = self._trainer.config.training
        epochs = f" ({count(config.max_epochs, 'epoch')})" if config.max_epochs else ""
        limits = [
            f"{config.max_steps} steps{epochs}" if config.max_steps else "",
            duration(60 * config.max_minutes) if config.max_minutes else "",
        ]
        return " or ".join(filter(None, limits))

    def _place(self, step: int) -> str:
        assert self._trainer is not None
        max_steps = self._trainer.config.training.max_steps
        return f"{step:>{len(str(max_steps))}}/{max_steps}" if max_steps else f"step {step}"

    def note(self, text: str) -> None:
        """Say something beside the course of the run."""
        self._print_fact("note", text)

    def stopping(self) -> None:
        """Show that the end was asked for; safe in a signal handler."""
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
                self.panel.val.add(event.step, event.val_loss)
                self._print(
                    f"step {event.step:>6}  val loss {event.val_loss:.4f} nats/token, "
                    f"{event.bits_per_byte:.4f} bits/byte  after {duration(event.elapsed_s)}"
                )
                self._show_glimpse()
            case SampleEvent():
                self._show_sample(event)

    def _show_step(self, event: StepEvent) -> None:
        self.line.share = event.progress
        if event.progress >= 1:
            self.line.label = "saving"
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
        self.panel.train.add(event.step, event.train_loss)
        self.panel.update(_numbers(event, self._evaluation), [place, left])
        self._update([fact for fact in facts if fact], is_due=event.progress >= 1)

    def _update(self, facts: Sequence[str], *, is_due: bool) -> None:
        """Show where the work is: in the live line, or now and then in a line of its own."""
        self.line.facts = facts
        is_due = is_due or time.monotonic() - self._last_line_at >= _PLAIN_EVERY_S
        if is_due and not self.is_live:
            self._last_line_at = time.monotonic()
            self._print("  ".join([self.line.label, *facts]))

    def _show_sample(self, event: SampleEvent) -> None:
        assert self._trainer is not None
        self._print(f"step {event.step:>6}  sample")
        # A bar before each line: the model's text can never pass for ours.
        for line in draw_sample(event.model, self._trainer).splitlines():
            self._print(f"  | {line}")

    def _show_glimpse(self) -> None:
        """Show a line of what the model writes by now, where somebody may be watching."""
        trainer = self._trainer
        assert trainer is not None
        # Shards are of no use to one rank alone; and who said when there are samples gets those.
        is_told = trainer.config.training.sample_every is not None
        if not self.is_live or trainer.world.is_sharded or is_told:
            return
        text = " ".join(draw_sample(trainer.model, trainer, _GLIMPSE).split())
        line = Text(f"  | {printable(text)}", "dim", no_wrap=True)
        line.truncate(min(self.console.width - FREE_CELLS, _WIDEST_GLIMPSE), overflow="ellipsis")
        self.console.print(line)

    def finish(self) -> None:
        """Say what came of it and where it is."""
        self.live.stop()
        assert self._trainer is not None
        best = self._trainer.folder.best()
        assert best is not None, "a run ends with a checkpoint"
        # The facts are missing where best.json was damaged, and the latest step stands in for it.
        losses = [
            f"{best.facts[key]:.4f} {unit}" for key, unit in _LOSSES.items() if key in best.facts
        ]
        loss = f": val loss {', '.join(losses)}" if losses else ""
        self._print_fact("best", f"{best.folder}{loss}")

    def propose(self, name: str, commands: Sequence[str]) -> None:
        """Name commands that are worth pasting."""
        for command in commands:
            self._print_fact(name, command)
            name = ""

    def _print_fact(self, name: str, fact: str) -> None:
        self.console.print(spans_to_text([(f"{name:<7}", "dim"), (fact, "plain")]))

    def _print(self, text: str) -> None:
        self.console.print(printable(text))


def _devices(trainer: Trainer) -> str:
    world = trainer.world
    if world.size == 1:
        return world.device.type
    shards = ", weights in shards," if world.is_sharded else ""
    return f"{world.size} x {world.device.type}{shards}"


def _numbers(event: StepEvent, evaluation: EvalEvent | None) -> dict[str, str]:
    """Return what the table of the live display says, under its heads."""
    numbers = {
        TRAIN_LOSS: f"{event.train_loss:.3f}",
        VAL_LOSS: f"{evaluation.val_loss:.3f}" if evaluation else "-",
        "bits/byte": f"{evaluation.bits_per_byte:.3f}" if evaluation else "-",
        "lr": f"{event.lr:.1e}",
        "grad norm": f"{event.grad_norm:.2f}",
        "tokens/s": short(event.tokens_per_s),
    }
    return numbers | ({} if event.mfu is None else {"MFU": f"{event.mfu:.0%}"})


def draw_sample(model: LanguageModel, trainer: Trainer, config: SamplingConfig = _SAMPLE) -> str:
    """Return some text from a run's model as it stands, the same draws every time."""
    tokenizer = trainer.data.tokenizer
    model.eval()
    # A vocabulary may have nothing that begins a text: then as the validation text begins.
    first = trainer.val_tokens.windows(np.zeros(1, np.int64), 1)[0].tolist()
    prompt = tokenizer.encode_prompt("") or first
    decoder = Decoder(model, prompt, max_new_tokens=config.max_new_tokens)
    steps = decoder.generate(config, seed=trainer.config.training.seed)
    try:
        text = "".join(item.text for item in stream_text(steps, tokenizer))
    except CheckpointError:  # logits that are no numbers; the weights are the run's own
        raise trainer.sample_is_not_finite() from None
    model.train()
    return text
