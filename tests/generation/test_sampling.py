"""Sampling options against plain Python and transformers, and draws against their distribution."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from minigpt.config import SamplingConfig
from minigpt.generation.sampling import Sampler

PROMPT = [3, 3, 17, 42, 0]
GENERATED = [17, 5, 5, 9, 5]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 40},
    {"top_k": 10_000},
    {"top_p": 0.05},
    {"top_p": 0.5},
    {"top_p": 0.97},
    {"min_p": 0.02},
    {"min_p": 0.4},
    {"min_p": 1.0},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"presence_penalty": -1.0},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -0.5},
    {"ignore_eos": True},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.8},
    {"temperature": 1.6, "top_k": 30, "top_p": 0.9, "min_p": 0.03, "repetition_penalty": 1.3},
    {"temperature": 0.4, "top_p": 0.9, "min_p": 0.1},
    {
        "temperature": 1.2,
        "top_k": 30,
        "top_p": 0.95,
        "min_p": 0.02,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "ignore_eos": True,
    },
]
ALL = OPTIONS[-1]
ENDS = [7, 30]


def shares(values: list[float]) -> list[float]:
    total = sum(values)
    return [value / total for value in values]


def softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    return shares([math.exp(logit - largest) for logit in logits])


def reference(
    logits: list[float], prompt: list[int], generated: list[int], config: SamplingConfig
) -> list[float]:
    """Return the probabilities of a draw, option by option, in plain Python."""
    logits = list(logits)
    if config.ignore_eos:
        for token in ENDS:
            logits[token] = -math.inf
    penalty = config.repetition_penalty
    for token in {*prompt, *generated}:
        logits[token] *= 1 / penalty if logits[token] > 0 else penalty
    for token, count in Counter(generated).items():
        logits[token] -= config.presence_penalty + count * config.frequency_penalty
    p = softmax([logit / config.temperature for logit in logits])
    if config.top_k:
        lowest = sorted(p, reverse=True)[: config.top_k][-1]
        p = shares([x if x >= lowest else 0.0 for x in p])
    if config.top_p < 1:
        kept, total = set(), 0.0
        for token in sorted(range(len(p)), key=lambda token: -p[token]):
            if total >= config.top_p:
                break
            kept.add(token)
            total += p[token]
        p = shares([x if token in kept else 0.0 for token, x in enumerate(p)])
    lowest = config.min_p * max(p)
    return shares([x if x >= lowest else 0.0 for x in p])


def some_logits(seed: int = 0, n: int = 50, n_rows: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_rows, n, generator=generator) * 3


def forced(*logits_of: int, n: int = 50) -> Tensor:
    """Logits (B, V) with which each row draws the token that is named for it."""
    logits = torch.full((len(logits_of), n), -1e9)
    logits[range(len(logits_of)), list(logits_of)] = 1e9
    return logits


def sampler(
    *seeds: int, generated: Sequence[int] = (), prompt: Sequence[int] = (), **options: Any
) -> Sampler:
    """Return a sampler that has already drawn ``generated`` in every row."""
    config = SamplingConfig(**{"temperature": 1.0, **options})
    seeds = seeds or (1,)
    source = Sampler(config, seeds=seeds, device="cpu", prompt=prompt, end_of_text=ENDS)
    for token in generated:
        assert source.draw(forced(*[token] * len(seeds))).tolist() == [token] * len(seeds)
    return source


def distribution(source: Sampler, logits: Tensor) -> Tensor:
    """Return the probabilities (B, V) that a draw is made from, in the order of the ids."""
    probability, ids = source.candidates(logits)
    if ids is None:
        return probability
    return torch.zeros_like(logits).scatter(1, ids, probability)


def drawn(source: Sampler, logits: Tensor, n: int) -> list[int]:
    """Return n draws of one row, all of the same logits."""
    return [source.draw(logits).item() for _ in range(n)]


def chi_squared_is_plausible(draws: list[int], p: list[float]) -> bool:
    """Whether these may be draws from p: Pearson's test, wrong for one right program in 10,000."""
    n = len(draws)
    counts = torch.bincount(torch.tensor(draws), minlength=len(p)).tolist()
    if any(count > 0 for count, x in zip(counts, p, strict=True) if x == 0):
        return False
    # Cells of fewer than five expected draws are taken together.
    cells = [(count, n * x) for count, x in zip(counts, p, strict=True) if n * x >= 5]
    rest = n - sum(c for c, _ in cells), n - sum(e for _, e in cells)
    if rest[1] > 0.5:
        cells.append(rest)
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    return len(cells) == 1 or chance_of_more(statistic, len(cells) - 1) > 1e-4


