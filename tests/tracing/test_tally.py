"""Effects summed over a trace: Spearman's rank correlation, means of sources and controls."""

import math

import numpy as np
import pytest
from knocking_out import check_cause

from minigpt.tracing.analysis.tally import rank_correlation
from minigpt.tracing.events import Source, Token
from minigpt.tracing.findings import Effect


def test_the_rank_correlation_is_that_of_spearman() -> None:
    assert rank_correlation([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [9, 7, 3, -5]) == pytest.approx(-1)
    # Without ties 1 - 6 sum d^2 / (n (n^2 - 1)), Spearman 1904.
    x, y = [86, 97, 99, 100, 101, 103, 106, 110, 112, 113], [2, 20, 28, 27, 50, 29, 7, 17, 6, 12]
    assert rank_correlation(x, y) == pytest.approx(1 - 6 * 194 / (10 * 99))
    # Ties get the mean of their ranks: 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert rank_correlation([1, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    for nothing_to_rank in (([], []), ([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3])):
        assert rank_correlation(*nothing_to_rank) is None


def test_rank_correlations_with_ties_equal_a_plain_loop() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        x, y = generator.integers(0, 6, (2, 15)).tolist()

        def ranks(values: list[int]) -> list[float]:
            return [
                sum(other < value for other in values)
                + (sum(other == value for other in values) + 1) / 2
                for value in values
            ]

        expected = np.corrcoef(ranks(x), ranks(y))[0, 1]
        assert rank_correlation(x, y) == pytest.approx(expected)


def effect(weight: float, change: float, control_of: int | None = None) -> Effect:
    return Effect(Source(Token(1, 1, b"a"), weight), change, control_of)


def test_the_cause_check_covers_all_sources_and_controls() -> None:
    assert check_cause([]) is None
    check = check_cause([effect(0.5, -2.0), effect(0.3, 1.0), effect(0.1, -0.5, 0)])
    assert check is not None
    assert (check.n_sources, check.n_controls) == (2, 1)
    assert (check.mean_effect, check.mean_control_effect) == (1.5, 0.5)
    assert check.rank_correlation == pytest.approx(1)
    alone = check_cause([effect(0.5, -2.0)])
    assert alone is not None
    assert (alone.n_controls, alone.mean_control_effect, alone.rank_correlation) == (0, None, None)
