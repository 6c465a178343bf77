"""Consoles on stdout and stderr, and the escaping of untrusted text before it is printed.

stdout carries the result, stderr everything else.
"""

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from typing import IO, Any, cast

from rich.console import Console
from rich.text import Text
from rich.theme import Theme

from minigpt.text.escape import printable

# Medium luminance, so that all colors are readable on dark and light backgrounds.
THEME = Theme(
    {
        "plain": "none",
        "token": "bold",
        "heat0": "dim",
        "heat1": "#4c9bc6",
        "heat2": "#2aa198",
        "heat3": "#cb8b16",
        "heat4": "bold #e0561f",
        # The same as backgrounds; black text is readable on all of them.
        "shade1": "#000000 on #4c9bc6",
        "shade2": "#000000 on #2aa198",
        "shade3": "#000000 on #cb8b16",
        "shade4": "bold #000000 on #e0561f",
        "chosen": "bold reverse",
    }
)
"""Colors of the style names of the trace."""
_PIPE_WIDTH = 100
_ASCII = dict(zip("█▉▊▋▌▍▎▏▇▆▅▄▃▂▁▀━─│┬┴┼·…␣⋯∅", "#===---.#==--..#--|+++.~_~0", strict=True))
"""Characters of bars, charts and tokens in ASCII, for a stream that cannot encode them."""


def make_console(*, is_stderr: bool) -> Console:
    """Return a console on the current stdout or stderr, plain if that is not a terminal.

    Writing to stderr never fails: a closed terminal or pipe must not end a training run.
    """
    stream = sys.stderr if is_stderr else sys.stdout
    return Console(
        file=cast("IO[str]", _Unfailing(stream)) if is_stderr else None,
        theme=THEME,
        highlight=False,
        emoji=False,
        markup=False,
        soft_wrap=True,
        width=None if stream.isatty() else _PIPE_WIDTH,
    )


class _Unfailing:
    """A stream that drops its output once it cannot be written."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            silence(self._stream)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            silence(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def silence(stream: IO[str]) -> None:
    """Redirect a stream, and what it has buffered, to the null device."""
    with suppress(OSError, ValueError):  # a stream without a descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def spans_to_text(spans: Iterable[tuple[str, str]]) -> Text:
    """Turn (text, style name) pairs into a rich Text, with control characters escaped."""
    return Text.assemble(*((printable(text), style) for text, style in spans))


def print_lines(
    console: Console, lines: Iterable[Iterable[tuple[str, str]]], *, is_cut: bool = True
) -> None:
    """Print lines of (text, style name) pairs, with control characters escaped.

    Args: is_cut, whether a terminal too narrow for a line gets its beginning, and does not wrap it.
    """
    missing = _not_encodable(console.encoding) if is_cut else {}
    is_plain = console.color_system is None and not (is_cut and console.is_terminal)
    for line_spans in lines:
        if is_plain:
            # The same output, without rich's 0.5 ms per line.
            line = "".join([text for text, _ in line_spans])
            line = printable(line.translate(missing) if missing else line).expandtabs()
            console.file.write(line + "\n")
            continue
        spans = [(text.translate(missing), style) for text, style in line_spans]
        text = spans_to_text(spans)
        if is_cut and console.is_terminal and text.cell_len > console.width:
            text.truncate(console.width, overflow="ellipsis")
        console.print(text, soft_wrap=is_cut)  # else rich breaks it between words
    console.file.flush()


@cache
def _not_encodable(encoding: str) -> dict[int, str]:
    """Return the characters of _ASCII that an encoding lacks, for ``str.translate``."""
    lacking = {}
    for character, replacement in _ASCII.items():
        try:
            character.encode(encoding)
        except UnicodeEncodeError:
            lacking[ord(character)] = replacement
    return lacking


def write_result(text: str) -> None:
    """Write model text to stdout and flush: exact for a pipe, escaped for a terminal."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def one_line(text: str) -> str:
    """Escape control characters and line breaks."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def note(text: str) -> None:
    """Write a line to stderr that is not part of the result."""
    make_console(is_stderr=True).print(one_line(text), style="dim")
