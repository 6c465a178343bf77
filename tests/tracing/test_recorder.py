"""Recording changes nothing, and recorded weights are those of the model."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from kept_attention import KeptAttention, full_weights
from laid_out import in_int8
from small_models import LAYOUTS, random_tokens, small_model
from torch import Tensor

from minigpt.config import SamplingConfig
from minigpt.generation.decoder import Decoder, Step
from minigpt.model.cache import KVCache
from minigpt.model.gpt import GPT
from minigpt.tracing.analysis.recorder import MeasureRecorder
from minigpt.tracing.head_lists import reduce_rows, select_heads
from minigpt.tracing.observers import CheckedRecorder
from minigpt.tracing.recorder import RowRecorder

EVERY_HEAD = select_heads(2, 4)


def mean_row(recorder: RowRecorder) -> Tensor:
    return reduce_rows(recorder.weights_LHS, EVERY_HEAD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_recording_changes_no_bit_of_the_logits(layout: str, dtype: torch.dtype) -> None:
    model = small_model(layout).to(dtype)
    for seed, n_prompt in ((1, 1), (2, 7), (3, 16)):
        prompt = random_tokens(n_prompt, seed=seed).tolist()
        plain = Decoder(model, prompt)
        watched = Decoder(model, prompt, MeasureRecorder(model, measures=("norm",)))
        assert torch.equal(watched.prompt_logits, plain.prompt_logits)
        for token in random_tokens(8, seed=seed + 10).tolist():
            assert torch.equal(watched.logits([token]), plain.logits([token]))
        assert torch.equal(
            watched.cache.keys_LBGSD[:, :, :, : n_prompt + 8],
            plain.cache.keys_LBGSD[:, :, :, : n_prompt + 8],
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_recording_changes_no_token(layout: str, dtype: torch.dtype) -> None:
    model = small_model(layout).to(dtype)
    config = SamplingConfig(temperature=1.2, top_k=30, max_new_tokens=8)

    def steps(seed: int, recorder: RowRecorder | None) -> list[Step]:
        prompt = random_tokens(4, seed=seed).tolist()
        result = []
        for step in Decoder(model, prompt, recorder).generate(config, seed=seed):
            result.append(step)
        return result

    for seed in range(2):
        plain = steps(seed, None)
        for measure in ("weight", "norm"):
            assert steps(seed, MeasureRecorder(model, measures=(measure,))) == plain


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_rows_sum_to_one_and_are_causal(layout: str) -> None:
    weights = full_weights(small_model(layout), random_tokens(2, 24))
    # float32 softmax over at most 24 keys
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 2, 4, 24), rtol=0, atol=1e-6)
    assert (weights.triu(1) == 0).all()
    assert (weights >= 0).all()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 0.02)],  # rounding of the kernel
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_row_times_the_values_equals_the_head_output(
    layout: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = small_model(layout).to(dtype)
    tokens = random_tokens(1, 20)
    cache = KVCache(model.config, dtype=dtype)
    kept, contexts = KeptAttention(), []
    for block in model.blocks:
        block.attention.output.register_forward_pre_hook(lambda _, x: contexts.append(x[0]))
    for part in tokens.split([9, 6, 1, 1, 3], dim=1):  # prefill, chunk, single steps
        contexts.clear()
        model(part, cache, kept)
        values = kept.last.values_LBGSD.float()
        assert values.shape[3] == cache.length
        per_head = values.repeat_interleave(4 // values.shape[2], dim=2)
        products = kept.weights(model) @ per_head  # (L, B, H, T, D)
        close = {"rtol": 0, "atol": tolerance * values.abs().max().item()}
        heads = torch.stack(contexts).float()
        torch.testing.assert_close(products.transpose(2, 3).flatten(3), heads, **close)
        last = kept.last.context_LBHD.float()
        torch.testing.assert_close(products[:, :, :, -1], last, **close)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_the_row_of_a_decode_step_equals_the_last_row_of_a_full_forward(layout: str) -> None:
    model = small_model(layout)
    tokens = random_tokens(1, 24)
    recorder = RowRecorder(model)
    cache = KVCache(model.config)
    full = full_weights(model, tokens)[:, 0].mean(dim=(0, 1))  # (T, S)
    for part in tokens.split([11, 1, 1, 1, 5, 1, 4], dim=1):
        model(part, cache, recorder)
        row = mean_row(recorder)
        assert row.shape == (cache.length,)
        expected = full[cache.length - 1, : cache.length]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-6)


def test_the_row_of_a_token_is_that_of_the_query_that_predicted_it() -> None:
    """The query is at position t - 1: the token is not among its own keys."""
    model = small_model("qwen3")
    prompt = random_tokens(5).tolist()
    recorder = RowRecorder(model)
    decoder = Decoder(model, prompt, recorder)
    tokens = list(prompt)
    for step in decoder.generate(SamplingConfig(max_new_tokens=12), seed=3):
        row = mean_row(recorder)
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


@pytest.mark.parametrize("is_max", [False, True])
@pytest.mark.parametrize("chosen", SELECTIONS, ids=str)
@torch.no_grad()
def test_rows_are_reduced_over_the_selected_heads(chosen: dict[str, str], is_max: bool) -> None:
    model = small_model("llama-grouped")
    selection = select_heads(2, 4, **chosen)
    tokens = random_tokens(1, 13)
    recorder = RowRecorder(model)
    model(random_tokens(1, 20, seed=9), recorder=recorder)  # an earlier pass must have no effect
    model(tokens, recorder=recorder)
    rows = [
        row[head, -1]
        for row, heads in zip(
            full_weights(model, tokens)[:, 0], selection.heads_by_layer, strict=True
        )
        for head in heads
    ]
    stacked = torch.stack(rows)
    expected = stacked.max(dim=0).values if is_max else stacked.mean(dim=0)
    reduced = reduce_rows(recorder.weights_LHS, selection, is_max=is_max)
    torch.testing.assert_close(reduced, expected)
    if not is_max:
        assert reduced.sum().item() == pytest.approx(1, abs=1e-6)


def added_vectors(model: GPT, tokens: Tensor) -> Tensor:
    """Return (L, H, S, C), what each head adds to the stream for each source (the oracle)."""
    kept = KeptAttention()
    model(tokens, recorder=kept)
    vectors = []
    for layer, weights in enumerate(kept.last.weights_LBHS[:, 0]):
        n_head, values = len(weights), kept.last.values_LBGSD[layer, 0]
        per_head = values.repeat_interleave(n_head // len(values), dim=0)  # (H, S, D)
        output = model.blocks[layer].attention.output.weight.unflatten(1, (n_head, -1))  # (C, H, D)
        vectors.append(
            torch.stack(
                [weights[h, :, None] * (per_head[h] @ output[:, h].T) for h in range(n_head)]
            )
        )
    return torch.stack(vectors)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_norms_are_the_lengths_of_the_head_output_vectors(layout: str) -> None:
    model = small_model(layout)
    tokens = random_tokens(1, 20)
    recorder = MeasureRecorder(model, measures=("norm",))
    cache = KVCache(model.config)
    for part in tokens.split([7, 1, 1, 4, 1, 1, 5], dim=1):
        model(part, cache, recorder)
        expected = added_vectors(model, tokens[:, : cache.length]).norm(dim=-1)
        torch.testing.assert_close(recorder.measured("norm").rows, expected, rtol=1e-4, atol=1e-5)
    cache.truncate(3)  # replaced positions must be measured again
    other = random_tokens(1, 4, seed=11)
    model(other, cache, recorder)
    seen = torch.cat((tokens[:, :3], other), dim=1)
    expected = added_vectors(model, seen).norm(dim=-1)
    torch.testing.assert_close(recorder.measured("norm").rows, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_head_output_vectors_sum_to_the_attention_output() -> None:
    """Summed over heads and sources, the vectors behind the norms give the layer's output."""
    model = small_model("llama-grouped")
    tokens = random_tokens(1, 11)
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.attention.register_forward_hook(lambda module, inputs, out: outputs.append(out))
    summed = added_vectors(model, tokens).sum(dim=(1, 2))
    for layer, output in enumerate(outputs):
        torch.testing.assert_close(summed[layer], output[0, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_norms_of_int8_weights_use_dequantized_values() -> None:
    model = small_model("gpt2")
    model = in_int8(model)
    recorder = MeasureRecorder(model, measures=("norm",))
    tokens = random_tokens(1, 9)
    model(tokens, recorder=recorder)
    plain = small_model("gpt2")
    for ours, theirs in zip(plain.blocks, model.blocks, strict=True):
        quantized = theirs.attention.output
        ours.attention.output.weight.copy_(quantized.weight * quantized.scale[:, None])
    norms = MeasureRecorder(plain, measures=("norm",))
    kept = KeptAttention()
    model(tokens, recorder=kept)
    norms.record(kept.last)
    torch.testing.assert_close(recorder.measured("norm").rows, norms.measured("norm").rows)


@torch.no_grad()
def test_a_row_that_differs_from_the_kernel_has_a_product_error() -> None:
    model = small_model()
    recorder, kept = CheckedRecorder(model), KeptAttention()
    for n_tokens in (5, 9, 14):
        model(random_tokens(1, n_tokens), recorder=recorder)
        assert recorder.product_error is not None
        assert recorder.product_error.item() < 1e-5
    model(random_tokens(1, 14), recorder=kept)
    recorder.record(replace(kept.last, context_LBHD=kept.last.context_LBHD * 1.1))
    assert recorder.product_error.item() == pytest.approx(0.1 / 1.1, rel=0.01)


@torch.no_grad()
def test_a_recorder_of_a_batch_records_the_first_sequence() -> None:
    model = small_model()
    tokens = random_tokens(3, 10)
    recorder = RowRecorder(model)
    model(tokens, recorder=recorder)
    batched = mean_row(recorder)
    model(tokens[:1], recorder=recorder)
    torch.testing.assert_close(batched, mean_row(recorder))


def test_rows_before_the_first_pass_raise() -> None:
    with pytest.raises(AssertionError, match="no forward pass was recorded"):
        _ = RowRecorder(small_model()).weights_LHS
