"""Tracing yields the tokens of a generation with their attention."""

import math
from typing import Any

import pytest
import torch
from small_models import LAYOUTS, small_model
from torch import Tensor

from minigpt.config import SamplingConfig
from minigpt.errors import DataError
from minigpt.generation import forward
from minigpt.generation.decoder import Decoder
from minigpt.generation.stream import stream_text
from minigpt.model.cache import KVCache
from minigpt.model.gpt import GPT
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.tracing import events, tracer
from minigpt.tracing.analysis_config import AnalysisConfig
from minigpt.tracing.config import TraceConfig
from minigpt.tracing.findings import TraceEvent, TraceFooter, TraceHeader, TraceStep
from minigpt.tracing.head_lists import reduce_rows, select_heads
from minigpt.tracing.recorder import RowRecorder
from minigpt.tracing.tracer import trace

TOKENIZER = BytesTokenizer()
PROMPT = list(b"to be or")
EVERY_HEAD = select_heads(2, 4)


def model_of(layout: str = "qwen3") -> GPT:
    return small_model(layout, vocab_size=257)


def traced(
    model: GPT, sampling: SamplingConfig, *, seed: int = 1, **options: Any
) -> tuple[TraceHeader, list[TraceStep], TraceFooter]:
    names = AnalysisConfig.__dataclass_fields__.keys() & options.keys()
    config = AnalysisConfig(**{name: options.pop(name) for name in names})
    events: list[TraceEvent] = list(
        trace(model, TOKENIZER, PROMPT, sampling, config, seed=seed, **options)
    )
    header, *steps, footer = events
    assert isinstance(header, TraceHeader)
    assert isinstance(footer, TraceFooter)
    assert all(isinstance(step, TraceStep) for step in steps)
    return header, steps, footer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduce": "max", "measure": "both", "has_heads": True},
        {"reduce": "rollout", "sink": "auto"},
        {"n_verified": 2, "roles": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trace_generates_the_same_tokens_and_text_as_generation(
    layout: str, options: dict[str, Any]
) -> None:
    model = model_of(layout)
    sampling = SamplingConfig(temperature=1.1, top_p=0.95, max_new_tokens=8, stop=("zz",))
    for seed in range(2):
        _, steps, footer = traced(model, sampling, seed=seed, **options)
        plain = list(
            stream_text(
                Decoder(model, PROMPT).generate(sampling, seed=seed, end_of_text=[256]),
                TOKENIZER,
                ("zz",),
            )
        )
        assert [
            (s.index, s.token.position, s.token.id, s.log_probability, s.finish, s.text)
            for s in steps
        ] == [
            (
                p.step.index,
                p.step.position,
                p.step.token,
                p.step.log_probability,
                p.step.finish,
                p.text,
            )
            for p in plain
        ]
        assert footer.n_tokens == len(plain)
        assert footer.finish == plain[-1].step.finish


def test_sink_sources_and_rest_of_a_row_sum_to_1() -> None:
    for n_sources in (0, 1, 3, 100):
        _, steps, footer = traced(
            model_of(), SamplingConfig(max_new_tokens=16), n_sources=n_sources
        )
        for step in steps:
            row = step.row
            assert row.rest is not None
            shares = [source.weight for source in row.sources]
            assert len(shares) == min(n_sources, step.token.position - 1)
            assert row.sink + sum(shares) + row.rest == pytest.approx(1, abs=1e-6)
            if len(shares) == step.token.position - 1:
                assert row.rest == 0  # exactly 0 without hidden sources, so that "<1%" is not shown
            assert row.prompt + row.generated == pytest.approx(1, abs=1e-6)
            assert shares == sorted(shares, reverse=True)
        assert footer.worst_row_sum_error is not None
        assert footer.worst_row_sum_error < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_core_tracer_and_the_analysis_ring_give_the_same_rows(layout: str) -> None:
    plain, analysed = (
        traced(model_of(layout), SamplingConfig(max_new_tokens=6), has_heads=has_heads)
        for has_heads in (False, True)
    )
    assert plain[0] == analysed[0]
    for one, other in zip(plain[1], analysed[1], strict=True):
        assert (one.row.heads, other.row.heads is None) == (None, False)
        assert one.row.weights_S.tolist() == other.row.weights_S.tolist()
        assert (one.row.sources, one.row.entropy) == (other.row.sources, other.row.entropy)


def test_without_a_config_a_trace_of_no_new_tokens_has_rows_of_the_prompt() -> None:
    sampling = SamplingConfig(max_new_tokens=0)
    _, *steps, _ = trace(model_of(), TOKENIZER, PROMPT, sampling, seed=1)
    tokens = [step.token.id for step in steps if isinstance(step, TraceStep)]
    assert tokens == list(PROMPT[1:])


def test_the_footer_reports_a_row_that_does_not_sum_to_1(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))

    def weights_LHS(recorder: RowRecorder) -> Tensor:
        return recorder.attention.weights_LBHS[:, 0] * (1.5 if next(calls) == 2 else 1)

    monkeypatch.setattr(RowRecorder, "weights_LHS", property(weights_LHS))
    _, _, footer = traced(model_of(), SamplingConfig(max_new_tokens=5))
    assert footer.worst_row_sum_error == pytest.approx(0.5, abs=1e-6)


def test_a_row_of_maxima_has_no_rest() -> None:
    _, steps, footer = traced(model_of(), SamplingConfig(max_new_tokens=5), reduce="max")
    assert {step.row.rest for step in steps} == {None}
    assert footer.worst_row_sum_error is None


