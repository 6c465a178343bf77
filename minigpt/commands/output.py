"""How a command's result is written: aligned rows, short numbers, JSON."""

import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from rich.text import Text

from minigpt.console import make_console, write_result
from minigpt.text.escape import printable

_GAP = "  "
_SHORTEST = 8


def aligned(
    rows: Sequence[Sequence[Text]], sides: Sequence[str], width: int | None = None
) -> Iterator[Text]:
    """Yield rows as lines of aligned cells.

    Args: sides, of each column: left or right; width, of the terminal, into which the first
        column is cut to fit; None cuts nothing.
    """
    widths = [max(cell.cell_len for cell in column) for column in zip(*rows, strict=True)]
    if width is not None:
        others = sum(widths[1:]) + len(_GAP) * len(widths[1:])
        widths[0] = min(widths[0], max(width - others, _SHORTEST))
    for row in rows:
        line = Text()
        for cell, side, n_cells in zip(row, sides, widths, strict=True):
            fitted = cell.copy()
            fitted.truncate(n_cells, overflow="ellipsis")
            padding = Text(" " * (n_cells - fitted.cell_len))
            line += padding + fitted if side == "right" else fitted + padding
            line.append(_GAP)
        line.rstrip()
        yield line


def one_line(text: str) -> str:
    """Escape what could steer a terminal, and what would break a line."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def line_width() -> int | None:
    """Return how wide a line on stdout may be; None in a pipe, where nothing is cut."""
    console = make_console(is_stderr=False)
    return console.width if console.is_terminal else None


def show(lines: Iterable[Text]) -> None:
    """Write lines to stdout."""
    console = make_console(is_stderr=False)
    for line in lines:
        console.print(line)


def note(text: str) -> None:
    """Write a line that is no result to stderr."""
    make_console(is_stderr=True).print(one_line(text), style="dim")


def write_json(facts: dict[str, Any]) -> None:
    """Write an object to stdout, in one line."""

    def plain(value: object) -> str:
        return value.isoformat() if isinstance(value, datetime) else str(value)

    write_result(json.dumps(facts, default=plain) + "\n")
