"""Comparison of two traces of the same tokens: two heads, two checkpoints, or two measures."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minigpt.errors import DataError
from minigpt.text.escape import token_name
from minigpt.tracing.events import Token
from minigpt.tracing.findings import Row, Trace


@dataclass(frozen=True)
class StepDiff:
    """Difference between the two rows of one generated token."""

    token: Token
    divergence: float
    """Jensen-Shannon divergence of the normalized rows, in bits: 0 for equal rows, 1 for rows with
    no position in common (Lin 1991, 10.1109/18.61115)."""
    moved: float
    """Total variation distance of the normalized rows, in [0, 1]: for attention weights, the share
    of attention that moved."""
    first_token: Token
    """Strongest source in the first trace, except the sink."""
    second_token: Token
    """Strongest source in the second trace, except the sink."""
    change: float
    """ln p of the token in the second trace minus ln p in the first."""


def diff_traces(first: Trace, second: Trace) -> Iterator[StepDiff]:
    """Compare two traces step by step, by the first measure of each.

    Signed rows are normalized by the sum of magnitudes, and numbers of different signs at the same
    position do not overlap.

    Raises: DataError naming the first position where their tokens differ.
    """
    _check_tokens(first, second)
    for one, other in zip(first.steps, second.steps, strict=True):
        p, q = _shares(one.row), _shares(other.row)
        yield StepDiff(
            token=one.token,
            divergence=_divergence(p, q),
            moved=float(np.abs(p - q).sum() / 2),
            first_token=_strongest(first, one.row),
            second_token=_strongest(second, other.row),
            change=other.log_probability - one.log_probability,
        )


def _check_tokens(first: Trace, second: Trace) -> None:
    if len(first.header.prompt) != len(second.header.prompt):
        raise DataError(
            "only traces of the same tokens can be compared: the prompts have "
            f"{len(first.header.prompt)} and {len(second.header.prompt)} tokens. Trace the same "
            "prompt."
        )
    for one, other in zip(first.tokens, second.tokens, strict=False):
        if one.data != other.data:
            raise DataError(
                f"the traces differ at position {one.position}: {token_name(one.data)} and "
                f"{token_name(other.data)}. "
                "Trace the same prompt with --temperature 0 or the same --seed, or --force the "
                "same text."
            )
    n_prompt = len(first.header.prompt)
    for kind, is_prompt, option in (
        ("rows of the prompt", True, "--prompt-rows, or both without"),
        ("generated tokens", False, "the same --max-new-tokens"),
    ):
        n_first, n_second = (
            sum((step.token.position < n_prompt) == is_prompt for step in trace.steps)
            for trace in (first, second)
        )
        if n_first != n_second:
            raise DataError(
                f"the traces have {n_first} and {n_second} {kind}. Trace both with {option}."
            )


def _shares(row: Row) -> NDArray[np.float64]:
    """Return the positive, then the negative numbers of a row, as shares of the sum (2 S,)."""
    weights_S = row.weights_S.astype(np.float64)
    sizes = np.concatenate((weights_S.clip(min=0), (-weights_S).clip(min=0)))
    shares: NDArray[np.float64] = sizes / max(sizes.sum(), 1e-300)
    return shares


def _divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    middle = (p + q) / 2
    bits = sum(
        float((part[part > 0] * np.log2(part[part > 0] / middle[part > 0])).sum())
        for part in (p, q)
    )
    return min(max(0.0, bits / 2), 1.0)


def _strongest(trace: Trace, row: Row) -> Token:
    """Return the token with the largest weight except the sink, or the sink if it is alone."""
    weights = np.abs(row.weights_S)
    if len(weights) > 1:
        weights[trace.header.sink : trace.header.sink + 1] = -1  # the sink may come after the query
    return trace.tokens[int(weights.argmax())]
