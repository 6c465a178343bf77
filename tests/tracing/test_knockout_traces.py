"""Traces contain knockout effects of their sources, and knockouts change nothing else."""

from typing import Any

import numpy as np
import pytest
import torch
from knocking_out import check_cause, last_query_without
from laid_out import in_int8
from small_models import any_model, small_model
from small_traces import small_trace

from minigpt.config import SamplingConfig
from minigpt.generation.fast import compiled
from minigpt.model.gpt import GPT
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.tracing.analysis.lines import header_lines
from minigpt.tracing.analysis.tally import rank_correlation
from minigpt.tracing.analysis.verifier import choose_controls
from minigpt.tracing.analysis_config import AnalysisConfig, Knockout
from minigpt.tracing.findings import TraceFooter, TraceStep
from minigpt.tracing.head_lists import select_heads
from minigpt.tracing.tracer import trace

KINDS: tuple[Knockout, ...] = ("key", "value")

TOKENIZER = BytesTokenizer()


def steps_of(
    model: GPT, prompt: list[int], *, n_tokens: int = 6, compiles: bool = False, **config: Any
) -> tuple[list[TraceStep], TraceFooter]:
    _, *steps, footer = trace(
        model,
        TOKENIZER,
        prompt,
        SamplingConfig(max_new_tokens=n_tokens),
        AnalysisConfig(**config),
        seed=2,
        compile=compiles,
    )
    assert isinstance(footer, TraceFooter)
    return [step for step in steps if isinstance(step, TraceStep)], footer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decoding", ["float32", "bfloat16", "int8", "graph"])
