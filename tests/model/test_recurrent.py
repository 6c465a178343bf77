"""The LSTMs against plain loops over the cell equations, with and without a cache."""

from typing import Any

import pytest
import torch
from kept_attention import KeptAttention
from laid_out import in_int8
from small_models import random_tokens, randomized
from torch import Tensor

from minigpt.config import ModelConfig
from minigpt.errors import ConfigError
from minigpt.model.cache import KVCache, cache_bytes_per_token
from minigpt.model.cost import parameter_count, training_flops_per_token
from minigpt.model.language_model import LanguageModel, model_class
from minigpt.model_config import ARCHS

RECURRENT = tuple(arch for arch in ARCHS if arch != "gpt")
KINDS: dict[str, dict[str, Any]] = {
    "lstm": {"arch": "lstm"},
    "lstm-tied": {"arch": "lstm", "tie_embeddings": True},
    "lstm-attention": {"arch": "lstm-attention"},
    # Luong et al. attended with multiplicative scores.
    "lstm-general": {"arch": "lstm-attention", "attention": "general"},
    "lstm-concat": {"arch": "lstm-attention", "attention": "concat", "tie_embeddings": True},
}
# float32 sums over at most 24 positions and 12 channels, in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def config_of(kind: str, **changes: Any) -> ModelConfig:
    shape = {"vocab_size": 61, "context_length": 24, "n_layer": 2, "n_head": 1, "d_model": 12}
    return ModelConfig(**(shape | KINDS[kind] | changes))


def model_of(kind: str, **changes: Any) -> LanguageModel:
    """Return a model in evaluation mode whose weights are all random."""
    config = config_of(kind, **changes)
    model = model_class(config)(config)
    return randomized(model, std=0.5)


