"""Costs computed from a config equal the costs that torch counts on the model."""

from typing import Any

import pytest
import torch
from small_models import LAYOUTS, random_tokens, small_config
from torch.utils.flop_counter import FlopCounterMode

from minigpt.model.cache import KVCache, cache_bytes_per_token
from minigpt.model.cost import parameter_count, training_flops_per_token
from minigpt.model.gpt import GPT
from minigpt.presets import PRESETS

SHAPES: list[dict[str, Any]] = [
    {},
    {"tie_embeddings": True},
    {"n_layer": 1, "n_head": 2, "n_kv_head": 2, "d_head": 16, "d_mlp": 7},
    {"vocab_size": 1, "context_length": 1},
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_parameter_counts_equal_the_model(layout: str, shape: dict[str, Any]) -> None:
    config = small_config(layout, **shape)
    with torch.device("meta"):
        model = GPT(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())


def test_gpt2_small_has_its_published_parameter_count() -> None:
    """124,439,808: openai-community/gpt2, whose output projection is the embedding."""
    config = small_config(
        "gpt2-tied", vocab_size=50257, context_length=1024, n_layer=12, n_head=12, d_model=768
    )
    assert parameter_count(config) == 124_439_808


@pytest.mark.parametrize(
    ("preset", "millions"), [("nano", (0.7, 1.5)), ("mini", (8, 13)), ("small", (100, 150))]
)
def test_presets_have_about_their_documented_size(
    preset: str, millions: tuple[float, float]
) -> None:
    vocab_size = 50257 if preset == "small" else 257
    config = small_config(**{"d_model": 32, "vocab_size": vocab_size, **PRESETS[preset]["model"]})
    assert millions[0] * 1e6 < parameter_count(config) < millions[1] * 1e6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_flops_agree_with_torchs_flop_counter(layout: str) -> None:
    config = small_config(layout, context_length=64)
    model = GPT(config)
    tokens = random_tokens(1, 64)
    # The counter counts attention as a full square, or not at all in torch's CPU kernel, so
    # attention is added here as the causal half, with one forward and two backward products.
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "attention" not in str(op))
    n_pairs = 64 * 64 // 2
    attention = config.n_layer * config.n_head * n_pairs * config.d_head * 2 * 2 * 3
    # Ours also counts six FLOPs per weight and bias of a norm, which add under 4% here.
    assert training_flops_per_token(config) * 64 == pytest.approx(products + attention, rel=0.04)
    assert training_flops_per_token(config) * 64 >= products + attention


def test_training_flops_of_a_tiny_model_equal_a_calculation_by_hand() -> None:
    config = small_config("llama", vocab_size=10, n_layer=1, n_head=1, d_model=4, d_mlp=8)
    # four 4 x 4 projections, three 4 x 8 matrices, three norms of 4, a 4 x 10 output projection;
    # the 10 x 4 embedding is only a lookup
    weights = 4 * 16 + 3 * 32 + 3 * 4 + 40
    # a query sees 12 of 24 keys: 2 products of 2 * 4 FLOPs a key, three times (forward, backward)
    attention = 12 * 2 * 2 * 4 * 3
    assert training_flops_per_token(config) == 6 * weights + attention


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cache_bytes_equal_the_allocated_size_of_the_cache(layout: str) -> None:
    config = small_config(layout)
    cache = KVCache(config, batch_size=3, capacity=5)
    assert cache.n_bytes == cache_bytes_per_token(config) * 3 * 5
    half = KVCache(config, capacity=7, dtype=torch.bfloat16)
    assert half.n_bytes == cache_bytes_per_token(config, bytes_per_value=2) * 7


@pytest.mark.parametrize(
    "biases",
    [{"attention_bias": "qkv", "n_kv_head": 2}, {"attention_bias": "all"}, {"mlp_bias": True}],
)
def test_the_biases_of_llama_layouts_are_counted(biases: dict[str, Any]) -> None:
    config = small_config("llama", **biases)
    with torch.device("meta"):
        model = GPT(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())