def chance_of_more(statistic: float, freedom: int) -> float:
    """How often chi squared of so many degrees of freedom is larger: 1 - its distribution."""
    half = torch.tensor([freedom, statistic], dtype=torch.float64) / 2
    return torch.special.gammaincc(half[0], half[1]).item()


def test_chi_squared_p_values_equal_the_table() -> None:
    """Abramowitz and Stegun 1964, table 26.8, at 0.0001 and 0.05."""
    for statistic, freedom, chance in ((21.1075, 3, 1e-4), (35.5640, 10, 1e-4), (43.773, 30, 0.05)):
        assert chance_of_more(statistic, freedom) == pytest.approx(chance, rel=1e-3)


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
def test_a_large_vocabulary_is_filtered_like_a_sort(options: dict[str, Any], scale: float) -> None:
    """Whether few candidates are left or nearly all."""
    logits = some_logits(1, n=6000) * scale
    config = SamplingConfig(**{"temperature": 1.0, **options})
    expected = reference(logits[0].tolist(), PROMPT, [], config)
    actual = distribution(sampler(prompt=PROMPT, **options), logits)[0]
    # Tokens at the border may fall on the other side by rounding.
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


def test_neutral_options_leave_the_softmax_of_the_model() -> None:
    logits, config = some_logits(), SamplingConfig(temperature=1.0)
    assert (config.top_k, config.top_p, config.min_p, config.repetition_penalty) == (0, 1, 0, 1)
    assert (config.presence_penalty, config.frequency_penalty, config.ignore_eos) == (0, 0, False)
    actual = distribution(sampler(prompt=PROMPT, generated=GENERATED), logits)
    torch.testing.assert_close(actual, logits.softmax(dim=-1))


def test_presence_and_frequency_penalties_ignore_the_prompt() -> None:
    """As OpenAI and vLLM count; transformers' repetition penalty counts the prompt's as well."""
    logits = some_logits()
    spared = sampler(prompt=PROMPT, presence_penalty=1.0, frequency_penalty=1.0)
    torch.testing.assert_close(distribution(spared, logits), logits.softmax(dim=-1))
    counted = sampler(prompt=PROMPT, repetition_penalty=1.5)
    assert not torch.allclose(distribution(counted, logits), logits.softmax(dim=-1))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_samples_follow_the_distribution(options: dict[str, Any]) -> None:
    logits, n_rows = some_logits(5) / 3, 4000
    # A draw in each of many rows, so that no draw's penalty falls on the next.
    seeds = range(100_000, 100_000 + n_rows)
    source = sampler(*seeds, prompt=PROMPT, generated=GENERATED, **options)
    draws = source.draw(logits.expand(n_rows, -1)).tolist()
    config = SamplingConfig(**{"temperature": 1.0, **options})
    assert chi_squared_is_plausible(draws, reference(logits[0].tolist(), PROMPT, GENERATED, config))
    if any(name.endswith("penalty") for name in options):
        assert not chi_squared_is_plausible(draws, reference(logits[0].tolist(), [], [], config))


