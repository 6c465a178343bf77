"""Results on stdout: aligned rows, lines, JSON."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from textwrap import wrap
from typing import Any

from rich.text import Text

from minigpt.console import make_console, write_result

_GAP = "  "
_SHORTEST = 8


def aligned(
    rows: Sequence[Sequence[Text]], sides: Sequence[str], width: int | None = None
) -> Iterator[Text]:
    """Yield rows as lines of aligned cells.

    Args: sides, left or right for each column; width, of the terminal, for which the first column
        is truncated; None does not truncate.
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


def fitting(
    rows: Sequence[Sequence[Text]], width: int | None, optional: Sequence[str]
) -> list[Sequence[Text]]:
    """Drop optional columns until the rows fit a narrow terminal.

    Args: rows, the first with the titles; width, as for ``aligned``; optional, titles of the
        columns to drop, in this order.
    """
    columns = list(zip(*rows, strict=True))
    for title in optional:
        others = sum(len(_GAP) + max(cell.cell_len for cell in column) for column in columns[1:])
        if width is not None and _SHORTEST + others > width:
            columns = [column for column in columns if column[0].plain != title]
    return list(zip(*columns, strict=True))


def fact_lines(facts: Mapping[str, str]) -> Iterator[Text]:
    """Yield the lines of each fact, its name first, wrapped at spaces on a terminal."""
    indent, width = max(map(len, facts)) + len(_GAP), line_width()
    for name, fact in facts.items():
        is_wrapped = width is not None and indent + len(fact) > width
        lines = wrap(fact, max(width - indent, 1)) if is_wrapped and width else []
        first, *more = lines or [fact]
        yield Text.assemble((name.ljust(indent), "dim"), first)
        yield from (Text(" " * indent + line) for line in more)


def line_width() -> int | None:
    """Return the width of the terminal on stdout; None for a pipe, where nothing is truncated."""
    console = make_console(is_stderr=False)
    return console.width if console.is_terminal else None


def show(lines: Iterable[Text]) -> None:
    """Write lines to stdout."""
    console = make_console(is_stderr=False)
    for line in lines:
        console.print(line)


def write_json(record: dict[str, Any]) -> None:
    """Write an object to stdout as one line of JSON."""

    def plain(value: object) -> str:
        return value.isoformat() if isinstance(value, datetime) else str(value)

    write_result(json.dumps(record, default=plain) + "\n")
