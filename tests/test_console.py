"""Output on terminals, in pipes and to closed streams."""

import itertools
import os
import re
import sys
from io import BytesIO, StringIO, TextIOWrapper

import pytest

from minigpt.console import make_console, note, write_result
from minigpt.streams import silence
from minigpt.styles import print_lines, spans_to_text

HOSTILE = "\x1b[31mred\x07\u202e\x9b2J\x00 end\n"


class Terminal(StringIO):
    """A stream that reports to be a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def attach_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Replace stdout and stderr by a terminal.

    To be called in the test itself: pytest restores its own streams between fixture and test.
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


def test_styled_spans_cannot_control_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert "…" in shown, "characters of the encoding must be kept"


def test_long_text_wraps_between_words_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = attach_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "20")
    text = [[(" could not tell which of them", "plain")]]
    print_lines(make_console(is_stderr=False), text, is_cut=False)
    lines = [line.rstrip() for line in terminal.getvalue().splitlines()]
    assert lines == [" could not tell", "which of them"]


MESSAGES = [
    "line 1 of 'a.jsonl' is not UTF-8. Give --encoding latin-1 (Western European), or convert it: "
    "iconv -f LATIN1 -t UTF-8 OLD > NEW. Leave such rows out with --skip-bad.",
    "there is no file or folder '/home/ann/a folder of mine/b.txt'. Give --data 'a b.txt'.",
    "the prompt's end is wrong. Put -- before it: minigpt generate --model m -- '-a long prompt'",
    "/srv/a-very-long-path-without-any-blank/that-is-wider/than-forty-columns/file.txt is damaged.",
]


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("width", [40, 80])
def test_messages_on_a_terminal_wrap_between_words_but_not_in_commands_or_quotes(
    message: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wholes = ["iconv -f LATIN1 -t UTF-8 OLD > NEW", "'/home/ann/a folder of mine/b.txt'"]
    wholes += ["--data 'a b.txt'", "minigpt generate --model m -- '-a long prompt'"]
    terminal = attach_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", str(width))
    note(message)
    shown = re.sub(r"\x1b\[\d*m", "", terminal.getvalue())
    lines = shown.splitlines()
    assert " ".join(lines) == message
    words = [*message.split(), *filter(message.__contains__, wholes)]
    assert all(any(word in line for line in lines) for word in words)
    for line, after in itertools.pairwise(lines):
        assert len(line) <= width or any(line in word for word in (*wholes, *message.split()))
        first = next((word for word in wholes if after.startswith(word)), after.split()[0])
        assert len(f"{line} {first}") > width, "a line must be as long as possible"


def test_messages_in_a_pipe_stay_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    note(MESSAGES[0])
    assert capfd.readouterr().err == f"{MESSAGES[0]}\n"


def test_lines_in_a_pipe_have_no_trailing_spaces_except_those_of_the_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    spans = [[("a cell  ", "plain"), ("  ", "dim")]]
    print_lines(make_console(is_stderr=False), spans)
    print_lines(make_console(is_stderr=False), spans, is_cut=False)
    assert stream.getvalue() == "a cell\na cell    \n"
