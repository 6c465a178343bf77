"""Settings and files of a base model's folder that fine-tuning keeps."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minigpt.checkpoint.config_json import read_config_json
from minigpt.checkpoint.model_folder import CONFIG, GENERATION_CONFIG, name_of
from minigpt.checkpoint.stored_tensors import DTYPES, stored_tensors
from minigpt.config import ModelConfig
from minigpt.files import read_bytes, read_json, resource_errors, to_json

CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "sp_vocab.json",
    "tokenizer.model*",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
    "*.py",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
)
"""Glob patterns of the small files of a model folder that training does not change."""


@dataclass(frozen=True)
class Carried:
    """Contents of a base model's folder that training does not change."""

    config: dict[str, Any]
    """Parsed config.json."""
    files: dict[str, bytes]
    """Tokenizer, chat template, generation and license files by their names."""
    dtypes: dict[str, torch.dtype]
    """Dtype of each stored tensor by its name in Hugging Face's format."""

    @property
    def dtype(self) -> str:
        """Name of the dtype in which most tensors are stored."""
        return name_of(max(self.dtypes.values(), key=list(self.dtypes.values()).count))

    def ending_at(self, ends: Sequence[int]) -> "Carried":
        """Return a copy whose eos_token_id is these ids.

        It is set where other programs look: in generation_config.json, else in config.json.
        """
        field = {"eos_token_id": list(ends)}
        if GENERATION_CONFIG not in self.files:
            return replace(self, config=self.config | field)
        settings = json.loads(self.files[GENERATION_CONFIG]) | field
        return replace(self, files=self.files | {GENERATION_CONFIG: to_json(settings)})

    def config_with(
        self, ours: Mapping[str, Any], model: ModelConfig, dtype: torch.dtype | None
    ) -> dict[str, Any]:
        """Return config.json with the dropout of training and, unless it is None, the dtype.

        Args: ours, the config.json that a new model would get.
        """
        config = dict(self.config)
        if read_config_json(config).dropout != model.dropout:
            names = ("resid_pdrop", "embd_pdrop", "dropout")
            config |= {name: ours[name] for name in names if name in ours}
        if dtype is not None:
            found = [name for name in ("dtype", "torch_dtype") if name in config]
            config |= dict.fromkeys(found or ["torch_dtype"], name_of(dtype))
        return config


def read_carried(folder: Path) -> Carried:
    """Read the settings, small files and tensor dtypes of a base model's folder.

    Raises: CheckpointError as ``read_model``; ResourceError if a file cannot be read.
    """
    settings = read_json(folder / CONFIG)
    stored = stored_tensors(read_config_json(settings), folder)
    with resource_errors(folder):
        paths = [path for pattern in CARRIED for path in sorted(folder.glob(pattern))]
        files = {path.relative_to(folder).as_posix(): read_bytes(path) for path in paths}
    return Carried(settings, files, {name: DTYPES[tensor.dtype] for name, tensor in stored.items()})
