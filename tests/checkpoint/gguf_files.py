"""Small models to export as GGUF, and reading of GGUF files with gguf.GGUFReader."""

from pathlib import Path
from typing import Any

import pytest
from small_models import randomized

from minigpt.checkpoint.model_folder import write_model
from minigpt.config import ModelConfig
from minigpt.model.language_model import model_class
from minigpt.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf", reason="needs the package gguf to read GGUF files")


def folder_of(path: Path, tokenizer: Tokenizer | None = None, **shape: Any) -> Path:
    small = {"context_length": 32, "n_layer": 2, "n_head": 4, "d_model": 64, "d_mlp": 40}
    rows = {"vocab_size": tokenizer.vocab_size if tokenizer else 259}
    config = ModelConfig(**(small | rows | shape))
    model = model_class(config)(config)
    randomized(model, std=0.5)
    write_model(path, model.eval(), tokenizer)
    return path


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metadata and the tensors of a GGUF file."""
    reader = gguf.GGUFReader(path)
    facts = {name: part.contents() for name, part in reader.fields.items()}
    return facts, {tensor.name: tensor for tensor in reader.tensors}
