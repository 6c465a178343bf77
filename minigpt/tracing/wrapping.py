"""Wrapping, truncating and escaping of styled text; signed numbers and vertical bars."""

import textwrap

from minigpt.text.escape import one_line
from minigpt.tracing.config import DIGITS
from minigpt.tracing.spans import Line, cell_len, eighths, fit

_UPRIGHT_EIGHTHS = " ▁▂▃▄▅▆▇█"
SIGNED_WIDTH = 5
"""Width of a signed number, in cells."""


def upright_bar(share: float) -> str:
    """Return a vertical bar in one cell: blank for 0, full for 1."""
    return _UPRIGHT_EIGHTHS[eighths(share)]


def signed(number: float) -> str:
    """Format a number with its sign in five cells."""
    number = round(number, DIGITS)
    digits = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    rounded = round(min(max(number, -9999), 9999), digits) + 0.0  # no negative zero
    return f"{rounded:+{SIGNED_WIDTH}.{digits}f}"


def fit_end(text: str, width: int) -> str:
    """Truncate the end of text that is too wide."""
    return text if cell_len(text) <= width else fit(text, width).rstrip()


def fit_start(text: str, width: int) -> str:
    """Truncate the start of text that is too wide."""
    if cell_len(text) <= width:
        return text
    while cell_len(text) > max(width - 1, 1):
        text = text[1:]
    return "…" + text


def wrapped(text: str, width: int, style: str = "dim", *, label: str = "") -> list[Line]:
    """Wrap text at spaces, after a label on the first line."""
    room = max(width - len(label), 1)
    pieces = textwrap.wrap(text, room, break_on_hyphens=False)
    start = [(label, "dim")] if label else []
    indent = [(" " * len(label), "plain")] if label else []
    return [[*(start if i == 0 else indent), (piece, style)] for i, piece in enumerate(pieces)]


def one_line_label(text: str) -> str:
    """Escape control, line-breaking and joining characters of a label."""
    return one_line(text).replace("\u200c", "\\u200c").replace("\u200d", "\\u200d")
