"""Standard streams that are closed, break, or cannot encode a character."""

import os
import sys
from contextlib import suppress
from functools import cache
from typing import IO, Any

_ASCII = dict(zip("█▉▊▋▌▍▎▏▇▆▅▄▃▂▁▀━─│┬┴┼·…␣⋯∅", "#===---.#==--..#--|+++.~_~0", strict=True))
"""Characters of bars, charts and tokens in ASCII, for a stream that cannot encode them."""


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
