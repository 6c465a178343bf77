"""The streams: what reaches a terminal, what reaches a pipe, and what a closed one does."""

import os
import sys
from io import BytesIO, StringIO, TextIOWrapper

import pytest

from minigpt.console import make_console, write_result
from minigpt.streams import silence
from minigpt.styles import print_lines, spans_to_text

HOSTILE = "\x1b[31mred\x07\u202e\x9b2J\x00 end\n"


class Terminal(StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def attach_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Put a terminal in the place of stdout and stderr.

    In the test itself: between a fixture and its test, pytest puts back its own streams.
    """
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_results_reach_a_pipe_exactly(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    write_result(HOSTILE)
    assert capfdbinary.readouterr().out == HOSTILE.encode()


def test_results_reach_a_terminal_without_control_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = attach_terminal(monkeypatch)
    write_result(HOSTILE)
    assert terminal.getvalue() == "\\x1b[31mred\\x07\\u202e\\x9b2J\\x00 end\n"


def test_spans_cannot_steer_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = attach_terminal(monkeypatch)
    make_console(is_stderr=False).print(spans_to_text([(HOSTILE, "plain")]), end="")
    assert terminal.getvalue() == "\\x1b[31mred\\x07\\u202e\\x9b2J\\x00 end\n"


def test_untrusted_text_is_not_read_as_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = attach_terminal(monkeypatch)
    make_console(is_stderr=True).print("[red]a[/red] :smile: 123")
    assert terminal.getvalue() == "[red]a[/red] :smile: 123\n"


def test_a_terminal_gets_color_unless_no_color_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = attach_terminal(monkeypatch)
    make_console(is_stderr=False).print(spans_to_text([("hot", "heat4")]))
    assert "\x1b[1;38;" in terminal.getvalue()
    terminal = attach_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    make_console(is_stderr=False).print(spans_to_text([("hot", "heat4")]))
    assert "38;" not in terminal.getvalue()


def test_a_pipe_gets_no_color_and_no_wrapped_lines(capfd: pytest.CaptureFixture[str]) -> None:
    make_console(is_stderr=False).print(spans_to_text([("hot" * 100, "heat4")]))
    assert capfd.readouterr().out == "hot" * 100 + "\n"


def test_writing_to_a_closed_stderr_does_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        os.close(reader)
        console = make_console(is_stderr=True)
        for _ in range(3):
            console.print("training goes on")


def test_a_silenced_stream_does_not_fail() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        os.close(reader)
        stream.write("lost")
        silence(stream)
        stream.flush()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "utf-8"])
def test_bars_are_ascii_where_stdout_cannot_encode_blocks(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    stream = TextIOWrapper(BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    line = "".join(["a", "█▉▊▋▌▍▎▏▇▆▅▄▃▂▁▀━─│┬┴┼·…␣⋯", "é" if encoding != "ascii" else ""])
    print_lines(make_console(is_stderr=False), [[(line, "plain")]])
    shown = stream.buffer.getvalue().decode(encoding).rstrip("\n")  # type: ignore[attr-defined]
    assert len(shown) == len(line)
    assert (shown == line) == (encoding == "utf-8")
    if encoding == "cp1252":
        assert "…" in shown, "what the encoding has is kept"


def test_text_that_is_not_cut_breaks_between_words_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = attach_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "20")
    text = [[(" could not tell which of them", "plain")]]
    print_lines(make_console(is_stderr=False), text, is_cut=False)
    lines = [line.rstrip() for line in terminal.getvalue().splitlines()]
    assert lines == [" could not tell", "which of them"]


def test_lines_in_a_pipe_have_no_blanks_at_their_end_and_text_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    spans = [[("a cell  ", "plain"), ("  ", "dim")]]
    print_lines(make_console(is_stderr=False), spans)
    print_lines(make_console(is_stderr=False), spans, is_cut=False)
    assert stream.getvalue() == "a cell\na cell    \n"
