"""Bursts: rows of several tokens are summarized together with the results of one at a time."""

import json
import math
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_models import LAYOUTS, small_model
from torch import Tensor

from minigpt.config import SamplingConfig
from minigpt.errors import CheckpointError
from minigpt.generation.decoder import Decoder
from minigpt.model.layers import RMSNorm
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.tracing import observers, tracer
from minigpt.tracing.analysis import knockout, verifier
from minigpt.tracing.analysis.linear_logits import frozen_norm
from minigpt.tracing.analysis_config import AnalysisConfig
from minigpt.tracing.config import TraceConfig
from minigpt.tracing.events import EndTrace, TraceEvent, TraceFooter, TraceStep
from minigpt.tracing.file import to_json_line
from minigpt.tracing.rows import RowSummarizer

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
def test_a_trace_in_bursts_equals_one_token_at_a_time(
    monkeypatch: pytest.MonkeyPatch, layout: str, options: dict[str, Any]
) -> None:
    def lines(seconds: float) -> list[dict[str, Any]]:
        events = events_of(monkeypatch, seconds, layout, **options)
        return [json.loads(to_json_line(event)) | {"seconds": 0} for event in events]

    assert lines(math.inf) == lines(0)


@pytest.mark.parametrize("is_signed", [False, True])
def test_rows_summarized_together_have_the_same_bits_as_alone(is_signed: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randn(4, n, generator=generator) for n in (1, 2, 7, 8, 40, 41, 200)]
    if not is_signed:
        rows = [x.softmax(dim=1) for x in rows]
    summarizer = RowSummarizer(sink=0, n_prompt=3, n_sources=6)
    together = summarizer.summaries(rows, is_signed=is_signed)
    for i, x in enumerate(rows):
        for name, alone in summarizer.summaries([x], is_signed=is_signed).items():
            assert together[name][i].tolist() == alone[0].tolist(), name


def decoding_that_fails_after(
    monkeypatch: pytest.MonkeyPatch, n_passes: int, error: BaseException | None
) -> list[int]:
    """Count decode steps; after n steps, raise the error, or return NaN if it is None."""
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
    assert len(calls) == SAMPLING.max_new_tokens - 1, "all later tokens must be one burst"


def test_ctrl_c_while_decoding_shows_the_tokens_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding_that_fails_after(monkeypatch, 4, KeyboardInterrupt())
    _, *steps, footer = events_of(monkeypatch, math.inf, "llama")
    assert [step.index for step in steps if isinstance(step, TraceStep)] == [0, 1, 2, 3, 4]
    assert isinstance(footer, TraceFooter)
    assert (footer.n_tokens, footer.finish) == (5, None)


def test_ending_a_trace_yields_observed_tokens_and_decodes_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = decoding_that_fails_after(monkeypatch, 99, None)
    events = events_of(monkeypatch, 0, "gpt2")
    shown = [next(events), next(events)]
    # The next token comes alone, then all others together.
    monkeypatch.setattr(observers, "_BURST_S", math.inf)
    shown += [next(events), next(events)]
    n_decoded = len(calls)
    shown += [events.throw(EndTrace), *events]
    _, *steps, footer = shown
    assert [step.index for step in steps if isinstance(step, TraceStep)] == [*range(10)]
    assert isinstance(footer, TraceFooter)
    assert (footer.n_tokens, footer.finish, len(calls)) == (10, None, n_decoded)


def test_ending_a_trace_between_two_bursts_decodes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    events = events_of(monkeypatch, 0, "llama")
    assert isinstance([next(events) for _ in range(3)][-1], TraceStep)
    footer = events.throw(EndTrace)
    assert isinstance(footer, TraceFooter)
    assert (footer.n_tokens, footer.finish) == (2, None)


@pytest.mark.parametrize("d_model", [5, 48, 768])
@pytest.mark.parametrize("kind", [torch.nn.LayerNorm, RMSNorm])
def test_a_frozen_norm_of_several_rows_has_the_same_bits_as_one_at_a_time(
    kind: Any, d_model: int
) -> None:
    norm = kind(d_model)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    x_NC, w_NC = torch.randn(2, 11, d_model, generator=torch.Generator().manual_seed(2))
    u_NC, b_N = frozen_norm(norm, x_NC, w_NC)
    for x_C, w_C, u_C, b in zip(x_NC, w_NC, u_NC, b_N, strict=True):
        alone = frozen_norm(norm, x_C, w_C)
        assert (u_C.tolist(), b.item()) == (alone[0].tolist(), alone[1].item())


