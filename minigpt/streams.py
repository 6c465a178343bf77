"""Standard streams that are closed, break or cannot encode a character; wrapping for stderr."""

import os
import re
import sys
import unicodedata
from contextlib import suppress
from functools import cache
from typing import IO, Any

_ASCII = dict(zip("█▉▊▋▌▍▎▏▇▆▅▄▃▂▁▀━─│┬┴┼·…␣⋯∅", "#===---.#==--..#--|+++.~_~0", strict=True))
"""Characters of bars, charts and tokens in ASCII, for a stream that cannot encode them."""
_WORDS = re.compile(
    r"""(\s*)((?:
        (?:^|(?<=[ :]\ ))(?:\S*python\S*|(?:\S*/)?minigpt|curl|git|iconv|jq|pip|torchrun|tr)\ .*?
            (?=;\ |\.\ [A-Z]|\.?$)  # a command, up to the end of its sentence
        |(?:--[\w-]+[ ])?(?:(?<!\w)'[^']*'(?!\w)|(?<!\w)"[^"]*"(?!\w)|`[^`]*`)
        |\S
    )+)""",
    re.VERBOSE,
)
"""Whitespace, and what follows it: a word, a whole command, or a text in quotes."""


def open_streams() -> None:
    """Make sure that stdin, stdout and stderr exist, and that no character makes them fail."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller, as with >&-
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def close_streams() -> None:
    """Silence streams that can no longer be written, so that Python's last flush does not fail."""
    for stream in filter(None, (sys.stdout, sys.stderr, sys.__stdout__)):
        try:
            stream.flush()
        except (OSError, ValueError):
            silence(stream)


def wrapped(text: str, indent: int = 0) -> list[str]:
    """Wrap a line at spaces to the width of stderr, if that is a terminal.

    Commands and texts in quotes stay in one piece, so that they can be copied, even if they are
    wider than the terminal.

    Args: indent, width of what the caller puts before each line.
    """
    if not sys.stderr.isatty():
        return [text]
    width = max(_columns() - indent, 20)
    lines = [""]
    for blanks, word in _WORDS.findall(text):
        if lines[-1] and _width(lines[-1] + blanks + word) > width:
            lines.append(word)
        else:
            lines[-1] += blanks + word
    return lines


def _columns() -> int:
    # shutil.get_terminal_size asks stdout, which may be a pipe.
    if os.environ.get("COLUMNS", "").isdigit():
        return int(os.environ["COLUMNS"])
    with suppress(OSError, ValueError):  # a stream without a descriptor
        return os.get_terminal_size(sys.stderr.fileno()).columns
    return 80


def _width(text: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def silence(stream: IO[str]) -> None:
    """Redirect a stream, and what it has buffered, to the null device."""
    with suppress(OSError, ValueError):  # a stream without a descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


class Unfailing:
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


@cache
def in_ascii(encoding: str) -> dict[int, str]:
    """Return what stands for the characters that an encoding lacks, for ``str.translate``."""
    lacking = {}
    for character, replacement in _ASCII.items():
        try:
            character.encode(encoding)
        except UnicodeEncodeError:
            lacking[ord(character)] = replacement
    return lacking
