"""Rollout equals the published example and a plain product of matrices."""

import pytest
import torch
from kept_attention import full_weights
from small_models import random_tokens, small_model

from minigpt.model.cache import KVCache
from minigpt.tracing.analysis.recorder import MeasureRecorder
from minigpt.tracing.analysis.rollout import Rollout
from minigpt.tracing.head_lists import select_heads


def test_the_rollout_of_two_layers_equals_a_calculation_by_hand() -> None:
    weights = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]])
    expected = torch.tensor([[1, 0, 0], [0.4375, 0.5625, 0], [0.2125, 0.225, 0.5625]])
    for sizes in ([3], [1, 1, 1], [2, 1]):  # at once, and incrementally
        rollout, end, rows = Rollout(select_heads(2, 1), 3), 0, []
        for n_new in sizes:
            end += n_new
            for layer in range(2):
                rollout.add(layer, weights[None, end - n_new : end, :end])
            rows.append(rollout.row())
        torch.testing.assert_close(rows[-1], expected[2])
        if len(sizes) == 3:
            torch.testing.assert_close(rows[0], expected[0, :1])
            torch.testing.assert_close(rows[1], expected[1, :2])


@pytest.mark.parametrize("heads", [None, "0.1,1.*", "1.2"])
@torch.no_grad()
def test_an_incremental_rollout_equals_the_product_of_full_matrices(heads: str | None) -> None:
    model = small_model("llama-grouped", n_layer=3)
    selection = select_heads(3, 4, heads=heads)
    tokens = random_tokens(1, 20)
    rollout = Rollout(selection, 24)
    recorder = MeasureRecorder(model, accumulators=[rollout])
    cache = KVCache(model.config)
    for part in tokens.split([9, 1, 1, 6, 1, 2], dim=1):
        model(part, cache, recorder)
        weights = full_weights(model, tokens[:, : cache.length])[:, 0]
        expected = torch.eye(cache.length)
        for layer, chosen in enumerate(selection.heads_by_layer):
            if chosen:
                mean = weights[layer][list(chosen)].mean(dim=0)
                expected = (0.5 * mean + 0.5 * torch.eye(cache.length)) @ expected
        torch.testing.assert_close(rollout.row(), expected[-1], rtol=1e-4, atol=1e-6)
        assert rollout.row().sum().item() == pytest.approx(1, abs=1e-5)
