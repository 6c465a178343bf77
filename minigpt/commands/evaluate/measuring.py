"""One evaluation pass of a model over a text, and its result as lines or JSON."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.text import Text
from torch import Tensor

from minigpt.checkpoint.resolve import resolve_model
from minigpt.commands.evaluate import EvaluationConfig
from minigpt.commands.loading import use_threads
from minigpt.commands.options import ModelSource
from minigpt.commands.output import aligned, one_line
from minigpt.commands.status_line import ProgressLine
from minigpt.config import DataConfig, ModelConfig
from minigpt.errors import CheckpointError, ConfigError, DataError
from minigpt.evaluation import LONGEST_WINDOW, Evaluation, evaluate, windows_at_once
from minigpt.format import duration, short
from minigpt.generation.api import load, tokenizer_of
from minigpt.model.device import resolve_device, resolve_dtype
from minigpt.settings import build
from minigpt.text.batches import validation_windows
from minigpt.text.corpus import BUILTIN
from minigpt.text.shards import PreparedData, TokenSpan, prepare


@dataclass(frozen=True)
class Windows:
    """How a text is cut into windows."""

    context_length: int
    """Tokens per window."""
    stride: int
    """Tokens from the start of a window to that of the next."""
    batch_size: int
    """Windows per forward pass."""
    n_tokens: int
    """Most tokens to predict."""


@dataclass(frozen=True)
class Measurement:
    """How well a model predicted a text."""

    config: EvaluationConfig
    source: ModelSource
    folder: Path
    """Model folder."""
    windows: Windows
    result: Evaluation
    seconds: float
    """Duration of the pass, without loading model and text."""
    device: torch.device
    dtype: torch.dtype

    @property
    def data(self) -> list[str]:
        """Names of the texts, as given."""
        return list(self.config.data) or [BUILTIN]

    @property
    def tokens_per_s(self) -> float:
        """Predicted tokens per second of the pass."""
        return self.result.n_tokens / self.seconds

    @property
    def dtype_name(self) -> str:
        """Compute dtype: float32 or bfloat16."""
        return str(self.dtype).removeprefix("torch.")


def measure(config: EvaluationConfig, source: ModelSource) -> Measurement:
    """Load the model and the text, and evaluate in one pass.

    Raises: ConfigError for a window longer than the context; CheckpointError for a model that is
        missing, damaged or without a tokenizer; DataError for a text that cannot be used.
    """
    use_threads(source.threads)
    share = {} if config.val_fraction is None else {"val_fraction": config.val_fraction}
    text = build(DataConfig, {"paths": list(config.data), **share})
    device = resolve_device(source.device)
    dtype = resolve_dtype(config.dtype, device)
    folder = resolve_model(source.model)
    # As while training: weights in float32, and autocast to the dtype.
    loaded = load(folder, device=device.type, dtype="float32", quantize=source.quantize)
    model, tokenizer = loaded.model, tokenizer_of(loaded)
    _require_at_most("context_length", config.context_length, model.config.context_length)
    with ProgressLine("reading") as progress:
        data = prepare(text, on_progress=progress.preparing, tokenizer=tokenizer)
        span = _span(data, config.val_fraction)
        windows = _windows(config, model.config, len(span))
        started = time.perf_counter()
        batches = _shown(_batches(span, windows), windows.n_tokens, progress)
        result = evaluate(model, batches, tokenizer.token_byte_lengths, dtype=dtype)
        seconds = time.perf_counter() - started
    if not math.isfinite(result.nats):
        raise CheckpointError(
            f"the loss of {str(folder)!r} is {result.nats_per_token}: its weights are damaged. Use "
            "another checkpoint, or download it again."
        )
    if config.val_fraction is None and result.n_tokens == len(span) - 1:
        result = replace(result, n_bytes=_text_bytes(data, span))
    return Measurement(config, source, folder, windows, result, seconds, device, dtype)


def _require_at_most(name: str, value: int | None, most: int) -> None:
    if value is not None and value > most:
        raise ConfigError(f"{name} must be between 1 and {most}: it is {value}.")


def _span(data: PreparedData, val_fraction: float | None) -> TokenSpan:
    """Return the tokens of the text, or of its last fraction as training splits it.

    Raises: DataError if it is too short to predict a token.
    """
    if val_fraction is not None:
        span = data.tokens.split(val_fraction)[1]
    else:
        # Of several tokens before a document, only the last has a predictable successor.
        first = max(len(data.tokenizer.separator) - 1, 0)
        span = TokenSpan(data.tokens, first, len(data.tokens), "whole")
    if len(span) < 2:
        raise DataError(
            f"too little text: the first of its tokens ({len(span)} here) is not predicted. Give "
            "more text."
        )
    return span


def _windows(config: EvaluationConfig, model: ModelConfig, n_tokens: int) -> Windows:
    longest = config.context_length or min(model.context_length, LONGEST_WINDOW)
    _require_at_most("stride", config.stride, longest)
    length = min(longest, n_tokens - 1)  # a short text is one short window
    return Windows(
        context_length=length,
        stride=min(config.stride or length, length),
        batch_size=config.batch_size or windows_at_once(model.vocab_size, length),
        n_tokens=min(config.eval_tokens or n_tokens, n_tokens - 1),
    )


def _batches(span: TokenSpan, windows: Windows) -> Iterator[tuple[Tensor, Tensor]]:
    return validation_windows(
        span,
        windows.context_length,
        windows.n_tokens,
        windows.batch_size,
        stride=windows.stride,
    )


def _shown(
    batches: Iterable[tuple[Tensor, Tensor]], n_tokens: int, progress: ProgressLine
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches, and show how many of n_tokens are done."""
    n_done = 0
    started = time.perf_counter()
    for inputs, targets in batches:
        speed = n_done / (time.perf_counter() - started)
        facts = [f"{short(n_done)} of {short(n_tokens)} tokens", f"{short(speed)} tok/s"]
        progress.show_task("evaluating", n_done / n_tokens, facts)
        yield inputs, targets
        n_done += targets.numel()


