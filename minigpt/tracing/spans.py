"""Lines of styled text for a terminal: bars, colours, and text fitted to a width in cells."""

import unicodedata
from bisect import bisect
from functools import lru_cache

from minigpt.tracing.config import DIGITS

Span = tuple[str, str]
"""Text and its style: a style name of the console's theme, or colours (``#ff8800 on #000000``)."""
Line = list[Span]

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_HEAT_BOUNDS = (0.05, 0.12, 0.25, 0.5)
_MARKS = "␣…⋯∅"
BAR_WIDTH = 3
SHARE_WIDTH = 3


def bar(share: float, width: int = BAR_WIDTH) -> str:
    """Return a horizontal bar: blank for 0, ``width`` full cells for 1."""
    full, part = divmod(eighths(share, width), 8)
    return ("█" * full + (_EIGHTHS[part] if part else "")).ljust(width)


def eighths(share: float, width: int = 1) -> int:
    """Return the number of eighths of a cell that a share of ``width`` cells fills."""
    return round(min(max(round(share, DIGITS), 0.0), 1.0) * width * 8)


def heat(share: float) -> str:
    """Return the style name of an attention weight."""
    return f"heat{bisect(_HEAT_BOUNDS, round(share, DIGITS))}"


@lru_cache(maxsize=4096)
def cell_len(text: str) -> int:
    """Return the width of text in terminal cells."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def encodable(text: str, encoding: str) -> str:
    """Escape the characters that an encoding lacks, before the width of a text is measured.

    Marks that ``print_lines`` replaces by others of the same width stay.
    """
    if text.isascii() or encoding == "utf-8":
        return text
    escaped = (c.encode(encoding, "backslashreplace").decode(encoding) for c in text)
    return "".join(c if c in _MARKS else e for c, e in zip(text, escaped, strict=True))


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


def percent(share: float) -> str:
    """Format a share as a whole percentage, three cells wide: `` 7%``, ``<1%``, ``100``."""
    share = round(share, DIGITS)
    whole = round(share * 100)
    if whole >= 100:
        return "100"
    if whole == 0 and share > 0:
        return "<1%"
    return f"{whole}%".rjust(3)