def test_nan_while_decoding_shows_the_tokens_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding_that_fails_after(monkeypatch, 4, None)
    shown: list[TraceEvent] = []
    with pytest.raises(CheckpointError, match="NaN"):
        shown.extend(events_of(monkeypatch, math.inf, "llama"))
    assert len(shown) == 1 + 5


def test_a_verified_token_of_a_slow_model_is_shown_before_the_next_one_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = decoding_that_fails_after(monkeypatch, 99, None)
    monkeypatch.setattr(verifier, "_WAIT_S", 0)
    events = events_of(monkeypatch, 0, "gpt2", n_verified=2)
    next(events)
    for n_decoded in range(SAMPLING.max_new_tokens):
        step = next(events)
        assert isinstance(step, TraceStep)
        assert (step.index, len(calls)) == (n_decoded, n_decoded)


@pytest.mark.parametrize("n_verified", [2, "all"])
def test_effects_do_not_depend_on_how_many_tokens_are_verified_together(
    monkeypatch: pytest.MonkeyPatch, n_verified: Any
) -> None:
    def changes(seconds: float) -> list[float]:
        monkeypatch.setattr(verifier, "_WAIT_S", seconds)
        steps = list(events_of(monkeypatch, 0, "llama-grouped", n_verified=n_verified))[1:-1]
        return [effect.change for step in steps for effect in step.effects]  # type: ignore[union-attr]

    alone, together = changes(0), changes(math.inf)
    # float32 rounding: on some CPUs, kernels round differently for other numbers of rows.
    assert alone == pytest.approx(together, abs=1e-5)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), None])
def test_a_trace_ended_while_decoding_shows_tokens_waiting_for_verification(
    monkeypatch: pytest.MonkeyPatch, error: BaseException | None
) -> None:
    decoding_that_fails_after(monkeypatch, 4, error)
    monkeypatch.setattr(verifier, "_WAIT_S", math.inf)
    shown: list[TraceEvent] = []
    try:
        shown.extend(event for event in events_of(monkeypatch, 0, "llama", n_verified=2))
        assert isinstance(shown.pop(), TraceFooter)
    except CheckpointError:
        assert error is None
    assert [step.index for step in shown[1:] if step.effects] == [0, 1, 2, 3, 4]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "where", [(RowSummarizer, "summaries"), (knockout.Knockouts, "changes")], ids=str
)
def test_ctrl_c_while_a_burst_is_computed_loses_no_observed_token(
    monkeypatch: pytest.MonkeyPatch, where: tuple[type, str]
) -> None:
    monkeypatch.setattr(verifier, "_WAIT_S", math.inf)
    real, bursts = getattr(*where), []

    def interrupted(*words: Any, **more: Any) -> Any:
        bursts.append(1)
        if len(bursts) == 2:  # all tokens after the first one
            signal.raise_signal(signal.SIGINT)
        return real(*words, **more)

    monkeypatch.setattr(*where, interrupted)
    _, *steps, footer = events_of(monkeypatch, math.inf, "gpt2", n_verified=2)
    assert [step.index for step in steps if isinstance(step, TraceStep)] == [*range(10)]
    assert isinstance(footer, TraceFooter)
    assert (footer.n_tokens, footer.finish) == (10, None)


def test_a_second_ctrl_c_aborts_the_computation_of_a_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    real, bursts = RowSummarizer.summaries, []

    def interrupted(*words: Any, **more: Any) -> Any:
        bursts.append(1)
        if len(bursts) == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return real(*words, **more)

    monkeypatch.setattr(RowSummarizer, "summaries", interrupted)
    _, *steps, footer = events_of(monkeypatch, math.inf, "gpt2")
    assert (len(steps), len(bursts)) == (1, 2)
    assert isinstance(footer, TraceFooter)