def plain_logits(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Return logits (T, V) of one sequence from the papers' equations, one position at a time."""
    p = dict(model.named_parameters())
    width = model.config.d_model
    states = [torch.zeros(2, width, dtype=p["embedding.weight"].dtype) for _ in model.blocks]
    earlier: list[Tensor] = []
    rows = []
    for token in tokens.tolist():
        x = p["embedding.weight"][token]
        for layer, (h, c) in enumerate(states):
            w_x, w_h, b_x, b_h = (
                p[f"blocks.{layer}.lstm.{name}_l0"]
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            z = w_x @ x + b_x + w_h @ h + b_h
            i, f, g, o = (z[n * width : (n + 1) * width] for n in range(4))
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states[layer] = torch.stack((h, c))
            x = h
        earlier.append(x)
        if model.config.arch == "lstm-attention":
            x = attentional_state(model, p, x, earlier)
        x = x / (x.square().mean() + model.config.norm_eps).sqrt() * p["final_norm.weight"]
        unembedding = "embedding" if model.config.tie_embeddings else "unembedding"
        rows.append(p[f"{unembedding}.weight"] @ x)
    return torch.stack(rows)


def attentional_state(
    model: LanguageModel, p: dict[str, Tensor], h: Tensor, earlier: list[Tensor]
) -> Tensor:
    w = {name.rpartition(".")[2]: t for name, t in p.items() if ".score." in name}

    def score(s: Tensor) -> Tensor:
        if model.config.attention == "general":
            return h @ w["w"] @ s
        if model.config.attention == "concat":
            return w["v"] @ (w["w"] @ torch.cat((h, s))).tanh()
        return w["v"] @ (w["w_q"] @ h + w["w_k"] @ s).tanh()

    weights = torch.stack([score(s) for s in earlier]).softmax(dim=0)
    context = sum(a * s for a, s in zip(weights, earlier, strict=True))
    w_c = torch.cat((p["attention.output.weight"], p["attention.own.weight"]), dim=1)
    return (w_c @ torch.cat((context, h))).tanh()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_equal_those_of_plain_loops(kind: str) -> None:
    model = model_of(kind).double()
    tokens = random_tokens(2, 9)
    weights = torch.randn(2, 9, 61, dtype=torch.float64)
    results = []
    for compute in (model, lambda t: torch.stack([plain_logits(model, row) for row in t])):
        logits = compute(tokens)
        gradients = torch.autograd.grad((logits * weights).sum(), list(model.parameters()))
        results.append((logits, *gradients))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_in_bfloat16_are_near_those_in_float32_on_any_cpu(kind: str) -> None:
    model, tokens = model_of(kind), random_tokens(2, 12)
    found = []
    for is_cast in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            logits = model(tokens)
        logits.float().square().mean().backward()
        found.append([logits.float(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for exact, rounded in zip(*found, strict=True):
        assert (rounded - exact).norm() < 0.03 * exact.norm()  # 8 bits of mantissa


@pytest.mark.parametrize("chunks", [[1] * 24, [24], [10] + [1] * 14, [7, 7, 7, 3]])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_logits_equal_a_full_forward_at_every_position(kind: str, chunks: list[int]) -> None:
    model = model_of(kind)
    tokens = random_tokens(3, 24)
    cache = KVCache(model.config, batch_size=3)
    logits = torch.cat([model(part, cache) for part in tokens.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(tokens), **TOLERANCE)
    for length in (1, 8, 23):  # without the tokens that follow
        alone = model(tokens[:, :length])[:, -1]
        torch.testing.assert_close(logits[:, length - 1], alone, **TOLERANCE)


@pytest.mark.parametrize("kept", [0, 1, 8, 15])
@pytest.mark.parametrize("kind", ["lstm", "lstm-attention"])
@torch.no_grad()
def test_a_truncated_cache_equals_one_that_was_never_longer(kind: str, kept: int) -> None:
    model = model_of(kind)
    tokens = random_tokens(2, 24)
    cache = KVCache(model.config, batch_size=2)
    model(random_tokens(2, 20, seed=4).index_copy(1, torch.arange(kept), tokens[:, :kept]), cache)
    cache.truncate(kept)
    after = torch.cat([model(t, cache) for t in tokens[:, kept:].split([5, 19 - kept], 1)], dim=1)
    torch.testing.assert_close(after, model(tokens)[:, kept:], **TOLERANCE)


@torch.inference_mode()
def test_rows_of_the_cache_can_be_selected() -> None:
    model = model_of("lstm-attention")
    tokens = random_tokens(3, 12)
    cache = KVCache(model.config, batch_size=3)
    model(tokens[:, :8], cache)
    cache.select([2, 0, 2])
    after = model(tokens[[2, 0, 2], 8:], cache)
    torch.testing.assert_close(after, model(tokens)[[2, 0, 2], 8:], **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_changing_a_token_does_not_change_earlier_logits(kind: str) -> None:
    model = model_of(kind)
    tokens = random_tokens(1, 24)
    other = tokens.clone()
    other[0, 11] = (other[0, 11] + 1) % 61
    before, after = model(tokens), model(other)
    assert torch.equal(after[:, :11], before[:, :11])
    assert (after[0, 11:] != before[0, 11:]).any(dim=-1).all()


@torch.no_grad()
def test_masked_states_get_no_attention_and_an_lstm_without_attention_raises() -> None:
    model, tokens = model_of("lstm-attention"), random_tokens(1, 6)
    kept = KeptAttention()
    visible = torch.ones(1, 6, dtype=torch.bool)
    visible[0, 2] = False
    before = model(tokens, recorder=kept)
    after = model(tokens, visible_BS=visible)
    (weights,) = kept.weights(model)
    assert weights.shape == (1, 1, 6, 6)
    torch.testing.assert_close(
        weights[:, :, -1:] @ kept.last.values_LBGSD[0], kept.last.context_LBHD[0][:, :, None]
    )
    assert torch.equal(after[:, :2], before[:, :2])
    assert (after[0, 2:] != before[0, 2:]).any(dim=-1).all()
    with pytest.raises(ValueError, match="without attention cannot mask"):
        model_of("lstm")(tokens, visible_BS=visible)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_and_reloading_change_no_bit(kind: str) -> None:
    model = model_of(kind)
    tokens = random_tokens(2, 24)
    again = type(model).from_tensors(model.config, model.state_dict()).eval()
    assert torch.equal(again(tokens), model(tokens))
    gradients = []
    for recompute in (False, True):
        loss = model(tokens, recompute=recompute, logits_to_keep=3).square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_the_counted_cost_of_an_lstm_equals_the_model(kind: str) -> None:
    config = config_of(kind)
    model = model_class(config).without_weights(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())
    cache = KVCache(config, batch_size=3, capacity=5)
    assert cache.n_bytes == cache_bytes_per_token(config) * 3 * 5


def test_flops_grow_with_the_context_only_with_attention() -> None:
    def flops(kind: str, length: int) -> int:
        return training_flops_per_token(config_of(kind, context_length=length))

    assert flops("lstm", 24) == flops("lstm", 240)
    # one head of 12, and on average 108 more visible keys
    assert flops("lstm-attention", 240) - flops("lstm-attention", 24) == 18 * 12 * 108


def test_a_new_lstm_has_a_uniform_loss_and_a_forget_bias_of_one() -> None:
    model = model_of("lstm-attention")
    model.init_weights(torch.Generator().manual_seed(1))
    assert (model(random_tokens(1, 24)) == 0).all()
    p = dict(model.named_parameters())
    for layer in range(2):
        forget = p[f"blocks.{layer}.lstm.bias_ih_l0"] + p[f"blocks.{layer}.lstm.bias_hh_l0"]
        assert forget.view(4, 12)[1].eq(1).all()
        assert forget.view(4, 12)[[0, 2, 3]].eq(0).all()
        for name in ("weight_ih_l0", "weight_hh_l0"):  # 576 draws
            std = p[f"blocks.{layer}.lstm.{name}"].std().item()
            assert std == pytest.approx(24**-0.5, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "rnn"}, "unknown arch 'rnn'"),
        ({"arch": "lstm", "attention": "dot"}, "attention dot does not go with arch lstm"),
        ({"attention": "none"}, "attention none does not go with arch gpt"),
        ({"arch": "lstm", "n_head": 2}, "with arch lstm, n_head can only be 1: it is 2. Leave it"),
        ({"arch": "lstm-attention", "qk_norm": True}, "qk_norm can only be False"),
        ({"arch": "lstm", "family": "gpt2"}, "family can only be llama: it is gpt2"),
        ({"arch": "lstm", "model_type": "llama"}, "model_type 'llama' does not fit"),
    ],
)
def test_settings_that_an_lstm_does_not_support_raise(
    changes: dict[str, Any], message: str
) -> None:
    shape = {"vocab_size": 61, "context_length": 24, "n_layer": 2, "n_head": 1, "d_model": 12}
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**(shape | changes))


def test_quantizing_an_lstm_raises() -> None:
    with pytest.raises(ConfigError, match="quantize int8 needs arch gpt"):
        in_int8(model_of("lstm"))
