"""Sampling in plain Python, and a chi-squared test of draws against a distribution."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

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
    """Return the sampling probabilities, computed option by option in plain Python."""
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


def certain_logits(*logits_of: int, n: int = 50) -> Tensor:
    """Return logits (B, V) with which each row is sure to draw its given token."""
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
        assert source.draw(certain_logits(*[token] * len(seeds))).tolist() == [token] * len(seeds)
    return source


def distribution(source: Sampler, logits: Tensor) -> Tensor:
    """Return the probabilities (B, V) that the sampler draws from, ordered by token id."""
    probability, ids = source.candidates(logits)
    if ids is None:
        return probability
    return torch.zeros_like(logits).scatter(1, ids, probability)


def drawn(source: Sampler, logits: Tensor, n: int) -> list[int]:
    """Return n draws of one row, all from the same logits."""
    return [source.draw(logits).item() for _ in range(n)]


def chi_squared_is_plausible(draws: list[int], p: list[float]) -> bool:
    """Whether the draws are consistent with p: Pearson's test, with 1 false alarm in 10,000."""
    n = len(draws)
    counts = torch.bincount(torch.tensor(draws), minlength=len(p)).tolist()
    if any(count > 0 for count, x in zip(counts, p, strict=True) if x == 0):
        return False
    # Cells with fewer than five expected draws are merged.
    cells = [(count, n * x) for count, x in zip(counts, p, strict=True) if n * x >= 5]
    rest = n - sum(c for c, _ in cells), n - sum(e for _, e in cells)
    if rest[1] > 0.5:
        cells.append(rest)
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    return len(cells) == 1 or p_value(statistic, len(cells) - 1) > 1e-4


def p_value(statistic: float, freedom: int) -> float:
    """Return the probability of a larger chi squared with these degrees of freedom."""
    half = torch.tensor([freedom, statistic], dtype=torch.float64) / 2
    return torch.special.gammaincc(half[0], half[1]).item()
