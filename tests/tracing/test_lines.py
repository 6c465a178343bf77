"""Lines of a trace for a terminal."""

import io
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from small_traces import HOSTILE, WIDTHS, cells, row_of, small_trace, step_of, text_of

from minigpt.styles import print_lines
from minigpt.tracing.analysis_config import Measure
from minigpt.tracing.config import DIGITS
from minigpt.tracing.findings import Effect, TraceStep
from minigpt.tracing.lines import TraceLayout, make_layout
from minigpt.tracing.spans import bar, fit, heat, percent
from minigpt.tracing.wrapping import signed

BOTH: tuple[Measure, ...] = ("weight", "norm")


def step_with(
    data: bytes, sources: Sequence[bytes], measures: tuple[Measure, ...], **changes: Any
) -> TraceStep:
    """Return a step with a row for each measure, all with the same shares."""
    step = step_of(data, sources, **changes)
    rows = [row_of(step.row.sources, step.token.position, measure=m) for m in measures]
    return replace(step, rows=tuple(rows))


def effects_of(step: TraceStep, n_verified: int) -> tuple[Effect, ...]:
    """Return effects of the first sources, -0.10, -1.20, ...; the first one has no control."""
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


def test_wider_terminals_show_more_sources() -> None:
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


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("measures", [("weight",), BOTH])
def test_columns_are_aligned_if_tokens_are_escaped_for_an_encoding(
    encoding: str, measures: tuple[Measure, ...]
) -> None:
    layout = make_layout(
        100, vocab_size=50_257, n_positions=1000, measures=measures, encoding=encoding
    )
    lines = [layout.heading()]
    for i, token in enumerate(HOSTILE):
        sources = (HOSTILE[i:] + HOSTILE)[: layout.n_sources]
        lines += layout.step(step_with(token, sources, measures, index=i))
    file = io.BytesIO()
    stream = io.TextIOWrapper(file, encoding, errors="backslashreplace")
    print_lines(Console(file=stream, width=100), lines)
    assert len({len(line) for line in file.getvalue().splitlines()}) == 1


def test_a_line_shows_the_numbers_of_its_step() -> None:
    layout = TraceLayout(140, vocab_size=257, n_positions=1000)
    trace = small_trace("to be or not", max_new_tokens=10, n_sources=layout.n_sources)
    for step in trace.steps:
        (line,) = layout.step(step)
        text = text_of(line)
        assert text.split()[0] == str(step.index + 1)
        shown = [int(n) for n in re.findall(r"(?<![<\d])(\d+)%", text)]
        n_below_one = text.count("<1%")
        # probability, sink, sources and rest, each rounded to a whole percent
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


def test_effects_of_any_size_take_five_cells() -> None:
    layout = TraceLayout(80, vocab_size=50_257, n_positions=1000)
    for change, shown in ((-0.004, "+0.00"), (-9.99, "-9.99"), (-10, "-10.0"), (-123.4, " -123")):
        step = step_of(b"x", [b"s"])
        step = replace(step, effects=(Effect(step.row.sources[0], change),))
        assert text_of(layout.step(step)[1]).endswith(f" 499 {shown} no control")


@pytest.mark.parametrize("width", range(40, 121, 4))
@pytest.mark.parametrize(
    "measures", [("weight",), ("norm",), ("weight", "norm"), ("logit",), ("gradient",)]
)
def test_the_column_title_of_the_sources_mentions_the_token(
    width: int, measures: tuple[Measure, ...]
) -> None:
    layout = make_layout(width, vocab_size=4096, n_positions=200, measures=measures)
    assert re.search("  at (the earlier )?token[ ,]", text_of(layout.heading()))


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
    # A trace file has rounded numbers, and a replay shows the same.
    tiny = (1e-9, 4e-7, 6e-7, 0.0049999, 0.9949999)
    assert [percent(x) for x in tiny] == [percent(round(x, DIGITS)) for x in tiny]
    assert {len(bar(i / 1000)) for i in range(1001)} == {3}


def test_colour_intensity_rises_with_the_share() -> None:
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


def test_signed_bars_are_relative_to_the_largest_source_of_the_row() -> None:
    trace = small_trace(measure="logit", n_sources=2)
    layout = make_layout(140, vocab_size=257, n_positions=24, n_sources=2, measures=("logit",))
    for step in trace.steps:
        text = text_of(layout.step(step)[0])
        largest = float(np.abs(step.row.weights_S).max())
        for source in step.row.sources:
            drawn = bar(abs(source.weight) / largest, layout.widths.bar)
            assert f"{signed(source.weight)} {drawn}" in text
