"""Differences between two traces of the same tokens."""

import math

import numpy as np
import pytest
from small_traces import header_of, row_of, small_trace, step_of

from minigpt.errors import DataError
from minigpt.tracing.analysis.diff import diff_traces
from minigpt.tracing.events import Token
from minigpt.tracing.findings import Row, Trace, TraceFooter


def trace_of(*weights: list[float], log_probability: float = -1.0, sink: int = 0) -> Trace:
    """Return a trace with a prompt of three tokens and a step for each row."""
    prompt = tuple(Token(i, i, bytes([97 + i])) for i in range(3))
    steps = [
        step_of(
            b"x",
            [],
            index=i,
            position=3 + i,
            log_probability=log_probability,
            rows=(row_with(row),),
        )
        for i, row in enumerate(weights)
    ]
    footer = TraceFooter(len(steps), "length", 1.0, None)
    return Trace(header_of(prompt=prompt, sink=sink), tuple(steps), footer)


def row_with(weights: list[float]) -> Row:
    return row_of([], len(weights), weights_S=np.array(weights, np.float32))


def test_equal_traces_have_no_difference() -> None:
    trace = small_trace(measure="norm")
    for step, diff in zip(trace.steps, diff_traces(trace, trace), strict=True):
        assert (diff.token, diff.divergence, diff.moved, diff.change) == (step.token, 0, 0, 0)
        assert diff.first_token == diff.second_token == step.row.sources[0].token


def test_rows_without_a_common_position_diverge_by_one_bit() -> None:
    first = trace_of([0.5, 0.5, 0], log_probability=-1.0)
    second = trace_of([0, 0, 1], log_probability=-3.0)
    (diff,) = diff_traces(first, second)
    assert (diff.divergence, diff.moved, diff.change) == (1, 1, -2)
    assert (diff.first_token.data, diff.second_token.data) == (b"b", b"c")


def test_the_divergence_is_the_mean_of_two_relative_entropies() -> None:
    p, q = [0.7, 0.2, 0.1], [0.1, 0.3, 0.6]
    (diff,) = diff_traces(trace_of(p), trace_of(q))
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    bits = sum(a * math.log2(a / m) for a, m in zip(p, middle, strict=True))
    bits += sum(b * math.log2(b / m) for b, m in zip(q, middle, strict=True))
    assert diff.divergence == pytest.approx(bits / 2, abs=1e-6)
    assert diff.moved == pytest.approx(0.6, abs=1e-6)


def test_rows_that_do_not_sum_to_one_are_compared_as_shares() -> None:
    (diff,) = diff_traces(trace_of([0.8, 0.4, 0.4]), trace_of([0.5, 0.25, 0.25]))
    assert diff.divergence == pytest.approx(0, abs=1e-6)


def test_two_heads_of_one_model_can_be_compared() -> None:
    first, second = (small_trace(heads=heads) for heads in ("0.1", "1.2"))
    diffs = list(diff_traces(first, second))
    assert all(0 < diff.divergence < 1 and 0 < diff.moved < 1 for diff in diffs)
    assert {diff.change for diff in diffs} == {0}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (small_trace("abc"), small_trace("abcd"), "prompts have 3 and 4 tokens"),
        (small_trace("abc"), small_trace("abd"), "position 2: c and d. Trace"),
        (
            trace_of([1, 0, 0], [1, 0, 0, 0]),
            trace_of([1, 0, 0]),
            "have 2 and 1 generated tokens",
        ),
    ],
)
def test_traces_of_different_tokens_are_refused(first: Trace, second: Trace, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(diff_traces(first, second))


def test_a_number_that_changes_its_sign_counts_as_moved() -> None:
    first, second = trace_of([0.0, -3.0, 1.0]), trace_of([0.0, 3.0, 1.0])
    (diff,) = diff_traces(first, second)
    assert (diff.moved, diff.divergence) == pytest.approx((0.75, 0.75))
    assert diff.first_token.data == diff.second_token.data == b"b"
    trace = small_trace(measure="logit")
    assert {(d.moved, d.divergence) for d in diff_traces(trace, trace)} == {(0, 0)}
    assert all(0 <= diff.moved <= 1 for diff in diff_traces(trace, small_trace()))


def test_rows_of_the_prompt_are_not_compared_with_those_of_generated_tokens() -> None:
    given = small_trace("abcd", max_new_tokens=0)
    generated = small_trace("abcd", max_new_tokens=len(given.steps))
    both = small_trace("abcd", max_new_tokens=len(given.steps), prompt_rows=True)
    for first, second in ((given, generated), (generated, both)):
        with pytest.raises(DataError, match=r"rows of the prompt. Trace both with --prompt-rows"):
            list(diff_traces(first, second))