def test_samples_of_one_generator_follow_the_distribution() -> None:
    logits = some_logits(4)
    assert chi_squared_is_plausible(
        drawn(sampler(), logits, 3000), logits[0].softmax(dim=0).tolist()
    )


def test_successive_samples_are_independent() -> None:
    logits = some_logits(4, n=6) / 3
    draws = drawn(sampler(), logits, 6001)
    p = logits[0].softmax(dim=0)
    pairs = [6 * a + b for a, b in itertools.pairwise(draws)][::2]
    assert chi_squared_is_plausible(pairs, torch.outer(p, p).flatten().tolist())


def test_first_samples_of_consecutive_seeds_follow_the_distribution() -> None:
    """Samples 1, 2, 3 of a prompt take neighbouring seeds."""
    logits = some_logits(4)
    draws = [sampler(seed).draw(logits).item() for seed in range(3000)]
    assert chi_squared_is_plausible(draws, logits[0].softmax(dim=0).tolist())
    neighbours = sum(a == b for a, b in itertools.pairwise(draws))
    chance = logits[0].softmax(dim=0).square().sum().item()
    assert abs(neighbours / 2999 - chance) < 4 * math.sqrt(chance / 2999)


@pytest.mark.parametrize(
    "other", [{"temperature": 1.15}, {"top_p": 0.97}, {"min_p": 0.02}, {"top_k": 14}], ids=str
)
def test_the_chi_squared_test_notices_another_option(other: dict[str, Any]) -> None:
    logits = some_logits(4)
    draws = drawn(sampler(**other), logits, 3000)
    assert not chi_squared_is_plausible(draws, logits[0].softmax(dim=0).tolist())


def test_samples_follow_the_softmax_of_a_large_vocabulary() -> None:
    logits = torch.zeros(1, 50_000)
    logits[0, 123] = math.log(50_000)  # half of all
    draws = sampler(*range(400)).draw(logits.expand(400, -1)).tolist()
    n_hits = sum(draw == 123 for draw in draws)
    assert abs(n_hits - 200) < 4 * 10
    others = [draw for draw in draws if draw != 123]
    assert abs(sum(others) / len(others) - 25_000) < 4 * 50_000 / math.sqrt(12 * len(others))


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


def test_ties_with_the_kth_token_are_kept() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    kept = distribution(sampler(top_k=2), logits)[0] > 0
    assert kept.tolist() == [False, True, True, True, False]


def test_many_ties_with_the_kth_token_are_kept() -> None:
    """More of them than a first look at a large vocabulary takes in."""
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
    assert kept(0.76) == [0, 1, 2]  # of two equal ones, the first
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


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all"])
def test_a_row_samples_the_same_tokens_when_others_are_removed(options: dict[str, Any]) -> None:
    """Its seed and its own tokens decide: 70 draws, more than are drawn ahead at once."""
    logits = some_logits(3, n=50, n_rows=70)
    alone = [sampler(seed, prompt=PROMPT, **options) for seed in (5, 6, 7)]
    expected = [[one.draw(row[None]).item() for row in logits] for one in alone]
    together = sampler(5, 6, 7, prompt=PROMPT, **options)
    rows, drawn_of = [0, 1, 2], [[], [], []]  # type: ignore[var-annotated]
    for n, row_logits in enumerate(logits):
        if n in (10, 66):
            together.keep(kept := [1, 0] if n == 66 else [0, 2])
            rows = [rows[place] for place in kept]
        tokens = together.draw(row_logits.expand(len(rows), -1)).tolist()
        for row, token in zip(rows, tokens, strict=True):
            drawn_of[row].append(token)
    assert drawn_of == [expected[0], expected[1][:10], expected[2]]


def test_samples_depend_on_the_seed_and_not_on_global_state() -> None:
    logits = some_logits(4)

    def draws(seed: int) -> list[int]:
        return drawn(sampler(seed), logits, 40)

    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    one = draws(5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert draws(5) == one
    assert draws(6) != one
    assert draws(2**63 - 1) != one
