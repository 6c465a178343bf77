"""Samples on stdout as they are generated, with their summaries on stderr or as JSON."""

import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import typer
from rich.cells import cell_len

from minigpt.commands.loading import PromptedModel, show_model
from minigpt.config import SamplingConfig
from minigpt.console import make_console, note, write_result
from minigpt.errors import MinigptError
from minigpt.format import count
from minigpt.generation import samples as batches
from minigpt.generation.decoder import Decoder, Step
from minigpt.generation.stream import TextStep
from minigpt.text.escape import printable, token_name
from minigpt.text.joined import JoinedTokens
from minigpt.text.tokenizer import Tokenizer

_SEPARATOR = "-" * 20
_ENDINGS = {
    "context": "; the context window is full",
    "end_of_text": "; the model ended the text",
    "interrupted": "; interrupted",
}
_TOKEN_CELLS = 12
# Between these characters a line may break without a space: East Asian scripts and emoji.
_WIDE = (
    "\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60"
    "\U0001f300-\U0001faff\U00020000-\U0003fffd"
)
# A line break, a wide character or a word, each with the blanks before it; or blanks at the end.
_PIECES = re.compile(rf"[^\S\n]*(?:\n|[{_WIDE}]|[^\s{_WIDE}]+)|[^\S\n]+")
_IS_WIDE = re.compile(rf"[{_WIDE}]$")
_LONGEST_HELD = 40
"""Maximum number of characters held back until their word ends; some scripts have no spaces."""


@dataclass
class Sample:
    """One sample and its steps so far."""

    seed: int
    began_at: float
    """Time at which its first token was begun, in seconds."""
    ended_at: float = 0.0
    """Time at which its newest token was complete."""
    steps: list[TextStep] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Generated text so far."""
        return "".join(item.text for item in self.steps)

    @property
    def last(self) -> Step | None:
        """Newest step. None if there is none yet."""
        return self.steps[-1].step if self.steps else None

    @property
    def finish(self) -> str | None:
        """Reason that generation ended. None if it has not."""
        return self.last.finish if self.last else None

    @property
    def tokens_per_s(self) -> float:
        """Speed of this sample alone."""
        return len(self.steps) / (self.ended_at - self.began_at) if self.steps else 0.0

    @property
    def forced(self) -> list[float]:
        """Log-probability of each forced token."""
        return [item.step.log_probability for item in self.steps if item.step.is_forced]

    def record(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the sample's fields of the JSON."""
        last = self.last
        record: dict[str, Any] = {
            "text": self.text,
            "finish_reason": self.finish or "interrupted",
            "n_tokens": len(self.steps),
            "tokens_per_s": round(self.tokens_per_s, 1),
            "n_slides": last.n_slides if last else 0,
            "n_forgotten": last.n_forgotten if last else 0,
            "seed": self.seed,
        }
        if forced := self.forced:
            record["n_forced"] = len(forced)
            record["forced_log_probability"] = round(sum(forced), 6)
        if last and last.best:
            record["steps"] = [_logprobs(item.step, tokenizer) for item in self.steps]
        return record

    def summary(self) -> str:
        """Return a line with its length, speed, seed and end."""
        line = f"{count(len(self.steps), 'token')}, {self.tokens_per_s:.4g} tok/s, seed {self.seed}"
        if forced := self.forced:
            line += f"; ln p of the {count(len(forced), 'forced token')} {sum(forced):.2f}"
        last = self.last
        if last and last.n_slides:
            times = "once" if last.n_slides == 1 else f"{last.n_slides} times"
            line += f"; the window slid {times} and dropped {last.n_forgotten} tokens"
        return line + _ENDINGS.get(self.finish or "interrupted", "")

    def probable(self, tokenizer: Tokenizer) -> Iterator[str]:
        """Yield a line per token with the most probable tokens at its step, if reported."""
        names = JoinedTokens(tokenizer.token_bytes(item.step.token) for item in self.steps).names
        for item, token in zip(self.steps, names, strict=True):
            step = item.step
            if not step.best:
                continue
            best = ", ".join(
                f"{token_name(tokenizer.token_bytes(token))} {math.exp(value):.2%}"
                for token, value in step.best
            )
            indent = " " * (_TOKEN_CELLS - cell_len(token))  # cells of the terminal, not characters
            yield f"{indent}{token} {math.exp(step.log_probability):>7.2%}  of  {best}"


def _logprobs(step: Step, tokenizer: Tokenizer) -> dict[str, Any]:
    def choice(token: int, log_probability: float) -> dict[str, Any]:
        text = tokenizer.token_bytes(token).decode("utf-8", "replace")
        return {"token": token, "text": text, "log_probability": round(log_probability, 6)}

    return choice(step.token, step.log_probability) | {
        "best": [choice(*pair) for pair in step.best]
    }


