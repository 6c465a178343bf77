"""Draws follow their distribution and depend only on their own seed."""

import itertools
import math
from typing import Any

import pytest
import torch
from sampling_reference import (
    ALL,
    GENERATED,
    OPTIONS,
    PROMPT,
    chi_squared_is_plausible,
    drawn,
    p_value,
    reference,
    sampler,
    some_logits,
)

from minigpt.config import SamplingConfig


def test_chi_squared_p_values_equal_the_table() -> None:
    """Abramowitz and Stegun 1964, table 26.8, at 0.0001 and 0.05."""
    for statistic, freedom, chance in ((21.1075, 3, 1e-4), (35.5640, 10, 1e-4), (43.773, 30, 0.05)):
        assert p_value(statistic, freedom) == pytest.approx(chance, rel=1e-3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_samples_follow_the_distribution(options: dict[str, Any]) -> None:
    logits, n_rows = some_logits(5) / 3, 4000
    # One draw in each of many rows, so that no draw penalizes the next.
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


@pytest.mark.integration
def test_successive_samples_are_independent() -> None:
    logits = some_logits(4, n=6) / 3
    draws = drawn(sampler(), logits, 6001)
    p = logits[0].softmax(dim=0)
    pairs = [6 * a + b for a, b in itertools.pairwise(draws)][::2]
    assert chi_squared_is_plausible(pairs, torch.outer(p, p).flatten().tolist())


@pytest.mark.integration
def test_first_samples_of_consecutive_seeds_follow_the_distribution() -> None:
    """Samples 1, 2, 3 of a prompt use consecutive seeds."""
    logits = some_logits(4)
    draws = [sampler(seed).draw(logits).item() for seed in range(3000)]
    assert chi_squared_is_plausible(draws, logits[0].softmax(dim=0).tolist())
    neighbours = sum(a == b for a, b in itertools.pairwise(draws))
    chance = logits[0].softmax(dim=0).square().sum().item()
    assert abs(neighbours / 2999 - chance) < 4 * math.sqrt(chance / 2999)


@pytest.mark.integration
@pytest.mark.parametrize(
    "other", [{"temperature": 1.15}, {"top_p": 0.97}, {"min_p": 0.02}, {"top_k": 14}], ids=str
)
def test_the_chi_squared_test_detects_different_sampling_options(other: dict[str, Any]) -> None:
    logits = some_logits(4)
    draws = drawn(sampler(**other), logits, 3000)
    assert not chi_squared_is_plausible(draws, logits[0].softmax(dim=0).tolist())


@pytest.mark.integration
def test_samples_follow_the_softmax_of_a_large_vocabulary() -> None:
    logits = torch.zeros(1, 50_000)
    logits[0, 123] = math.log(50_000)  # half of the probability mass
    draws = sampler(*range(400)).draw(logits.expand(400, -1)).tolist()
    n_hits = sum(draw == 123 for draw in draws)
    assert abs(n_hits - 200) < 4 * 10
    others = [draw for draw in draws if draw != 123]
    assert abs(sum(others) / len(others) - 25_000) < 4 * 50_000 / math.sqrt(12 * len(others))


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all"])
def test_a_row_samples_the_same_tokens_when_other_rows_are_removed(options: dict[str, Any]) -> None:
    """Only its seed and tokens matter; 70 draws need more than one block of random numbers."""
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
