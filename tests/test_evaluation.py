"""The validation loss against a plain loop over tokens."""

import math

import numpy as np
import pytest
import torch
from small_models import LAYOUTS, random_tokens, small_model

from minigpt.evaluation import Evaluation, evaluate, windows_at_once
from minigpt.model.gpt import GPT
from minigpt.text.batches import validation_windows
from minigpt.text.tokens import TokenDataset, TokenSpan

CONTEXT = 24


def span_of(tokens: list[int]) -> TokenSpan:
    array = np.array(tokens, dtype=np.uint16)
    cut = len(tokens) // 3  # two shards
    return TokenSpan(TokenDataset([array[:cut], array[cut:]], "x"), 0, len(tokens), "validation")


def plain_nats(model: GPT, tokens: list[int], stride: int = CONTEXT) -> list[float]:
    """Return -ln p of each token but the first, one at a time, without batches or cross_entropy."""
    nats = []
    for target in range(1, len(tokens)):
        # The first window at 0, stride, 2 stride, ... that contains the target.
        start = -(-max(target - CONTEXT, 0) // stride) * stride
        logits = model(torch.tensor([tokens[start:target]]))[0, -1].double().tolist()
        total = sum(math.exp(logit - max(logits)) for logit in logits)
        nats.append(math.log(total) + max(logits) - logits[tokens[target]])
    return nats


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_the_loss_equals_a_plain_loop_with_every_token_counted_once(layout: str) -> None:
    model = small_model(layout)
    tokens = random_tokens(2 * CONTEXT + 12).tolist()  # the last window is incomplete
    lengths = np.arange(61, dtype=np.int32) % 4  # some tokens have no bytes
    expected = plain_nats(model, tokens)
    for batch_size in (1, 2, 100):
        windows = validation_windows(span_of(tokens), CONTEXT, 10**6, batch_size)
        result = evaluate(model, windows, lengths)
        assert result.n_tokens == len(tokens) - 1
        assert result.n_bytes == sum(token % 4 for token in tokens[1:])
        # softmax of float32 logits of order ten
        assert result.nats == pytest.approx(sum(expected), rel=1e-5)
        assert result.nats_per_token == pytest.approx(sum(expected) / len(expected), rel=1e-5)
        bits = sum(expected) / math.log(2)
        assert result.bits_per_byte == pytest.approx(bits / result.n_bytes, rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-4)


@pytest.mark.integration
@pytest.mark.parametrize("stride", [1, 7, 12])
@torch.no_grad()
def test_a_strided_loss_equals_a_plain_loop_with_each_token_in_its_window(stride: int) -> None:
    model = small_model("qwen3")
    tokens = random_tokens(2 * CONTEXT + 12).tolist()
    lengths = np.arange(61, dtype=np.int32) % 4
    expected = plain_nats(model, tokens, stride)
    for batch_size in (1, 3):
        windows = validation_windows(span_of(tokens), CONTEXT, 10**6, batch_size, stride=stride)
        result = evaluate(model, windows, lengths)
        assert result.n_tokens == len(tokens) - 1
        assert result.n_bytes == sum(token % 4 for token in tokens[1:])
        assert result.nats == pytest.approx(sum(expected), rel=1e-5)
    assert sum(expected) != pytest.approx(sum(plain_nats(model, tokens)), rel=1e-3)


@torch.no_grad()
def test_a_subsampled_pass_counts_only_complete_windows() -> None:
    model = small_model()
    tokens = random_tokens(10 * CONTEXT + 5).tolist()
    windows = list(validation_windows(span_of(tokens), CONTEXT, 3 * CONTEXT, 2))
    result = evaluate(model, windows, np.ones(61, np.int32))
    expected = 0.0
    for inputs, targets in windows:
        for row, answer in zip(inputs, targets, strict=True):
            losses = -model(row[None])[0].double().log_softmax(dim=-1)
            expected += losses[torch.arange(CONTEXT), answer].sum().item()
    assert result.n_tokens == result.n_bytes == 3 * CONTEXT
    assert result.nats == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("is_training", [True, False])
def test_evaluation_uses_no_random_numbers_and_restores_the_model_mode(is_training: bool) -> None:
    model = small_model("gpt2", dropout=0.5)
    model.train(is_training)
    tokens = random_tokens(60).tolist()
    state = torch.random.get_rng_state()
    results = {
        evaluate(
            model, validation_windows(span_of(tokens), CONTEXT, 10**6, 4), np.ones(61, np.int32)
        ).nats
        for _ in range(3)
    }
    assert len(results) == 1
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training == is_training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bfloat16_is_close_to_float32() -> None:
    model = small_model("qwen3")
    tokens = random_tokens(100).tolist()
    exact, close = (
        evaluate(
            model,
            validation_windows(span_of(tokens), CONTEXT, 10**6, 4),
            np.ones(61, np.int32),
            dtype=dtype,
        ).nats_per_token
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert close == pytest.approx(exact, rel=0.02)  # logits rounded to 1 part in 256
    assert close != exact


def test_bits_per_byte_is_nan_without_bytes() -> None:
    assert math.isnan(Evaluation(nats=1.0, n_tokens=2, n_bytes=0).bits_per_byte)
    assert Evaluation(nats=math.log(2) * 6, n_tokens=3, n_bytes=4).bits_per_byte == 1.5


@torch.no_grad()
def test_a_model_with_uniform_predictions_has_a_loss_of_ln_v() -> None:
    model = small_model("llama")
    model.unembedding.weight.zero_()
    windows = validation_windows(span_of(random_tokens(500).tolist()), CONTEXT, 10**6, 8)
    result = evaluate(model, windows, np.ones(61, np.int32))
    assert result.nats_per_token == pytest.approx(math.log(61), rel=1e-6)
    assert result.perplexity == pytest.approx(61, rel=1e-5)


@pytest.mark.parametrize("vocab_size", [257, 50_257, 2**28])
@pytest.mark.parametrize("length", [1, 64, 1024, 100_000])
@pytest.mark.parametrize(("device", "most"), [("cuda", 16_384), ("cpu", 1024)])
def test_windows_at_once_fit_into_memory_and_are_at_least_one(
    vocab_size: int, length: int, device: str, most: int
) -> None:
    n_windows = windows_at_once(vocab_size, length, device)
    assert n_windows == 1 or n_windows * length * vocab_size * 4 <= 2**29  # bytes of logits
    assert n_windows == 1 or n_windows * length <= most
    assert (n_windows + 1) * length * max(vocab_size, 2**27 // most) > 2**27, (
        "one more window must not fit"
    )


def test_a_perplexity_that_overflows_is_infinite() -> None:
    assert Evaluation(nats=1e6, n_tokens=1, n_bytes=1).perplexity == math.inf
