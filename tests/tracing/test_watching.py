"""Tracing changes nothing: random prompts with and without all features of a trace."""

from itertools import cycle

import pytest
import torch
from small_models import LAYOUTS, random_tokens, small_model

from minigpt.config import SamplingConfig
from minigpt.generation.decoder import Decoder
from minigpt.model.gpt import GPT
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.tracing.analysis_config import AnalysisConfig
from minigpt.tracing.findings import TraceStep
from minigpt.tracing.tracer import trace

EVERYTHING = AnalysisConfig(measure="both", has_heads=True, n_verified=2, roles=True, sink="auto")
LOGIT = AnalysisConfig(measure="logit", against="x", has_heads=True, n_verified=1)
GRADIENTS = AnalysisConfig(measure="integrated", n_steps=3)
ROLLOUT = AnalysisConfig(reduce="rollout", heads="0.1,1.*", n_verified=1, knockout="value")


def watched(
    model: GPT, prompt: list[int], sampling: SamplingConfig, seed: int, config: AnalysisConfig
) -> list[tuple[int, float]]:
    events = trace(model, BytesTokenizer(), prompt, sampling, config, seed=seed)
    return [(e.token.id, e.log_probability) for e in events if isinstance(e, TraceStep)]


@pytest.mark.integration
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tracing_random_prompts_changes_no_bit_of_any_log_probability(dtype: torch.dtype) -> None:
    """A log-probability depends on all logits, so its bits detect any change."""
    models = [small_model(layout, vocab_size=257).to(dtype) for layout in LAYOUTS]
    configs = cycle([EVERYTHING, LOGIT, ROLLOUT, GRADIENTS])
    for seed, (model, config) in enumerate(zip(models * 5, configs, strict=False)):
        n_prompt = 1 + 5 * seed % 16
        prompt = random_tokens(n_prompt, vocab_size=256, seed=seed).tolist()
        sampling = SamplingConfig(temperature=0.3 * (seed % 5), max_new_tokens=8, top_k=50)
        decoder = Decoder(model, prompt, max_new_tokens=8)
        plain = [
            (step.token, step.log_probability)
            for step in decoder.generate(sampling, seed=seed, end_of_text=[256])
        ]
        assert watched(model, prompt, sampling, seed, config) == plain
