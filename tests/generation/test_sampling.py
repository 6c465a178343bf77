"""Sampling options against plain Python, and draws against the distribution they should have."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from minigpt.config import SamplingConfig
from minigpt.generation.sampling import Sampler

CPU = torch.device("cpu")
NONE_SEEN = torch.tensor([], dtype=torch.int64)

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
    {"temperature": 0.7, "top_k": 12, "top_p": 0.8},
    {"temperature": 1.6, "top_k": 30, "top_p": 0.9, "min_p": 0.03, "repetition_penalty": 1.3},
    {"temperature": 0.4, "top_p": 0.9, "min_p": 0.1},
]


def softmax(logits: list[float]) -> list[float]:
    exps = [math.exp(logit - max(logits)) for logit in logits]
    return [e / sum(exps) for e in exps]


def reference(logits: list[float], seen: list[int], config: SamplingConfig) -> list[float]:
    """Return the probabilities of a draw, option by option, in plain Python."""
    penalty = config.repetition_penalty
    for token in set(seen):
        logits = list(logits)
        logits[token] *= 1 / penalty if logits[token] > 0 else penalty
    p = softmax([logit / config.temperature for logit in logits])
    if config.top_k:
        lowest = sorted(p, reverse=True)[: config.top_k][-1]
        p = [x if x >= lowest else 0.0 for x in p]
        p = [x / sum(p) for x in p]
    if config.top_p < 1:
        kept, total = set(), 0.0
        for token in sorted(range(len(p)), key=lambda token: -p[token]):
            if total >= config.top_p:
                break
            kept.add(token)
            total += p[token]
        p = [x if token in kept else 0.0 for token, x in enumerate(p)]
        p = [x / sum(p) for x in p]
    p = [x if x >= config.min_p * max(p) else 0.0 for x in p]
    return [x / sum(p) for x in p]


def some_logits(seed: int = 0, n: int = 50) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 3


def sampler(seed: int = 1, **options: Any) -> Sampler:
    return Sampler(SamplingConfig(**{"temperature": 1.0, **options}), seed=seed, device=CPU)


def chi_squared_is_plausible(counts: list[int], p: list[float]) -> bool:
    """Whether counts may be draws from p: beyond four deviations once in some ten thousand."""
    n = sum(counts)
    assert all(count == 0 for count, x in zip(counts, p, strict=True) if x == 0)
    # Cells of fewer than five expected draws are taken together.
    cells = [(count, n * x) for count, x in zip(counts, p, strict=True) if n * x >= 5]
    rest = n - sum(c for c, _ in cells), n - sum(e for _, e in cells)
    if rest[1] > 0.5:
        cells.append(rest)
    freedom = max(1, len(cells) - 1)
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    return statistic < freedom + 4 * math.sqrt(2 * freedom) + 4


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_distribution_equals_plain_python(options: dict[str, Any]) -> None:
    seen = [3, 3, 17, 42, 0]
    for seed in range(5):
        logits = some_logits(seed)
        config = SamplingConfig(**{"temperature": 1.0, **options})
        expected = reference(logits.tolist(), seen, config)
        actual = sampler(**options).distribution(logits, torch.tensor(seen)).softmax(dim=0)
        assert [x > 0 for x in actual.tolist()] == [x > 0 for x in expected]
        torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-4, atol=1e-7)


def test_neutral_options_leave_the_softmax_of_the_model() -> None:
    logits = some_logits()
    config = SamplingConfig(temperature=1.0)
    assert (config.top_k, config.top_p, config.min_p, config.repetition_penalty) == (0, 1, 0, 1)
    actual = sampler().distribution(logits, torch.tensor([1, 2])).softmax(dim=0)
    torch.testing.assert_close(actual, logits.softmax(dim=0))


@pytest.mark.parametrize("options", [OPTIONS[0], *OPTIONS[-3:]], ids=str)
def test_draws_have_the_distribution(options: dict[str, Any]) -> None:
    logits, seen = some_logits(4), [1, 2]
    source = sampler(**options)
    draws = [source.draw(logits, torch.tensor(seen)).item() for _ in range(2000)]
    counts = torch.bincount(torch.tensor(draws), minlength=50).tolist()
    config = SamplingConfig(**{"temperature": 1.0, **options})
    assert chi_squared_is_plausible(counts, reference(logits.tolist(), seen, config))


def test_first_draws_of_neighbouring_seeds_have_the_distribution() -> None:
    """Samples 1, 2, 3 of a prompt take neighbouring seeds."""
    logits = some_logits(4)
    draws = [sampler(seed).draw(logits, NONE_SEEN).item() for seed in range(3000)]
    counts = torch.bincount(torch.tensor(draws), minlength=50).tolist()
    assert chi_squared_is_plausible(counts, logits.softmax(dim=0).tolist())
    neighbours = sum(a == b for a, b in itertools.pairwise(draws))
    chance = logits.softmax(dim=0).square().sum().item()
    assert abs(neighbours / 2999 - chance) < 4 * math.sqrt(chance / 2999)


def test_the_chi_squared_test_notices_another_temperature() -> None:
    logits = some_logits(4)
    source = sampler(temperature=1.15)
    draws = [source.draw(logits, NONE_SEEN).item() for _ in range(3000)]
    counts = torch.bincount(torch.tensor(draws), minlength=50).tolist()
    assert not chi_squared_is_plausible(counts, logits.softmax(dim=0).tolist())


def test_a_draw_follows_the_softmax_even_for_a_large_vocabulary() -> None:
    logits = torch.zeros(50_000)
    logits[123] = math.log(50_000)  # half of all
    source = sampler()
    draws = [source.draw(logits, NONE_SEEN).item() for _ in range(400)]
    n_hits = sum(draw == 123 for draw in draws)
    assert abs(n_hits - 200) < 4 * 10
    others = [draw for draw in draws if draw != 123]
    assert abs(sum(others) / len(others) - 25_000) < 4 * 50_000 / math.sqrt(12 * len(others))


def test_temperature_zero_takes_the_most_probable_token() -> None:
    for seed in range(20):
        logits = some_logits(seed)
        expected = max(range(50), key=logits.tolist().__getitem__)
        greedy = sampler(seed, temperature=0.0, top_k=5, top_p=0.5, min_p=0.5)
        assert greedy.draw(logits, NONE_SEEN).item() == expected


def test_temperature_zero_is_penalized_too() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0])
    greedy = sampler(temperature=0.0, repetition_penalty=1.5)
    assert greedy.draw(logits, torch.tensor([0])).item() == 1
    assert greedy.draw(logits, NONE_SEEN).item() == 0
    assert greedy.draw(logits, torch.tensor([0, 1])).item() == 0


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy_and_no_nan(temperature: float) -> None:
    for seed in range(5):
        logits = some_logits(seed)
        source = sampler(temperature=temperature, top_k=20, top_p=0.9, min_p=0.1)
        assert not source.distribution(logits, NONE_SEEN).isnan().any()
        assert source.draw(logits, NONE_SEEN).item() == logits.argmax().item()


@pytest.mark.parametrize("temperature", [1e30, 1e300])
def test_a_huge_temperature_is_an_even_draw(temperature: float) -> None:
    actual = sampler(temperature=temperature).distribution(some_logits(), NONE_SEEN).softmax(dim=0)
    torch.testing.assert_close(actual, torch.full((50,), 0.02))


def test_equal_logits_at_the_border_of_top_k_stay_together() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    kept = sampler(top_k=2).distribution(logits, NONE_SEEN).isfinite()
    assert kept.tolist() == [False, True, True, True, False]


def test_top_p_takes_the_fewest_tokens_that_reach_it() -> None:
    logits = torch.tensor([0.25, 0.5, 0.125, 0.125]).log()

    def kept(p: float) -> list[int]:
        finite = sampler(top_p=p).distribution(logits, NONE_SEEN).isfinite()
        return finite.nonzero().flatten().tolist()

    assert kept(1e-9) == [1]
    assert kept(0.49) == [1]
    assert kept(0.51) == [0, 1]
    assert kept(0.74) == [0, 1]
    assert kept(0.76) == [0, 1, 2]  # of two equal ones, the first
    assert kept(0.9) == [0, 1, 2, 3]


def test_logits_of_minus_infinity_are_never_drawn() -> None:
    logits = torch.full((10,), -torch.inf)
    logits[[2, 7]] = torch.tensor([1.0, 0.5])
    source = sampler(temperature=3.0, top_p=0.999)
    assert {source.draw(logits, NONE_SEEN).item() for _ in range(200)} == {2, 7}


def test_the_logits_that_are_given_are_not_changed() -> None:
    logits = some_logits()
    before = logits.clone()
    source = sampler(top_k=5, top_p=0.5, min_p=0.1, repetition_penalty=2.0, temperature=0.5)
    source.draw(logits, torch.tensor([1, 2, 3]))
    assert torch.equal(logits, before)


def test_draws_depend_on_the_seed_alone_and_touch_no_global_state() -> None:
    logits = some_logits()

    def draws(seed: int, n: int = 40) -> list[float]:
        source = sampler(seed)
        return [source.draw(logits, NONE_SEEN).item() for _ in range(n)]

    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    one = draws(5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert draws(5) == one
    assert draws(6) != one
    assert draws(2**63 - 1) != one
