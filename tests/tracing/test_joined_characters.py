"""Views show a character that is split among tokens as one, and mark its later tokens."""

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from page_traces import random_trace
from small_traces import small_trace, text_of, with_tokens

from minigpt.commands.attention_trace.described import DescribedOutput
from minigpt.tracing.findings import Trace, TraceEvent
from minigpt.tracing.lines import TraceLayout
from minigpt.tracing.summary import header_lines
from minigpt.tracing.views import ViewOptions, matrix, pictures, text
from minigpt.tracing.views.page import to_html

TEXT = "今日は🙂"
BYTES = [bytes([byte]) for byte in TEXT.encode()]  # 13 tokens


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Return a trace of the text twice, one token per byte; the prompt ends inside a character."""
    made = small_trace("x" * 14, max_new_tokens=12, context_length=30)
    return with_tokens(made, BYTES)


def shown_live(trace: Trace, capsys: pytest.CaptureFixture[str]) -> tuple[str, list[int]]:
    """Return the final stdout, and its number of step lines after each event."""
    counts: list[int] = []
    out = ""

    def events() -> Iterator[TraceEvent]:
        nonlocal out
        for event in (trace.header, *trace.steps, trace.footer):
            yield event
            out += capsys.readouterr().out
            counts.append(len(re.findall(r"(?m)^ +\d+ .*%", out)))

    layout = TraceLayout(80, vocab_size=257, n_positions=30, n_sources=0)
    with DescribedOutput(layout) as output:
        output.show(events())
    return out + capsys.readouterr().out, counts


@pytest.mark.integration
def test_no_view_shows_bytes_of_a_character(
    trace: Trace, capsys: pytest.CaptureFixture[str]
) -> None:
    views = {
        "text": "\n".join(text_of(line) for line in text.show(trace)),
        "matrix": "\n".join(text_of(line) for line in matrix.show(trace)),
        "lines": shown_live(trace, capsys)[0].split(" bits\n")[1].split("\n\n")[0],
        "svg": pictures.show(trace, ViewOptions(picture="matrix")).decode(),
        "strip": pictures.show(trace, ViewOptions(picture="strip")).decode(),
        "page": to_html(trace).split('id="trace">')[1].split("</script>")[0],
    }
    for name, view in views.items():
        assert "\\x" not in view, name
        for character in TEXT:
            code = character.encode("utf-16-be").hex()
            escaped = "".join(f"\\u{code[i : i + 4]}" for i in range(0, len(code), 4))
            assert character in view or escaped in view, (name, character)


def test_the_text_view_shades_a_character_by_the_sum_of_its_tokens(trace: Trace) -> None:
    last = len(trace.tokens) - 1
    row = trace.steps[-1].row
    lines = [text_of(line) for line in text.show(trace, ViewOptions(width=200, position=last))]
    shown = next(line for line in lines if TEXT in line)
    assert TEXT + TEXT in shown
    # The second 今 is tokens 13 to 15; the sink's and the last character are styled differently.
    sums = [float(row.weights_S[a:b].sum()) for a, b in ((3, 6), (6, 9), (9, 13), (13, 16))]
    sums += [float(row.weights_S[a:b].sum()) for a, b in ((16, 19), (19, 22))]
    blocks = lines[lines.index(shown) + 1]
    heights = [" ▁▂▃▄▅▆▇█".index(blocks[3 + 2 * i]) for i in range(1, 7)]
    assert heights == [round(8 * min(1, share / max(*sums, 1e-9))) for share in sums]
    assert blocks.rstrip().endswith("^^")


def test_the_list_of_prompt_tokens_has_complete_characters(trace: Trace) -> None:
    header = replace(trace.header, prompt=trace.header.prompt[:13])
    shown = "".join(map(text_of, header_lines(header, 80)[2:]))
    for position, name in enumerate(
        ("今", "⋯今", "⋯今", "日", "⋯日", "⋯日", "は", "⋯は", "⋯は", "🙂")
    ):
        assert f" {position} {name}" in shown


def test_a_line_waits_until_its_character_is_complete(
    trace: Trace, capsys: pytest.CaptureFixture[str]
) -> None:
    out, counts = shown_live(trace, capsys)
    # The prompt of 14 tokens ends with the first byte of 今.
    assert counts == [0, 0, 2, 2, 2, 5, 5, 5, 8, 8, 8, 8, 12]
    for name in ("⋯今", "日", "⋯日", "は", "🙂", "⋯🙂"):
        assert f" {name} " in out


def test_an_interrupted_trace_shows_the_bytes_of_an_incomplete_character(
    trace: Trace, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = replace(trace, steps=trace.steps[:4])
    out, _ = shown_live(cut, capsys)
    assert "日" in out.split("step")[0]
    assert r" \xe6 " in out
    assert r" \x97 " in out


def test_later_tokens_of_a_character_are_labelled_with_a_mark() -> None:
    made = random_trace(3, 3)
    picture = pictures.show(with_tokens(made, BYTES[:3]), ViewOptions(picture="strip")).decode()
    assert picture.count(">今<") == 2
    assert picture.count(">⋯<") == 4
