"""The residual stream recorded on request by every decode step."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kept_attention import KeptAttention
from small_models import LAYOUTS, random_tokens, small_model
from torch import Tensor

from minigpt.config import ModelConfig
from minigpt.errors import ConfigError
from minigpt.generation.fast import compiled
from minigpt.generation.fast.compiled import CompiledForward
from minigpt.generation.fast.eager import EagerForward
from minigpt.generation.fast.graph import GraphStep
from minigpt.generation.forward import PlainForward
from minigpt.model.gpt import GPT
from minigpt.model.variants.lstm import LSTM
from minigpt.places import CACHE_VARIABLE
from minigpt.tracing.analysis.recorder import MeasureRecorder

FORWARDS = {"plain": PlainForward, "eager": EagerForward, "graph": CompiledForward}


def streams(model: GPT, tokens: Tensor) -> Tensor:
    """Return (N, B, C) from hooks on a forward pass without a cache (the oracle)."""
    states: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        states.append(inputs[0][:, -1])

    norms = [n for block in model.blocks for n in (block.attention_norm, block.mlp_norm)]
    hooks = [norm.register_forward_pre_hook(keep) for norm in (*norms, model.final_norm)]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return torch.stack(states)


def uncompiled(step: GraphStep, **_: Any) -> compiled.CompiledStep:
    n_layer = step.model.config.n_layer
    return lambda tensors: list(step(*tensors[:3], tensors[3:-n_layer], tensors[-n_layer:]))


@pytest.fixture(params=FORWARDS)
def forward_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "graph":
        monkeypatch.setattr(compiled, "load_step", uncompiled)
    return request.param


def check(layout: str, make: Any, *, is_exact: bool) -> None:
    """Check that the stream is that of a full forward and that recording changes no logits."""
    model, kept = small_model(layout), KeptAttention(needs_residual=True)
    tokens = random_tokens(1, 12)
    parts = tokens.split([7, 1, 1, 1, 1, 1], dim=1)
    forward, plain = make(model, capacity=24, recorder=kept), make(model, capacity=24)
    for part in parts:
        logits = forward.feed(part)
        assert kept.last.residual_NBC is not None
        expected = streams(model, tokens[:, : forward.cache.length])
        torch.testing.assert_close(kept.last.residual_NBC, expected, rtol=1e-4, atol=1e-4)
        if is_exact:
            assert torch.equal(logits, plain.feed(part))
        else:  # another graph, in which sums may have another order
            torch.testing.assert_close(logits, plain.feed(part), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_the_recorded_residual_stream_equals_that_of_a_full_forward(
    layout: str, forward_name: str
) -> None:
    check(layout, FORWARDS[forward_name], is_exact=True)


@pytest.mark.slow  # half a minute per graph
@pytest.mark.parametrize("layout", ["gpt2", "llama-grouped"])
@torch.no_grad()
def test_a_compiled_graph_gives_the_same_residual_stream(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    check(layout, CompiledForward, is_exact=False)


@torch.no_grad()
def test_the_residual_stream_is_recorded_only_on_request() -> None:
    model = small_model()
    for make in (PlainForward, EagerForward):
        kept = KeptAttention()
        forward = make(model, capacity=24, recorder=kept)
        for part in random_tokens(1, 9).split([8, 1], dim=1):
            forward.feed(part)
            assert kept.last.residual_NBC is None


@torch.no_grad()
def test_a_model_without_a_residual_stream_is_refused_in_one_line() -> None:
    shape: dict[str, Any] = {"vocab_size": 61, "context_length": 24, "n_layer": 1, "n_head": 1}
    model = LSTM(ModelConfig(arch="lstm-attention", d_model=8, **shape)).eval()
    recorder = MeasureRecorder(model, needs_residual=True)
    with pytest.raises(ConfigError, match="residual stream"):
        model(random_tokens(1, 5), recorder=recorder)