@pytest.mark.parametrize("layout", ["gpt2-tied", "llama-grouped"])
def test_knockouts_change_no_token_and_no_bit_of_the_trace(
    layout: str, decoding: str, kind: Knockout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(n_verified: int) -> list[TraceStep]:
        model = small_model(layout, vocab_size=257)
        if decoding == "bfloat16":
            model.bfloat16()
        elif decoding == "int8":
            model = in_int8(model)
        return steps_of(
            model,
            list(b"to be or"),
            compiles=decoding == "graph",
            n_verified=n_verified,
            knockout=kind if n_verified else "key",
            roles=n_verified > 0,
        )[0]

    monkeypatch.setattr(
        compiled,
        "load_step",
        lambda step, **_: lambda given: list(step(*given[:3], given[3:-2], given[-2:])),
    )
    for checked, plain in zip(run(3), run(0), strict=True):
        assert (checked.token, checked.log_probability) == (plain.token, plain.log_probability)
        assert np.array_equal(checked.row.weights_S, plain.row.weights_S)
        assert len([e for e in checked.effects if e.control_of is None]) == 3
        assert plain.effects == ()


@pytest.mark.parametrize("n_sources", [0, 2])
def test_the_strongest_sources_are_knocked_out_even_if_fewer_are_shown(n_sources: int) -> None:
    model = small_model("qwen3", vocab_size=257)
    prompt = list(b"to be or")
    steps, footer = steps_of(model, prompt, n_verified=3, n_sources=n_sources, sink=2)
    tokens = list(prompt)
    for step in steps:
        row = step.row.weights_S
        strongest = sorted({*range(len(row))} - {2}, key=lambda i: -row[i])[:3]
        sources = [e for e in step.effects if e.control_of is None]
        controls = [e for e in step.effects if e.control_of is not None]
        assert [e.source.token.position for e in sources] == strongest
        assert step.effects == (*sources, *controls)
        chosen = choose_controls(row, strongest, sink=2)
        assert [chosen[e.control_of or 0] for e in controls] == [
            e.source.token.position for e in controls
        ]
        seen = torch.tensor([tokens])
        with torch.no_grad():
            whole = model(seen)[0, -1].log_softmax(dim=0)[step.token.id].item()
            for e in step.effects:
                position = e.source.token.position
                assert e.source.weight == row[position]
                assert e.source.token.id == tokens[position]
                with last_query_without(position, "key"):
                    changed = model(seen)[0, -1].log_softmax(dim=0)[step.token.id].item()
                assert e.change == pytest.approx(changed - whole, abs=2e-4)
        tokens.append(step.token.id)
    assert footer.cause == check_cause([e for step in steps for e in step.effects])


@pytest.mark.parametrize("layers", [None, "0", "1"])
@pytest.mark.parametrize("second", ["sliding", "full"])
def test_a_control_is_in_the_window_of_a_layer_of_the_knockout(
    second: str, layers: str | None
) -> None:
    types = ["sliding_attention", f"{second}_attention"]
    model = any_model("gemma2", vocab_size=257, sliding_window=4, layer_types=types)
    tokens = list(b"to be or not")
    steps, _ = steps_of(model, tokens, n_verified=2, verify_layers=layers)
    for step in steps:
        row = step.row.weights_S
        sees_all = second == "full" and layers != "0"
        visible = range(0 if sees_all else len(tokens) - 4, len(tokens))
        strongest = sorted(range(1, len(row)), key=lambda i: -row[i])[:2]
        controls = {e.control_of: e.source.token.position for e in step.effects[2:]}
        taken: set[int | None] = {0, *strongest}
        for i, source in enumerate(strongest):
            able = [p for p in visible if p not in taken and row[p] < row[source]]
            expected = min(able, key=lambda p: abs(p - source), default=None)
            assert controls.get(i) == expected
            taken.add(expected)
        tokens.append(step.token.id)


@pytest.mark.parametrize("heads", [None, "1.1,0.2-3"])
@pytest.mark.usefixtures("knockout_step")
def test_verifying_all_gives_the_effect_of_every_position(heads: str | None) -> None:
    model, prompt = small_model("llama-grouped", vocab_size=257), list(b"to be or")
    steps, footer = steps_of(model, prompt, n_verified="all", verify_heads=heads, n_sources=3)
    chosen = heads and select_heads(2, 4, heads=heads).heads_by_layer
    tokens = list(prompt)
    weights, changes = [], []
    for step in steps:
        assert step.changes_S is not None
        assert step.kept is None
        for position, change in enumerate(step.changes_S):
            with torch.no_grad():
                whole = model(torch.tensor([tokens]))[0, -1].log_softmax(dim=0)[step.token.id]
                with last_query_without(position, "key", chosen or None):
                    without = model(torch.tensor([tokens]))[0, -1].log_softmax(dim=0)
            assert change == pytest.approx((without[step.token.id] - whole).item(), abs=2e-4)
        largest = np.argsort(-abs(step.changes_S), kind="stable")[:3].tolist()
        assert [e.source.token.position for e in step.effects] == largest
        assert [e.change for e in step.effects] == step.changes_S[largest].tolist()
        weights += step.row.weights_S.tolist()
        changes += abs(step.changes_S).tolist()
        tokens.append(step.token.id)
    assert footer.cause is not None
    assert (footer.cause.n_sources, footer.cause.n_controls) == (len(weights), 0)
    assert footer.cause.rank_correlation == rank_correlation(weights, changes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("knockout_step")
def test_the_prediction_from_the_sources_alone_equals_a_full_forward(
    kind: Knockout,
) -> None:
    model, prompt = small_model("gpt2", vocab_size=257), list(b"to be or")
    steps, _ = steps_of(model, prompt, n_verified=2, knockout=kind, sink=1)
    tokens = list(prompt)
    for step in steps:
        seen = {1} | {e.source.token.position for e in step.effects if e.control_of is None}
        others = [position for position in range(len(tokens)) if position not in seen]
        with torch.no_grad():
            whole = model(torch.tensor([tokens]))[0, -1]
            with last_query_without(others, kind):
                alone = model(torch.tensor([tokens]))[0, -1]
        target = step.token.id
        change = (alone.log_softmax(dim=0) - whole.log_softmax(dim=0))[target].item()
        assert step.kept is not None
        assert step.kept.change == pytest.approx(change, abs=2e-4)
        assert step.kept.logit_change == pytest.approx((alone - whole)[target].item(), abs=2e-4)
        tokens.append(target)


@pytest.mark.usefixtures("knockout_step")
def test_no_prediction_from_the_sources_alone_if_they_are_all_positions() -> None:
    model = small_model("llama", vocab_size=257)
    steps, _ = steps_of(model, list(b"to b"), n_verified=3)
    assert [step.kept is None for step in steps[:3]] == [True, False, False]
    assert len(steps[0].effects) == 3


def test_an_interrupted_trace_ends_with_a_footer_about_the_steps_so_far() -> None:
    model = small_model("llama", vocab_size=257)
    events = trace(
        model,
        TOKENIZER,
        list(b"to be"),
        SamplingConfig(max_new_tokens=12),
        AnalysisConfig(n_verified=2),
        seed=2,
    )
    next(events)
    for step in (next(events), next(events), next(events)):
        assert isinstance(step, TraceStep)
        assert step.effects
    footer = events.throw(KeyboardInterrupt)
    assert isinstance(footer, TraceFooter)
    assert (footer.n_tokens, footer.finish) == (3, None)
    assert footer.cause is not None
    assert footer.cause.n_sources == 6


def test_a_single_token_has_no_source_to_knock_out() -> None:
    model = small_model("gpt2", vocab_size=257)
    steps, footer = steps_of(model, [97], n_tokens=1, n_verified=3)
    assert (steps[0].effects, footer.cause) == ((), None)
    steps, _ = steps_of(model, [97, 98], n_tokens=1, n_verified=3)
    assert [e.source.token.position for e in steps[0].effects] == [1], (
        "the position of the query itself"
    )


@pytest.mark.parametrize("n_tokens", [0, 3])
def test_queries_of_the_prompt_get_knockouts_too(n_tokens: int) -> None:
    model, prompt = small_model("llama-grouped", vocab_size=257), list(b"to be or")
    steps, footer = steps_of(model, prompt, n_tokens=n_tokens, n_verified="all", prompt_rows=True)
    assert (len(steps), footer.n_tokens) == (len(prompt) - 1 + n_tokens, n_tokens)
    tokens = prompt + [step.token.id for step in steps[len(prompt) - 1 :]]
    for step in steps[1:]:
        assert step.changes_S is not None
        seen = torch.tensor([tokens[: step.token.position]])
        with torch.no_grad():
            whole = model(seen)[0, -1].log_softmax(dim=0)[step.token.id]
            for position, change in enumerate(step.changes_S):
                with last_query_without(position, "key"):
                    without = model(seen)[0, -1].log_softmax(dim=0)[step.token.id]
                assert change == pytest.approx((without - whole).item(), abs=2e-4)


@pytest.mark.parametrize(
    ("n", "says"),
    [
        (1, "the strongest source of each token is knocked out, and a control near it ("),
        (2, "the 2 strongest sources of each token are knocked out, and a control near each ("),
    ],
)
def test_the_header_says_how_many_sources_are_knocked_out(n: int, says: str) -> None:
    header = small_trace("abcd", max_new_tokens=1, n_verified=n).header
    lines = header_lines(header, 200)
    assert says in "".join(part for line in lines for part, _ in line)
