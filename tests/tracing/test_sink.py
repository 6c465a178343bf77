"""The sink is the position that receives the most attention from later positions."""

import pytest
import torch
from small_traces import small_trace

from minigpt.errors import ConfigError
from minigpt.tracing.analysis.sink import SinkFinder
from minigpt.tracing.analysis_config import AnalysisConfig


def rows_that_attend_to(position: int, n: int) -> torch.Tensor:
    """Return causal weights (2, n, n) of two heads that attend to one position once visible."""
    scores = torch.zeros(2, n, n)
    scores[:, :, position] = 16
    return scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(dim=-1)


@pytest.mark.parametrize("n_new", [1, 30, 100])
@pytest.mark.parametrize("position", [0, 1, 7, 49])
def test_the_sink_is_the_position_that_all_attend_to(position: int, n_new: int) -> None:
    finder = SinkFinder(100)
    weights = rows_that_attend_to(position, 100)
    for layer in range(2):
        for first in range(0, 100, n_new):
            last = min(first + n_new, 100)
            finder.add(layer, weights[:, first:last, :last])
    assert finder.sink() == position


def test_attention_of_a_token_to_itself_is_ignored_for_the_sink() -> None:
    finder = SinkFinder(10)
    finder.add(0, torch.eye(10)[None])
    finder.add(1, rows_that_attend_to(2, 10))
    assert finder.sink() == 2


def test_tokens_after_the_prompt_do_not_move_the_sink() -> None:
    finder = SinkFinder(8)
    finder.add(0, rows_that_attend_to(1, 8))
    finder.add(0, 1000 * rows_that_attend_to(3, 9)[:, -1:])
    assert finder.sink() == 1


def test_the_sink_is_not_listed_among_the_sources() -> None:
    for sink, rule in ((2, "given"), (0, "first"), ("auto", "detected")):
        trace = small_trace(sink=sink, n_sources=100)
        position = trace.header.sink
        assert trace.header.sink_rule == rule
        assert position == sink or sink == "auto"
        for step in trace.steps:
            assert step.row.sink == pytest.approx(step.row.weights_S[position])
            assert position not in {source.token.position for source in step.row.sources}


def test_a_sink_outside_the_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="the sink must be a position of the prompt"):
        small_trace("abc", sink=3)
    with pytest.raises(ConfigError, match="at least 0"):
        AnalysisConfig(sink=-1)
