"""Handle standard streams that are closed, broken or limited in encoding; wrap lines for stderr."""

import os
import re
import sys
import unicodedata
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

_WORDS = re.compile(
    r"""(\s*)((?:
        (?:^|(?<=[ :]\ ))(?:\S*python\S*|(?:\S*/)?minigpt|curl|git|iconv|jq|pip|torchrun|tr)\ .*?
            (?=;\ |\.\ [A-Z]|\.?$)  # a command, up to the end of its sentence
        |(?:--[\w-]+[ ])?(?:(?<!\w)'[^']*'(?!\w)|(?<!\w)"[^"]*"(?!\w)|`[^`]*`)
        |\S
    )+)""",
    re.VERBOSE,
)
"""Whitespace followed by a word, a complete command or quoted text."""


def open_streams() -> None:
    """Open standard streams that are closed; escape characters that the others cannot encode.

    A terminal of unknown size has 80 columns: rich would print nothing with COLUMNS=0.
    """
    for name in ("COLUMNS", "LINES"):
        if not os.environ.get(name, "").strip("0"):
            os.environ.pop(name, None)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller, as with >&-
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def close_streams() -> None:
    """Silence streams that can no longer be written, so that Python's flush at exit cannot fail."""
    for stream in filter(None, (sys.stdout, sys.stderr, sys.__stdout__)):
        try:
            stream.flush()
        except (OSError, ValueError):
            silence(stream)


def wrapped(text: str, indent: int = 0) -> list[str]:
    """Wrap a line at spaces to the width of stderr, if that is a terminal.

    Commands and quoted texts are not broken, so that they can be copied, even if they are wider
    than the terminal.

    Args: indent, width of the prefix that the caller adds to each line.
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
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    return 80


def _width(text: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def silence(stream: IO[str]) -> None:
    """Redirect a stream, including its buffered output, to the null device."""
    with suppress(OSError, ValueError):  # a stream without a descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


class Unfailing:
    """Wrapper of a stream that drops all output once a write has failed."""

    def __init__(self, stream: IO[str], errors: Collection[int] = ()) -> None:
        """Args: errors, the numbers of the OSErrors that are caught; empty for all."""
        self._stream, self._errors = stream, errors

    def write(self, text: str) -> int:
        with self._failing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._failing():
            self._stream.flush()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._errors and error.errno not in self._errors:
                raise
            silence(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
