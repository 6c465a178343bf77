"""The map of tokens and positions shows the rows in colours or density characters."""

import re
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from small_traces import HOSTILE, cells, small_trace, text_of, with_tokens

from minigpt.errors import ConfigError
from minigpt.tracing.events import Token
from minigpt.tracing.findings import Trace
from minigpt.tracing.spans import Line
from minigpt.tracing.views import ViewOptions
from minigpt.tracing.views.matrix import DENSITY, N_COLOURS, colour, density, show

SHARES = {colour(i / (N_COLOURS - 1)): i / (N_COLOURS - 1) for i in range(N_COLOURS)}
N_PROMPT = 12


@pytest.fixture(scope="module")
def trace() -> Trace:
    return small_trace(measure="both", max_new_tokens=12)


@pytest.fixture(scope="module")
def long_trace() -> Trace:
    return small_trace(context_length=128, max_new_tokens=99)


def rows_of(trace: Trace) -> list[NDArray[np.float32]]:
    return [step.row.weights_S for step in trace.steps]


def scale_of(lines: list[Line]) -> float:
    """Return the number at the upper end of the legend."""
    (text,) = [text for text in map(text_of, lines) if text.startswith("0% ")]
    found = re.search(r"([\d.]+)%( or more)?$", text)
    assert found is not None
    return float(found[1]) / 100


def map_lines(lines: list[Line]) -> list[Line]:
    """Return the lines with cells, which start with a position."""
    return [line for line in lines if line and line[0][1] == "token"]


def shares(line: Line) -> list[float]:
    """Return the shares shown by a line of coloured cells, one per position."""
    return [SHARES[style] for text, style in line[1:]]


def test_colours_rise_in_lightness_and_are_distinct() -> None:
    assert len(SHARES) == N_COLOURS
    light = [
        0.2126 * int(c[1:3], 16) + 0.7152 * int(c[3:5], 16) + 0.0722 * int(c[5:], 16)
        for c in SHARES
    ]
    assert light == sorted(light)
    assert (colour(0), colour(1), colour(-1), colour(7)) == (
        "#440154", "#fde725", "#440154", "#fde725",
    )  # fmt: skip
    assert "".join(density(i / 9) for i in range(10)) == DENSITY


def test_colours_equal_the_viridis_map_of_matplotlib() -> None:
    pytest.importorskip("matplotlib", reason="needs pip install 'minigpt-attention[plot]'")
    from matplotlib import colormaps

    for text, share in SHARES.items():
        ours = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert np.abs(np.array(ours) - colormaps["viridis"](share)[:3]).max() < 0.03


def test_coloured_cells_show_the_rows(trace: Trace) -> None:
    lines = show(trace, ViewOptions(width=100))
    scale = scale_of(lines)
    drawn = map_lines(lines)
    assert len(drawn) == len(trace.steps)
    for line, row in zip(drawn, rows_of(trace), strict=True):
        assert {text for text, _ in line[1:]} == {"██"}
        # half a step of the colormap, plus rounding of the scale
        np.testing.assert_allclose(shares(line), np.minimum(row / scale, 1), atol=0.01)


def test_half_blocks_show_two_rows_per_line(trace: Trace) -> None:
    lines = show(trace, ViewOptions(width=100, height=15))
    scale = scale_of(lines)
    drawn = map_lines(lines)
    rows = rows_of(trace)[-2 * len(drawn) :]
    assert len(drawn) < len(trace.steps)
    for i, line in enumerate(drawn):
        upper, lower = rows[2 * i : 2 * i + 2]
        spans = line[1:]
        assert [text for text, _ in spans] == ["▀"] * len(upper) + ["▄"]
        pairs = [style.split(" on ") for _, style in spans]
        above = [SHARES[pair[0]] for pair in pairs[:-1]]
        below = [SHARES[pair[-1]] for pair in pairs]
        np.testing.assert_allclose(above, np.minimum(upper / scale, 1), atol=0.01)
        np.testing.assert_allclose(below, np.minimum(lower / scale, 1), atol=0.01)


