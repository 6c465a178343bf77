"""A training run on stderr: live on a terminal, plain lines elsewhere."""

from dataclasses import replace
from typing import Any

from rich.text import Text

from minigpt.commands.display.progress import FREE_CELLS, LiveLines, ProgressLine
from minigpt.commands.train import explanations
from minigpt.commands.train.run import Display
from minigpt.config import SamplingConfig
from minigpt.errors import CheckpointError
from minigpt.format import short
from minigpt.generation.decoder import Decoder
from minigpt.generation.stream import stream_text
from minigpt.model.language_model import LanguageModel
from minigpt.rings import has_ring, ring
from minigpt.text.escape import printable
from minigpt.training.events import EvalEvent, Event, SampleEvent, StepEvent
from minigpt.training.trainer import Trainer

_SAMPLE = SamplingConfig(max_new_tokens=200, temperature=0.8)
_GLIMPSE = replace(_SAMPLE, max_new_tokens=80)
_WIDEST_GLIMPSE = 100
_BAR = "  | "  # before each line, so that model text cannot be mistaken for messages
_LOSSES = {"val_loss": "nats/token", "bits_per_byte": "bits/byte"}


class TrainingDisplay(ProgressLine, Display):
    """Context manager that shows preparation and training."""

    def __init__(self) -> None:
        super().__init__()
        self.panel: Any = None
        """Live chart. None outside a terminal or without the ring of plots."""
        if self.live and has_ring("commands.plot"):
            panels = ring("commands.train.panel")
            self.panel = panels.TrainingPanel(self.line)
            self.live = LiveLines(self.panel, self.console)
        self._trainer: Trainer | None = None
        self._evaluations: list[EvalEvent] = []
        self._train_loss: float | None = None

    def start(self, trainer: Trainer) -> None:
        """Print the text, the model and the run, before the first step."""
        self._trainer = trainer
        for name, fact in explanations.opening(trainer):
            self.print_fact(name, fact)
        if trainer.step and self.panel:
            self.panel.resume(trainer.folder.path)
        self.line.label, self.line.share = "train", trainer.progress
        self.line.details = [self._place(trainer.step), "Ctrl-C saves and stops"]

    @property
    def _run(self) -> Trainer:
        assert self._trainer is not None, "start has been called"
        return self._trainer

    def _place(self, step: int) -> str:
        max_steps = self._run.config.training.max_steps
        return f"{step:>{len(str(max_steps))}}/{max_steps}" if max_steps else f"step {step}"

    def note(self, text: str) -> None:
        self.print_fact("note", text)

    def stopping(self) -> None:
        """Show that a stop was requested; safe in a signal handler."""
        self.line.label = "saving"

    def show(self, event: Event) -> None:
        match event:
            case StepEvent():
                self._show_step(event)
            case EvalEvent():
                self._evaluations.append(event)
                if self.panel:
                    self.panel.show_evaluation(event)
                averaged = ", averaged" if event.is_averaged else ""
                self._print(
                    f"step {event.step:>6}  val loss {event.val_loss:.4f} nats/token, "
                    f"{event.bits_per_byte:.4f} bits/byte  after {_clock(event.elapsed_s)}"
                    f"{averaged}"
                )
                if self.live:
                    self._glimpse()
            case SampleEvent():
                self._print(f"step {event.step:>6}  sample")
                for line in draw_sample(event.model, self._run).splitlines():
                    self._print(f"{_BAR}{line}")
            case _:
                if what := event.describe():
                    self._print(f"step {event.step:>6}  {what}")

    def _glimpse(self) -> None:
        """Print one line of sampled text, unless ``sample_every`` shows longer samples."""
        run = self._run
        # One rank cannot sample from sharded parameters. With sample_every, SampleEvents do it.
        if run.world.is_sharded or run.config.training.sample_every is not None:
            return
        text = " ".join(draw_sample(run.model, run, _GLIMPSE).split())
        line = Text(f"{_BAR}{printable(text)}", "dim", no_wrap=True)
        line.truncate(min(self.console.width - FREE_CELLS, _WIDEST_GLIMPSE), overflow="ellipsis")
        self.console.print(line)

    def _show_step(self, event: StepEvent) -> None:
        self._train_loss = event.train_loss
        place, left = self._place(event.step), f"{_clock(event.remaining_s)} left"
        val = self._evaluations[-1].val_loss if self._evaluations else None
        details = [
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
        self.show_task(label, event.progress, [text for text in details if text], is_due=is_last)

    def finish(self) -> None:
        """Print the best checkpoint."""
        if self.live:
            self.live.stop()
        best = self._run.folder.best()
        assert best is not None, "a run ends with a checkpoint"
        # Without a validation text there are no losses.
        losses = [
            f"{best.facts[key]:.4f} {unit}" for key, unit in _LOSSES.items() if key in best.facts
        ]
        loss = f": val loss {', '.join(losses)}" if losses else ""
        self.print_fact("best", f"{best.folder}{loss}")
        if "val_loss" in best.facts:
            notes = explanations.meaning(self._run, best, self._evaluations, self._train_loss)
            for name, fact in notes:
                self.print_fact(name, fact)

    def propose(self, resume: str | None) -> None:
        """Print the command that resumes a stopped run, or else those to run next."""
        if resume is not None:
            self.print_fact("resume", resume)
            return
        for number, command in enumerate(explanations.next_commands(self._run)):
            self.print_fact("" if number else "next", command)

    def _print(self, text: str) -> None:
        self.console.print(printable(text))


def _clock(seconds: float) -> str:
    """Return a duration in compact form: 0:42, 3:05, 2:10:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def draw_sample(model: LanguageModel, trainer: Trainer, config: SamplingConfig = _SAMPLE) -> str:
    """Return text sampled from a run's current model, with the run's seed."""
    tokenizer = trainer.data.tokenizer
    model.eval()
    # If no token starts a text, start with the first one of the validation or training text.
    span = trainer.val_tokens or trainer.train_tokens
    prompt = tokenizer.encode_prompt("") or span.first_ids(1)
    decoder = Decoder(model, prompt, max_new_tokens=config.max_new_tokens)
    steps = decoder.generate(config, seed=trainer.config.training.seed)
    try:
        text = "".join(item.text for item in stream_text(steps, tokenizer))
    except CheckpointError:  # NaN or inf in the logits
        raise trainer.metrics.divergence_error_now("a sample's logits are NaN or inf") from None
    model.train()
    return text
