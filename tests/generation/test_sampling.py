"""Sampling options against plain Python and transformers."""

from typing import Any

import pytest
import torch
from sampling_reference import (
    ALL,
    GENERATED,
    OPTIONS,
    PROMPT,
    distribution,
    drawn,
    reference,
    sampler,
    some_logits,
)

from minigpt.config import SamplingConfig
from minigpt.generation.sampling import Sampler


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_distribution_equals_plain_python(options: dict[str, Any]) -> None:
    for seed in range(5):
        logits = some_logits(seed)
        config = SamplingConfig(**{"temperature": 1.0, **options})
        expected = reference(logits[0].tolist(), PROMPT, GENERATED, config)
        actual = distribution(sampler(prompt=PROMPT, generated=GENERATED, **options), logits)[0]
        assert [x > 0 for x in actual.tolist()] == [x > 0 for x in expected]
        torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [{"top_k": 5}, {"top_k": 3000}, {"top_p": 0.3}, {"top_p": 0.9999}, {"min_p": 0.2}, ALL],
    ids=str,
)
@pytest.mark.parametrize("scale", [0.1, 4.0])
def test_filtering_a_large_vocabulary_equals_a_full_sort(
    options: dict[str, Any], scale: float
) -> None:
    """The options keep few of the candidates or nearly all."""
    logits = some_logits(1, n=6000) * scale
    config = SamplingConfig(**{"temperature": 1.0, **options})
    expected = reference(logits[0].tolist(), PROMPT, [], config)
    actual = distribution(sampler(prompt=PROMPT, **options), logits)[0]
    # Rounding may move tokens across the cut-off.
    assert sum((x > 0) != (y > 0) for x, y in zip(actual.tolist(), expected, strict=True)) <= 2
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-3, atol=1e-3 / 6000)


@pytest.mark.parametrize(
    "options",
    [{"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.05}, {"repetition_penalty": 1.4}],
    ids=str,
)
def test_each_option_equals_the_processor_of_transformers(options: dict[str, Any]) -> None:
    from transformers.generation import logits_process as theirs

    ((name, value),) = options.items()
    processor: Any = {
        "top_k": theirs.TopKLogitsWarper,
        "top_p": theirs.TopPLogitsWarper,
        "min_p": theirs.MinPLogitsWarper,
        "repetition_penalty": theirs.RepetitionPenaltyLogitsProcessor,
    }[name](value)
    logits = some_logits(2, n_rows=3)
    source = sampler(1, 2, 3, prompt=PROMPT, generated=GENERATED, **options)
    ids = torch.tensor([PROMPT + GENERATED] * 3)
    expected = processor(ids, logits.clone()).softmax(dim=-1)
    torch.testing.assert_close(distribution(source, logits), expected)


def test_all_options_of_transformers_apply_in_its_order() -> None:
    from transformers.generation import logits_process as theirs

    options = {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.05}
    logits = some_logits(2, n_rows=3)
    expected, ids = logits.clone(), torch.tensor([PROMPT] * 3)
    for processor in (
        theirs.RepetitionPenaltyLogitsProcessor(1.3),
        theirs.TemperatureLogitsWarper(1.5),
        theirs.TopKLogitsWarper(20),
        theirs.TopPLogitsWarper(0.8),
        theirs.MinPLogitsWarper(0.05),
    ):
        expected = processor(ids, expected)
    source = sampler(1, 2, 3, prompt=PROMPT, repetition_penalty=1.3, **options)
    torch.testing.assert_close(distribution(source, logits), expected.softmax(dim=-1))


def test_neutral_sampling_options_give_the_softmax_of_the_logits() -> None:
    logits, config = some_logits(), SamplingConfig(temperature=1.0)
    assert (config.top_k, config.top_p, config.min_p, config.repetition_penalty) == (0, 1, 0, 1)
    assert (config.presence_penalty, config.frequency_penalty, config.ignore_eos) == (0, 0, False)
    actual = distribution(sampler(prompt=PROMPT, generated=GENERATED), logits)
    torch.testing.assert_close(actual, logits.softmax(dim=-1))


def test_presence_and_frequency_penalties_ignore_the_prompt() -> None:
    """As in OpenAI and vLLM; transformers' repetition penalty also counts tokens of the prompt."""
    logits = some_logits()
    spared = sampler(prompt=PROMPT, presence_penalty=1.0, frequency_penalty=1.0)
    torch.testing.assert_close(distribution(spared, logits), logits.softmax(dim=-1))
    counted = sampler(prompt=PROMPT, repetition_penalty=1.5)
    assert not torch.allclose(distribution(counted, logits), logits.softmax(dim=-1))


def test_temperature_zero_takes_the_most_probable_token() -> None:
    for seed in range(20):
        logits = some_logits(seed)
        expected = max(range(50), key=logits[0].tolist().__getitem__)
        greedy = sampler(seed, temperature=0.0, top_k=5, top_p=0.5, min_p=0.5)
        assert greedy.draw(logits).item() == expected


def test_temperature_zero_is_penalized_too() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0]])

    def greedy(prompt: list[int], **options: Any) -> list[int]:
        config = SamplingConfig(temperature=0.0, **options)
        source = Sampler(config, seeds=[1], device="cpu", prompt=prompt, end_of_text=[0])
        return drawn(source, logits, 3)

    assert greedy([], repetition_penalty=1.5) == [0, 1, 0]
    assert greedy([0], repetition_penalty=1.5) == [1, 0, 0]
    assert greedy([0, 1], repetition_penalty=1.5) == [0, 0, 0]
    assert greedy([], presence_penalty=1.0) == [0, 1, 0]
    assert greedy([0, 0], frequency_penalty=0.06) == [0, 0, 1]
    assert greedy([], ignore_eos=True) == [1, 1, 1]


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy_without_nan(temperature: float) -> None:
    for seed in range(5):
        logits = some_logits(seed)
        for options in ({}, {"top_k": 20, "top_p": 0.9, "min_p": 0.1}):
            source = sampler(temperature=temperature, **options)
            assert not distribution(source, logits).isnan().any()
            assert source.draw(logits).item() == logits.argmax().item()


