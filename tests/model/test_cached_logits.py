"""Logits with a KV cache equal those of a forward pass without one."""

import pytest
import torch
from small_models import LAYOUTS, random_tokens, small_config, small_model
from torch import Tensor

from minigpt.model.cache import KVCache
from minigpt.model.gpt import GPT
from minigpt.model_config import ATTENTIONS

# float32 sums over at most 24 keys and 32 channels, in another order than the full forward's.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def cached_logits(model: GPT, tokens: Tensor, chunks: list[int], cache: KVCache) -> Tensor:
    parts = [model(part, cache) for part in tokens.split(chunks, dim=1)]
    return torch.cat(parts, dim=1)


@pytest.fixture(params=[*LAYOUTS, *(name for name in ATTENTIONS if name != "scaled_dot")])
def model(request: pytest.FixtureRequest) -> GPT:
    if request.param in LAYOUTS:
        return small_model(request.param)
    return small_model("llama-grouped", attention=request.param)


@pytest.mark.parametrize(
    "chunks",
    [[1] * 24, [24], [10] + [1] * 14, [7, 7, 7, 3], [1, 2, 3, 4, 5, 6, 3], [23, 1], [2] * 12],
    ids=lambda chunks: f"{chunks[0]}-then-{len(chunks) - 1}-more",
)
@torch.no_grad()
def test_cached_logits_equal_a_full_forward_at_every_position(
    model: GPT, chunks: list[int]
) -> None:
    tokens = random_tokens(3, 24)
    cache = KVCache(model.config, batch_size=3)
    torch.testing.assert_close(
        cached_logits(model, tokens, chunks, cache), model(tokens), **TOLERANCE
    )
    assert cache.length == 24


@torch.no_grad()
def test_cached_logits_equal_those_of_every_prefix_alone(model: GPT) -> None:
    """An oracle without a mask: the last position of each prefix, recomputed without a cache."""
    tokens = random_tokens(2, 24)
    cache = KVCache(model.config, batch_size=2)
    logits = cached_logits(model, tokens, [9] + [1] * 15, cache)
    for length in range(1, 25):
        alone = model(tokens[:, :length])[:, -1]
        torch.testing.assert_close(logits[:, length - 1], alone, **TOLERANCE)


@pytest.mark.parametrize("kept", [0, 1, 8, 15])
@torch.no_grad()
def test_a_truncated_cache_equals_one_that_was_never_longer(model: GPT, kept: int) -> None:
    tokens = random_tokens(2, 24)
    cache = KVCache(model.config, batch_size=2)
    model(random_tokens(2, 20, seed=4).index_copy(1, torch.arange(kept), tokens[:, :kept]), cache)
    cache.truncate(kept)
    assert cache.length == kept
    after = cached_logits(model, tokens[:, kept:], [5, 1, 24 - kept - 6], cache)
    torch.testing.assert_close(after, model(tokens)[:, kept:], **TOLERANCE)


@torch.no_grad()
def test_a_cache_of_small_capacity_gives_the_same_logits(model: GPT) -> None:
    tokens = random_tokens(1, 6)
    cache = KVCache(model.config, capacity=6)
    torch.testing.assert_close(
        cached_logits(model, tokens, [4, 1, 1], cache), model(tokens), **TOLERANCE
    )


def test_a_full_cache_raises() -> None:
    model = small_model("llama-grouped")
    cache = KVCache(model.config, capacity=6)
    model(random_tokens(1, 5), cache)
    with pytest.raises(ValueError, match="holds 6 positions; 7 were asked for"):
        model(random_tokens(1, 2), cache)
    assert cache.length == 5


@pytest.mark.parametrize("layout", ["gpt2", "llama"])
def test_more_positions_than_the_context_raise_with_and_without_a_cache(layout: str) -> None:
    model = small_model(layout)
    message = "the model sees 24 positions; 25 were given"
    with pytest.raises(ValueError, match=message):
        model(random_tokens(1, 25))
    cache = KVCache(model.config, capacity=40)
    model(random_tokens(1, 24), cache)
    with pytest.raises(ValueError, match=message):
        model(random_tokens(1, 1), cache)


@pytest.mark.parametrize("length", [-1, 4, 24])
def test_truncating_to_more_than_the_length_raises(length: int) -> None:
    cache = KVCache(small_config())
    small_model()(random_tokens(1, 3), cache)
    with pytest.raises(ValueError, match=f"a cache of 3 positions to {length}"):
        cache.truncate(length)


def test_the_cache_writes_only_its_new_positions() -> None:
    cache = KVCache(small_config("llama-grouped"), batch_size=2)
    cache.keys_LBGSD.fill_(9)
    cache.values_LBGSD.fill_(9)
    cache.advance(3)
    new = torch.zeros(2, 2, 4, 8)
    keys, values = cache.write(1, new, new)
    assert keys.shape == values.shape == (2, 2, 7, 8)
    for stored in (cache.keys_LBGSD, cache.values_LBGSD):
        assert (stored[1, :, :, 3:7] == 0).all()
        assert stored.sum() == 9 * (stored.numel() - new.numel())
