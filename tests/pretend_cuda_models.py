"""Small models for the tests of CUDA paths."""

from typing import Any

import torch

from minigpt.config import ModelConfig
from minigpt.model.language_model import model_class

BASE: dict[str, Any] = {"n_layer": 2, "d_model": 32, "vocab_size": 97, "context_length": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"n_head": 4, "n_kv_head": 2, "qk_norm": True},
    "gpt2": {"family": "gpt2", "n_head": 4},
    "general": {"attention": "general", "n_head": 4},
    "additive": {"attention": "additive", "n_head": 4},
    "lstm": {"arch": "lstm", "n_head": 1},
    "lstm-attention": {"arch": "lstm-attention", "n_head": 1},
}


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model whose weights are all nonzero, so that every weight matters."""
    config = ModelConfig(**BASE, **SHAPES[name])
    model = model_class(config)(config)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    return model_class(config).from_tensors(config, tensors)
