"""A model folder: config.json, model.safetensors, tokenizer.json, as Hugging Face lays it out."""

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minigpt.checkpoint.disk import read_json, resource_errors, to_json
from minigpt.checkpoint.families import model_config_from_hf, model_config_to_hf
from minigpt.checkpoint.sentencepiece import json_from_scores
from minigpt.checkpoint.tensor_names import canonical_names, tensors_from_hf, tensors_to_hf
from minigpt.checkpoint.tokenizer_json import (
    NAME_FIELD,
    tokenizer_config,
    tokenizer_from_json,
    tokenizer_to_json,
)
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError
from minigpt.model.gpt import GPT
from minigpt.text.tokenizer import Tokenizer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
SCORES = "sp_vocab.json"
"""The vocabulary of a llama2.c model, read where there is no tokenizer.json."""

_GENERATION_CONFIG = "generation_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F64", "F32", "F16", "BF16"}
_LARGEST_WIDTH = 2**28
_LARGEST_CONTEXT = 2**20  # rotary tables of all positions are made


@dataclass(frozen=True)
class LoadedModel:
    """What a model folder holds."""

    model: GPT
    """In evaluation mode."""
    tokenizer: Tokenizer | None
    """None if the folder has no tokenizer.json."""
    folder: Path
    """Where it was read."""


