"""Small models of every layout, with random weights so that no initial value hides a bug."""

from typing import Any, TypeVar

import torch
from torch import nn

from minigpt.checkpoint.families import model_config_from_hf
from minigpt.config import ModelConfig
from minigpt.model.gpt import GPT
from minigpt.model.language_model import model_class

LAYOUTS: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2", "activation": "gelu"},
    "gpt2-tied": {"family": "gpt2", "tie_embeddings": True},
    "llama": {"activation": "relu2"},
    "llama-grouped": {"n_kv_head": 2, "rope_theta": 300.0, "tie_embeddings": True},
    "qwen3": {"qk_norm": True, "n_kv_head": 1, "d_head": 10},
}

FAMILIES: dict[str, dict[str, Any]] = {
    "olmo2": {},  # norms after the branches
    "gemma": {},
    "gemma2": {"final_logit_softcapping": None},  # norms before and after the branches
    "gpt_neox": {
        "num_key_value_heads": None,
        "head_dim": None,
    },  # biases, MLP parallel to attention
    "llama-biases": {"attention_bias": True},
}
"""Hugging Face families with other blocks than LAYOUTS and logits without a soft cap."""
SOFTCAP = "gemma2-softcap"
"""A model with soft caps on logits and scores."""


Model = TypeVar("Model", bound=nn.Module)


def small_config(layout: str = "llama", **changes: Any) -> ModelConfig:
    """Return a config of two layers, four heads, width 32 and 24 positions."""
    shape = {"vocab_size": 61, "context_length": 24, "n_layer": 2, "n_head": 4, "d_model": 32}
    return ModelConfig(**(shape | LAYOUTS[layout] | changes))


def small_model(layout: str = "llama", *, seed: int = 7, **changes: Any) -> GPT:
    """Return a model in evaluation mode whose weights, biases and norms are all random."""
    return randomized(GPT(small_config(layout, **changes)), seed=seed)


def any_model(name: str, **changes: Any) -> GPT:
    """Return a ``small_model`` of LAYOUTS, FAMILIES or SOFTCAP, all of one shape."""
    if name in LAYOUTS:
        return small_model(name, **changes)
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 24}
    shape |= {"head_dim": 8}
    own = {"final_logit_softcapping": 3.0} if name == SOFTCAP else FAMILIES[name]
    values: dict[str, Any] = shape | {"model_type": name.partition("-")[0]} | own | changes
    config = model_config_from_hf(values)
    model = model_class(config)(config)
    assert isinstance(model, GPT)
    return randomized(model)


def randomized(model: Model, *, std: float = 0.3, seed: int = 7) -> Model:
    """Randomize all weights, biases and norms of a model; return it in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model.eval()


def random_tokens(*shape: int, vocab_size: int = 61, seed: int = 3) -> torch.Tensor:
    """Return token ids drawn uniformly."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))
