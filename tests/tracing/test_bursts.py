"""Bursts: the rows of several tokens are summarized together, as if each were alone."""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_models import LAYOUTS, small_model
from torch import Tensor

from minigpt.config import SamplingConfig
from minigpt.errors import CheckpointError
from minigpt.generation.decoder import Decoder
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.tracing import observers, tracer
from minigpt.tracing.analysis_config import AnalysisConfig
from minigpt.tracing.config import TraceConfig
from minigpt.tracing.events import TraceEvent, TraceFooter, TraceStep
from minigpt.tracing.file import to_json_line
from minigpt.tracing.rows import RowReader

PROMPT = list(b"to be or not")
SAMPLING = SamplingConfig(max_new_tokens=10, temperature=0.8)


def events_of(
    monkeypatch: pytest.MonkeyPatch, seconds: float, layout: str, **options: Any
) -> Iterator[TraceEvent]:
    monkeypatch.setattr(observers, "_BURST_S", seconds)
    model = small_model(layout, vocab_size=257)
    config = AnalysisConfig(**options) if options else TraceConfig()
    return tracer.trace(model, BytesTokenizer(), PROMPT, SAMPLING, config, seed=3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"measure": "both", "has_heads": True, "sink": "auto", "candidates": 3},
        {"measure": "logit", "against": "x", "heads": "0.1,1.*", "lens": True},
        {"measure": "gradient"},
        {"reduce": "rollout", "n_verified": 2},
        {"reduce": "max", "prompt_rows": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trace_in_bursts_is_that_of_one_token_at_a_time(
    monkeypatch: pytest.MonkeyPatch, layout: str, options: dict[str, Any]
) -> None:
    def lines(seconds: float) -> list[dict[str, Any]]:
        events = events_of(monkeypatch, seconds, layout, **options)
        return [json.loads(to_json_line(event)) | {"seconds": 0} for event in events]

    assert lines(math.inf) == lines(0)


@pytest.mark.parametrize("is_signed", [False, True])
def test_rows_read_together_have_the_bits_of_rows_read_alone(is_signed: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randn(4, n, generator=generator) for n in (1, 2, 7, 8, 40, 41, 200)]
    if not is_signed:
        rows = [x.softmax(dim=1) for x in rows]
    reader = RowReader(sink=0, n_prompt=3, n_sources=6)
    together = reader.facts(rows, is_signed=is_signed)
    for i, x in enumerate(rows):
        for name, alone in reader.facts([x], is_signed=is_signed).items():
            assert together[name][i].tolist() == alone[0].tolist(), name


def decoding_that_fails_after(
    monkeypatch: pytest.MonkeyPatch, n_passes: int, error: BaseException | None
) -> list[int]:
    """Count the decode steps; raise in the one after n, or without an error return NaN."""
    calls: list[int] = []
    real = Decoder._feed

    def feed(self: Decoder, rows: Any, tokens: Tensor) -> Tensor:
        calls.append(1)
        logits = real(self, rows, tokens)
        if len(calls) <= n_passes:
            return logits
        if error is None:
            return logits * math.nan
        raise error

    monkeypatch.setattr(Decoder, "_feed", feed)
    return calls


def test_the_first_token_is_shown_before_the_next_one_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = decoding_that_fails_after(monkeypatch, 99, None)
    events = events_of(monkeypatch, math.inf, "gpt2")
    next(events)
    assert isinstance(next(events), TraceStep)
    assert not calls
    assert isinstance(next(events), TraceStep)
    assert len(calls) == SAMPLING.max_new_tokens - 1, "the rest is one burst"


def test_ctrl_c_while_decoding_shows_the_tokens_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding_that_fails_after(monkeypatch, 4, KeyboardInterrupt())
    _, *steps, footer = events_of(monkeypatch, math.inf, "llama")
    assert [step.index for step in steps if isinstance(step, TraceStep)] == [0, 1, 2, 3, 4]
    assert isinstance(footer, TraceFooter)
    assert (footer.n_tokens, footer.finish) == (5, None)


def test_nan_while_decoding_shows_the_tokens_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding_that_fails_after(monkeypatch, 4, None)
    shown: list[TraceEvent] = []
    with pytest.raises(CheckpointError, match="NaN"):
        shown.extend(events_of(monkeypatch, math.inf, "llama"))
    assert len(shown) == 1 + 5
