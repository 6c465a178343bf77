"""The cost of a model: parameters and FLOPs, from the meta device, and the peak FLOP/s of GPUs."""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from minigpt.config import ModelConfig
from minigpt.model.language_model import LanguageModel, model_class


def with_one_block(config: ModelConfig) -> LanguageModel:
    """Build a model with one block on the meta device: all blocks have the same shapes."""
    config = replace(config, n_layer=1)
    return model_class(config).without_weights(config)


def parameters(config: ModelConfig) -> Iterator[tuple[str, Tensor, int]]:
    """Yield the name of each parameter, the parameter on the meta device, and how often it occurs.

    The parameters of the only block that is built occur n_layer times.
    """
    for name, parameter in with_one_block(config).named_parameters():
        yield name, parameter, config.n_layer if name.startswith("blocks.") else 1


@lru_cache(maxsize=64)
def parameter_count(config: ModelConfig) -> int:
    """Return the number of parameters, tied ones counted once."""
    return sum(n * parameter.numel() for _, parameter, n in parameters(config))


@lru_cache(maxsize=64)
def training_flops_per_token(config: ModelConfig) -> int:
    """Return the FLOPs of a forward and backward pass over one token of a full context.

    Six per parameter of a matrix product (not of a lookup), and the score's ``flops_per_weight``
    per attention weight: half the context on average, as it is causal, or less with a window.
    Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    model = model_class(config).without_weights(config)
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    n_lookups = sum(embedding.weight.numel() for embedding in embeddings)
    if config.tie_embeddings:
        n_lookups -= model.embedding.weight.numel()
    flops = 6 * (parameter_count(config) - n_lookups)
    width = config.n_head * config.d_head
    for attention in model.attentions:
        seen = min(attention.score.window or config.context_length, config.context_length)
        seen_on_average = seen * (2 * config.context_length - seen) // (2 * config.context_length)
        flops += attention.score.flops_per_weight * width * seen_on_average
    return flops


# Dense bfloat16 tensor-core peaks, FLOP/s, from NVIDIA's datasheets (without sparsity). The first
# key whose words are in the device's name counts, so longer keys come first.
_BFLOAT16_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the hardware's peak FLOP/s in ``dtype``; None if unknown."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    # Whole words only: an L40 is not an L4.
    return next((p for key, p in _BFLOAT16_PEAKS.items() if re.search(rf"\b{key}\b", name)), None)


def utilization(
    config: ModelConfig, tokens_per_s: float, device: torch.device, dtype: torch.dtype
) -> float | None:
    """Return the model FLOPs utilization of training on one device; None if its peak is unknown.

    Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    peak = peak_flops(device, dtype)
    return tokens_per_s * training_flops_per_token(config) / peak if peak else None
