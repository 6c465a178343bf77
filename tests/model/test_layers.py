"""Norms, MLPs and rotary positions against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from kept_attention import KeptAttention
from small_models import small_config, small_model

from minigpt.model.attention import PassCollector
from minigpt.model.layers import MLP, GatedMLP, make_norm, rotary_table, rotate

ACTIVATIONS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_the_llama_norm_divides_by_the_root_mean_square() -> None:
    norm = make_norm(small_config("llama", norm_eps=0.1), 32)
    norm.weight.copy_(normal(32))
    x = normal(5, 32, seed=1) * 3 + 1  # a nonzero mean, which LayerNorm would subtract
    expected = x / (x.square().mean(dim=-1, keepdim=True) + 0.1).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


@torch.no_grad()
def test_the_gpt2_norm_subtracts_the_mean_and_divides_by_the_deviation() -> None:
    norm = make_norm(small_config("gpt2", norm_eps=0.1), 32)
    norm.weight.copy_(normal(32))
    norm.bias.copy_(normal(32, seed=2))
    x = normal(5, 32, seed=1) * 3 + 1
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    expected = centred / (variance + 0.1).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@torch.no_grad()
def test_both_mlps_equal_their_formulas(activation: str) -> None:
    def act(x: torch.Tensor) -> torch.Tensor:
        return torch.tensor([ACTIVATIONS[activation](v) for v in x.flatten().tolist()]).view_as(x)

    x = normal(2, 3, 32)
    plain = MLP(small_config("gpt2", activation=activation))
    hidden = act(x @ plain.up.weight.T + plain.up.bias)
    torch.testing.assert_close(plain(x), hidden @ plain.down.weight.T + plain.down.bias)
    gated = GatedMLP(small_config("llama", activation=activation))
    hidden = act(x @ gated.gate.weight.T) * (x @ gated.up.weight.T)
    torch.testing.assert_close(gated(x), hidden @ gated.down.weight.T)


def test_rotary_rotates_pairs_of_the_two_halves_as_complex_numbers() -> None:
    config = small_config("llama", rope_theta=500.0)
    x = normal(1, 2, 24, 8)
    z = torch.complex(x[..., :4].double(), x[..., 4:].double())
    position = torch.arange(24, dtype=torch.float64)[:, None]
    angle = position * 500.0 ** (-2 * torch.arange(4, dtype=torch.float64) / 8)
    turned = z * torch.exp(1j * angle)
    expected = torch.cat((turned.real, turned.imag), dim=-1).float()
    # float32 angles up to 23 are exact to 2e-6.
    torch.testing.assert_close(rotate(x, *rotary_table(config)), expected, rtol=1e-5, atol=1e-5)


def test_rotary_scores_depend_only_on_the_distance() -> None:
    config = small_config("llama", context_length=2000)
    cos, sin = rotary_table(config)
    q, k = normal(8).double(), normal(8, seed=1).double()

    def score(t: int, s: int) -> float:
        at_t = rotate(q[None], cos[t : t + 1].double(), sin[t : t + 1].double())
        at_s = rotate(k[None], cos[s : s + 1].double(), sin[s : s + 1].double())
        return (at_t * at_s).sum().item()

    scores = [score(distance, 0) for distance in (0, 1, 7, 300)]
    assert len({round(s, 3) for s in scores}) == 4  # different distances give different scores
    for start in (1, 10, 1500):
        shifted = [score(start + distance, start) for distance in (0, 1, 7, 300)]
        # A float32 table represents angles near a thousand to 6e-5.
        torch.testing.assert_close(shifted, scores, rtol=0, atol=1e-3)


def test_rotary_keeps_vector_norms() -> None:
    x = normal(2, 3, 24, 8)
    turned = rotate(x, *rotary_table(small_config("llama")))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


@pytest.mark.integration
@torch.no_grad()
def test_learned_positions_start_at_the_cache_length() -> None:
    model = small_model("gpt2")
    tokens = torch.full((1, 24), 5)
    before = model(tokens)
    model.positions.weight[10] += 1
    after = model(tokens)
    assert torch.equal(after[:, :10], before[:, :10])
    assert not torch.allclose(after[:, 10], before[:, 10])


def test_qk_norm_is_per_head_and_before_the_rotation() -> None:
    model = small_model("qwen3", n_kv_head=2)
    attention = model.blocks[0].attention
    x = normal(1, 6, 32)

    kept = KeptAttention()
    collector = PassCollector(kept, 6)
    rotary = model.rotary_cos[:6], model.rotary_sin[:6]
    attention(x, rotary, collector=collector)
    collector.finish()
    assert kept.last.queries is not None
    assert kept.last.keys is not None
    heads = attention.query(x).view(1, 6, 4, 10)
    normed = F.normalize(heads, dim=-1) * 10**0.5 * attention.query_norm.weight
    torch.testing.assert_close(
        kept.last.queries[0], rotate(normed.transpose(1, 2), *rotary), rtol=1e-3, atol=1e-4
    )  # accounts for the epsilon under the root
    heads = attention.key(x).view(1, 6, 2, 10)
    normed = F.normalize(heads, dim=-1) * 10**0.5 * attention.key_norm.weight
    torch.testing.assert_close(
        kept.last.keys[0], rotate(normed.transpose(1, 2), *rotary), rtol=1e-3, atol=1e-4
    )
