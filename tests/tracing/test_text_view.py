"""The shaded text shows the row of one token with blocks and percentages."""

import re
from dataclasses import replace

import numpy as np
import pytest
from small_traces import HOSTILE, cells, small_trace, text_of, with_tokens

from minigpt.errors import ConfigError
from minigpt.tracing.findings import Candidate, Trace
from minigpt.tracing.spans import Line
from minigpt.tracing.views import ViewOptions
from minigpt.tracing.views.text import readable, show

BLOCKS = " ▁▂▃▄▅▆▇█"


@pytest.fixture(scope="module")
def trace() -> Trace:
    return small_trace(measure="both", max_new_tokens=12)


def parts(lines: list[Line]) -> tuple[list[str], list[str], str]:
    """Return the title of a view, its text with blocks, and the lines below."""
    texts = [text_of(line) for line in lines]
    first, second = [i for i, text in enumerate(texts) if not text]
    return texts[:first], texts[first + 1 : second], " ".join(texts[second + 1 :])


@pytest.mark.parametrize("width", [40, 80, 140])
def test_the_text_fits_the_terminal_for_hostile_tokens(trace: Trace, width: int) -> None:
    for first in range(0, len(HOSTILE), 5):
        hostile = with_tokens(trace, HOSTILE[first:] + HOSTILE[:first])
        for position in (None, 13):
            for line in show(hostile, ViewOptions(width=width, position=position)):
                assert cells(text_of(line)) <= width


def test_the_text_is_complete_and_in_order(trace: Trace) -> None:
    for tokens in ([b"Once", b" upon", b" a\n", b"time"], HOSTILE):
        other = with_tokens(trace, tokens)
        _, page, _ = parts(show(other, ViewOptions(width=60)))
        written = "".join(line[3:] for line in page if line[:2].strip())
        assert written == "".join(readable(token.data) for token in other.tokens)
        numbers = [int(line[:2]) for line in page if line[:2].strip()]
        assert numbers == sorted(numbers)
        assert numbers[0] == (0 if tokens[0] else 1), "an empty token must not start a line"


def test_words_are_not_broken(trace: Trace) -> None:
    words = with_tokens(trace, [b" extra", b"ordi", b"narily"])
    _, page, _ = parts(show(words, ViewOptions(width=40)))
    lines = [line[3:] for line in page if line[:2].strip()]
    assert len(lines) > 2
    for line in lines[:-1]:
        assert line.replace(" extraordinarily", "") == ""


@pytest.mark.parametrize("position", [None, 13, 17])
def test_the_height_of_a_block_shows_the_share(trace: Trace, position: int | None) -> None:
    letters = with_tokens(trace, [bytes([97 + i]) for i in range(26)])
    lines = show(letters, ViewOptions(position=position))
    _, (text, blocks), below = parts(lines)
    chosen = position or letters.tokens[-1].position
    row = letters.steps[chosen - 12].row
    others = row.weights_S[1:]
    scale = float(others.max())
    for place, token in enumerate(letters.tokens[:chosen]):
        assert text[3 + place] == token.data.decode()
        eighths = BLOCKS.index(blocks.ljust(80)[3 + place])
        assert abs(eighths / 8 - min(1, row.weights_S[place] / scale)) <= 1 / 16 + 1e-6
    assert blocks[3 + chosen] == "^"
    assert not blocks[4 + chosen :].strip()
    assert f"█ is {scale:.1%}" in below
    assert ("or more" in below) == (row.sink > scale)
    assert f"sink (position 0) {row.sink:.1%}" in below
    assert f"entropy {row.entropy:.1f} bits" in below


def test_shades_rise_with_the_shares_up_to_the_chosen_token(trace: Trace) -> None:
    letters = with_tokens(trace, [bytes([97 + i]) for i in range(26)])
    lines = show(letters, ViewOptions(position=17))
    (page,) = [line for line in lines if text_of(line).startswith(" 0 a")]
    styles = [style for _, style in page[1:]]
    assert styles[0] == "plain", "the sink must not be shaded"
    assert styles[17] == "chosen"
    assert set(styles[18:]) == {"dim"}
    weights = letters.steps[5].row.weights_S
    levels = [int(style[-1]) if style.startswith("shade") else 0 for style in styles[1:17]]
    by_weight = [level for _, level in sorted(zip(weights[1:17], levels, strict=True))]
    assert by_weight == sorted(levels)
    assert by_weight[-1] == 4