def _text_bytes(data: PreparedData, span: TokenSpan) -> int:
    """Return the bytes of a whole text, without those of a first token that is not predicted.

    The bytes of its tokens may sum to another number: some tokenizers add a space before a text, or
    normalize its characters.
    """
    if data.tokenizer.separator:
        return data.manifest.n_bytes
    first = span.windows(np.zeros(1, np.int64), 1)[0, 0]
    return data.manifest.n_bytes - int(data.tokenizer.token_byte_lengths[first])


def record(measurement: Measurement) -> dict[str, Any]:
    """Return a measurement for JSON; NaN and inf are None."""
    result, windows = measurement.result, measurement.windows
    numbers = {
        "nats_per_token": result.nats_per_token,
        "bits_per_byte": result.bits_per_byte,
        "perplexity": result.perplexity,
        "tokens_per_s": measurement.tokens_per_s,
        "seconds": measurement.seconds,
    }
    return {
        "model": measurement.folder,
        "data": measurement.data,
        "val_fraction": measurement.config.val_fraction,
        **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        "n_tokens": result.n_tokens,
        "n_bytes": result.n_bytes,
        "context_length": windows.context_length,
        "stride": windows.stride,
        "batch_size": windows.batch_size,
        "device": measurement.device.type,
        "dtype": measurement.dtype_name,
        "quantize": measurement.source.quantize,
    }


def lines(measurement: Measurement) -> Iterator[Text]:
    """Yield a measurement as lines of text."""
    result, windows = measurement.result, measurement.windows
    share, seconds = measurement.config.val_fraction, measurement.seconds
    time_ = f"{seconds:.1f} s" if seconds < 60 else duration(seconds)
    facts = {
        "model": one_line(str(measurement.folder)),
        "text": one_line(", ".join(measurement.data))
        + (f", the last {100 * share:.3g}%" if share else ""),
        "loss": f"{result.nats_per_token:.4f} nats/token, {result.bits_per_byte:.4f} bits/byte",
        "perplexity": f"{result.perplexity:,.4g}",
        "predicted": f"{result.n_tokens:,} tokens, {result.n_bytes:,} bytes",
        "windows": f"{windows.context_length} tokens, stride {windows.stride}",
        "speed": f"{short(measurement.tokens_per_s)} tok/s, {time_} on "
        f"{measurement.device.type} in {measurement.dtype_name}"
        + (f", {measurement.source.quantize} weights" if measurement.source.quantize else ""),
    }
    rows = [[Text(name, "dim"), Text(fact)] for name, fact in facts.items()]
    yield from aligned(rows, ["left"] * 2)
