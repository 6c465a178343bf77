"""Attention of a published model equals the intermediates published with it."""

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kept_attention import KeptAttention
from torch import Tensor

from minigpt.checkpoint.model_folder import read_model
from minigpt.model.cache import KVCache
from minigpt.model.gpt import GPT
from minigpt.model.scores import causal_softmax, scaled_dot_score
from minigpt.tracing.head_lists import reduce_rows, select_heads
from minigpt.tracing.recorder import RowRecorder

# The published numbers are float32, computed with another torch on another machine.
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def model(shared: Path) -> GPT:
    return read_model(shared / "weights" / "gpt-nano-sort").model


@pytest.fixture
def published(shared: Path) -> Callable[[str], Tensor]:
    path = shared / "weights" / "gpt-nano-sort" / "gpt-nano-sort-t0-partials.json"
    values = json.loads(path.read_text())

    def tensor(name: str) -> Tensor:
        data = bytearray(base64.b64decode(values[name]["data"]))
        return torch.frombuffer(data, dtype=torch.float32).view(values[name]["shape"])

    return tensor


@torch.no_grad()
def test_attention_of_the_first_layer_equals_the_published_one(
    model: GPT, published: Callable[[str], Tensor]
) -> None:
    kept = KeptAttention()
    model(published("idx").long(), recorder=kept)
    assert kept.last.queries is not None
    assert kept.last.keys is not None
    q, k = kept.last.queries[0], kept.last.keys[0]
    for ours, name in ((q, "q"), (k, "k"), (kept.last.values_LBGSD[0], "v")):
        torch.testing.assert_close(ours, published(name), **CLOSE)
    weights = causal_softmax(scaled_dot_score(q, k))
    torch.testing.assert_close(weights, published("attSm"), **CLOSE)
    context = kept.last.context_LBHD[0].flatten(1)
    torch.testing.assert_close(context, published("y")[:, -1], **CLOSE)


@torch.no_grad()
def test_blocks_and_logits_equal_the_published_ones(
    model: GPT, published: Callable[[str], Tensor]
) -> None:
    """The file has only the attention of the first layer; outputs check the later ones."""
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    logits = model(published("idx").long())
    for i, output in enumerate(outputs):
        torch.testing.assert_close(output, published(f"block{i}"), **CLOSE)
    torch.testing.assert_close(logits, published("lm_head"), **CLOSE)
    torch.testing.assert_close(logits.softmax(dim=-1), published("probs"), **CLOSE)


@pytest.mark.parametrize("n_prefill", [1, 6, 11])
@torch.no_grad()
def test_traced_rows_equal_the_published_ones(
    n_prefill: int, model: GPT, published: Callable[[str], Tensor]
) -> None:
    for sequence in range(3):
        tokens = published("idx").long()[sequence : sequence + 1]
        expected = published("attSm")[sequence]  # (H, T, S)
        for heads, weights in (("0.*", expected.mean(dim=0)), ("0.1", expected[1])):
            recorder, selection = RowRecorder(model), select_heads(3, 3, heads=heads)
            cache = KVCache(model.config)
            for part in (tokens[:, :n_prefill], *tokens[:, n_prefill:].split(1, dim=1)):
                if part.numel():
                    model(part, cache, recorder)
                    row = reduce_rows(recorder.weights_LHS, selection)
                    torch.testing.assert_close(
                        row, weights[cache.length - 1, : cache.length], **CLOSE
                    )