def test_density_characters_show_the_same_shares_as_colours(trace: Trace) -> None:
    plain = map_lines(show(trace, ViewOptions(width=100, has_colour=False)))
    coloured = map_lines(show(trace, ViewOptions(width=100)))
    for dense, line in zip(plain, coloured, strict=True):
        text = dense[1][0]
        assert text.isascii()
        assert text.endswith("|")
        assert text[:-1:2] == text[1:-1:2], "a cell must be two characters wide"
        levels = [DENSITY.index(character) / 9 for character in text[:-1:2]]
        assert len(levels) == len(shares(line))
        assert np.abs(np.subtract(levels, shares(line))).max() < 1 / 18 + 0.01
    styles = {
        style for line in show(trace, ViewOptions(width=100, has_colour=False)) for _, style in line
    }
    assert styles <= {"dim", "plain", "token"}


@pytest.mark.parametrize("has_colour", [True, False])
@pytest.mark.parametrize("width", [40, 80, 140])
@pytest.mark.parametrize("height", [None, 15, 24, 60])
def test_the_map_fits_the_terminal_for_hostile_tokens(
    trace: Trace, long_trace: Trace, width: int, height: int | None, has_colour: bool
) -> None:
    for one in (with_tokens(trace, HOSTILE), with_tokens(long_trace, HOSTILE[::-1])):
        lines = show(one, ViewOptions(width=width, height=height, has_colour=has_colour))
        assert height is None or len(lines) <= height
        for line in lines:
            assert cells(text_of(line)) <= width


@pytest.mark.parametrize(("width", "n_pooled"), [(140, 1), (80, 2), (60, 3), (40, 4)])
def test_narrow_terminals_average_neighbouring_positions(
    long_trace: Trace, width: int, n_pooled: int
) -> None:
    lines = show(long_trace, ViewOptions(width=width))
    caption = " ".join(map(text_of, lines))
    assert ("each the mean of" in caption) == (n_pooled > 1)
    assert n_pooled == 1 or f"each the mean of {n_pooled};" in " ".join(caption.split())
    scale = scale_of(lines)
    for line, row in zip(map_lines(lines), rows_of(long_trace), strict=True):
        means = [row[i : i + n_pooled].mean() for i in range(0, len(row), n_pooled)]
        np.testing.assert_allclose(shares(line), np.minimum(np.array(means) / scale, 1), atol=0.02)


@pytest.mark.parametrize(("height", "has_colour"), [(30, True), (30, False), (None, False)])
def test_the_newest_tokens_are_shown_and_counted_in_the_caption(
    long_trace: Trace, height: int | None, has_colour: bool
) -> None:
    lines = show(long_trace, ViewOptions(height=height, has_colour=has_colour))
    drawn = map_lines(lines)
    n_tokens = len(long_trace.steps)
    caption = " ".join(" ".join(map(text_of, lines)).split())
    positions = [int(text_of(line).split()[0]) for line in drawn]
    if height is None:
        assert "newest" not in caption
        assert positions == [step.token.position for step in long_trace.steps]
        return
    per_line = 2 if has_colour else 1
    assert ("two per line" in caption) == has_colour
    assert f"the newest {per_line * len(drawn)} of {n_tokens}" in caption
    last = long_trace.tokens[-1].position
    assert positions == list(range(last - per_line * len(drawn) + 1, last + 1, per_line))


def test_columns_are_labelled_above_and_numbered_below(trace: Trace) -> None:
    named = with_tokens(trace, [b"Once", b" a", b"\n", "日".encode(), b"abcdefghi"])
    texts = list(map(text_of, show(named, ViewOptions(width=50))))
    first = next(i for i, text in enumerate(texts) if text.startswith("12 "))
    indent = texts[first].index("█")
    names = [text.ljust(140) for text in texts[1:first]]
    for column, name in enumerate(["Once", "␣a", "\\n", None, "abcde…"]):
        place = indent + column  # 23 positions in 37 cells: one cell each
        if name is not None:
            assert "".join(text[place] for text in names).strip() == name
    lower = list(map(text_of, show(named, ViewOptions(width=50, height=29))))
    assert lower[1].startswith("1"), "with few lines, column labels must be omitted"
    ticks = next(text for text in texts[first:] if text.split()[:2] == ["0", "5"])
    assert [ticks.index(str(n)) - indent for n in (0, 5, 10, 15, 20)] == [0, 5, 10, 15, 20]


