"""Traces of every score and of an LSTM with attention pass the same checks as a GPT's."""

from typing import Any

import pytest
import torch
from small_models import random_tokens, randomized

from minigpt.config import ModelConfig, SamplingConfig
from minigpt.errors import ConfigError
from minigpt.generation.decoder import Decoder
from minigpt.model.language_model import LanguageModel, model_class
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.tracing.analysis.roles import head_effects, head_roles
from minigpt.tracing.analysis_config import AnalysisConfig
from minigpt.tracing.findings import Trace, TraceFooter, TraceHeader, TraceStep
from minigpt.tracing.tracer import trace

VARIANTS: dict[str, dict[str, Any]] = {
    "dot": {"attention": "dot"},
    "general": {"attention": "general"},
    "concat": {"attention": "concat", "n_kv_head": 2},
    "additive": {"attention": "additive"},
    "lstm-attention": {"arch": "lstm-attention", "n_head": 1},
    "lstm-attention, dot": {"arch": "lstm-attention", "attention": "dot", "n_head": 1},
}


def model_of(variant: dict[str, Any], *, context_length: int = 24) -> LanguageModel:
    shape = {"vocab_size": 257, "n_layer": 2, "n_head": 4, "d_model": 32}
    config = ModelConfig(context_length=context_length, **(shape | variant))
    model = model_class(config)(config)
    return randomized(model)


def traced(model: LanguageModel, **config: Any) -> Trace:
    sampling = SamplingConfig(max_new_tokens=8, temperature=1.0)
    prompt = random_tokens(5, vocab_size=256).tolist()
    events = trace(model, BytesTokenizer(), prompt, sampling, AnalysisConfig(**config), seed=3)
    header, *steps, footer = events
    assert isinstance(header, TraceHeader)
    assert isinstance(footer, TraceFooter)
    return Trace(header, tuple(s for s in steps if isinstance(s, TraceStep)), footer)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_tracing_changes_nothing_and_rows_match_the_head_outputs(variant: dict[str, Any]) -> None:
    model = model_of(variant)
    result = traced(model, measure="both", has_heads=True, n_verified=2, sink="auto")
    decoder = Decoder(model, [token.id for token in result.header.prompt], max_new_tokens=8)
    sampling = SamplingConfig(max_new_tokens=8, temperature=1.0)
    plain = [(s.token, s.log_probability) for s in decoder.generate(sampling, seed=3)]
    assert [(s.token.id, s.log_probability) for s in result.steps] == plain
    assert result.footer.worst_row_sum_error is not None
    assert result.footer.worst_row_sum_error < 1e-5
    assert result.footer.worst_product_error is not None
    assert result.footer.worst_product_error < 1e-4
    n_layer = 1 if variant.get("arch") else 2
    assert (result.header.n_layer, result.header.n_head) == (n_layer, 1 if n_layer == 1 else 4)


@pytest.mark.parametrize("name", ["lstm-attention", "lstm-attention, dot"])
@torch.no_grad()
def test_knocking_out_a_state_of_an_lstm_equals_a_full_pass_without_it(name: str) -> None:
    """Attention is the last layer, so hiding the state from the last query alone suffices."""
    model = model_of(VARIANTS[name])
    result = traced(model, n_verified=3)
    for step in result.steps:
        tokens = torch.tensor([[token.id for token in result.tokens[: step.token.position]]])
        whole = model(tokens)[0, -1].log_softmax(dim=-1)[step.token.id]
        for effect in step.effects:
            visible = torch.ones_like(tokens, dtype=torch.bool)
            visible[0, effect.source.token.position] = False
            hidden = model(tokens, visible_BS=visible)[0, -1].log_softmax(dim=-1)[step.token.id]
            assert effect.change == pytest.approx((hidden - whole).item(), abs=1e-4)


@pytest.mark.integration
def test_roles_are_found_with_every_score() -> None:
    for variant in VARIANTS.values():
        model = model_of(variant)
        roles = head_roles(model)
        shape = (len(model.attentions), model.config.n_head)
        assert (len(roles), len(roles[0])) == shape
        assert head_effects(model).shape == shape


def test_analyses_that_an_lstm_does_not_support_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="arch lstm has no attention to show"):
        traced(model_of({"arch": "lstm", "n_head": 1}))
    with pytest.raises(ConfigError, match="arch lstm has no attention to show"):
        head_roles(model_of({"arch": "lstm", "n_head": 1}))
    with pytest.raises(ConfigError, match="Use --knockout key"):
        traced(model_of(VARIANTS["lstm-attention"]), n_verified=1, knockout="value")
    with pytest.raises(ConfigError, match=r"measure logit need\. Leave them out"):
        traced(model_of(VARIANTS["lstm-attention"]), lens=True)
