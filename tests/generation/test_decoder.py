"""Cached generation against a plain loop of full forward passes."""

from collections.abc import Collection
from typing import Any

import pytest
import torch
from kept_attention import KeptAttention
from small_models import LAYOUTS, random_tokens, small_model

from minigpt.config import SamplingConfig
from minigpt.errors import CheckpointError, DataError
from minigpt.generation.decoder import Decoder, Step, fresh_seed
from minigpt.generation.sampling import Sampler
from minigpt.model.cache import cache_bytes_per_token
from minigpt.model.gpt import GPT

PROMPT = random_tokens(5).tolist()


def plain_generation(
    model: GPT, prompt: list[int], config: SamplingConfig, seed: int
) -> list[tuple[int, float]]:
    """Generate without a cache: the model reads all tokens so far for each new one."""
    sampler = Sampler(config, seeds=[seed], device="cpu", prompt=prompt)
    context, result = list(prompt), []
    while len(result) < config.max_new_tokens and len(context) <= model.config.context_length:
        with torch.no_grad():
            logits = model(torch.tensor([context]))[:, -1]
        token = int(sampler.draw(logits))
        result.append((token, logits[0].log_softmax(dim=0)[token].item()))
        context.append(token)
    return result


def generated(
    model: GPT,
    prompt: list[int],
    *,
    seed: int = 1,
    end_of_text: Collection[int] = (),
    **options: Any,
) -> list[Step]:
    config = SamplingConfig(**options)
    decoder = Decoder(model, prompt, max_new_tokens=config.max_new_tokens)
    return list(decoder.generate(config, seed=seed, end_of_text=end_of_text))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"temperature": 1.0},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
        {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.4},
    ],
    ids=["greedy", "greedy-penalized", "plain", "all", "counted"],
)
def test_generation_with_the_cache_equals_full_forward_passes(
    layout: str, options: dict[str, Any]
) -> None:
    model = small_model(layout)
    for seed in range(2):
        prompt = random_tokens(1 + 6 * seed, seed=seed).tolist()
        steps = generated(model, prompt, seed=seed, max_new_tokens=8, **options)
        expected = plain_generation(
            model, prompt, SamplingConfig(max_new_tokens=8, **options), seed
        )
        assert [step.token for step in steps] == [token for token, _ in expected]
        # The model's own probability before sampling options; float32 sums in another order.
        assert [step.log_probability for step in steps] == pytest.approx(
            [log_probability for _, log_probability in expected], abs=1e-3
        )
        assert [step.index for step in steps] == list(range(8))
        assert [step.position for step in steps] == list(range(len(prompt), len(prompt) + 8))


@pytest.mark.parametrize("n_prompt", [1, 5, 23, 24])
def test_generation_ends_when_the_context_is_full(n_prompt: int) -> None:
    """The query at the last position still generates a token."""
    model = small_model("gpt2")
    steps = generated(model, random_tokens(n_prompt).tolist(), max_new_tokens=1000)
    assert len(steps) == 24 - n_prompt + 1
    assert [step.finish for step in steps] == [None] * (24 - n_prompt) + ["context"]
    assert steps[-1].position == 24


@pytest.mark.parametrize("n", [1, 7])
def test_generation_ends_after_max_new_tokens(n: int) -> None:
    steps = generated(small_model(), PROMPT, max_new_tokens=n)
    assert [step.finish for step in steps] == [None] * (n - 1) + ["length"]


def test_max_new_tokens_reached_at_the_end_of_the_context_finishes_by_length() -> None:
    steps = generated(small_model(), PROMPT, max_new_tokens=20)
    assert len(steps) == 20
    assert steps[-1].finish == "length"


def test_generation_ends_at_an_end_of_text_only() -> None:
    model = small_model()
    free = generated(model, PROMPT, temperature=0.0, max_new_tokens=10)
    tokens = [step.token for step in free]
    absent = next(token for token in range(61) if token not in tokens)
    for ends in ([tokens[6]], [absent, tokens[6]], {tokens[4], tokens[8], absent}):
        first = min(tokens.index(end) for end in ends if end != absent)
        ended = generated(model, PROMPT, temperature=0.0, max_new_tokens=10, end_of_text=ends)
        assert [step.token for step in ended] == tokens[: first + 1]
        assert [step.finish for step in ended] == [None] * first + ["end_of_text"]
    unended = generated(model, PROMPT, temperature=0.0, max_new_tokens=10, end_of_text=[absent])
    assert unended == free


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cache_of_limited_capacity_gives_the_same_tokens(
    layout: str,
) -> None:
    model = small_model(layout, context_length=2000)
    config = SamplingConfig(max_new_tokens=9, temperature=1.0)
    tight, whole = Decoder(model, PROMPT, max_new_tokens=9), Decoder(model, PROMPT)
    bytes_per_token = cache_bytes_per_token(model.config)
    assert tight.cache.n_bytes == (5 + 9) * bytes_per_token
    assert whole.cache.n_bytes == 2000 * bytes_per_token
    # The log-probabilities are equal too, bit for bit.
    assert list(tight.generate(config, seed=3)) == list(whole.generate(config, seed=3))
    assert Decoder(model, PROMPT, max_new_tokens=10**9).cache.capacity == 2000