def write_model(folder: Path, model: GPT, tokenizer: Tokenizer | None) -> None:
    """Write a folder that transformers and read_model read; complete, but not synced to the disk.

    Raises: ResourceError if the disk is full or the folder is not ours to write.
    """
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    config = model_config_to_hf(model.config, tokenizer) | {"torch_dtype": dtype}
    specials = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files = {CONFIG: config, _GENERATION_CONFIG: {"_from_model_config": True} | specials}
    if tokenizer is not None:
        files[TOKENIZER] = tokenizer_to_json(tokenizer)
        files[_TOKENIZER_CONFIG] = tokenizer_config(tokenizer, model.config.context_length)
    with resource_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (folder / name).write_bytes(to_json(value))
    save_tensors(folder / WEIGHTS, tensors_to_hf(model.config, tensors), {"format": "pt"})


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Raises: ResourceError if the disk is full or the folder is not ours to write.
    """
    with resource_errors(path):
        try:
            save_file(tensors, path, metadata)
        except SafetensorError as error:  # it wraps the system's errors in words
            code = re.search(r"os error (\d+)", str(error))
            number = int(code[1]) if code else errno.EIO
            raise OSError(number, os.strerror(number), str(path)) from error


def read_config(folder: Path) -> ModelConfig:
    """Read a folder's config.json.

    Raises: CheckpointError if it is missing, not JSON, or of a model that ours cannot compute.
    """
    return model_config_from_hf(read_json(folder / CONFIG))


def read_model(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> LoadedModel:
    """Read a model folder, strictly; names, shapes and sizes are checked before any weight is.

    Args: dtype, of the weights; None for what is stored.
    Raises: CheckpointError naming the file, what is wrong with it and the remedy.
    """
    settings = read_json(folder / CONFIG)
    config = model_config_from_hf(settings)
    weights = _Weights(_checked_tensors(config, _weight_files(folder)))
    tokenizer = _read_tokenizer(folder, config, _end_of_text_ids(folder, settings))
    model = GPT.from_tensors(config, tensors_from_hf(config, weights, device=device, dtype=dtype))
    return LoadedModel(model.eval(), tokenizer, folder)


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies, and what its header says."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class _Weights(Mapping[str, Tensor]):
    """Tensors by canonical name, each read when it is asked for."""

    def __init__(self, stored: Mapping[str, _Stored]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        with _opened(stored.path) as file:
            tensor: Tensor = file.get_tensor(stored.name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        # Read, not mapped: a file that shrinks under a mapping kills the process (SIGBUS).
        with resource_errors(path), safe_open(path, framework="pt", backend="pread") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{str(path)!r} is no whole safetensors file ({str(error)[:120]!r}). "
            "Write or download it again."
        ) from None


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / _INDEX).exists():
        shards = read_json(folder / _INDEX).get("weight_map")
        names = list(shards.values()) if isinstance(shards, dict) else []
        # Nothing outside the folder is opened, whatever the index says.
        if names and all(isinstance(n, str) and re.fullmatch(r"[\w.-]+", n) for n in names):
            return [folder / name for name in sorted(set(names))]
        raise CheckpointError(
            f"{str(folder / _INDEX)!r} does not map tensors to files of its folder. "
            "Download it again."
        )
    pickled = sorted(path.name for path in folder.glob("*.bin")) + sorted(
        path.name for path in folder.glob("*.pt*")
    )
    if pickled:
        raise CheckpointError(
            f"{str(folder)!r} has its weights in {pickled[0]!r}, a pickle, which can run any code "
            f"and is never opened. Save the model as {WEIGHTS}."
        )
    raise CheckpointError(f"{WEIGHTS} is missing in {str(folder)!r}. Write or download it again.")


def _checked_tensors(config: ModelConfig, paths: list[Path]) -> dict[str, _Stored]:
    """Compare names, shapes and dtypes with what the config asks for, from the headers alone."""
    found: dict[str, _Stored] = {}
    for path in paths:
        with _opened(path) as file:
            for name, stored in canonical_names(config, file.keys()).items():
                header = file.get_slice(stored)
                shape, dtype = tuple(header.get_shape()), header.get_dtype()
                if found.setdefault(name, _Stored(path, stored, shape, dtype)).path != path:
                    raise CheckpointError(
                        f"the tensor {name!r} is there twice, in {str(found[name].path)!r} and in "
                        f"{path.name!r}. Download the model again."
                    )
    _check_size(config, len(found))
    with torch.device("meta"):
        expected = tensors_to_hf(config, GPT.without_weights(config).state_dict())
    problem = _first_problem(expected, found, is_tied=config.tie_embeddings)
    if problem:
        raise CheckpointError(
            f"the weights in {str(paths[0].parent)!r} do not fit {CONFIG}: {problem}. "
            "Take both from the same place."
        )
    return found


def _check_size(config: ModelConfig, n_tensors: int) -> None:
    """Refuse sizes that no model has, before anything is made of them."""
    sizes = {
        "vocabulary": (config.vocab_size, _LARGEST_WIDTH),
        "width": (config.d_model, _LARGEST_WIDTH),
        "width of the MLP": (config.d_mlp, _LARGEST_WIDTH),
        "width of all heads": (config.n_head * config.d_head, _LARGEST_WIDTH),
        "context": (config.context_length, _LARGEST_CONTEXT),
        "number of layers": (config.n_layer, n_tensors),
    }
    for what, (size, largest) in sizes.items():
        if size > largest:
            raise CheckpointError(
                f"{CONFIG} asks for a {what} of {size}, and at most {largest} is possible here. "
                "Download it again."
            )


def _first_problem(
    expected: Mapping[str, Tensor], found: Mapping[str, _Stored], *, is_tied: bool
) -> str | None:
    expected = dict(expected)
    if is_tied and "lm_head.weight" in found:  # some files hold the tied one twice
        embedding = next(iter(expected))
        expected["lm_head.weight"] = expected[embedding]
    if missing := [name for name in expected if name not in found]:
        return f"{missing[0]!r} is missing ({len(missing)} of {len(expected)} are)"
    if extra := [name for name in found if name not in expected]:
        return f"{extra[0]!r} has no place in the model ({len(extra)} have none)"
    for name, stored in found.items():
        if stored.shape != tuple(expected[name].shape):
            return f"{name!r} has shape {list(stored.shape)}, not {list(expected[name].shape)}"
        if stored.dtype not in _DTYPES:
            readable = ", ".join(sorted(_DTYPES))
            return f"{name!r} is stored as {stored.dtype}, and only {readable} are read"
    return None


def _end_of_text_ids(folder: Path, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Return what generation_config.json, else config.json, says ends a text: an id, or several."""
    ends = _read_if_there(folder / _GENERATION_CONFIG).get("eos_token_id")
    ends = settings.get("eos_token_id") if ends is None else ends
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(id_) is int and id_ >= 0 for id_ in ids):
        raise CheckpointError(
            f"the eos_token_id of {str(folder)!r} is {str(ends)[:80]!r}, and not an id or a list "
            "of ids. Download its JSON files again."
        )
    return tuple(ids)


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _read_tokenizer(folder: Path, config: ModelConfig, ends: tuple[int, ...]) -> Tokenizer | None:
    settings = _read_if_there(folder / _TOKENIZER_CONFIG)
    if (folder / TOKENIZER).exists():
        data = read_json(folder / TOKENIZER)
    elif (folder / SCORES).exists():
        data = json_from_scores(read_json(folder / SCORES))
    else:
        return None
    named = settings.get(NAME_FIELD)
    name = named if isinstance(named, str) else folder.name
    tokenizer = tokenizer_from_json(data, name, config=settings, end_of_text=ends)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"the vocabulary in {str(folder)!r} has {tokenizer.vocab_size} tokens, and the model "
            f"only {config.vocab_size}. Take both from the same place."
        )
    return tokenizer
