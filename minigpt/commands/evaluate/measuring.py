"""One evaluation pass of a model over a text, and its result as lines."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.text import Text
from torch import Tensor

from minigpt.checkpoint.folder import CONFIG_FILE
from minigpt.checkpoint.manifest import MANIFEST, verify
from minigpt.checkpoint.resolve import resolve_model, shown_name
from minigpt.commands.display.progress import ProgressLine
from minigpt.commands.evaluate import EvaluationConfig
from minigpt.commands.loading import use_threads
from minigpt.commands.options import ModelSource
from minigpt.commands.tables import fact_lines
from minigpt.commands.train.explanations import slow_dtype_note
from minigpt.config import DataConfig, ModelConfig, RunConfig
from minigpt.errors import CheckpointError, ConfigError, DataError
from minigpt.evaluation import evaluate, windows_at_once
from minigpt.format import count, duration, short
from minigpt.generation.loading import load
from minigpt.model.device import inference_dtype, resolve_device
from minigpt.rings import find_ring, ring
from minigpt.settings import build, read_toml
from minigpt.text.batches import validation_windows
from minigpt.text.escape import one_line
from minigpt.text.tokenizer import Tokenizer
from minigpt.text.tokens import PreparedData, TokenSpan, prepare

_LONGEST_WINDOW = 1024  # by default: the full context of some models needs too much memory


def measure(
    config: EvaluationConfig, source: ModelSource, *, is_quiet: bool = False
) -> dict[str, Any]:
    """Load the model and the text, evaluate in one pass, and return the result for JSON.

    Raises: ConfigError for a window longer than the context; CheckpointError for a model that is
        missing, damaged or without a tokenizer; DataError for a text that cannot be used.
    """
    use_threads(source.threads)
    device = resolve_device(source.device)
    dtype = inference_dtype(config.dtype, device)
    folder = resolve_model(source.model)
    if (folder / MANIFEST).is_file():  # the result must be of the weights that were saved
        verify(folder, hashes=True)
    text, val_fraction = _text(config, folder)
    # As in training: weights in float32, and autocast to the dtype.
    loaded = load(folder, device=device.type, dtype="float32", quantize=source.quantize)
    model, tokenizer = loaded.model, loaded.tokenizer
    if tokenizer is None:
        remedy = ring("checkpoint.vocabulary_files").tokenizer_remedy(folder)
        raise CheckpointError(
            f"{str(folder)!r} has no tokenizer.json, so it cannot be evaluated on text. {remedy}"
        )
    with ProgressLine("reading", is_quiet=is_quiet) as progress:
        data = _read(config, text, folder, tokenizer, progress)
        span = _span(data, val_fraction)
        windows = _windows(config, model.config, len(span), device.type)
        n_predicted = min(config.eval_tokens or len(span), len(span) - 1)
        progress.note(f"model {shown_name(folder)}")
        if slow := slow_dtype_note(device, dtype):
            progress.note(slow)
        # A run with --val has a separate validation text; without the ring of corpora, no run does.
        paths = getattr(text, "val", ()) or text.paths
        if not config.data:
            progress.note(
                f"text   {', '.join(paths)}: the run's own text, because no DATA is given"
            )
        started = time.perf_counter()
        batches = validation_windows(span, max_tokens=n_predicted, **windows)
        batches = _shown(batches, n_predicted, progress)
        result = evaluate(model, batches, tokenizer.token_byte_lengths, dtype=dtype)
        seconds = time.perf_counter() - started
    if not result.n_tokens:
        raise DataError("the text has no answers of the assistant. Give more text.")
    if not math.isfinite(result.nats):
        raise CheckpointError(
            f"the loss of {str(folder)!r} is {result.nats_per_token}: its weights are damaged. Use "
            "another checkpoint, or download it again."
        )
    if val_fraction is None and result.n_tokens == len(span) - 1:
        result = replace(result, n_bytes=_text_bytes(data, span))
    return {
        "model": folder,
        "data": list(paths),
        "val_fraction": val_fraction,
        "val_split": None if val_fraction is None else data.manifest.val_split,
        "nats_per_token": result.nats_per_token,
        "bits_per_byte": result.bits_per_byte,
        "perplexity": result.perplexity,
        "tokens_per_s": result.n_tokens / seconds,
        "seconds": seconds,
        "n_tokens": result.n_tokens,
        "n_bytes": result.n_bytes,
        "n_skipped": data.manifest.n_skipped,
        "n_bad_rows": getattr(data.manifest, "n_bad_rows", 0),  # of the ring of corpora
        **windows,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "quantize": source.quantize,
    }


def _read(
    config: EvaluationConfig,
    text: DataConfig,
    folder: Path,
    tokenizer: Tokenizer,
    progress: ProgressLine,
) -> PreparedData:
    """Tokenize the text, and show what was skipped.

    Raises: DataError if it cannot be read, or if the text that the run was trained on has changed.
    """
    try:
        data = prepare(text, on_progress=progress.preparing, tokenizer=tokenizer, chat_model=folder)
    except DataError as error:
        if config.data:
            raise
        raise DataError(f"the run's own text: {error} If it has moved, give DATA.") from None
    if not config.data and not _reading(config):  # read as in training: to the same tokens
        own, trained_on = _own_text(folder), data
        if text.val_fraction != own.val_fraction:  # perhaps with other documents held out
            trained_on = prepare(own, tokenizer=tokenizer, chat_model=folder)
        _require_trained_on(trained_on, text, folder)
    for line in data.manifest.notes():
        progress.note(f"note   {line}")
    return data


def _require_trained_on(data: PreparedData, text: DataConfig, folder: Path) -> None:
    """Raise DataError if a model was trained on another text, perhaps of another folder."""
    states = find_ring("training.state")
    if states is None:
        return
    with suppress(CheckpointError):  # weights only: there is nothing to compare with
        if states.read_state(folder).corpus not in ("", data.tokens.fingerprint):
            raise DataError(
                f"{', '.join(map(repr, text.paths))} is not the text that {str(folder)!r} was "
                "trained on: it has changed, or its path is relative to another folder. Give "
                "DATA, and --val-fraction for its last part."
            )


def _reading(config: EvaluationConfig) -> dict[str, Any]:
    """Return those given options that change how a text is read."""
    words = "format field encoding skip_bad special skip_unencodable chat loss_on chat_template"
    given = {name: getattr(config, name) for name in words.split()}
    return {name: value for name, value in given.items() if value not in (None, False)}


def _text(config: EvaluationConfig, folder: Path) -> tuple[DataConfig, float | None]:
    """Return the text to evaluate on and the share of it; without DATA, the validation text."""
    share = config.val_fraction
    reading = _reading(config)
    if config.data:
        # Without a share, the text is not split, so its documents stay in order.
        paths = {"paths": list(config.data), "val_fraction": share or 0.0}
        return build(DataConfig, paths | reading), share
    data = _own_text(folder)
    if "-" in data.paths:
        raise DataError("the run's own text came from standard input. Give it as DATA.")
    if not (share or data.val_fraction):
        raise DataError("the run trained on all of its text and validates on none. Give DATA.")
    data = replace(data, val_fraction=share or data.val_fraction, **reading)
    return data, data.val_fraction


def _own_text(folder: Path) -> DataConfig:
    """Return the text that the run of a checkpoint was trained on."""
    try:
        return build(RunConfig, read_toml(folder.parent / CONFIG_FILE)).data
    except ConfigError:  # a model from elsewhere
        raise DataError(
            f"{str(folder)!r} is not a step of a run, so it has no text of its own. Give DATA."
        ) from None


def _windows(
    config: EvaluationConfig, model: ModelConfig, n_tokens: int, device_type: str
) -> dict[str, int]:
    """Return the length, stride and batch size of windows for n_tokens, with defaults for None.

    Raises: ConfigError for a window longer than the context, or a stride longer than a window.
    """
    longest = config.context_length or min(model.context_length, _LONGEST_WINDOW)
    limits = {"context_length": (longest, model.context_length), "stride": (config.stride, longest)}
    for name, (value, most) in limits.items():
        if value and value > most:
            raise ConfigError(f"{name} must be between 1 and {most}: it is {value}.")
    length = min(longest, n_tokens - 1)  # a short text is one short window
    n_fitting = windows_at_once(model.vocab_size, length, device_type)
    return {
        "context_length": length,
        "stride": min(config.stride or length, length),
        "batch_size": config.batch_size or n_fitting,
    }


def _span(data: PreparedData, val_fraction: float | None) -> TokenSpan:
    """Return the tokens of a text, or of its last fraction as training splits it.

    Raises: DataError if it is too short to predict a token.
    """
    if val_fraction is not None:
        span = data.tokens.split(val_fraction)[1]
    else:
        # If several tokens separate documents, only the token after the last one is predicted.
        first = max(len(data.tokenizer.separator) - 1, 0)
        span = TokenSpan(data.tokens, first, len(data.tokens), "whole")
    if len(span) < 2:
        raise DataError(
            f"too little text: the first of its tokens ({len(span)} here) is not predicted. Give "
            "more text."
        )
    return span


def _text_bytes(data: PreparedData, span: TokenSpan) -> int:
    """Return the number of bytes of a text, without its first token if that is not predicted.

    The byte lengths of its tokens may sum to another number: some tokenizers add a space before a
    text, or normalize characters.
    """
    if data.tokenizer.separator:
        return data.manifest.n_bytes
    [first] = span.first_ids(1)
    return data.manifest.n_bytes - int(data.tokenizer.token_byte_lengths[first])


def _shown(
    batches: Iterable[tuple[Tensor, Tensor]], n_tokens: int, progress: ProgressLine
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches, and show how many of n_tokens are done."""
    n_done = 0
    started = time.perf_counter()
    for inputs, targets in batches:
        speed = n_done / (time.perf_counter() - started)
        details = [f"{short(n_done)} of {short(n_tokens)} tokens", f"{short(speed)} tok/s"]
        progress.show_task("evaluating", n_done / n_tokens, details)
        yield inputs, targets
        n_done += targets.numel()


def lines(result: dict[str, Any]) -> Iterator[Text]:
    """Return the result of ``measure`` as lines of text."""
    share, seconds, quantize = result["val_fraction"], result["seconds"], result["quantize"]
    part = ""
    if share:
        part = f", the last {100 * share:.3g}%"
        kinds = {"documents": ", the documents for validation", "own": ", the validation text"}
        part = kinds.get(result["val_split"], part)
    time_ = f"{seconds:.1f} s" if seconds < 60 else duration(seconds)
    return fact_lines(
        {
            "model": one_line(str(result["model"])),
            "text": one_line(", ".join(result["data"])) + part,
            "loss": f"{result['nats_per_token']:.4f} nats/token, "
            f"{result['bits_per_byte']:.4f} bits/byte",
            "perplexity": f"{result['perplexity']:,.4g}",
            "predicted": ", ".join(count(result[f"n_{word}s"], word) for word in ("token", "byte")),
            "windows": f"{count(result['context_length'], 'token')}, stride {result['stride']}",
            "speed": f"{short(result['tokens_per_s'])} tok/s, {time_} on {result['device']} "
            f"in {result['dtype']}" + (f", {quantize} weights" if quantize else ""),
        }
    )
