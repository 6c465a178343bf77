"""Small models of every layout, with no weight left at a value that would hide a mistake."""

import torch

from minigpt.config import ModelConfig
from minigpt.model.gpt import GPT

LAYOUTS = {
    "gpt2-tied": {"family": "gpt2", "tie_embeddings": True, "dropout": 0.1},
    "gpt2-untied": {"family": "gpt2", "d_mlp": 40, "activation": "gelu", "norm_eps": 1e-3},
    "llama-grouped": {"n_kv_head": 2, "rope_theta": 500.0},
    "llama-tied": {"tie_embeddings": True, "activation": "relu2"},
    "llama-biased": {
        "attention_bias": "all",
        "mlp_bias": True,
        "d_head": 6,
        "rope_scaling_factor": 4.0,
        "rope_low_freq_factor": 1.5,
        "rope_original_context": 16,
    },
    "mistral": {"model_type": "mistral", "n_kv_head": 2},
    "qwen2": {"attention_bias": "qkv", "n_kv_head": 2, "rope_theta": 1e6},
    "qwen3": {"qk_norm": True, "n_kv_head": 1, "d_head": 6, "norm_eps": 1e-4},
    "qwen3-biased": {"qk_norm": True, "attention_bias": "all", "tie_embeddings": True},
}


def make_model(vocab_size: int, layout: str) -> GPT:
    config = ModelConfig(
        vocab_size=vocab_size,
        context_length=32,
        n_layer=2,
        n_head=4,
        d_model=16,
        **LAYOUTS[layout],
    )
    model = GPT(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5, generator=generator)
    return model.eval()
