"""Lines of styled text for a terminal: bars, colours, and text fitted to a width in cells."""

import textwrap
import unicodedata
from functools import lru_cache

from minigpt.text.escape import printable

Span = tuple[str, str]
"""Text and its style: a name of the console's theme, or colours as ``#ff8800 on #000000``."""
Line = list[Span]

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_UPRIGHT_EIGHTHS = " ▁▂▃▄▅▆▇█"
_HEAT_BOUNDS = (0.05, 0.12, 0.25, 0.5)
BAR_WIDTH = 3
SHARE_WIDTH = 3
SIGNED_WIDTH = 5
"""Width of a number with a sign, in cells."""


def bar(share: float, width: int = BAR_WIDTH) -> str:
    """Return a horizontal bar: blank for 0, ``width`` full cells for 1."""
    full, part = divmod(eighths(share, width), 8)
    return ("█" * full + (_EIGHTHS[part] if part else "")).ljust(width)


def upright_bar(share: float) -> str:
    """Return a vertical bar in one cell: blank for 0, full for 1."""
    return _UPRIGHT_EIGHTHS[eighths(share)]


def eighths(share: float, width: int = 1) -> int:
    """Return the number of eighths of a cell that a share of ``width`` cells fills."""
    return round(min(max(share, 0.0), 1.0) * width * 8)


def heat(share: float) -> str:
    """Return the style of an attention weight."""
    return f"heat{sum(share >= bound for bound in _HEAT_BOUNDS)}"


def signed(number: float) -> str:
    """Format a number with its sign in five cells."""
    digits = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    rounded = round(min(max(number, -9999), 9999), digits) + 0.0  # no negative zero
    return f"{rounded:+{SIGNED_WIDTH}.{digits}f}"


@lru_cache(maxsize=4096)
def cell_len(text: str) -> int:
    """Return the width of text in terminal cells."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def fit(text: str, width: int) -> str:
    """Pad text to a number of terminal cells, at least 1, or truncate it with an ellipsis."""
    width = max(width, 1)
    if cell_len(text) > width:
        text = text[:width]
        while cell_len(text) > width - 1:
            text = text[:-1]
        # a wide character that does not fit leaves a blank
        return text + " " * (width - 1 - cell_len(text)) + "…"
    return text + " " * (width - cell_len(text))


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
    """Wrap text at blanks, after a label on the first line."""
    room = max(width - len(label), 1)
    pieces = textwrap.wrap(text, room, break_on_hyphens=False)
    start = [(label, "dim")] if label else []
    indent = [(" " * len(label), "plain")] if label else []
    return [[*(start if i == 0 else indent), (piece, style)] for i, piece in enumerate(pieces)]


def one_line(text: str) -> str:
    """Escape a name for use within a line: control, line-breaking and joining characters."""
    escaped = printable(text).replace("\n", "\\n").replace("\t", "\\t")
    return escaped.replace("\u200c", "\\u200c").replace("\u200d", "\\u200d")
