"""Load a model for generation: its weights, in the layout for decoding, and its tokenizer."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from minigpt.checkpoint.model_folder import VOCABULARIES, LoadedModel, read_model
from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError, DataError, require_choice
from minigpt.generation.decoder import Decoder
from minigpt.generation.forward import FAST
from minigpt.model.device import has_fast_bfloat16, inference_dtype, resolve_device
from minigpt.model.language_model import LanguageModel
from minigpt.rings import find_ring, ring
from minigpt.run_config import DEVICES, DTYPES, QUANTIZATIONS
from minigpt.text.tokenizer import Tokenizer


def load(
    folder: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    for_decoding: bool = False,
    compile: bool | None = None,
    n_rows: int = 1,
) -> LoadedModel:
    """Load a model for inference.

    Args: for_decoding, whether to lay out the weights for fast decoding while they are read;
        compile and n_rows, as for ``fast.is_compiled``.
    Raises: CheckpointError if it is damaged; ConfigError for an unknown or unavailable device or
        quantization.
    """
    require_choice("device", device, DEVICES)
    require_choice("dtype", dtype, DTYPES)
    if quantize:
        require_choice("quantize", quantize, QUANTIZATIONS)
    place = resolve_device(device)
    resolved = inference_dtype(dtype, place)
    is_slow = place.type == "cpu" and resolved == torch.bfloat16 and not has_fast_bfloat16(place)
    make_reader = None
    find = ring if quantize else find_ring
    if reading := find(f"{FAST}.reading"):
        make_reader = partial(
            reading.make_reader,
            device=place,
            dtype=resolved,
            activations=torch.float32 if is_slow and not quantize else resolved,
            quantizes=bool(quantize),
            for_decoding=for_decoding,
            compile=compile,
            n_rows=n_rows,
        )
    loaded = read_model(folder, device=place, dtype=resolved, make_reader=make_reader)
    loaded.model.requires_grad_(False)
    return loaded


def tokenizer_of(loaded: LoadedModel) -> Tokenizer:
    """Return the tokenizer of a model; if it has none, one that uses token ids as text."""
    return loaded.tokenizer or ring(VOCABULARIES).id_tokenizer(loaded.folder, loaded.model.config)


def encode_prompt(tokenizer: Tokenizer, prompt: str, *, special: bool = False) -> list[int]:
    """Return the token ids of a prompt; empty text starts a new document.

    Args: special, whether to parse special tokens in the text.
    Raises: DataError if the prompt is empty and the vocabulary has no token to start a document.
    """
    ids = tokenizer.encode_prompt(prompt, special=special)
    if not ids:
        raise DataError("this model has no token that starts a document. Give a prompt.")
    return ids


def require_new_tokens(sampling: SamplingConfig) -> None:
    """Raise ConfigError if there is nothing to generate."""
    if sampling.max_new_tokens == 0:
        raise ConfigError(
            "max_new_tokens must be at least 1 to generate text: it is 0. For the probabilities "
            "and the attention of a given text, use attention-trace with --max-new-tokens 0."
        )


def make_decoder(
    model: LanguageModel,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    *,
    compile: bool | None = None,
) -> Decoder:
    """Return a decoder for as many samples at a time as fit into memory.

    Args: compile, as for ``fast.is_compiled``.
    Raises: DataError if the prompt is empty, or longer than the context and overflow is stop.
    """
    n_rows = 1
    if sampling.num_samples > 1:
        n_positions = len(prompt) + sampling.max_new_tokens
        max_rows_together = ring("generation.samples").max_rows_together
        n_rows = max_rows_together(model.config, sampling.num_samples, n_positions)
    slides = sampling.overflow == "slide"
    decoder_class = ring("generation.sliding").SlidingDecoder if slides else Decoder
    return decoder_class(
        model,
        prompt,
        max_new_tokens=sampling.max_new_tokens,
        n_rows=n_rows,
        compile=compile,
        overflow=sampling.overflow,
    )
