"""Attention against plain loops over heads, queries and keys, in float64."""

import math
from typing import Any

import pytest
import torch
from kept_attention import KeptAttention
from small_models import LAYOUTS, random_tokens, small_model
from torch import Tensor

from minigpt.model.attention import Attention, AttentionPass, PassCollector
from minigpt.model.gpt import GPT
from minigpt.model.scores import causal_mask, causal_softmax, scaled_dot_score


def rotated(vector: list[float], position: int, theta: float) -> list[float]:
    """Multiply each pair (x_i, x_{i + D/2}), as a complex number, by e^(i position frequency)."""
    half = len(vector) // 2
    result = [0.0] * len(vector)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(vector))
        z = complex(vector[i], vector[i + half]) * complex(math.cos(angle), math.sin(angle))
        result[i], result[i + half] = z.real, z.imag
    return result


def rms_normed(vector: list[float], weight: list[float], eps: float) -> list[float]:
    root = math.sqrt(sum(x * x for x in vector) / len(vector) + eps)
    return [x / root * w for x, w in zip(vector, weight, strict=True)]


def plain_attention(attention: Attention, x: Tensor, model: GPT) -> tuple[Tensor, Tensor]:
    """Return the output (T, C) and the weights (H, T, T) of one sequence x (T, C)."""
    config = model.config
    attention = attention.double()
    x = x.double()
    n, d = len(x), config.d_head

    def projected(linear: torch.nn.Linear, t: int, head: int) -> list[float]:
        rows = linear.weight[head * d : (head + 1) * d].tolist()
        bias = linear.bias[head * d : (head + 1) * d].tolist() if linear.bias is not None else None
        source = x[t].tolist()
        products = [sum(w * s for w, s in zip(row, source, strict=True)) for row in rows]
        return [p + (bias[i] if bias else 0.0) for i, p in enumerate(products)]

    def positioned(vector: list[float], t: int, norm: torch.nn.Module) -> list[float]:
        if config.qk_norm:
            vector = rms_normed(vector, norm.weight.tolist(), config.norm_eps)
        return rotated(vector, t, config.rope_theta) if config.family == "llama" else vector

    contexts = torch.zeros(n, config.n_head * d, dtype=torch.float64)
    weights = torch.zeros(config.n_head, n, n, dtype=torch.float64)
    for head in range(config.n_head):
        group = head // (config.n_head // config.n_kv_head)
        keys = [
            positioned(projected(attention.key, s, group), s, attention.key_norm) for s in range(n)
        ]
        values = [projected(attention.value, s, group) for s in range(n)]
        for t in range(n):
            query = positioned(projected(attention.query, t, head), t, attention.query_norm)
            scores = [
                sum(a * b for a, b in zip(query, keys[s], strict=True)) / math.sqrt(d)
                for s in range(t + 1)
            ]
            exps = [math.exp(score - max(scores)) for score in scores]
            for s in range(t + 1):
                weights[head, t, s] = exps[s] / sum(exps)
                for i in range(d):
                    contexts[t, head * d + i] += exps[s] / sum(exps) * values[s][i]
    output = contexts @ attention.output.weight.T
    return output + (attention.output.bias if attention.output.bias is not None else 0), weights


def attend(attention: Attention, x: Tensor, rotary: Any) -> tuple[Tensor, AttentionPass]:
    """Return the output of one layer and its recorded pass."""
    kept = KeptAttention()
    collector = PassCollector(kept, x.shape[1])
    output = attention(x, rotary, collector=collector)
    collector.finish()
    return output, kept.last


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_attention_equals_plain_loops(layout: str) -> None:
    model = small_model(layout, d_model=16, n_head=4, d_head=6 if layout == "qwen3" else 4)
    attention = model.blocks[1].attention
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    is_llama = model.config.family == "llama"
    rotary = (model.rotary_cos[:9], model.rotary_sin[:9]) if is_llama else None
    output, shown = attend(attention, x, rotary)
    assert shown.queries is not None
    assert shown.keys is not None
    weights = causal_softmax(scaled_dot_score(shown.queries[0], shown.keys[0]))
    torch.testing.assert_close(shown.weights_LBHS[0], weights[:, :, -1])
    for i in range(2):
        expected_output, expected_weights = plain_attention(attention, x[i], model)
        # float32 against float64, with sums of about ten terms of order 1.
        torch.testing.assert_close(output[i].double(), expected_output, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights[i].double(), expected_weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_changing_a_token_does_not_change_earlier_logits(layout: str) -> None:
    model = small_model(layout)
    tokens = random_tokens(1, 24)
    before = model(tokens)
    for changed in (0, 1, 11, 23):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % 61
        after = model(other)
        # The same kernels on the same numbers must give the same bits.
        assert torch.equal(after[:, :changed], before[:, :changed])
        is_changed = (after[0, changed:] != before[0, changed:]).any(dim=-1)
        assert is_changed.all()


@pytest.mark.parametrize("n_group", [1, 2, 6])
def test_scores_of_grouped_heads_equal_those_of_repeated_keys(n_group: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 5, 8, generator=generator)
    k = torch.randn(2, n_group, 7, 8, generator=generator)
    repeated = k.repeat_interleave(6 // n_group, dim=1)
    expected = torch.einsum("bhtd,bhsd->bhts", q.double(), repeated.double()) / 8**0.5
    # float32 sums of eight products.
    torch.testing.assert_close(scaled_dot_score(q, k), expected.float(), rtol=1e-5, atol=1e-6)


def test_half_precision_scores_are_computed_in_float32() -> None:
    q, k = (torch.randn(1, 2, 3, 16, dtype=torch.bfloat16) for _ in range(2))
    score = scaled_dot_score(q, k)
    assert score.dtype == torch.float32
    assert torch.equal(score, scaled_dot_score(q.float(), k.float()))


@pytest.mark.parametrize(("n_query", "n_key"), [(1, 1), (1, 5), (3, 3), (3, 7), (7, 7)])
def test_the_causal_mask_is_aligned_to_the_last_key(n_query: int, n_key: int) -> None:
    mask = causal_mask(n_query, n_key)
    for t in range(n_query):
        for s in range(n_key):
            assert mask[t, s].item() == (s <= t + n_key - n_query)


def test_huge_scores_give_weights_without_nan() -> None:
    q = torch.full((1, 1, 4, 2), 1e15)
    k = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None].expand(4, 2).mul(1e15)[None, None]
    weights = causal_softmax(scaled_dot_score(q, k))
    expected = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0], [0.5, 0, 0.5, 0], [0.5, 0, 0.5, 0]])
    torch.testing.assert_close(weights[0, 0], expected)


def test_neighbouring_query_heads_share_a_key_head() -> None:
    """Heads 0 and 1 use key head 0, 2 and 3 use key head 1, as in Hugging Face's repeat_kv."""
    model = small_model("llama-grouped")
    attention = model.blocks[0].attention
    rotary = (model.rotary_cos[:5], model.rotary_sin[:5])
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = attend(attention, x, rotary)[1].context_LBHD[0]
        attention.value.weight[8:].zero_()  # key/value head 1
        after = attend(attention, x, rotary)[1].context_LBHD[0]
    assert torch.equal(after[:, :2], before[:, :2])
    assert (after[:, 2:] == 0).all()
