"""Small models of every layout, with no weight left at a value that would hide a mistake."""

from typing import Any

import torch

from minigpt.config import ModelConfig
from minigpt.model.gpt import GPT

LAYOUTS: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2", "activation": "gelu"},
    "gpt2-tied": {"family": "gpt2", "tie_embeddings": True},
    "llama": {"activation": "relu2"},
    "llama-grouped": {"n_kv_head": 2, "rope_theta": 300.0, "tie_embeddings": True},
    "qwen3": {"qk_norm": True, "n_kv_head": 1, "d_head": 10},
}


def small_config(layout: str = "llama", **changes: Any) -> ModelConfig:
    """Two layers of four heads, 32 wide, 24 positions."""
    shape = {"vocab_size": 61, "context_length": 24, "n_layer": 2, "n_head": 4, "d_model": 32}
    return ModelConfig(**(shape | LAYOUTS[layout] | changes))


def small_model(layout: str = "llama", *, seed: int = 7, **changes: Any) -> GPT:
    """A model whose weights, biases and norms are all random, in evaluation mode."""
    model = GPT(small_config(layout, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def random_tokens(*shape: int, vocab_size: int = 61, seed: int = 3) -> torch.Tensor:
    """Token ids drawn evenly."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))
