"""The CPU attention kernel for training equals torch's attention, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from small_models import random_tokens, small_model

from minigpt.training import kernels
from minigpt.training.trainer import TrainingLoss


def inputs(*, n_head: int, n_group: int, n_query: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, n_head, n_query, 16), (2, n_group, n_query, 16), (2, n_group, n_query, 16)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("n_query", [1, 7, 64, 200])
@pytest.mark.parametrize("n_group", [1, 2, 4])
def test_the_backward_pass_of_the_cpu_kernel_equals_that_of_torch(
    n_query: int, n_group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 64)
    q, k, v = inputs(n_head=4, n_group=n_group, n_query=n_query, dtype=torch.float32)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(out, (q, k, v), gradient)
    with torch.no_grad():
        actual = kernels.attention_backward(gradient, q, k, v)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_query", [1, 7, 64])
@pytest.mark.parametrize("n_group", [1, 2, 4])
def test_the_kernel_of_short_sequences_equals_torch(n_query: int, n_group: int) -> None:
    q, k, v = inputs(n_head=4, n_group=n_group, n_query=n_query, dtype=torch.float32)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    actual = kernels._ShortAttention.apply(q, k, v)
    torch.testing.assert_close(actual, expected)
    gradient = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad(out, (q, k, v), gradient) for out in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [1, 20])  # 20 gives scores of up to 80
@pytest.mark.parametrize("n_query", [5, 64, 300])
def test_in_bfloat16_the_kernel_is_as_accurate_as_that_of_torch(n_query: int, factor: int) -> None:
    q, k, v = inputs(n_head=4, n_group=2, n_query=n_query, dtype=torch.bfloat16)
    q.data *= factor
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    outs = [
        kernels.attention(q, k, v, is_causal=True),
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True),
    ]
    gradient = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours, theirs, expected = (
        (out, *torch.autograd.grad(out, inputs, gradient.to(out.dtype)))
        for out, inputs in zip(outs, [(q, k, v), (q, k, v), exact], strict=True)
    )
    for mine, other, right in zip(ours, theirs, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - right).norm() < 1.5 * (other - right).norm() + 1e-3 * right.norm()


@pytest.mark.parametrize("n_query", [64, 300])
def test_without_gradients_the_bits_are_those_of_torch(n_query: int) -> None:
    q, k, v = inputs(n_head=4, n_group=2, n_query=n_query, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        assert torch.equal(kernels.attention(q, k, v, is_causal=True, enable_gqa=True), expected)


def test_masks_and_other_dtypes_fall_back_to_torch() -> None:
    q, k, v = inputs(n_head=2, n_group=2, n_query=6, dtype=torch.float32)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.equal(kernels.attention(q, k, v, attn_mask=mask), expected)
    assert kernels.attention(q, k, v, is_causal=True).grad_fn.name().startswith("ScaledDot")


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_of_a_model_are_the_same_with_and_without_the_kernels(
    is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "has_fast_bfloat16", lambda device: True)
    plain, model = small_model().train(), small_model().train()
    kernels.use_kernels(model, torch.device("cpu"), torch.bfloat16)
    tokens = random_tokens(3, 21)
    gradients = []
    for each in (plain, model):
        loss_of = TrainingLoss(each)
        loss_of = torch.compile(loss_of) if is_compiled else loss_of
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss_of(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in each.parameters()]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.999


@pytest.mark.parametrize(
    ("device", "dtype", "has_instructions", "is_used"),
    [
        ("cpu", torch.bfloat16, True, True),
        ("cpu", torch.bfloat16, False, False),
        ("cpu", torch.float32, True, False),
        ("cuda", torch.bfloat16, True, False),
    ],
)
def test_the_kernels_are_used_only_for_bfloat16_training_on_cpus_that_support_it(
    device: str,
    dtype: torch.dtype,
    has_instructions: bool,
    is_used: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "has_fast_bfloat16", lambda device: has_instructions)
    model = small_model()
    kernels.use_kernels(model, torch.device(device), dtype)
    scores = [attention.score for attention in model.attentions]
    assert [score.fused is kernels.attention for score in scores] == [is_used] * len(scores)
