"""Linear layers for prompts compute the same as torch's own."""

import copy

import pytest
import torch
from torch import nn

from minigpt.generation.fast import prompts


@pytest.mark.parametrize("is_slow", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_prompt_linear_layer_computes_the_same_as_torch(
    has_bias: bool, is_slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "has_slow_matvec", lambda _: is_slow)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 80, bias=has_bias), nn.Linear(80, 7, bias=has_bias))
    x = torch.randn(2, 5, 48)
    expected = copy.deepcopy(model).double()(x.double())
    prompts.use_prompt_linears(model)
    assert all(type(layer) is prompts.PromptLinear for layer in model)
    with torch.no_grad():
        torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)
        strided = prompts.linear(x, model[0].weight.t().contiguous().t(), model[0].bias)
        torch.testing.assert_close(strided, model[0](x))
        narrow = prompts.linear(x.bfloat16(), model[0].weight.bfloat16())
        assert narrow.dtype == torch.bfloat16


def test_a_prompt_linear_layer_propagates_the_gradient_to_its_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prompts, "has_slow_matvec", lambda _: True)
    layer, x = nn.Linear(16, 8).requires_grad_(False), torch.randn(3, 16, requires_grad=True)
    [expected] = torch.autograd.grad(layer(x).square().sum(), x)
    prompts.use_prompt_linears(layer)
    [gradient] = torch.autograd.grad(layer(x).square().sum(), x)
    assert torch.equal(gradient, expected)
