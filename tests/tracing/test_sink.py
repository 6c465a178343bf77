"""The sink is where the prompt's tokens look that do not look at anything."""

import pytest
import torch
from small_traces import small_trace

from minigpt.errors import ConfigError
from minigpt.tracing.analysis.sink import SinkFinder
from minigpt.tracing.tracer import TraceConfig


def keys_that_all_look_at(position: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of two heads whose attention goes to one position, once it is there."""
    q = torch.ones(1, 2, n, 4)
    k = torch.zeros(1, 1, n, 4)
    k[:, :, position] = 8
    return q, k


@pytest.mark.parametrize("position", [0, 1, 7, 49])
def test_the_position_that_all_look_at_is_found(position: int) -> None:
    finder = SinkFinder()
    for layer in range(2):
        finder.watch(layer, *keys_that_all_look_at(position, 100))
    assert finder.sink() == position


def test_what_a_token_gives_itself_makes_no_sink() -> None:
    q = torch.eye(10)[None, None] * 20
    finder = SinkFinder()
    finder.watch(0, q, q)  # each looks at itself alone
    finder.watch(1, *keys_that_all_look_at(2, 10))
    assert finder.sink() == 2


def test_later_tokens_change_nothing() -> None:
    finder = SinkFinder()
    finder.watch(0, *keys_that_all_look_at(1, 8))
    q, k = keys_that_all_look_at(3, 9)
    finder.watch(0, q[:, :, -1:], k)
    assert finder.sink() == 1


def test_a_trace_leaves_the_sink_that_is_given_out_of_its_sources() -> None:
    for sink, rule in ((2, "given"), (0, "first"), (None, "detected")):
        trace = small_trace(sink=sink, n_sources=100)
        position = trace.header.sink
        assert trace.header.sink_rule == rule
        assert sink is None or position == sink
        for step in trace.steps:
            assert step.row.sink == pytest.approx(step.row.weights_S[position])
            assert position not in {source.token.position for source in step.row.sources}


def test_a_sink_behind_the_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="the sink must be a position of the prompt"):
        small_trace("abc", sink=3)
    with pytest.raises(ConfigError, match="at least 0"):
        TraceConfig(sink=-1)
