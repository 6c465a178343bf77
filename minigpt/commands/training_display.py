"""A training run as it is seen on stderr: live on a terminal, plain lines elsewhere."""

import shlex
import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from minigpt.checkpoint.folder import RunFolder
from minigpt.config import SamplingConfig
from minigpt.console import make_console
from minigpt.generation.decoder import Decoder
from minigpt.generation.stream import stream_text
from minigpt.model.cost import parameter_count
from minigpt.text.shards import PrepareProgress
from minigpt.text.visible import printable
from minigpt.training.trainer import EvalEvent, Event, SampleEvent, StepEvent, Trainer

_SAMPLE = SamplingConfig(max_new_tokens=200, temperature=0.8)
_PLAIN_EVERY_S = 5.0


def duration(seconds: float) -> str:
    """Return a time as people write it: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class TrainingDisplay:
    """Shows preparation and training; use it as a context."""

    def __init__(self) -> None:
        self.console = make_console(is_stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="cyan"),
            TextColumn("{task.fields[facts]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
            expand=True,
        )
        self._task: TaskID | None = None
        self._stage = ""
        self._trainer: Trainer | None = None
        self._val_loss: float | None = None
        self._last_line_at = 0.0

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def preparing(self, progress: PrepareProgress) -> None:
        """Show how far the preparation of the text is."""
        if progress.stage != self._stage:
            self._stage = progress.stage
            self._new_task(progress.stage, progress.total)
        assert self._task is not None
        facts = f"{progress.done / 1e6:.1f} of {progress.total / 1e6:.1f} MB"
        self.progress.update(self._task, completed=progress.done, facts=facts)

    def _new_task(self, description: str, total: float) -> None:
        if self._task is not None:
            self.progress.remove_task(self._task)
        self._task = self.progress.add_task(description, total=total, facts="")

    def start(self, trainer: Trainer) -> None:
        """Say what will be trained on what."""
        self._trainer = trainer
        config, manifest = trainer.config, trainer.data.manifest
        n_parameters = parameter_count(config.model)
        dtype = str(trainer.dtype).removeprefix("torch.")
        budget = [
            f"{config.training.max_steps} steps" if config.training.max_steps else "",
            duration(60 * config.training.max_minutes) if config.training.max_minutes else "",
        ]
        self._print(
            f"{manifest.n_tokens:,} tokens ({config.data.tokenizer}) of {manifest.n_bytes:,} bytes; "
            f"the last {config.data.val_fraction:.0%} validate"
        )
        self._print(
            f"{n_parameters / 1e6:.3g}M parameters, {config.model.n_layer} layers, "
            f"{config.model.n_head} heads, width {config.model.d_model}, "
            f"context {config.model.context_length}; {trainer.device.type}, {dtype}"
        )
        where = f", from step {trainer.step}" if trainer.step else ""
        limit = " or ".join(filter(None, budget))
        self._print(f"run {str(trainer.folder.path)!r}: {limit}{where}. Ctrl-C saves and stops.")
        self._new_task("train", 1.0)

    def show(self, event: Event) -> None:
        """Show one event."""
        match event:
            case StepEvent():
                self._show_step(event)
            case EvalEvent():
                self._val_loss = event.val_loss
                self._print(
                    f"step {event.step:>6}  val loss {event.val_loss:.4f} nats/token, "
                    f"{event.bits_per_byte:.4f} bits/byte  after {duration(event.elapsed_s)}"
                )
            case SampleEvent():
                self._show_sample()

    def _show_step(self, event: StepEvent) -> None:
        facts = [
            f"step {event.step}",
            f"loss {event.train_loss:.3f}",
            f"val {self._val_loss:.3f}" if self._val_loss is not None else "",
            f"lr {event.lr:.2g}",
            f"{event.tokens_per_s:,.0f} tok/s",
            f"MFU {event.mfu:.0%}" if event.mfu is not None else "",
            f"{duration(event.remaining_s)} left",
        ]
        if self.console.is_terminal:
            assert self._task is not None
            text = "  ".join(filter(None, facts))
            self.progress.update(self._task, completed=event.progress, facts=text)
        elif event.progress >= 1 or time.monotonic() - self._last_line_at >= _PLAIN_EVERY_S:
            self._last_line_at = time.monotonic()
            self._print("  ".join(filter(None, facts)))

    def _show_sample(self) -> None:
        assert self._trainer is not None
        self._print(f"--- sample at step {self._trainer.step}")
        self._print(draw_sample(self._trainer))
        self._print("---")

    def finish(self, run: RunFolder, resume_command: str | None) -> None:
        """Say where the result is and what to try next."""
        self.progress.stop()
        best = run.best()
        if best is not None:
            facts = best.facts
            self._print(
                f"best checkpoint {str(best.folder)!r}: val loss {facts['val_loss']:.4f} "
                f"nats/token, {facts['bits_per_byte']:.4f} bits/byte"
            )
        if resume_command:
            self._print(f"stopped and saved. Go on with:\n  {resume_command}")
            return
        name = shlex.quote(run.path.name)
        self._print(
            "try next:\n"
            f"  minigpt generate --model {name} 'Once upon a time'\n"
            f"  minigpt attention-trace --model {name} --max-new-tokens 40 'Once upon a time'"
        )

    def _print(self, text: str) -> None:
        self.progress.console.print(printable(text))


def draw_sample(trainer: Trainer) -> str:
    """Return some text from the model as it stands, the same draws every time."""
    tokenizer, model = trainer.data.tokenizer, trainer.model
    model.eval()
    assert tokenizer.end_of_text is not None
    decoder = Decoder(model, [tokenizer.end_of_text])
    steps = decoder.generate(_SAMPLE, seed=trainer.config.training.seed)
    text = "".join(item.text for item in stream_text(steps, tokenizer))
    model.train()
    return text
