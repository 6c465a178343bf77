"""A model folder in Hugging Face's format: config.json, model.safetensors, tokenizer.json."""

import errno
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minigpt.checkpoint.config_json import config_json, read_config_json
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError
from minigpt.files import make_folder, read_json, resource_errors, to_json
from minigpt.model.language_model import LanguageModel, model_class
from minigpt.model_config import OWN_TYPE
from minigpt.rings import find_ring, ring
from minigpt.text.tokenizer import BytesTokenizer, Tokenizer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

STATE_FOLDER = "training_state"
"""Folder of a checkpoint with the state that only a resumed run needs."""

TOKENIZER = "tokenizer.json"
BYTES_TOKENIZER = Path(__file__).with_name("bytes_tokenizer.json")
"""tokenizer.json of the single-byte vocabulary, for the tokenizers library."""
GENERATION_CONFIG = "generation_config.json"
VOCABULARIES = "checkpoint.tokenizer_json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class LoadedModel:
    """A model and tokenizer read from a folder."""

    model: LanguageModel
    """Model in evaluation mode."""
    tokenizer: Tokenizer | None
    """Tokenizer; None if the folder has none."""
    folder: Path


def write_model(folder: Path, model: LanguageModel, tokenizer: Tokenizer | None) -> None:
    """Write a folder that transformers and read_model can read, without syncing it to the disk.

    Raises: ResourceError if the disk is full or the folder cannot be written.
    """
    config, files = new_files(model, tokenizer)
    write_parts(folder, config, files, weights_to_hf(model))


def new_files(
    model: LanguageModel, tokenizer: Tokenizer | None
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return a new model's config.json, and the other files of its folder except the weights."""
    config = config_json(model.config, tokenizer)
    config["torch_dtype"] = name_of(model.embedding.weight.dtype)
    generation = {"_from_model_config": True} | {name: config[name] for name in TOKEN_IDS}
    files = {GENERATION_CONFIG: to_json(generation)}
    if tokenizer is not None:
        files[TOKENIZER] = BYTES_TOKENIZER.read_bytes()
        find = find_ring if isinstance(tokenizer, BytesTokenizer) else ring
        if vocabularies := find(VOCABULARIES):
            files |= vocabularies.tokenizer_files(tokenizer, model.config, is_new=True)
    return config, files


def write_parts(
    folder: Path,
    config: Mapping[str, Any],
    files: Mapping[str, bytes],
    tensors: dict[str, Tensor],
) -> None:
    """Write config.json, the weights and other files, given by name, to a folder."""
    with resource_errors(folder):
        make_folder(folder)
        for name, data in {CONFIG: to_json(config), **files}.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})


def weights_to_hf(model: LanguageModel) -> dict[str, Tensor]:
    """Return the weights of a model on the CPU, by their names in model.safetensors."""
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if model.config.model_type != OWN_TYPE:
        return ring("checkpoint.weights").tensors_to_hf(model.config, tensors)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype in config.json, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


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
            os.chmod(path, mode)  # the library creates files that only the owner can read
        except SafetensorError as error:  # its message contains the errno
            code = re.search(r"os error (\d+)", str(error))
            number = int(code[1]) if code else errno.EIO
            raise OSError(number, os.strerror(number), str(path)) from error


def read_config(folder: Path) -> ModelConfig:
    """Read a folder's config.json.

    Raises: CheckpointError if it is missing, not JSON, or describes a model we cannot compute.
    """
    return read_config_json(read_json(folder / CONFIG), repr(str(folder / CONFIG)))


def read_model(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    is_exact: bool = False,
    make_reader: Callable[[ModelConfig], Any] | None = None,
) -> LoadedModel:
    """Read a model folder; names, shapes and sizes are checked before any weight is read.

    Args: dtype, of the weights, or None for the stored one; is_exact, whether to read a
        checkpoint's unrounded weights if it has them; make_reader, a function that returns a
        ``generation.fast.reading.WeightReader`` for a config.
    Raises: CheckpointError naming the file, what is wrong with it and the remedy.
    """
    config = read_config(folder)
    exact = folder / STATE_FOLDER
    has_exact = is_exact and os.path.lexists(exact / WEIGHTS)
    tensors = _tensors(config, exact if has_exact else folder)
    tokenizer = read_vocabulary(folder, config.vocab_size)
    reader = make_reader(config) if make_reader else None
    place = reader or (lambda name, tensor: placed(tensor, device, dtype))
    if config.model_type == OWN_TYPE:
        ours = {name: place(name, tensors[name]) for name in tensors}
    else:
        ours = ring("checkpoint.weights").tensors_from_hf(config, tensors, place)
    model = model_class(config).from_tensors(config, ours)
    if reader:
        reader.finish(model)
    return LoadedModel(model.eval(), tokenizer, folder)


def _tensors(config: ModelConfig, folder: Path) -> Mapping[str, Tensor]:
    if stored := find_ring("checkpoint.stored_tensors"):
        return stored.LazyTensors(stored.stored_tensors(config, folder))
    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{str(folder / WEIGHTS)!r} cannot be read ({error}). Write or download it again."
        ) from None


def placed(
    part: Tensor, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return a tensor on a device and in a dtype; a view of a larger tensor is copied."""
    if part.is_contiguous() and part.nbytes == part.untyped_storage().nbytes():
        return part.to(device, dtype)
    place = torch.empty(part.shape, device=device or part.device, dtype=dtype or part.dtype)
    return place.copy_(part)


def read_vocabulary(folder: Path, n_rows: int) -> Tokenizer | None:
    """Read the tokenizer of a model folder; None if it has none.

    Args: n_rows, number of rows of the model's embedding.
    Raises: CheckpointError if a file is damaged, or the vocabulary has more tokens than the model.
    """
    if vocabularies := find_ring(VOCABULARIES):
        return vocabularies.read_vocabulary(folder, n_rows)
    if not os.path.lexists(folder / TOKENIZER):
        return None
    if read_json(folder / TOKENIZER) != read_json(BYTES_TOKENIZER):
        raise CheckpointError(
            f"the vocabulary in {str(folder)!r} is not the single-byte vocabulary. Install all of "
            "minigpt to use it."
        )
    return BytesTokenizer()