class WrappedText:
    """Writes text in pieces, and starts a new line before a word that would cross the edge.

    The last word is held back until the next piece shows that it is complete. A terminal alone
    would break lines inside words.
    """

    def __init__(self) -> None:
        self._held = ""
        self._column = 0
        self._can_break = False  # before a word that follows no space

    def write(self, text: str, sink: Callable[[str], object]) -> None:
        """Write text, but hold back a last word that may continue. Args: sink, a terminal."""
        pieces = _PIECES.findall(self._held + printable(text))
        last = pieces[-1] if pieces else ""
        is_open = not (last.endswith("\n") or _IS_WIDE.search(last) or len(last) > _LONGEST_HELD)
        self._held = pieces.pop() if pieces and is_open else ""
        for piece in pieces:
            self._put(piece, sink)

    def flush(self, sink: Callable[[str], object]) -> None:
        """Write the text held back."""
        held, self._held = self._held, ""
        if held:
            self._put(held, sink)

    def _put(self, piece: str, sink: Callable[[str], object]) -> None:
        width = max(shutil.get_terminal_size().columns, 1)
        word = piece.lstrip()
        n_cells = cell_len(piece.expandtabs())
        is_wide = bool(_IS_WIDE.search(piece))
        can_break = word != piece or is_wide or self._can_break
        if piece.endswith("\n"):
            n_cells = self._column = 0
        elif self._column and self._column + n_cells > width >= cell_len(word) and can_break:
            piece, n_cells, self._column = f"\n{word}", cell_len(word), 0
        sink(piece)
        # If a word is wider than the terminal, its last row counts.
        self._column += n_cells
        self._column = (self._column - 1) % width + 1 if self._column else 0
        self._can_break = is_wide


class SampleDisplay:
    """Shows samples in order: the current one as it is generated, each later one in its turn."""

    def __init__(
        self, prompted: PromptedModel, sampling: SamplingConfig, *, as_json: bool, streams: bool
    ) -> None:
        self._prompted, self._sampling = prompted, sampling
        self._as_json, self._streams = as_json, streams and not as_json
        self._is_first = True
        self._screen = WrappedText()

    def show_samples(self, decoder: Decoder, seed: int) -> None:
        """Generate and show the samples; Ctrl-C ends the command with its exit code."""
        prompted, config = self._prompted, self._sampling
        items = batches.stream_samples(
            decoder, prompted.tokenizer, config, seed=seed, forced=prompted.forced
        )
        is_complete = self.show(
            items,
            seed=seed,
            prompt=prompted.text,
            n_prompt_tokens=len(prompted.prompt),
            is_prompt_shown=prompted.chat is None,
            n_samples=config.num_samples,
        )
        if not is_complete:
            raise typer.Exit(130)

    def show(
        self,
        items: Iterable[TextStep],
        *,
        seed: int,
        prompt: str,
        n_prompt_tokens: int,
        is_prompt_shown: bool = True,
        n_samples: int = 1,
    ) -> bool:
        """Show the steps of samples with seeds from ``seed`` on; return False on Ctrl-C."""
        if self._is_first:
            show_model(self._prompted.folder)
            self._is_first = False
        began_at = ready_at = time.perf_counter()
        about = {"prompt": prompt, "n_prompt_tokens": n_prompt_tokens}
        samples = {0: Sample(seed, began_at)}
        shown_prompt = prompt if is_prompt_shown else ""
        current = n_tokens = 0
        self._begin(shown_prompt)
        try:
            for item in items:
                n_tokens += 1
                sample = samples.setdefault(item.sample, Sample(seed + item.sample, ready_at))
                sample.steps.append(item)
                sample.ended_at = time.perf_counter()
                if item.step.index:  # the first tokens of one batch began at the same time
                    ready_at = time.perf_counter()
                if item.sample == current and self._streams:
                    self._write(item.text)
                while current in samples and samples[current].finish:
                    self._end(samples.pop(current), about)
                    current += 1
                    if current < n_samples:
                        self._begin(shown_prompt, is_next=True)
                        if current in samples and self._streams:
                            self._write(samples[current].text)
        except KeyboardInterrupt:
            self._end(samples.get(current) or Sample(seed + current, began_at), about)
            return False
        except MinigptError:
            if sys.stdout.isatty() and not self._as_json:
                write_result("\n")  # ends the line of the text that the error cut short
            raise
        if n_samples > 1:
            speed = n_tokens / (time.perf_counter() - began_at)
            note(f"{n_samples} samples, {count(n_tokens, 'token')}, {speed:.4g} tok/s together")
        return True

    def _begin(self, prompt: str, *, is_next: bool = False) -> None:
        if self._as_json:
            return
        if is_next:
            write_result(_SEPARATOR + "\n")
        # A terminal shows the prompt before the text; a pipe receives only the text.
        self._screen = WrappedText()
        if sys.stdout.isatty() and sys.stderr.isatty():
            self._screen.write(prompt, sys.stderr.write)
            self._screen.flush(sys.stderr.write)
            sys.stderr.flush()

    def _write(self, text: str, *, is_end: bool = False) -> None:
        """Write generated text: unchanged to a pipe, wrapped between words on a terminal."""
        if not sys.stdout.isatty():
            write_result(text)
            return
        self._screen.write(text, write_result)
        if is_end:
            self._screen.flush(write_result)

    def _end(self, sample: Sample, about: dict[str, Any]) -> None:
        tokenizer = self._prompted.tokenizer
        if self._as_json:
            record = sample.record(tokenizer) | about
            record |= {"sampling": asdict(self._sampling), "model": str(self._prompted.folder)}
            write_result(json.dumps(record) + "\n")
        else:
            self._write("" if self._streams else sample.text, is_end=True)
            write_result("\n")
            for line in sample.probable(tokenizer):
                make_console(is_stderr=True).print(line)
        note(sample.summary())
