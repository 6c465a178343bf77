"""The cost of a model: parameters, FLOPs and cache bytes, from a model without memory."""

from functools import lru_cache

from torch import nn

from minigpt.config import ModelConfig
from minigpt.model.registry import model_class


def parameter_count(config: ModelConfig) -> int:
    """Return the number of parameters, tied ones counted once."""
    return _counts(config)[0]


def training_flops_per_token(config: ModelConfig) -> int:
    """Return the FLOPs of a forward and backward pass over one token of a full context.

    Six per parameter that multiplies (lookups do not), and what the score declares per attention
    weight, for half the context on average, because the mask is causal, or for a sliding window.
    Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    return _counts(config)[1]


@lru_cache(maxsize=64)
def _counts(config: ModelConfig) -> tuple[int, int]:
    model = model_class(config).without_weights(config)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    n_lookups = sum(embedding.weight.numel() for embedding in embeddings)
    if config.tie_embeddings:
        n_lookups -= model.embedding.weight.numel()
    flops = 6 * (n_parameters - n_lookups)
    width = config.n_head * config.d_head
    for attention in model.attentions:
        seen = min(attention.score.window or config.context_length, config.context_length)
        seen_on_average = seen * (2 * config.context_length - seen) // (2 * config.context_length)
        flops += attention.score.flops_per_weight * width * seen_on_average
    return n_parameters, flops


def cache_bytes_per_token(config: ModelConfig, bytes_per_value: int = 4) -> int:
    """Return the cache bytes of one position of one sequence.

    An LSTM stores both states of each layer for each position, so that the cache can be truncated.
    """
    return 2 * config.n_layer * config.n_kv_head * config.d_head * bytes_per_value
