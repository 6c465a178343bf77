"""LongRoPE: different RoPE frequencies for texts longer than the original context.

A text of up to ``original_max_position_embeddings`` tokens uses the short factors, and a longer one
uses the long factors at all positions.

Source: Ding et al. 2024, arXiv:2402.13753; transformers, modeling_rope_utils.py.
"""

import math
from collections.abc import Mapping
from functools import cache as cached
from typing import Any

import torch
from torch import Tensor

from minigpt.checkpoint.families import head_width, hf_fields, is_positive, unsupported
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError
from minigpt.model.attention import Recorder
from minigpt.model.cache import KVCache
from minigpt.model.gpt import GPT
from minigpt.model.layers import Rotary

LONGROPE = "longrope"
_LISTS = ("short_factor", "long_factor")
ORIGINAL_CONTEXT = "original_max_position_embeddings"
"""Field of config.json with the context length before RoPE was scaled."""
_KNOWN = {*_LISTS, ORIGINAL_CONTEXT, "factor", "attention_factor"}
_ELSEWHERE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


class LongRope(GPT):
    """Mixin for a GPT whose RoPE frequencies depend on the length of the text."""

    def __init__(self, config: ModelConfig) -> None:
        self.original_context = min(long_rope_of(config)[ORIGINAL_CONTEXT], config.context_length)
        super().__init__(config)

    def rotary_table(self, divisor: Tensor | None = None, scale: float = 1.0) -> Rotary:
        """Return cos and sin: the original context (short factors), then all positions (long)."""
        scaling, n = long_rope_of(self.config), self.original_context
        scale = scaling["attention_factor"]
        short, long = (torch.tensor(scaling[name], device="cpu") for name in _LISTS)
        tables = super().rotary_table(short, scale), super().rotary_table(long, scale)
        cos, sin = (torch.cat((a[:n], b)) for a, b in zip(*tables, strict=True))
        return cos, sin

    def rotary(self, start: int, end: int) -> Rotary:
        n = self.original_context
        return super().rotary(start + n, end + n) if end > n else super().rotary(start, end)

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        recorder: Recorder | None = None,
        *,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> Tensor:
        """Return the logits, like GPT.

        If the keys in the cache have the other frequencies, all tokens are computed again.
        """
        if cache is not None:
            start, end = self.positions_of(tokens, cache)
            held_BS = tokens[:, :0] if cache.tokens_BS is None else cache.tokens_BS[:, :start]
            cache.tokens_BS = torch.cat((held_BS, tokens), dim=1)
            is_long = end > self.original_context
            if start and is_long != cache.is_long:
                logits_to_keep = logits_to_keep or tokens.shape[1]
                tokens = cache.tokens_BS
                cache.truncate(0)
            cache.is_long = is_long
        return super().forward(tokens, cache, recorder, logits_to_keep=logits_to_keep, **options)


def cache_of(model: LongRope, cache: KVCache, n_tokens: int) -> KVCache:
    """Return a cache whose first ``n_tokens`` positions have the frequencies of that length.

    Args: cache, of a longer text.
    """
    if cache.is_long == (n_tokens > model.original_context):
        return cache
    assert cache.tokens_BS is not None
    keys = cache.keys_LBGSD
    shorter = KVCache(model.config, capacity=n_tokens, device=keys.device, dtype=keys.dtype)
    model(cache.tokens_BS[:1, :n_tokens], shorter)
    return shorter


@cached
def with_long_rope(base: type[GPT]) -> type[GPT]:
    """Return a subclass of a family's model class with LongRoPE."""
    return type(f"LongRope{base.__name__}", (LongRope, base), {})


def long_rope_of(config: ModelConfig) -> dict[str, Any]:
    """Return a model's LongRoPE parameters, as from ``read_long_rope``; {} if it has none."""
    return hf_fields(config).get("rope_scaling", {})


def read_long_rope(
    rope: Mapping[str, Any], name: str, config: Mapping[str, Any], share: Any
) -> dict[str, Any]:
    """Return the LongRoPE parameters in config.json, with the defaults that transformers derives.

    Args: rope, the field ``name`` of config.json; share, rotated fraction of each head.
    Raises: CheckpointError for a parameter that is unknown or has the wrong type.
    """
    for key, value in rope.items():
        if key not in _KNOWN | _ELSEWHERE and value is not None:
            raise CheckpointError(
                f"{name} has the unknown field {key[:80]!r}. If it does not change "
                "what the model computes, remove it."
            )
    # transformers prefers the top-level field of config.json, where Phi-3 has it.
    original = config.get(ORIGINAL_CONTEXT, rope.get(ORIGINAL_CONTEXT))
    context: Any = config.get("max_position_embeddings")
    original = context if original is None else original
    if type(original) is not int or original < 2:
        raise unsupported(ORIGINAL_CONTEXT, original, "an integer of 2 or more")
    n_factors = int(head_width(config) * share) // 2 if is_positive(share) else 0
    for key in _LISTS:
        factors: Any = rope.get(key)
        is_fitting = isinstance(factors, list) and len(factors) == n_factors
        if not is_fitting or not all(map(is_positive, factors)):
            expected = f"a list of {n_factors} positive numbers"
            raise unsupported(f"{name}.{key}", factors, expected)
    given = {key: rope[key] for key in ("factor", "attention_factor") if rope.get(key) is not None}
    for key, value in given.items():
        if not is_positive(value):
            raise unsupported(f"{name}.{key}", value, "a positive number")
    factor = given.get("factor") or (context / original if is_positive(context) else 1.0)
    ratio = math.log(factor) / math.log(original) if factor > 1 else 0.0
    derived = {"attention_factor": math.sqrt(1 + ratio)}
    lists = {key: rope[key] for key in _LISTS}
    return {"rope_type": LONGROPE, ORIGINAL_CONTEXT: original} | lists | derived | given
