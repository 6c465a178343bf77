"""The trace on a terminal: never too wide, never steered by a token, always 100 %."""

import re
import unicodedata

import pytest
from small_traces import header_of, small_trace, step_of

from minigpt.tracing.events import Token, TraceFooter
from minigpt.tracing.selection import select_heads
from minigpt.tracing.spans import Line, bar, fit, heat, percent
from minigpt.tracing.terminal import (
    TraceLayout,
    footer_lines,
    header_lines,
)

WIDTHS = [60, 80, 140]
HOSTILE = [
    b"",
    b" ",
    b"\x00",
    b"\x1b[31mred\x1b[0m",
    b"\x1b]0;title\x07",
    b"\x9b31m",
    b"\r",
    b"\n\n\t",
    b"\x08\x08\x08",
    b"\x7f",
    b"\xff\xfe",
    "日本語の長い文字列".encode(),
    "日本".encode()[:-1],
    "🙂🙂🙂🙂🙂🙂".encode(),
    "👩‍👩‍👧‍👦".encode(),
    "e\u0301\u0301\u0301".encode(),
    "\u0301".encode(),
    "\u202eevil\u2066".encode(),
    "\u200b\u200d\ufeff\ufe0f".encode(),
    "\u2028\u2029\u0085\u00a0\u3000".encode(),
    "한국어".encode(),
    "\uff21\uff22".encode(),
    b"[bold red]markup[/]",
    b"a" * 99,
    "█▏…␣\\".encode(),
]


def cells(text: str) -> int:
    """Cells by Unicode's East Asian width; nothing that joins or is invisible may be left."""
    for character in text:
        assert unicodedata.category(character)[0] not in "CM", repr(character)
        assert unicodedata.category(character) not in ("Zl", "Zp"), repr(character)
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def text_of(line: Line) -> str:
    return "".join(text for text, _ in line)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("vocab_size", [257, 50_257])
@pytest.mark.parametrize("n_positions", [24, 1024, 131_072])
@pytest.mark.parametrize("n_sources", [None, 0, 1, 8, 30])
def test_no_line_is_wider_than_the_terminal_whatever_the_tokens(
    width: int, vocab_size: int, n_positions: int, n_sources: int | None
) -> None:
    layout = TraceLayout(width, vocab_size=vocab_size, n_positions=n_positions, n_sources=n_sources)
    assert cells(text_of(layout.heading())) <= width
    for i, token in enumerate(HOSTILE):
        sources = (HOSTILE[i:] + HOSTILE)[: layout.n_sources]
        lines = layout.step(step_of(token, sources, index=9998))
        assert len(lines) == max(1, -(-len(sources) // layout.per_line))
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
def test_columns_stand_below_each_other(width: int) -> None:
    layout = TraceLayout(width, vocab_size=257, n_positions=1000)
    ends = {cells(text_of(layout.heading()))}
    for i, token in enumerate(HOSTILE):
        full = (HOSTILE[i:] + HOSTILE)[: layout.n_sources]
        for sources in (full, full[:1], []):
            (line,) = layout.step(step_of(token, sources, index=i))
            ends.add(cells(text_of(line)))
    assert len(ends) == 1


def test_a_line_shows_the_numbers_of_its_step_and_accounts_for_all() -> None:
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


@pytest.mark.parametrize("width", WIDTHS)
def test_header_and_footer_fit_too(width: int) -> None:
    for heads in (None, "0.1", "0.1,3.2,5.0,7.*,9.3,11.1,11.2,11.3,11.5,11.7"):
        for prompt in (HOSTILE * 2, HOSTILE[11:12], [b"x"] * width, [b"x"]):
            header = header_of(
                model="runs/" + "a-very-long-name-" * 12,
                n_layer=12,
                n_head=12,
                selection=select_heads(12, 12, heads=heads),
                reduce="max",
                prompt=tuple(Token(i, 0, data) for i, data in enumerate(prompt)),
            )
            for line in header_lines(header, width):
                assert cells(text_of(line)) <= width
    for finish in ("length", "stop", "end_of_text", "context", None):
        footer = TraceFooter(n_tokens=1024, finish=finish, seconds=1.0, worst_row_sum_error=1.2e-7)
        for line in footer_lines(footer):
            assert cells(text_of(line)) <= 80  # at sixty the console wraps it at a blank


@pytest.mark.parametrize("n", [1, 5, 20, 34, 35, 36, 37, 38, 50])
def test_the_header_shows_the_end_of_the_prompt_and_cuts_no_more_than_it_must(n: int) -> None:
    prompt = bytes(97 + i % 26 for i in range(n))
    header = header_of(
        prompt=tuple(Token(i, b, bytes([b])) for i, b in enumerate(prompt)),
    )
    (line,) = [text for text in map(text_of, header_lines(header, 66)) if "prompt" in text]
    shown = line.partition(": ")[2]
    room = 66 - (len(line) - len(shown))
    assert shown == (prompt.decode() if n <= room else "…" + prompt.decode()[n - room + 1 :])


def test_bars_and_percents_say_the_share() -> None:
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
def test_fit_pads_and_cuts_to_cells(text: str, width: int, expected: str) -> None:
    assert fit(text, width) == expected
    assert cells(expected) == width