def test_the_strongest_sources_are_listed_with_their_shares(trace: Trace) -> None:
    row = trace.steps[-1].row
    _, _, below = parts(show(trace, ViewOptions(width=100)))
    listed = [(int(a), int(b)) for a, b in re.findall(r"(\d+) \S+ +(\d+)%", below)]
    order = sorted(range(1, len(row.weights_S)), key=lambda p: -row.weights_S[p])
    assert listed == [(p, round(float(row.weights_S[p]) * 100)) for p in order[:12]]


def test_positions_without_rows_are_refused(trace: Trace) -> None:
    for position in (-1, 0, 11, 24, 10**9):
        with pytest.raises(ConfigError, match="Choose a position from 12 to 23"):
            show(trace, ViewOptions(position=position))
    only = small_trace(max_new_tokens=2)
    with pytest.raises(ConfigError, match="no generated token"):
        show(Trace(only.header, (), only.footer))


@pytest.mark.parametrize("position", [None, 13])
@pytest.mark.parametrize("against", [None, "b"])
def test_signed_rows_are_shaded_by_magnitude_and_orange_if_negative(
    position: int | None, against: str | None
) -> None:
    trace = small_trace(measure="logit", against=against, max_new_tokens=12)
    letters = with_tokens(trace, [bytes([97 + i]) for i in range(26)])
    lines = show(letters, ViewOptions(position=position, width=100))
    title, (_, blocks), below = parts(lines)
    chosen = position or letters.tokens[-1].position
    row = letters.steps[chosen - 12].row
    scale = float(np.abs(row.weights_S[1:]).max())
    assert " ".join(title).startswith(
        f"What raised or lowered the logit of position {chosen}, from the query at {chosen - 1}: "
        f"logit{' against b' if against else ''} in logits, sum of all 8 heads"
    )
    (page,) = [line for line in lines if text_of(line).startswith(" 0 a")]
    for place in range(chosen):
        number = float(row.weights_S[place])
        eighths = BLOCKS.index(blocks.ljust(80)[3 + place])
        assert abs(eighths / 8 - min(1, abs(number) / scale)) <= 1 / 16 + 1e-6
        if place and eighths:
            assert (page[1 + place][1] == "#e07b39") == (number < 0)
    assert f"█ is a magnitude of {scale:.3g} logits" in below
    assert ("or more" in below) == (abs(row.sink) > scale)
    assert f"sink (position 0) {row.sink:+.2f}" in below
    assert f"prompt {row.prompt:+.2f}, generated {row.generated:+.2f}" in below
    assert "bits" not in below
    listed = [(int(a), b) for a, b in re.findall(r"(\d+) \S+ +([+-]\d+\.\d+)", below)]
    order = sorted(range(1, len(row.weights_S)), key=lambda p: -abs(row.weights_S[p]))
    assert listed == [(p, f"{row.weights_S[p]:+.2f}") for p in order[: len(listed)]]
    assert len(listed) >= 5


def test_sources_of_small_logits_are_listed_too() -> None:
    trace = small_trace(measure="logit", max_new_tokens=2)
    step = trace.steps[-1]
    row = replace(step.row, weights_S=step.row.weights_S / 1e4)
    small = replace(trace, steps=(trace.steps[0], replace(step, rows=(row,))))
    listed = [len(re.findall(r"\d+ \S+ +[+-]0\.", parts(show(t))[2])) for t in (trace, small)]
    assert listed[1] >= 5


def test_the_legend_shows_no_negative_zero() -> None:
    trace = small_trace(measure="logit")
    steps = [replace(s, rows=(replace(s.row, sink=-0.001, prompt=-0.004),)) for s in trace.steps]
    legend = " ".join(text_of(line) for line in show(replace(trace, steps=tuple(steps))))
    assert "sink (position 0) +0.00; prompt +0.00" in legend


def test_without_colours_the_legend_mentions_no_colours() -> None:
    trace = small_trace(measure="logit")
    for has_colour in (True, False):
        legend = parts(show(trace, ViewOptions(has_colour=has_colour)))[2]
        assert ("orange" in legend) == has_colour
        assert ("sign in the list" in legend) != has_colour


def test_a_comma_candidate_is_distinct_from_a_separator() -> None:
    trace = small_trace(candidates=2)
    best = (Candidate(1, b",", -0.5), Candidate(2, b" a", -1.5))
    steps = tuple(replace(step, candidates=best) for step in trace.steps)
    texts = [text_of(line) for line in show(replace(trace, steps=steps))]
    assert "candidates , 61% | ␣a 22%" in texts
