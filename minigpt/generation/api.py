"""Text from a model in one call: what the command line does, for Python."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from minigpt.checkpoint.model_folder import LoadedModel, read_model
from minigpt.checkpoint.resolve import resolve_model
from minigpt.config import DEVICES, DTYPES, QUANTIZATIONS, SamplingConfig
from minigpt.errors import CheckpointError, ConfigError, DataError, nearest
from minigpt.generation.decoder import Decoder, fresh_seed, rows_at_once
from minigpt.generation.forward import has_compiled_step
from minigpt.generation.stream import TextStep, stream_samples
from minigpt.model.device import has_fast_bfloat16, resolve_device, resolve_dtype
from minigpt.model.language_model import LanguageModel
from minigpt.settings import build
from minigpt.text.tokenizer import Tokenizer


def generate(
    model: str | Path | LanguageModel,
    prompt: str | Sequence[int] = "",
    *,
    tokenizer: Tokenizer | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    compile: bool | None = None,
    **sampling: Any,
) -> Iterator[TextStep]:
    """Go on from a prompt: yield each token as it is drawn, and the text that it makes certain.

        import minigpt

        for step in minigpt.generate("book", "Once upon a time", temperature=0.7, seed=1):
            print(step.text, end="", flush=True)

    It is what ``minigpt generate`` runs: the same settings give the same text.

    Args: model, what ``--model`` takes, or one in evaluation mode with its tokenizer. prompt,
        text or token ids; no text is the beginning of a document. device, dtype, quantize (int8),
        as the options of the command, of a model that is read. compile, decoding through
        torch.compile; None does on CUDA. sampling, fields of SamplingConfig: temperature, top_k,
        stop=("text",), seed and so on.
    Returns: the steps; of several samples (num_samples) in turn, told apart by ``step.sample``.
        The ``finish`` of a sample's last ``step.step`` says why it ended.
    Raises: at once, ConfigError for a setting that cannot be; CheckpointError for a model that is
        missing or damaged; DataError for a prompt that is empty or does not fit. While it yields,
        CheckpointError if the model's logits are no numbers.
    """
    config = build(SamplingConfig, sampling)
    network, tokenizer, _ = at_hand(model, tokenizer, device=device, dtype=dtype, quantize=quantize)
    ids = encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
    decoder = make_decoder(network, ids, config, compile=compile)
    seed = fresh_seed() if config.seed is None else config.seed
    return stream_samples(decoder, tokenizer, config, seed=seed)


def at_hand(
    model: str | Path | LanguageModel,
    tokenizer: Tokenizer | None,
    *,
    device: str,
    dtype: str,
    quantize: str | None,
) -> tuple[LanguageModel, Tokenizer, str]:
    """Return a model, its tokenizer and its name, read if it is not there yet.

    Raises: as ``generate``.
    """
    if isinstance(model, LanguageModel):
        if tokenizer is None:
            raise ConfigError("a LanguageModel has no tokenizer of its own. Give tokenizer, too.")
        return model, tokenizer, ""
    folder = resolve_model(str(model))
    loaded = load(folder, device=device, dtype=dtype, quantize=quantize)
    return loaded.model, tokenizer or tokenizer_of(loaded), str(folder)


def load(
    folder: Path, *, device: str = "auto", dtype: str = "auto", quantize: str | None = None
) -> LoadedModel:
    """Read a model to decode with.

    Raises: CheckpointError if it is damaged; ConfigError for a device that is not there or a
        quantization that is unknown or not available.
    """
    for name, value, choices in (
        ("device", device, DEVICES),
        ("dtype", dtype, DTYPES),
        ("quantize", quantize, (None, *QUANTIZATIONS)),
    ):
        if value not in choices:
            known = [choice for choice in choices if choice]
            raise ConfigError(f"there is no {name} {value!r}. {nearest(str(value), known)}")
    place = resolve_device(device)
    # A cached decoding step at batch 1 is bound by memory and, on a CPU, by calls: bfloat16 has to
    # be asked for there.
    automatic = "float32" if place.type == "cpu" else "auto"
    resolved = resolve_dtype(automatic if dtype == "auto" else dtype, place)
    loaded = read_model(folder, device=place, dtype=resolved)
    loaded.model.requires_grad_(False)  # its weights may then be laid out anew, and not copied
    if quantize:
        from minigpt.generation.fast.quantize import quantize_int8

        quantize_int8(loaded.model)
    elif resolved == torch.bfloat16 and place.type == "cpu" and not has_fast_bfloat16(place):
        from minigpt.generation.fast.quantize import widen_activations

        widen_activations(loaded.model)
    return loaded


def tokenizer_of(loaded: LoadedModel) -> Tokenizer:
    """Return a model's tokenizer.

    Raises: CheckpointError if it has none.
    """
    if loaded.tokenizer is None:
        raise CheckpointError(
            f"{str(loaded.folder)!r} has neither tokenizer.json nor sp_vocab.json, so text means "
            "nothing to it. Add the one that the model was trained with."
        )
    return loaded.tokenizer


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the tokens of a prompt; no text is the beginning of a document.

    Raises: DataError if the vocabulary has none for it.
    """
    ids = tokenizer.encode_prompt(prompt)
    if not ids:
        raise DataError("this model has no token that begins a document. Give a prompt.")
    return ids


def make_decoder(
    model: LanguageModel,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    *,
    compile: bool | None = None,
) -> Decoder:
    """Return a decoder for as many samples at once as its memory should hold.

    Args: compile, decoding through torch.compile; None does on CUDA.
    Raises: DataError if the prompt is empty or longer than the context.
    """
    n_positions = len(prompt) + sampling.max_new_tokens
    return Decoder(
        model,
        prompt,
        max_new_tokens=sampling.max_new_tokens,
        n_rows=rows_at_once(model.config, sampling.num_samples, n_positions),
        compiles=is_compiled(model, compile),
    )


def is_compiled(model: LanguageModel, compile: bool | None) -> bool:
    """Tell whether decoding goes through torch.compile: as asked for, else on CUDA if it can."""
    if compile is not None:
        return compile
    return next(model.parameters()).is_cuda and has_compiled_step(model)
