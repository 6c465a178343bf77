"""The complete model: initial weights, loading, options of forward, and dtypes."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import LAYOUTS, random_tokens, small_config, small_model

from minigpt.model.cache import KVCache
from minigpt.model.gpt import GPT


def initialised(layout: str, *, seed: int = 1, **changes: Any) -> GPT:
    model = GPT(small_config(layout, **changes))
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def test_llama_blocks_are_initialized_as_the_identity() -> None:
    model = initialised("qwen3")
    x = torch.randn(2, 5, 32)
    rotary = model.rotary_cos[:5], model.rotary_sin[:5]
    for block in model.blocks:
        assert torch.equal(block(x, rotary), x)


@pytest.mark.parametrize(
    ("layout", "tolerance"),
    # Exactly uniform where the output projection is zero, nearly where logits are small and random.
    [("llama", 1e-6), ("qwen3", 1e-6), ("gpt2", 0.05), ("gpt2-tied", 0.05)],
)
@torch.no_grad()
def test_the_loss_of_a_new_model_is_that_of_a_uniform_distribution(
    layout: str, tolerance: float
) -> None:
    model = initialised(layout)
    tokens = random_tokens(16, 24)
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(61), abs=tolerance)


def test_initial_weights_have_the_documented_standard_deviations() -> None:
    wide = {"d_model": 128, "vocab_size": 500}
    gpt2 = dict(initialised("gpt2", **wide).named_parameters())
    llama = dict(initialised("llama", **wide).named_parameters())
    expected = {
        "embedding.weight": 0.02,
        "positions.weight": 0.02,
        "blocks.1.attention.query.weight": 0.02,
        "blocks.0.mlp.up.weight": 0.02,
        "blocks.0.attention.output.weight": 0.02 / 2,  # sqrt(2 n_layer) is 2
        "blocks.1.mlp.down.weight": 0.02 / 2,
        "unembedding.weight": 0.02,
    }
    for name, std in expected.items():
        # With at least 3,072 draws, the standard deviation is known to 1 / sqrt(2 n), 1.3%.
        assert gpt2[name].std().item() == pytest.approx(std, rel=0.06), name
    for name in ("blocks.0.attention.query.weight", "blocks.1.mlp.gate.weight"):
        assert llama[name].std().item() == pytest.approx(128**-0.5, rel=0.06), name
    for parameters in (gpt2, llama):
        for name, parameter in parameters.items():
            if name.endswith("bias"):
                assert (parameter == 0).all(), name
            elif "norm" in name:
                assert (parameter == 1).all(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_initial_weights_are_determined_by_the_seed(layout: str) -> None:
    state = torch.random.get_rng_state()
    one, same, other = (initialised(layout, seed=seed).state_dict() for seed in (1, 1, 2))
    for name, tensor in one.items():
        assert torch.equal(tensor, same[name]), name
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])
    assert one.keys() == same.keys()
    torch.random.set_rng_state(state)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_model_built_from_the_tensors_of_another_equals_it(layout: str) -> None:
    model = small_model(layout)
    tensors = model.state_dict()
    again = GPT.from_tensors(model.config, tensors).eval()
    tokens = random_tokens(2, 24)
    assert torch.equal(again(tokens), model(tokens))
    assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))
    assert all(p.requires_grad for p in again.parameters())
    # The weights are not copied.
    assert again.embedding.weight.data_ptr() == tensors["embedding.weight"].data_ptr()


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_tensors_that_do_not_fit_raise(change: str) -> None:
    model = small_model("llama")
    tensors = dict(model.state_dict())
    if change == "missing":
        del tensors["blocks.1.mlp.up.weight"]
    elif change == "extra":
        tensors["blocks.1.mlp.up.bias"] = torch.zeros(96)
    else:
        tensors["blocks.1.mlp.up.weight"] = torch.zeros(96, 31)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.mlp\.up"):
        GPT.from_tensors(model.config, tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_logits_to_keep_returns_the_last_positions_of_the_full_logits(layout: str) -> None:
    model = small_model(layout)
    tokens = random_tokens(2, 10)
    everything = model(tokens)
    assert everything.shape == (2, 10, 61)
    for n in (1, 3, 10):
        kept = model(tokens, logits_to_keep=n)
        assert kept.shape == (2, n, 61)
        # The same products, computed with another number of rows.
        torch.testing.assert_close(kept, everything[:, -n:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_tied_embeddings_are_the_output_projection() -> None:
    tied = small_model("gpt2-tied")
    assert "unembedding.weight" not in tied.state_dict()
    tensors = {**tied.state_dict(), "unembedding.weight": tied.embedding.weight.clone()}
    untied = GPT.from_tensors(small_config("gpt2-tied", tie_embeddings=False), tensors).eval()
    tokens = random_tokens(2, 24)
    assert torch.equal(tied(tokens), untied(tokens))


def test_every_weight_of_a_tied_or_untied_model_gets_a_gradient() -> None:
    for layout in LAYOUTS:
        model = small_model(layout)
        model(random_tokens(2, 24)).logsumexp(dim=-1).sum().backward()
        for name, parameter in model.named_parameters():
            # A constant added to every key leaves the softmax unchanged: its gradient is noise.
            assert parameter.grad is not None, name
            assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_bfloat16_logits_are_close_to_float32(layout: str) -> None:
    model = small_model(layout)
    for parameter in model.parameters():  # small enough that rounding errors do not grow
        parameter.mul_(0.5)
    tensors = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    half = GPT.from_tensors(model.config, tensors).eval()
    tokens = random_tokens(2, 24)
    cache = KVCache(model.config, batch_size=2, dtype=torch.bfloat16)
    exact, close = model(tokens), half(tokens)
    cached = torch.cat([half(part, cache) for part in tokens.split([20, 1, 1, 2], dim=1)], dim=1)
    assert close.dtype == cached.dtype == torch.bfloat16
    # bfloat16 rounds to 1 part in 256, about thirty times in two blocks.
    scale = exact.abs().max().item()
    torch.testing.assert_close(close.float(), exact, rtol=0, atol=0.06 * scale)
    torch.testing.assert_close(cached.float(), exact, rtol=0, atol=0.06 * scale)
    # The logits were not computed in float32.
    assert not torch.allclose(close.float(), exact, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_autocast_logits_are_close_and_weights_stay_float32(layout: str) -> None:
    model = small_model(layout)
    for parameter in model.parameters():
        parameter.mul_(0.5)
    tokens = random_tokens(2, 24)
    exact = model(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close = model(tokens)
        cache = KVCache(model.config, batch_size=2)
        cached = torch.cat([model(part, cache) for part in tokens.split([9, 14, 1], dim=1)], dim=1)
    scale = exact.abs().max().item()
    torch.testing.assert_close(close.float(), exact, rtol=0, atol=0.06 * scale)
    torch.testing.assert_close(cached.float(), exact, rtol=0, atol=0.06 * scale)
    assert torch.equal(model(tokens), exact)


def test_dropout_is_active_in_training_only() -> None:
    model = small_model("gpt2", dropout=0.5)
    tokens = random_tokens(1, 24)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    torch.manual_seed(0)
    assert not torch.allclose(model(tokens), model(tokens))
