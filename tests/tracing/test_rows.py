"""Summaries of rows."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minigpt.tracing.rows import RowSummarizer


def some_rows(n_rows: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return (torch.randn(n_rows, n, generator=generator) * 2).softmax(dim=1)


def summaries_of(
    rows: Tensor, *, sink: int = 0, n_prompt: int = 3, n_sources: int = 4
) -> dict[str, Any]:
    summaries = RowSummarizer(sink=sink, n_prompt=n_prompt, n_sources=n_sources).summaries([rows])
    return {name: values[0] for name, values in summaries.items()}


@pytest.mark.parametrize(
    ("n", "sink"), [(1, 0), (2, 0), (2, 1), (1, 1), (2, 4), (5, 3), (24, 0), (24, 3), (1000, 0)]
)
@pytest.mark.parametrize("n_sources", [0, 1, 4, 2000])
def test_row_summaries_equal_those_of_a_plain_loop(n: int, n_sources: int, sink: int) -> None:
    rows = some_rows(3, n)
    summaries = summaries_of(rows, sink=sink, n_sources=n_sources)
    for i, row in enumerate(rows.tolist()):
        order = sorted((j for j in range(n) if j != sink), key=lambda j: -row[j])[:n_sources]
        assert summaries["positions"][i].tolist() == order
        assert summaries["weights"][i].tolist() == [row[j] for j in order]
        assert summaries["sink"][i] == np.float32(row[sink] if sink < n else 0)
        assert summaries["own"][i] == np.float32(row[-1])
        # float32 sums of up to 1,000 parts
        assert summaries["total"][i] == pytest.approx(1, abs=1e-6)
        assert summaries["prompt"][i] == pytest.approx(sum(row[:3]), abs=1e-6)
        entropy = -sum(weight * math.log2(weight) for weight in row)
        assert summaries["entropy"][i] == pytest.approx(entropy, abs=1e-4)
        distance = sum(weight * (n - 1 - j) for j, weight in enumerate(row))
        assert summaries["distance"][i] == pytest.approx(distance, rel=1e-5, abs=1e-6 * n)
    assert summaries["first"].tolist() == rows[0].tolist()


@pytest.mark.parametrize("n", [1, 2, 64])
def test_the_entropy_is_0_for_one_position_and_log2_for_a_uniform_row(n: int) -> None:
    rows = torch.stack((torch.eye(n)[n - 1], torch.full((n,), 1 / n)))
    summaries = summaries_of(rows)
    assert summaries["entropy"].tolist() == pytest.approx([0, math.log2(n)], abs=1e-5)
    assert summaries["distance"].tolist() == pytest.approx([0, (n - 1) / 2], abs=1e-5)


def test_late_positions_of_a_long_context_are_exact() -> None:
    rows = torch.zeros(1, 1 << 20)
    rows[0, [(1 << 20) - 1, 777_777]] = torch.tensor([0.75, 0.25])
    summaries = summaries_of(rows, n_sources=2)
    assert summaries["positions"].tolist() == [[(1 << 20) - 1, 777_777]]


def test_the_entropy_of_a_row_of_maxima_is_that_of_the_normalized_row() -> None:
    summaries = summaries_of(torch.tensor([[0.8, 0.8, 0.8, 0.8]]), n_prompt=2)
    assert summaries["total"][0] == pytest.approx(3.2)
    assert summaries["prompt"][0] == pytest.approx(1.6)
    assert summaries["entropy"][0] == pytest.approx(2)
    assert summaries["distance"][0] == pytest.approx(1.5)


def test_a_summarizer_accepts_rows_of_any_length() -> None:
    summarizer = RowSummarizer(sink=0, n_prompt=3, n_sources=2)
    for n in (4, 5, 30, 7, 100):
        rows = some_rows(2, n)
        summaries, alone = summarizer.summaries([rows]), summaries_of(rows, n_sources=2)
        assert summaries["prompt"][0].tolist() == alone["prompt"].tolist()
        assert summaries["distance"][0].tolist() == alone["distance"].tolist()