def test_the_colour_scale_ignores_the_sink(trace: Trace) -> None:
    steps = []
    for step in trace.steps:
        weights = np.full_like(step.row.weights_S, 0.01)
        weights[3] = 0.9
        weights[5] = 0.125
        steps.append(replace(step, rows=(replace(step.row, weights_S=weights), step.rows[1])))
    other = replace(trace, header=replace(trace.header, sink=3), steps=tuple(steps))
    lines = show(other, ViewOptions(width=100))
    assert "12.5% or more" in "".join(map(text_of, lines))
    (top, *_) = map_lines(lines)
    assert shares(top)[3] == shares(top)[5] == 1
    assert "sink: position 3" in "".join(map(text_of, lines))


def test_a_trace_without_generated_tokens_is_refused(trace: Trace) -> None:
    with pytest.raises(ConfigError, match="no generated token"):
        show(Trace(trace.header, (), trace.footer))


@pytest.fixture(scope="module")
def signed_trace() -> Trace:
    return small_trace(measure="logit", max_new_tokens=12)


def level_of(style: str) -> float:
    """Return the number from -1 to 1 of a colour from orange over near white to blue."""
    red, green, blue = bytes.fromhex(style.removeprefix("#"))
    end, sign = ((0x21, 0x66, 0xAC), 1) if blue >= red else ((0xB3, 0x58, 0x06), -1)
    parts = [
        (0xF7 - have) / (0xF7 - whole) for have, whole in zip((red, green, blue), end, strict=True)
    ]
    assert max(parts) - min(parts) < 0.02, "a colour must be interpolated between two colours"
    return sign * float(np.mean(parts))


def test_signed_cells_are_blue_or_orange_by_their_sign(signed_trace: Trace) -> None:
    lines = show(signed_trace, ViewOptions(width=100))
    rows = rows_of(signed_trace)
    scale = max(float(np.abs(row[1:]).max()) for row in rows)
    assert min(row.min() for row in rows) < 0 < max(row.max() for row in rows)
    for line, row in zip(map_lines(lines), rows, strict=True):
        levels = [level_of(style) for _, style in line[1:]]
        np.testing.assert_allclose(levels, np.clip(row / scale, -1, 1), atol=0.02)
    (legend,) = [text for text in map(text_of, lines) if text.startswith(f"{-scale:+.3g} ")]
    beyond = max(float(np.abs(row).max()) for row in rows) > scale
    assert legend.endswith(f" {scale:+.3g}{' or beyond' if beyond else ''}")


def test_the_title_keeps_the_capitals_of_the_token_of_against(signed_trace: Trace) -> None:
    header = replace(signed_trace.header, against=Token(7, 0, b" The"))
    text = " ".join(map(text_of, show(replace(signed_trace, header=header))))
    assert text.startswith("Logit against ␣The in logits")


def test_signed_half_blocks_show_two_rows_per_line(signed_trace: Trace) -> None:
    lines = show(signed_trace, ViewOptions(width=100, height=15))
    drawn, rows = map_lines(lines), rows_of(signed_trace)
    scale = max(float(np.abs(row[1:]).max()) for row in rows)
    assert len(drawn) < len(rows)
    for i, line in enumerate(drawn):
        upper, lower = rows[-2 * len(drawn) :][2 * i : 2 * i + 2]
        pairs = [style.split(" on ") for _, style in line[1:]]
        above = [level_of(pair[0]) for pair in pairs[:-1]]
        below = [level_of(pair[-1]) for pair in pairs]
        np.testing.assert_allclose(above, np.clip(upper / scale, -1, 1), atol=0.02)
        np.testing.assert_allclose(below, np.clip(lower / scale, -1, 1), atol=0.02)


def test_signed_cells_without_colours_have_a_minus_before_the_density(signed_trace: Trace) -> None:
    lines = show(signed_trace, ViewOptions(width=100, has_colour=False))
    rows = rows_of(signed_trace)
    scale = max(float(np.abs(row[1:]).max()) for row in rows)
    for line, row in zip(map_lines(lines), rows, strict=True):
        text = line[1][0].removesuffix("|")
        expected = "".join(
            ("-" if number < 0 else " ") + density(abs(float(number)) / scale) for number in row
        )
        assert text == expected


def test_the_caption_does_not_count_prompt_tokens_as_generated() -> None:
    for more, says in (({}, "rows: generated tokens;"), ({"prompt_rows": True}, "rows: tokens;")):
        text = " ".join(map(text_of, show(small_trace(max_new_tokens=2, **more))))
        assert says in text
