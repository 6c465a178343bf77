"""Gradient x input and integrated gradients of the token's logit, compared with Captum."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from laid_out import in_int8
from small_models import FAMILIES, LAYOUTS, SOFTCAP, any_model, random_tokens, small_model
from torch import Tensor

from minigpt.config import ModelConfig
from minigpt.model.gpt import GPT
from minigpt.model.language_model import LanguageModel
from minigpt.model.variants.lstm import LSTM
from minigpt.tracing.analysis.measures import Measured, Prediction
from minigpt.tracing.analysis.recorder import MeasureRecorder
from minigpt.tracing.analysis_config import AnalysisConfig


@pytest.fixture
def attribution() -> Any:
    """Import captum.attr only where it is used, because it takes a second."""
    return pytest.importorskip("captum.attr", reason="needs captum")


def measured(model: LanguageModel, tokens: Tensor, **config: Any) -> Measured:
    settings = AnalysisConfig(**config)
    recorder = MeasureRecorder(model, measures=settings.measures, config=settings)
    with torch.inference_mode():
        model(tokens, recorder=recorder)
        against = 11 if config.get("against") else None
        prediction = Prediction(recorder.attention, tokens[0].tolist(), 5, against)
        [found] = recorder.measured_late(config["measure"], [prediction])
    return found


def from_embeddings(model: LanguageModel, n: int, against: int | None) -> Callable[..., Tensor]:
    """Return the model as a function of its embeddings (B, S, C), for Captum."""

    def logit(x_BSC: Tensor) -> Tensor:
        hook = model.embedding.register_forward_hook(lambda *call: x_BSC)
        logits = model(torch.zeros(len(x_BSC), n, dtype=torch.int64), logits_to_keep=1)[:, -1]
        hook.remove()
        return logits[:, 5] - (0 if against is None else logits[:, against])

    return logit


@pytest.mark.parametrize("against", [None, 11])
@pytest.mark.parametrize("layout", [*LAYOUTS, *FAMILIES, SOFTCAP])
def test_gradient_times_input_equals_captum(
    layout: str, against: int | None, attribution: Any
) -> None:
    model, tokens = any_model(layout), random_tokens(1, 9)
    x_BSC = model.embedding(tokens).detach()
    oracle = attribution.InputXGradient(from_embeddings(model, 9, against))
    expected = oracle.attribute(x_BSC.requires_grad_()).sum(dim=2)[0]
    row = measured(model, tokens, measure="gradient", against=None if against is None else "x")
    torch.testing.assert_close(row.rows, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [*LAYOUTS, *FAMILIES, SOFTCAP])
def test_integrated_gradients_equal_captum(layout: str, attribution: Any) -> None:
    model, tokens = any_model(layout), random_tokens(1, 9)
    x_BSC = model.embedding(tokens).detach()
    baseline = model.embedding.weight.detach().mean(dim=0).expand_as(x_BSC)
    oracle = attribution.IntegratedGradients(from_embeddings(model, 9, None))
    expected = oracle.attribute(x_BSC, baseline, n_steps=20, method="gausslegendre")
    row = measured(model, tokens, measure="integrated", n_steps=20)
    # Gradients are large near the baseline, where the residual stream is small.
    torch.testing.assert_close(row.rows, expected.sum(dim=2)[0].float(), rtol=1e-3, atol=1e-3)
    logit = from_embeddings(model, 9, None)
    with torch.no_grad():
        torch.testing.assert_close(row.parts["baseline"], logit(baseline)[0])
        torch.testing.assert_close(row.whole, model(tokens)[0, -1, 5])


@pytest.mark.parametrize("layout", ["gpt2", "llama-grouped"])
def test_integrated_gradients_satisfy_completeness_with_enough_steps(layout: str) -> None:
    model, tokens = small_model(layout), random_tokens(1, 9)
    errors = []
    for n_steps in (2, 400):
        row = measured(model, tokens, measure="integrated", n_steps=n_steps)
        assert row.whole is not None
        total = row.rows.sum() + sum(row.parts.values())
        torch.testing.assert_close(total, row.whole, rtol=0, atol=1e-4)
        errors.append(abs(float(row.parts["error"])))
    assert errors[1] < 0.01
    assert errors[1] < errors[0]


def test_integration_steps_in_batches_equal_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from minigpt.tracing.analysis.measures import integrated

    model, tokens = small_model(), random_tokens(1, 9)
    whole = measured(model, tokens, measure="integrated", n_steps=7)
    monkeypatch.setattr(integrated, "_MAX_POSITIONS", 18)
    split = measured(model, tokens, measure="integrated", n_steps=7)
    torch.testing.assert_close(split.rows, whole.rows, rtol=1e-4, atol=1e-5)


def test_quantized_models_have_the_gradients_of_their_dequantized_weights() -> None:
    model, plain, tokens = small_model("llama"), small_model("llama"), random_tokens(1, 6)
    model = in_int8(model)
    with torch.no_grad():
        quantized = dict(model.named_modules())
        for name, layer in plain.named_modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.copy_(quantized[name].dense_weight())
        plain.embedding.weight.copy_(model.embedding(torch.arange(61)))
    row = measured(model, tokens, measure="gradient").rows
    expected = measured(plain, tokens, measure="gradient").rows
    torch.testing.assert_close(row, expected, rtol=1e-3, atol=1e-4)


def test_an_lstm_with_attention_has_gradients_too(attribution: Any) -> None:
    shape: dict[str, Any] = {"vocab_size": 61, "context_length": 24, "n_layer": 2, "n_head": 1}
    torch.manual_seed(1)
    model = LSTM(ModelConfig(arch="lstm-attention", d_model=16, **shape)).eval()
    tokens = random_tokens(1, 9)
    x_BSC = model.embedding(tokens).detach()
    oracle = attribution.InputXGradient(from_embeddings(model, 9, None))
    expected = oracle.attribute(x_BSC.requires_grad_()).sum(dim=2)[0]
    row = measured(model, tokens, measure="gradient").rows
    torch.testing.assert_close(row, expected.detach(), rtol=1e-4, atol=1e-6)


def test_parameters_accumulate_no_gradient() -> None:
    model: GPT = small_model()
    measured(model, random_tokens(1, 5), measure="gradient")
    assert all(parameter.grad is None for parameter in model.parameters())