def test_sources_are_earlier_tokens_with_the_weights_of_a_full_forward() -> None:
    model = model_of()
    sampling = SamplingConfig(max_new_tokens=14, temperature=1.0)
    _, steps, _ = traced(model, sampling, n_sources=100, seed=5)
    context = list(PROMPT)
    for step in steps:
        recorder = RowRecorder(model)
        with torch.no_grad():
            model(torch.tensor([context]), recorder=recorder)
        row = reduce_rows(recorder.weights_LHS, EVERY_HEAD).tolist()
        assert step.row.sink == pytest.approx(row[0], abs=1e-5)
        assert step.row.weights_S.tolist() == pytest.approx(row, abs=1e-5)
        assert sorted(s.token.position for s in step.row.sources) == list(range(1, len(context)))
        for source in step.row.sources:
            position = source.token.position
            assert source.weight == pytest.approx(row[position], abs=1e-5)
            assert source.token.id == context[position]
            assert source.token.data == TOKENIZER.token_bytes(context[position])
        assert step.token.position == len(context)
        context.append(step.token.id)


def test_the_header_records_the_model_and_the_settings() -> None:
    sampling = SamplingConfig(max_new_tokens=1)
    selection = select_heads(2, 4, heads="1.2,0.*")
    header, _, _ = traced(
        model_of(), sampling, seed=9, heads="1.2,0.*", reduce="max", model_name="runs/x"
    )
    assert (header.model, header.n_layer, header.n_head, header.seed) == ("runs/x", 2, 4, 9)
    assert (header.selection, header.reduce, header.sampling) == (selection, "max", sampling)
    assert bytes(token.id for token in header.prompt) == b"to be or"
    assert [token.position for token in header.prompt] == list(range(8))


def test_the_probability_is_before_any_sampling_option() -> None:
    model = model_of()
    _, steps, _ = traced(model, SamplingConfig(max_new_tokens=3, temperature=0.0))
    context = list(PROMPT)
    for step in steps:
        with torch.no_grad():
            p = model(torch.tensor([context]))[0, -1].softmax(dim=0)
        assert step.probability == pytest.approx(p.max().item(), rel=1e-3)
        assert step.probability == math.exp(step.log_probability)
        context.append(step.token.id)


def test_the_end_of_text_token_ends_a_trace() -> None:
    model = model_of("gpt2")
    with torch.no_grad():
        model.unembedding.weight[256] = model.final_norm.bias * 100  # always predict <|endoftext|>
        model.final_norm.weight.zero_()
    _, steps, footer = traced(model, SamplingConfig(max_new_tokens=4))
    assert [step.token.id for step in steps] == [256]
    assert footer.finish == "end_of_text"


def test_any_of_several_end_of_text_tokens_ends_a_trace() -> None:
    model = model_of()
    _, free, _ = traced(model, SamplingConfig(max_new_tokens=9))
    second = free[4].token.id
    tokenizer = BytesTokenizer("bytes", (256, second))
    events = list(
        trace(
            model,
            tokenizer,
            PROMPT,
            SamplingConfig(max_new_tokens=9),
            seed=1,
        )
    )
    ids = [event.token.id for event in events if isinstance(event, TraceStep)]
    assert ids == [step.token.id for step in free[: len(ids)]]
    assert second not in ids[:-1]
    assert ids[-1] == second
    assert isinstance(events[-1], TraceFooter)
    assert events[-1].finish == "end_of_text"


def test_the_cache_has_the_length_of_the_trace_not_of_the_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capacities = []

    class Watched(KVCache):
        def __init__(self, *words: Any, **options: Any) -> None:
            super().__init__(*words, **options)
            capacities.append(self.capacity)

    monkeypatch.setattr(forward, "KVCache", Watched)
    model = small_model("qwen3", vocab_size=257, context_length=100_000)
    traced(model, SamplingConfig(max_new_tokens=3))
    assert capacities == [len(PROMPT) + 3]


def test_a_trace_ends_when_the_context_is_full() -> None:
    _, steps, footer = traced(model_of(), SamplingConfig(max_new_tokens=100), n_sources=2)
    assert len(steps) == 24 - 8 + 1
    assert footer.finish == "context"


def test_a_prompt_of_one_token_has_only_the_sink() -> None:
    events = list(
        trace(
            model_of(),
            TOKENIZER,
            [97],
            SamplingConfig(max_new_tokens=1),
            seed=1,
        )
    )
    step = events[1]
    assert isinstance(step, TraceStep)
    row = step.row
    assert (row.sink, row.sources, row.rest) == (
        pytest.approx(1),
        (),
        pytest.approx(0, abs=1e-6),
    )


def test_an_empty_or_long_prompt_is_a_data_error() -> None:
    for prompt in ([], list(b"x" * 25)):
        events = trace(model_of(), TOKENIZER, prompt, SamplingConfig(), seed=1)
        with pytest.raises(DataError):
            next(events)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_rings_a_trace_has_the_same_sources_sink_rest_and_entropy(
    monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    def steps() -> list[Any]:
        model = small_model(layout, vocab_size=257)
        config = TraceConfig(n_sources=3)
        sampling = SamplingConfig(max_new_tokens=12)
        events = trace(model, BytesTokenizer(), list(b"to be"), sampling, config, seed=3)
        return list(events)[1:-1]

    in_bursts = steps()
    monkeypatch.setattr(tracer, "find_ring", lambda name: None)
    for plain, step in zip(steps(), in_bursts, strict=True):
        assert type(plain.row) is events.Row
        assert plain.token == step.token
        assert [s.token for s in plain.row.sources] == [s.token for s in step.row.sources]
        for numbers in (
            lambda row: [row.sink, row.total, row.rest, row.entropy],
            lambda row: [source.weight for source in row.sources],
            lambda row: list(row.weights_S),
        ):
            assert numbers(plain.row) == pytest.approx(numbers(step.row), abs=1e-5)
