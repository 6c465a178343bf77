"""Text for a terminal in spans, measured in cells; bars and shares. What the views are made of."""

import textwrap

from rich.cells import cell_len, set_cell_size

from minigpt.text.escape import printable

Span = tuple[str, str]
"""Text, and its style: a name of the console's theme, or colours such as ``#ff8800 on #000000``."""
Line = list[Span]

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_UPRIGHT_EIGHTHS = " ▁▂▃▄▅▆▇█"
_HEAT_BOUNDS = (0.05, 0.12, 0.25, 0.5)
BAR_WIDTH = 3
SHARE_WIDTH = 3


def bar(share: float, width: int = BAR_WIDTH) -> str:
    """Return a bar of eighths of a cell: empty for 0, ``width`` full cells for 1."""
    full, part = divmod(eighths(share, width), 8)
    return ("█" * full + (_EIGHTHS[part] if part else "")).ljust(width)


def upright_bar(share: float) -> str:
    """Return one cell that is filled from below: blank for 0, full for 1."""
    return _UPRIGHT_EIGHTHS[eighths(share)]


def eighths(share: float, width: int = 1) -> int:
    """Return how many eighths of ``width`` cells a share fills."""
    return round(min(max(share, 0.0), 1.0) * width * 8)


def percent(share: float) -> str:
    """Return a share in whole percent, three cells wide: `` 7%``, ``<1%``, ``100``."""
    whole = round(share * 100)
    if whole >= 100:
        return "100"
    if whole == 0 and share > 0:
        return "<1%"
    return f"{whole}%".rjust(SHARE_WIDTH)


def heat(share: float) -> str:
    """Return the style of a share of the attention."""
    return f"heat{sum(share >= bound for bound in _HEAT_BOUNDS)}"


def fit(text: str, width: int) -> str:
    """Pad or cut a text to a number of terminal cells; a cut one ends in an ellipsis."""
    if cell_len(text) <= width:
        return set_cell_size(text, width)
    return set_cell_size(text, width - 1) + "…"


def fit_end(text: str, width: int) -> str:
    """Cut the end of a text that is too wide; do not pad."""
    return text if cell_len(text) <= width else fit(text, width).rstrip()


def fit_start(text: str, width: int) -> str:
    """Cut the start of a text that is too wide; do not pad."""
    if cell_len(text) <= width:
        return text
    while cell_len(text) > max(width - 1, 1):
        text = text[1:]
    return "…" + text


def wrapped(text: str, width: int, style: str = "dim", *, label: str = "") -> list[Line]:
    """Break a text of our own at blanks; a label stands before its first line."""
    room = width - len(label)
    pieces = textwrap.wrap(text, room, break_on_hyphens=False)
    start = [(label, "dim")] if label else []
    indent = [(" " * len(label), "plain")] if label else []
    return [[*(start if i == 0 else indent), (piece, style)] for i, piece in enumerate(pieces)]


def one_line(text: str) -> str:
    """Escape a name for a place in a line: what steers a terminal, and what breaks or joins."""
    escaped = printable(text).replace("\n", "\\n").replace("\t", "\\t")
    return escaped.replace("\u200c", "\\u200c").replace("\u200d", "\\u200d")