def test_a_call_may_ask_for_fewer_new_tokens_than_the_decoder_allows() -> None:
    decoder = Decoder(small_model(), PROMPT, max_new_tokens=8)
    for n in (8, 3):
        steps = list(decoder.generate(SamplingConfig(max_new_tokens=n), seed=1))
        assert [step.finish for step in steps] == [None] * (n - 1) + ["length"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}])
def test_nan_or_inf_logits_raise_a_checkpoint_error(value: float, options: dict[str, Any]) -> None:
    for name in ("unembedding", "blocks.1.mlp.down", "blocks.0.attention.value"):
        model = small_model()
        with torch.no_grad():
            model.get_submodule(name).weight[7, 3] = value  # type: ignore[index]
        with pytest.raises(CheckpointError, match="position 5, so its weights are damaged"):
            generated(model, PROMPT, **options)


def test_tokens_are_determined_by_the_seed() -> None:
    model = small_model("qwen3")
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    one = generated(model, PROMPT, seed=8, max_new_tokens=15, temperature=1.5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(4)
    assert generated(model, PROMPT, seed=8, max_new_tokens=15, temperature=1.5) == one
    assert generated(model, PROMPT, seed=9, max_new_tokens=15, temperature=1.5) != one


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_reused_decoder_generates_the_tokens_of_a_new_one(layout: str) -> None:
    model = small_model(layout)
    decoder = Decoder(model, PROMPT)
    config = SamplingConfig(max_new_tokens=10, temperature=1.0)
    for seed in (1, 2, 1):
        steps = list(decoder.generate(config, seed=seed))
        assert steps == list(Decoder(model, PROMPT).generate(config, seed=seed))
    partial = decoder.generate(config, seed=5)
    next(partial)
    next(partial)  # abandoned halfway
    assert list(decoder.generate(config, seed=1)) == generated(
        model, PROMPT, seed=1, max_new_tokens=10, temperature=1.0
    )


def test_the_recorders_latest_pass_predicted_the_token() -> None:
    recorder = KeptAttention()
    decoder = Decoder(small_model(), PROMPT, recorder)
    first_rows = []
    for n in (4, 1, 2):
        for step in decoder.generate(SamplingConfig(max_new_tokens=n), seed=1):
            assert recorder.last.weights_LBHS.shape[3] == step.position
            if step.index == 0:
                first_rows.append(recorder.last.weights_LBHS)
    assert torch.equal(first_rows[0], first_rows[1])
    assert torch.equal(first_rows[0], first_rows[2])


def test_an_empty_prompt_raises_a_data_error() -> None:
    with pytest.raises(DataError, match=r"^the prompt is empty\. Give at least one character"):
        Decoder(small_model(), [])


def test_a_prompt_longer_than_the_context_raises_a_data_error_with_both_lengths() -> None:
    with pytest.raises(DataError) as caught:
        Decoder(small_model(), random_tokens(25).tolist())
    assert str(caught.value) == (
        "the prompt has 25 tokens, but the model sees 24. Shorten the prompt, or train with a "
        "larger --context-length."
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bfloat16_model_decodes_with_a_bfloat16_cache(layout: str) -> None:
    model = small_model(layout).bfloat16()
    decoder = Decoder(model, PROMPT)
    assert decoder.cache.keys_LBGSD.dtype == torch.bfloat16
    steps = list(decoder.generate(SamplingConfig(max_new_tokens=5), seed=1))
    assert len(steps) == 5
    assert all(step.log_probability <= 0 for step in steps)


def test_fresh_seeds_differ_and_are_valid() -> None:
    seeds = {fresh_seed() for _ in range(20)}
    assert len(seeds) == 20
    for seed in seeds:
        assert SamplingConfig(seed=seed).seed == seed
