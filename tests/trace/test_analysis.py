"""A row in a few numbers, and nothing of it lost."""

import pytest
import torch

from minigpt.trace.analysis import summarize_row


def some_row(n: int, seed: int = 0) -> torch.Tensor:
    return (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 2).softmax(dim=0)


@pytest.mark.parametrize("n", [1, 2, 5, 24, 1000])
@pytest.mark.parametrize("n_sources", [0, 1, 4, 8, 2000])
def test_a_summary_accounts_for_the_whole_row(n: int, n_sources: int) -> None:
    row = some_row(n, seed=n)
    values = row.tolist()
    summary = summarize_row(row, n_sources)
    order = sorted(range(1, n), key=lambda i: -values[i])[:n_sources]
    assert summary.sink == values[0]
    assert list(summary.positions) == order
    assert list(summary.weights) == [values[i] for i in order]
    assert summary.total == pytest.approx(1, abs=1e-6)
    assert summary.sink + sum(summary.weights) + summary.rest == pytest.approx(1, abs=1e-6)
    others = [values[i] for i in range(1, n) if i not in order]
    assert summary.rest == pytest.approx(sum(others), abs=1e-6)
    assert summary.rest >= 0


def test_late_positions_of_a_long_context_are_exact() -> None:
    row = torch.zeros(1 << 20)
    row[[(1 << 20) - 1, 777_777]] = torch.tensor([0.75, 0.25])
    assert summarize_row(row, 2).positions == ((1 << 20) - 1, 777_777)


def test_a_row_of_maxima_keeps_its_total() -> None:
    summary = summarize_row(torch.tensor([0.9, 0.8, 0.7]), 1)
    assert summary.total == pytest.approx(2.4)
    assert summary.rest == pytest.approx(0.7)
