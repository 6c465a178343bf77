"""Watching changes nothing, and every weight shown is the model's own."""

from typing import Any

import pytest
import torch
from small_models import LAYOUTS, random_tokens, small_model
from torch import Tensor

from minigpt.config import SamplingConfig
from minigpt.generation.decoder import Decoder, Step
from minigpt.model.cache import KVCache
from minigpt.model.gpt import GPT
from minigpt.model.scores import attention_weights
from minigpt.trace.recorder import Reduce, RowRecorder
from minigpt.trace.selection import HeadSelection, select_heads

EVERY_HEAD = select_heads(2, 4)


class Collector:
    """Keeps what every layer shows in the last forward pass."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def record(self, layer: int, q: Tensor, k: Tensor, v: Tensor, context: Tensor) -> None:
        self.layers[layer] = q, k, v, context

    def weights(self) -> Tensor:
        """(L, B, H, T, S) of the last forward pass, the whole matrices."""
        return torch.stack([attention_weights(q, k) for q, k, _, _ in self.layers.values()])


def full_weights(model: GPT, tokens: Tensor) -> Tensor:
    collector = Collector()
    model(tokens, recorder=collector)
    return collector.weights()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_watching_changes_no_bit_of_the_logits(layout: str, dtype: torch.dtype) -> None:
    model = small_model(layout).to(dtype)
    for seed, n_prompt in ((1, 1), (2, 7), (3, 16)):
        prompt = random_tokens(n_prompt, seed=seed).tolist()
        plain = Decoder(model, prompt)
        watched = Decoder(model, prompt, RowRecorder(EVERY_HEAD))
        assert torch.equal(watched.prompt_logits, plain.prompt_logits)
        for token in random_tokens(8, seed=seed + 10).tolist():
            assert torch.equal(watched.logits([token]), plain.logits([token]))
        assert torch.equal(
            watched.cache.keys_LBGSD[:, :, :, : n_prompt + 8],
            plain.cache.keys_LBGSD[:, :, :, : n_prompt + 8],
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_watching_changes_no_token(layout: str, dtype: torch.dtype) -> None:
    model = small_model(layout).to(dtype)
    config = SamplingConfig(temperature=1.2, top_k=30, max_new_tokens=8)

    def steps(seed: int, recorder: RowRecorder | None) -> list[Step]:
        prompt = random_tokens(4, seed=seed).tolist()
        result = []
        for step in Decoder(model, prompt, recorder).generate(config, seed=seed):
            if recorder is not None:
                recorder.row()
            result.append(step)
        return result

    for seed in range(2):
        plain = steps(seed, None)
        for reduce in ("mean", "max"):
            assert steps(seed, RowRecorder(EVERY_HEAD, reduce)) == plain


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_rows_sum_to_one_and_see_nothing_after_the_query(layout: str) -> None:
    weights = full_weights(small_model(layout), random_tokens(2, 24))
    # float32 softmax over at most 24 keys.
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 2, 4, 24), rtol=0, atol=1e-6)
    assert (weights.triu(1) == 0).all()
    assert (weights >= 0).all()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 0.02)],  # the kernel's own rounding
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_row_times_the_values_is_the_head_s_output(
    layout: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = small_model(layout).to(dtype)
    tokens = random_tokens(1, 20)
    cache = KVCache(model.config, dtype=dtype)
    collector = Collector()
    for part in tokens.split([9, 6, 1, 1, 3], dim=1):  # prefill, chunk, single steps
        model(part, cache, collector)
        n_key = cache.length
        for q, k, v, context in collector.layers.values():
            assert k.shape[2] == v.shape[2] == n_key
            weights = attention_weights(q, k)
            per_head = v.float().repeat_interleave(4 // v.shape[1], dim=1)
            torch.testing.assert_close(
                weights @ per_head,
                context.float(),
                rtol=0,
                atol=tolerance * v.float().abs().max().item(),
            )


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_decode_row_is_the_last_row_of_a_full_forward(layout: str) -> None:
    model = small_model(layout)
    tokens = random_tokens(1, 24)
    recorder = RowRecorder(EVERY_HEAD)
    cache = KVCache(model.config)
    full = full_weights(model, tokens)[:, 0].mean(dim=(0, 1))  # (T, S)
    for part in tokens.split([11, 1, 1, 1, 5, 1, 4], dim=1):
        model(part, cache, recorder)
        row = recorder.row()
        assert row.shape == (cache.length,)
        expected = full[cache.length - 1, : cache.length]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-6)


def test_the_row_of_a_generated_token_is_that_of_the_query_before_it() -> None:
    """Position t - 1: the token is not among its own keys."""
    model = small_model("qwen3")
    prompt = random_tokens(5).tolist()
    recorder = RowRecorder(EVERY_HEAD)
    decoder = Decoder(model, prompt, recorder)
    tokens = list(prompt)
    for step in decoder.generate(SamplingConfig(max_new_tokens=12), seed=3):
        row = recorder.row()
        assert row.numel() == step.position == len(tokens)
        with torch.no_grad():
            full = full_weights(model, torch.tensor([tokens]))
        expected = full[:, 0, :, -1].mean(dim=(0, 1))
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-6)
        tokens.append(step.token)


SELECTIONS: list[dict[str, Any]] = [
    {},
    {"layers": "0"},
    {"layers": "1"},
    {"heads": "0.3"},
    {"heads": "1.0,1.2"},
    {"heads": "0.1,1.*"},
]


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("chosen", SELECTIONS, ids=str)
@torch.no_grad()
def test_the_reduction_is_over_the_chosen_heads(chosen: dict[str, str], reduce: Reduce) -> None:
    model = small_model("llama-grouped")
    selection = select_heads(2, 4, **chosen)
    tokens = random_tokens(1, 13)
    recorder = RowRecorder(selection, reduce)
    model(random_tokens(1, 20, seed=9), recorder=recorder)  # an earlier pass leaves no trace
    model(tokens, recorder=recorder)
    rows = [
        row[head, -1]
        for row, heads in zip(
            full_weights(model, tokens)[:, 0], selection.heads_by_layer, strict=True
        )
        for head in heads
    ]
    stacked = torch.stack(rows)
    expected = stacked.mean(dim=0) if reduce == "mean" else stacked.max(dim=0).values
    torch.testing.assert_close(recorder.row(), expected)
    if reduce == "mean":
        assert recorder.row().sum().item() == pytest.approx(1, abs=1e-6)


@torch.no_grad()
def test_a_recorder_of_a_batch_shows_its_first_sequence() -> None:
    model = small_model()
    tokens = random_tokens(3, 10)
    recorder = RowRecorder(EVERY_HEAD)
    model(tokens, recorder=recorder)
    batched = recorder.row()
    model(tokens[:1], recorder=recorder)
    torch.testing.assert_close(batched, recorder.row())


def test_a_recorder_that_saw_nothing_has_no_row() -> None:
    with pytest.raises(AssertionError, match="no forward pass was recorded"):
        RowRecorder(HeadSelection(((0,),), 1)).row()