@pytest.mark.parametrize("temperature", [1e20, 9e29])
def test_a_huge_temperature_is_uniform(temperature: float) -> None:
    actual = distribution(sampler(temperature=temperature), some_logits())
    torch.testing.assert_close(actual, torch.full((1, 50), 0.02))


def test_top_k_keeps_ties_with_the_kth_token() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    kept = distribution(sampler(top_k=2), logits)[0] > 0
    assert kept.tolist() == [False, True, True, True, False]


def test_top_k_keeps_many_ties_in_a_large_vocabulary() -> None:
    """More ties than the candidates of the first pass over a large vocabulary."""
    logits = torch.zeros(1, 6000)
    logits[0, ::2] = 2.0
    logits[0, 17] = 3.0
    n_kept = int((distribution(sampler(top_k=5), logits) > 0).sum())
    assert n_kept == 3001


def test_top_p_takes_the_fewest_tokens_that_reach_it() -> None:
    logits = torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log()

    def kept(p: float) -> list[int]:
        return distribution(sampler(top_p=p), logits)[0].nonzero().flatten().tolist()

    assert kept(1e-9) == [1]
    assert kept(0.49) == [1]
    assert kept(0.51) == [0, 1]
    assert kept(0.74) == [0, 1]
    assert kept(0.76) == [0, 1, 2]  # the first of two equal tokens
    assert kept(0.9) == [0, 1, 2, 3]


@pytest.mark.parametrize("options", [{}, {"top_p": 0.999}], ids=str)
def test_logits_of_minus_infinity_are_never_sampled(options: dict[str, Any]) -> None:
    logits = torch.full((1, 10), -torch.inf)
    logits[0, [2, 7]] = torch.tensor([1.0, 0.5])
    assert set(drawn(sampler(temperature=3.0, **options), logits, 200)) == {2, 7}


def test_the_logits_are_not_modified() -> None:
    logits = some_logits()
    before = logits.clone()
    sampler(prompt=PROMPT, generated=GENERATED, **ALL).draw(logits)
    sampler(temperature=0.0, repetition_penalty=2.0, prompt=PROMPT).draw(logits)
    assert torch.equal(logits, before)
