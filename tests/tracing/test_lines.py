"""Lines of a trace for a terminal."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from small_traces import HOSTILE, cells, header_of, roles_of, row_of, small_trace, step_of, text_of

from minigpt.config import SamplingConfig
from minigpt.tracing.analysis_config import MEASURES, Measure, facts_of
from minigpt.tracing.events import Token
from minigpt.tracing.findings import CauseCheck, Effect, TraceFooter, TraceStep
from minigpt.tracing.head_lists import select_heads
from minigpt.tracing.lines import TraceLayout, make_layout
from minigpt.tracing.spans import Line, bar, fit, heat, percent
from minigpt.tracing.summary import footer_lines, header_lines, legend
from minigpt.tracing.wrapping import signed

WIDTHS = [40, 60, 80, 140]
BOTH: tuple[Measure, ...] = ("weight", "norm")


def step_with(
    data: bytes, sources: Sequence[bytes], measures: tuple[Measure, ...], **changes: Any
) -> TraceStep:
    """A step with a row for each measure; all have the same shares."""
    step = step_of(data, sources, **changes)
    rows = [row_of(step.row.sources, step.token.position, measure=m) for m in measures]
    return replace(step, rows=tuple(rows))


def effects_of(step: TraceStep, n_verified: int) -> tuple[Effect, ...]:
    """Effects of the first sources, -0.10, -1.20, ...; the first one has no control."""
    sources = step.row.sources[:n_verified]
    changes = [-0.1 - 1.1 * i for i in range(len(sources))]
    found = [Effect(source, change) for source, change in zip(sources, changes, strict=True)]
    found += [Effect(sources[i], 0.05 * i, control_of=i) for i in range(1, len(sources))]
    return tuple(found)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("vocab_size", [257, 50_257])
@pytest.mark.parametrize("n_positions", [24, 131_072])
@pytest.mark.parametrize("n_sources", [None, 0, 1, 30])
@pytest.mark.parametrize("measures", [("weight",), BOTH])
def test_no_line_is_wider_than_the_terminal(
    width: int,
    vocab_size: int,
    n_positions: int,
    n_sources: int | None,
    measures: tuple[Measure, ...],
) -> None:
    layout = make_layout(
        width,
        vocab_size=vocab_size,
        n_positions=n_positions,
        n_sources=n_sources,
        measures=measures,
    )
    assert cells(text_of(layout.heading())) <= width
    for i, token in enumerate(HOSTILE):
        sources = (HOSTILE[i:] + HOSTILE)[: layout.n_sources]
        step = step_with(token, sources, measures, index=9998, position=n_positions - 1)
        lines = layout.step(step)
        assert len(lines) == max(1, -(-len(sources) // layout.per_line))
        lines += layout.step(replace(step, effects=effects_of(step, 7)))
        for line in lines:
            assert cells(text_of(line)) <= width


def test_more_width_shows_more_sources() -> None:
    def n_sources(width: int, vocab_size: int) -> int:
        return TraceLayout(width, vocab_size=vocab_size, n_positions=1000).n_sources

    for vocab_size in (257, 50_257):
        counts = [n_sources(width, vocab_size) for width in WIDTHS]
        assert counts == sorted(counts)
        assert counts[0] >= 1
        assert counts[2] > counts[0]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("measures", [("weight",), ("norm",), BOTH])
def test_columns_are_aligned(width: int, measures: tuple[Measure, ...]) -> None:
    layout = make_layout(width, vocab_size=257, n_positions=1000, measures=measures)
    ends = {cells(text_of(layout.heading()))}
    for i, token in enumerate(HOSTILE):
        full = (HOSTILE[i:] + HOSTILE)[: layout.n_sources]
        for sources in (full, full[:1], []):
            (line,) = layout.step(step_with(token, sources, measures, index=i))
            ends.add(cells(text_of(line)))
    assert len(ends) == 1


def test_a_line_shows_the_numbers_of_its_step() -> None:
    layout = TraceLayout(140, vocab_size=257, n_positions=1000)
    trace = small_trace("to be or not", max_new_tokens=10, n_sources=layout.n_sources)
    for step in trace.steps:
        (line,) = layout.step(step)
        text = text_of(line)
        assert text.split()[0] == str(step.index + 1)
        shown = [int(n) for n in re.findall(r"(?<![<\d])(\d+)%", text)]
        n_below_one = text.count("<1%")
        # probability, sink, sources, rest: each rounded to a whole percent
        assert len(shown) + n_below_one == 3 + len(step.row.sources)
        total = sum(shown) - (round(step.probability * 100) if step.probability >= 0.005 else 0)
        assert abs(total - 100) <= (2 + len(step.row.sources)) / 2 + n_below_one
        for source in step.row.sources:
            assert f" {source.token.position} " in text


def test_a_line_shows_both_measures_of_each_source() -> None:
    layout = make_layout(140, vocab_size=257, n_positions=40, measures=BOTH)
    assert "share by weight and norm" in text_of(layout.heading())
    trace = small_trace(measure="both", n_sources=layout.n_sources)
    for step in trace.steps:
        (line,) = layout.step(step)
        weight, norm = step.rows
        shares = [percent(step.probability), percent(weight.sink), percent(norm.sink)]
        for source in weight.sources:
            shares += [percent(source.weight), percent(norm.weights_S[source.token.position])]
        shown = [source.token.position for source in weight.sources]
        others = [p for p in range(len(norm.weights_S)) if p not in (*shown, 0)]
        shares += [percent(weight.rest or 0), percent(norm.weights_S[others].sum())]
        text = text_of(line)
        assert re.findall(r"<1%|\d+%|\b100\b", text) == [share.strip() for share in shares]
        assert float(text.split()[-1]) == round(weight.entropy, 1)


def test_a_narrow_terminal_shows_no_entropy() -> None:
    lines = {
        width: TraceLayout(width, vocab_size=50_257, n_positions=99).heading() for width in (50, 80)
    }
    assert {width: "bits" in text_of(line) for width, line in lines.items()} == {
        50: False,
        80: True,
    }


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n_verified", [1, 2, 7])
def test_each_effect_is_shown_below_with_its_control(width: int, n_verified: int) -> None:
    layout = TraceLayout(width, vocab_size=257, n_positions=1000)
    step = step_of(b"x", [b"s"] * 9)
    without = layout.step(step)
    lines = layout.step(replace(step, effects=effects_of(step, n_verified)))[len(without) :]
    found = re.findall(
        r"(\d+) +([+-]\d\.\d\d)(?: (?:vs)? *([+-]\d\.\d\d)| no control)?",
        " ".join(map(text_of, lines)),
    )
    assert [(int(a), float(b), c) for a, b, c in found] == [
        (499 - i, pytest.approx(-0.1 - 1.1 * i), "" if i == 0 else f"{0.05 * i:+.2f}")
        for i in range(n_verified)
    ]
    assert text_of(lines[0]).split()[:3] == ["ln", "p", "without"]


def test_changes_of_any_size_take_five_cells() -> None:
    layout = TraceLayout(80, vocab_size=50_257, n_positions=1000)
    for change, shown in ((-0.004, "+0.00"), (-9.99, "-9.99"), (-10, "-10.0"), (-123.4, " -123")):
        step = step_of(b"x", [b"s"])
        step = replace(step, effects=(Effect(step.row.sources[0], change),))
        assert text_of(layout.step(step)[1]).endswith(f" 499 {shown} no control")


@pytest.mark.parametrize("width", WIDTHS)
def test_header_and_footer_fit_the_width(width: int) -> None:
    for heads in (None, "0.1", "0.1,3.2,5.0,7.*,9.3,11.1,11.2,11.3,11.5,11.7"):
        for prompt in (HOSTILE * 2, HOSTILE[11:12], [b"x"] * width, [b"x"]):
            header = header_of(
                model="runs/\x1b[31m\n\u200d日本" + "a-very-long-name-" * 12,
                n_layer=12,
                n_head=12,
                selection=select_heads(12, 12, heads=heads),
                measures=BOTH,
                reduce="max",
                sink=3,
                sink_rule="detected",
                n_verified=4,
                roles=tuple(tuple(roles_of(tag="induc") for _ in range(12)) for _ in range(12)),
                prompt=tuple(Token(i, 0, data) for i, data in enumerate(prompt)),
            )
            for line in header_lines(header, width):
                assert cells(text_of(line)) <= width
    for finish in ("length", "stop", "end_of_text", "context", None):
        for cause in (None, CauseCheck(8, 7, 1.5, 0.25, 0.5), CauseCheck(1, 0, 1.5, 0, None)):
            footer = TraceFooter(1024, finish, 1.0, 1.2e-7, 1e-4, cause)
            for line in footer_lines(footer, header, width):
                assert cells(text_of(line)) <= width


def words_of(lines: list[Line]) -> str:
    return " ".join(" ".join(map(text_of, lines)).split())


def test_the_header_shows_options_that_are_not_the_default() -> None:
    usual = words_of(header_lines(header_of(), 80))
    assert "measure weight of head 0.*" in usual
    assert not re.search("sink|role|verify", usual)
    roles = roles_of(tag="induc", induction=0.715, previous=0.04)
    said = words_of(
        header_lines(header_of(sink=3, sink_rule="detected", roles=((roles,),), n_verified=2), 80)
    )
    assert "sink position 3, detected" in said
    assert "role induc: previous 4%, duplicate 0%, induction 72%, sink 0%, local 0%" in said
    assert "the 2 strongest sources" in said
    assert "weights grow to sum to 1" in said
    header = header_of(
        n_layer=2, n_head=2, selection=select_heads(2, 2, heads="0.*,1.1"), reduce="rollout",
        roles=((roles_of(tag="sink"), roles_of()), (roles_of(tag="prev"), roles_of(tag="sink"))),
    )  # fmt: skip
    said = words_of(header_lines(header, 80))
    assert "weight, rollout of the mean of 3 heads (0.*,1.1)" in said
    assert "roles sink 0.0 1.1 prompt" in said, "the roles of the heads that were not chosen"


def test_the_footer_counts_positions_where_every_position_is_knocked_out() -> None:
    footer = TraceFooter(9, "length", 1.0, 1.2e-7, 3e-6, CauseCheck(60, 0, 0.3, 0.0, 0.8))
    text = words_of(footer_lines(footer, header_of(n_verified="all"), 80))
    assert "a position changed ln p by 0.300 on average (60 positions). Rank" in text
    assert not re.search("source|control", text)


def test_the_footer_names_the_measure_that_ranked_the_sources() -> None:
    def said(correlation: float | None) -> str:
        cause = CauseCheck(60, 58, 0.3121, 0.0213, correlation)
        footer = TraceFooter(9, "length", 1.0, None, 3e-6, cause)
        return words_of(footer_lines(footer, header_of(measures=("logit",)), 80))

    assert "It counts what heads add to the logit directly" in said(0.8)
    assert (
        "Rank correlation of measure logit and effect: 0.80, so here measure logit says much"
        in (said(0.8))
    )
    assert "too few to rank measure logit against effects" in said(None)
    assert not re.search("weight", said(0.8) + said(None), re.IGNORECASE)


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (None, ["Attention shows where a head looked, not why a token was generated."]),
        (
            CauseCheck(60, 58, 0.3121, 0.0213, 0.12),
            ["Weight is not influence", "60 sources", "0.312", "58 controls", "0.021",
             "mattered more than", "0.12", "say little"],
        ),
        (CauseCheck(60, 58, 0.3, 0.2, 0.8), ["mattered little more than", "0.80", "say much"]),
        (CauseCheck(60, 58, 0.2, 0.3, 0.1), ["mattered no more than", "say little"]),
        (CauseCheck(2, 2, 0.3, 0.2, 0.76), ["0.76, which may be chance with 4 knockouts."]),
        (CauseCheck(8, 8, 0.3, 0.2, -0.5), ["-0.50, which may be chance with 16 knockouts."]),
        (CauseCheck(8, 8, 0.3, 0.2, 0.53), ["0.53, so here the weights say something"]),
        (CauseCheck(1, 0, 0.3, 0.0, None), ["(1 source); there were no controls", "too few to"]),
    ],
)  # fmt: skip
def test_the_footer_shows_the_results_of_the_checks(
    cause: CauseCheck | None, said: list[str]
) -> None:
    text = words_of(
        footer_lines(TraceFooter(9, "length", 1.0, 1.2e-7, 3e-6, cause), header_of(), 80)
    )
    assert "checks passed: every row sums to 100% and rows times values give the heads'" in text
    assert "e-0" not in text
    for words in said:
        assert words in text


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n", [1, 9, 18, 30, 400])
def test_the_header_lists_each_token_of_the_prompt_with_its_position(n: int, width: int) -> None:
    prompt = bytes(97 + i % 26 for i in range(n))
    header = header_of(
        prompt=tuple(Token(i, b, bytes([b])) for i, b in enumerate(prompt)),
    )
    lines = [text_of(line) for line in header_lines(header, width)]
    assert max(map(cells, lines)) <= width
    text = "\n".join(lines).partition("prompt ")[2].partition("from ")[0]
    shown = {int(position): name for position, name in re.findall(r"(\d+) ([a-z])(?=\s)", text)}
    assert all(chr(prompt[position]) == name for position, name in shown.items())
    assert {0, n - 1} <= set(shown)
    hidden = re.findall(r"\.\.\. (\d+) more", text)
    assert len(shown) + sum(map(int, hidden)) == n
    assert len(text.strip().splitlines()) <= 6


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("measure", ["weight", "norm", "logit"])
def test_the_columns_are_explained_once_above_them(width: int, measure: Measure) -> None:
    layout = make_layout(width, vocab_size=4096, n_positions=200, measures=(measure,))
    lines = legend(layout, header_of(measures=(measure,), sink=3))
    assert all(cells(text_of(line)) <= width for line in lines)
    explained = re.findall(r"(\w+): ", words_of(lines).removeprefix("columns "))
    heading = text_of(layout.heading()).split()
    columns = [name for name in ("prob", "sink", "rest", "bits", "other", "sum") if name in heading]
    assert set(columns) <= set(explained)
    assert "bits" in heading or "bits" not in explained
    assert "position 3" in words_of(lines)


@pytest.mark.parametrize("width", range(40, 121, 4))
@pytest.mark.parametrize(
    "measures", [("weight",), ("norm",), ("weight", "norm"), ("logit",), ("gradient",)]
)
def test_the_title_of_the_sources_names_their_token(
    width: int, measures: tuple[Measure, ...]
) -> None:
    layout = make_layout(width, vocab_size=4096, n_positions=200, measures=measures)
    assert re.search("  at (the earlier )?token[ ,]", text_of(layout.heading()))


@pytest.mark.parametrize(
    ("measure", "heads", "says"),
    [
        ("logit", None, "other: MLPs, embedding, biases; sum"),
        ("logit", "0.1", "other: MLPs, embedding, biases, other heads; sum"),
        ("integrated", None, "other: logit of the baseline, error; sum"),
    ],
)
def test_the_legend_says_what_other_is_made_of(
    measure: Measure, heads: str | None, says: str
) -> None:
    layout = make_layout(80, vocab_size=4096, n_positions=200, measures=(measure,))
    header = header_of(measures=(measure,))
    if heads:
        header = replace(header, selection=select_heads(2, 2, heads=heads))
    assert says in words_of(legend(layout, header))


def test_a_check_that_failed_is_shown_with_its_number() -> None:
    footer = TraceFooter(9, "length", 1.0, 0.5, 4e-3)
    text = words_of(footer_lines(footer, header_of(), 80))
    assert "check failed: every row sums to 100% only within 5e-01" in text
    assert "within 4e-03" in text
    nan = words_of(footer_lines(replace(footer, worst_product_error=float("nan")), header_of(), 80))
    assert "only within nan" in nan
    none = words_of(footer_lines(TraceFooter(9, "length", 1.0, None), header_of(), 80))
    assert "check" not in none


def test_bars_and_percentages_show_the_share() -> None:
    assert [bar(x, 2) for x in (0, 1 / 16, 0.5, 0.75, 1, 7, -1)] == [
        "  ",
        "▏ ",
        "█ ",
        "█▌",
        "██",
        "██",
        "  ",
    ]
    shares = (0, 0.0001, 0.001, 0.004, 0.005, 0.05, 0.994, 0.996, 1, 1.0000001)
    assert [percent(x) for x in shares] == [
        " 0%", "<1%", "<1%", "<1%", "<1%", " 5%", "99%", "100", "100", "100",
    ]  # fmt: skip
    assert {len(percent(i / 1000)) for i in range(1001)} == {3}
    assert {len(bar(i / 1000)) for i in range(1001)} == {3}


def test_heat_rises_with_the_share() -> None:
    heats = [heat(i / 100) for i in range(101)]
    assert heats == sorted(heats)
    assert set(heats) == {f"heat{i}" for i in range(5)}


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("ab", 4, "ab  "),
        ("abcd", 4, "abcd"),
        ("abcde", 4, "abc…"),
        ("日本", 4, "日本"),
        ("日本語", 4, "日 …"),
        ("日本", 3, "日…"),
        ("", 2, "  "),
    ],
)
def test_fit_pads_or_truncates_to_a_width_in_cells(text: str, width: int, expected: str) -> None:
    assert fit(text, width) == expected
    assert cells(expected) == width


@pytest.mark.parametrize("measure", MEASURES)
def test_the_footer_says_what_the_measure_does_not(measure: Measure) -> None:
    caveats = [facts_of(one).caveat for one in MEASURES]
    text = words_of(
        footer_lines(TraceFooter(9, "length", 1.0, 0.0), header_of(measures=(measure,)))
    )
    assert [one in text for one in caveats] == [one == measure for one in MEASURES]
    assert len(set(caveats)) == len(caveats)


@pytest.mark.parametrize(
    ("n_new", "n_rows", "finish", "says"),
    [
        (5, 5, "length", "5 tokens; the token limit was reached"),
        (5, 16, "length", "11 tokens of the prompt; 5 generated tokens; the token limit was"),
        (0, 11, "length", "11 tokens of the prompt."),
        (0, 4, None, "4 tokens of the prompt; interrupted."),
    ],
)
def test_the_footer_counts_tokens_of_a_given_text_apart(
    n_new: int, n_rows: int, finish: Any, says: str
) -> None:
    header = header_of(sampling=SamplingConfig(max_new_tokens=n_new))
    footer = TraceFooter(n_new, finish, 1.0, None)
    assert words_of(footer_lines(footer, header, n_rows=n_rows)).startswith(says)


def test_bars_of_signed_sources_are_relative_to_the_largest_of_the_row() -> None:
    trace = small_trace(measure="logit", n_sources=2)
    layout = make_layout(140, vocab_size=257, n_positions=24, n_sources=2, measures=("logit",))
    for step in trace.steps:
        text = text_of(layout.step(step)[0])
        largest = float(np.abs(step.row.weights_S).max())
        for source in step.row.sources:
            drawn = bar(abs(source.weight) / largest, layout.form.bar)
            assert f"{signed(source.weight)} {drawn}" in text
