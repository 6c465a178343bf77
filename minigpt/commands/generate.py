"""minigpt generate; the docstring of the command is its --help."""

import json
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt.commands import options

if TYPE_CHECKING:
    from minigpt.commands.loading import Ready
    from minigpt.config import SamplingConfig
    from minigpt.generation.decoder import Decoder

_SEPARATOR = "-" * 20
_ENDINGS = {
    "context": "; the context window is full",
    "end_of_text": "; the model ended the text",
    "interrupted": "; interrupted",
}


def generate(
    prompt: options.Prompt = None,
    model: options.Model = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    stop: options.Stop = None,
    num_samples: options.NumSamples = None,
    seed: options.Seed = None,
    as_json: options.Json = False,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream/--no-stream",
            help="Print text as it is decoded, or at the end [stream]",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = True,
    debug: options.Debug = False,
) -> None:
    """Continue a prompt with a trained model.

    Standard output gets the generated text and a line break, nothing else: the prompt is no part
    of it, and only shown before it on a terminal. Speed and seed go to standard error.

    The text ends with --max-new-tokens, a --stop text, the end of the document as the model sees
    it, or a full context window; --json says which (finish_reason).
    """
    sampling = options.sampling_config(locals())
    from minigpt.commands.loading import load
    from minigpt.console import make_console, write_result
    from minigpt.generation.decoder import Decoder, fresh_seed

    ready = load(model, prompt, device, dtype)
    decoder = Decoder(ready.model, ready.prompt, max_new_tokens=sampling.max_new_tokens)
    first_seed = fresh_seed() if sampling.seed is None else sampling.seed
    for number in range(sampling.num_samples):
        if number and not as_json:
            write_result(_SEPARATOR + "\n")
        if not as_json:
            _show_prompt(ready.text)
        streams = stream and not as_json
        sample = _draw(ready, decoder, sampling, first_seed + number, streams=streams)
        if as_json:
            write_result(json.dumps(_facts(sample, ready, sampling)) + "\n")
        else:
            write_result(("" if streams else sample.text) + "\n")
        make_console(is_stderr=True).print(_note(sample), style="dim")
        if sample.finish == "interrupted":
            raise typer.Exit(130)


@dataclass(frozen=True)
class _Sample:
    """One continuation."""

    text: str
    n_tokens: int
    finish: str
    """A FinishReason, or interrupted."""
    seed: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.n_tokens / self.seconds


def _draw(
    ready: "Ready", decoder: "Decoder", sampling: "SamplingConfig", seed: int, *, streams: bool
) -> _Sample:
    """Draw one continuation; Ctrl-C ends it early."""
    from minigpt.console import write_result
    from minigpt.generation.stream import stream_text

    started = time.perf_counter()
    pieces: list[str] = []
    n_tokens, finish = 0, None
    steps = decoder.generate(sampling, seed=seed, end_of_text=ready.tokenizer.end_of_text_ids)
    with suppress(KeyboardInterrupt):
        for item in stream_text(steps, ready.tokenizer, sampling.stop):
            n_tokens, finish = n_tokens + 1, item.step.finish
            pieces.append(item.text)
            if streams:
                write_result(item.text)
    seconds = time.perf_counter() - started
    return _Sample("".join(pieces), n_tokens, finish or "interrupted", seed, seconds)


def _show_prompt(text: str) -> None:
    """Let a terminal show the prompt where the text goes on; a pipe gets the text alone."""
    from minigpt.text.visible import printable

    if sys.stdout.isatty() and sys.stderr.isatty():
        sys.stderr.write(printable(text))
        sys.stderr.flush()


def _facts(sample: _Sample, ready: "Ready", sampling: "SamplingConfig") -> dict[str, object]:
    return {
        "text": sample.text,
        "finish_reason": sample.finish,
        "prompt": ready.text,
        "n_prompt_tokens": len(ready.prompt),
        "n_tokens": sample.n_tokens,
        "tokens_per_s": round(sample.tokens_per_s, 1),
        "seed": sample.seed,
        "sampling": asdict(sampling),
        "model": str(ready.folder),
    }


def _note(sample: _Sample) -> str:
    ending = _ENDINGS.get(sample.finish, "")
    return f"{sample.n_tokens} tokens, {sample.tokens_per_s:.4g} tok/s, seed {sample.seed}{ending}"
