"""The sink is the position that gets the most attention from later positions."""

import pytest
import torch
from small_traces import small_trace

from minigpt.errors import ConfigError
from minigpt.tracing.analysis.sink import SinkFinder
from minigpt.tracing.config import TraceConfig


def keys_that_all_attend_to(position: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of two heads that attend to one position once it is in view."""
    q = torch.ones(1, 2, n, 4)
    k = torch.zeros(1, 1, n, 4)
    k[:, :, position] = 8
    return q, k


@pytest.mark.parametrize("position", [0, 1, 7, 49])
def test_the_position_that_all_attend_to_is_found(position: int) -> None:
    finder = SinkFinder()
    for layer in range(2):
        finder.watch(layer, *keys_that_all_attend_to(position, 100))
    assert finder.sink() == position


def test_attention_of_a_token_to_itself_does_not_count() -> None:
    q = torch.eye(10)[None, None] * 20
    finder = SinkFinder()
    finder.watch(0, q, q)  # each attends to itself only
    finder.watch(1, *keys_that_all_attend_to(2, 10))
    assert finder.sink() == 2


def test_later_tokens_do_not_count() -> None:
    finder = SinkFinder()
    finder.watch(0, *keys_that_all_attend_to(1, 8))
    q, k = keys_that_all_attend_to(3, 9)
    finder.watch(0, q[:, :, -1:], k)
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
        TraceConfig(sink=-1)
