"""A model folder in Hugging Face's format: config.json, model.safetensors, tokenizer.json."""

import errno
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minigpt.checkpoint.families import model_config_from_hf, model_config_to_hf
from minigpt.checkpoint.tokenizer_json import (
    TOKENIZER,
    TOKENIZER_CONFIG,
    read_tokenizer,
    tokenizer_config,
    tokenizer_to_json,
)
from minigpt.checkpoint.weights import (
    WEIGHTS,
    LazyTensors,
    stored_tensors,
    tensors_from_hf,
    tensors_to_hf,
)
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError
from minigpt.files import read_json, resource_errors, to_json
from minigpt.model.language_model import LanguageModel
from minigpt.model.registry import model_class
from minigpt.text.tokenizer import Tokenizer

CONFIG = "config.json"

_GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class LoadedModel:
    """A model and tokenizer read from a folder."""

    model: LanguageModel
    """Model in evaluation mode."""
    tokenizer: Tokenizer | None
    """Tokenizer; None if the folder has none."""
    folder: Path
    """Folder that was read."""


def write_model(folder: Path, model: LanguageModel, tokenizer: Tokenizer | None) -> None:
    """Write a folder that transformers and read_model can read, without syncing it to the disk.

    Raises: ResourceError if the disk is full or the folder cannot be written.
    """
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    config = model_config_to_hf(model.config, tokenizer) | {"torch_dtype": dtype}
    specials = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files = {CONFIG: config, _GENERATION_CONFIG: {"_from_model_config": True} | specials}
    if tokenizer is not None:
        files[TOKENIZER] = tokenizer_to_json(tokenizer)
        files[TOKENIZER_CONFIG] = tokenizer_config(tokenizer, model.config.context_length)
    with resource_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (folder / name).write_bytes(to_json(value))
    save_tensors(folder / WEIGHTS, tensors_to_hf(model.config, tensors), {"format": "pt"})


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Raises: ResourceError if the disk is full or the folder cannot be written.
    """
    with resource_errors(path):
        path.touch()
        mode = path.stat().st_mode
        try:
            save_file(tensors, path, metadata)
            os.chmod(path, mode)  # the library makes files that only the owner can read
        except SafetensorError as error:  # its message has the system's error code
            code = re.search(r"os error (\d+)", str(error))
            number = int(code[1]) if code else errno.EIO
            raise OSError(number, os.strerror(number), str(path)) from error


def read_config(folder: Path) -> ModelConfig:
    """Read a folder's config.json.

    Raises: CheckpointError if it is missing, not JSON, or of a model that we cannot compute.
    """
    return model_config_from_hf(read_json(folder / CONFIG))


def read_model(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> LoadedModel:
    """Read a model folder; names, shapes and sizes are checked before any weight is read.

    Args: dtype, of the weights; None keeps the stored dtype.
    Raises: CheckpointError naming the file, what is wrong with it and the remedy.
    """
    config = read_config(folder)
    weights = LazyTensors(stored_tensors(config, folder))
    tokenizer = read_vocabulary(folder, config.vocab_size)
    model = model_class(config).from_tensors(
        config, tensors_from_hf(config, weights, device=device, dtype=dtype)
    )
    return LoadedModel(model.eval(), tokenizer, folder)


def read_vocabulary(folder: Path, n_rows: int) -> Tokenizer | None:
    """Read the tokenizer of a model folder, None if it has none.

    Args: n_rows, number of the model's embeddings.
    Raises: CheckpointError if a file is damaged, or the vocabulary has more tokens than the model.
    """
    ends = _end_of_text_ids(folder, read_json(folder / CONFIG))
    tokenizer = read_tokenizer(folder, ends, n_rows=n_rows)
    if tokenizer is not None and tokenizer.vocab_size > n_rows:
        raise CheckpointError(
            f"the vocabulary in {str(folder)!r} has {tokenizer.vocab_size} tokens, and the model "
            f"only {n_rows}. Take both from the same place."
        )
    if tokenizer is not None and any(id_ >= n_rows for id_ in tokenizer.prefix):
        raise CheckpointError(
            f"the tokenizer in {str(folder)!r} begins each text with the id {tokenizer.prefix[0]}, "
            f"and the model's are 0 to {n_rows - 1}. Take both from the same place."
        )
    return tokenizer


def _end_of_text_ids(folder: Path, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the end-of-text token ids in generation_config.json, else in config.json."""
    path = folder / _GENERATION_CONFIG
    ends = read_json(path).get("eos_token_id") if os.path.lexists(path) else None
    ends = settings.get("eos_token_id") if ends is None else ends
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(id_) is int and id_ >= 0 for id_ in ids):
        raise CheckpointError(
            f"the eos_token_id of {str(folder)!r} is {str(ends)[:80]!r}, and not an id or a list "
            "of ids. Download its JSON files again."
        )
    return tuple(ids)
