"""CSV -> rows; a broken one costs only its first line."""

import csv
import re
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import TextIO

from minigpt.config import DataConfig
from minigpt.text.rows import LONGEST_ROW, BadRow, read_line, undecodable


def csv_rows(stream: TextIO, name: str, data: DataConfig) -> Iterator[tuple[int, object]]:
    first = read_line(stream, 1, name)
    delimiter = max(",\t;|", key=re.sub(r'"[^"]*"?', "", first).count)
    waiting, lines, n_read = deque([first]), [], 0  # lines to read again, lines of the row
    if named := re.fullmatch(r"\ufeff?sep=(.)\r?\n?", first):  # in files of Excel
        delimiter = named[1]
        waiting.clear()
        n_read = 1

    def next_line() -> str:
        nonlocal n_read
        line = waiting.popleft() if waiting else read_line(stream, n_read + 1, name)
        if line:
            n_read += 1
            lines.append(line)
        return line

    header: list[str] = []
    number = 0
    csv.field_size_limit(LONGEST_ROW)  # a longer cell is a quote that is not closed
    while True:
        row: object
        lines.clear()
        where = f"(line {n_read + 1})"
        try:
            cells = next(csv.reader(iter(next_line, ""), delimiter=delimiter, strict=True))
        except StopIteration:
            return
        except csv.Error as error:
            is_cut = "unexpected end" in str(error) or "field larger" in str(error)
            reason = "a quote in it is not closed" if is_cut else str(error)
            remedy = 'In a text in quotes, write a quote twice: "".'
            row = BadRow(f"{where} is not CSV: {reason}", remedy)
        else:
            if not cells:
                continue
            if not header:
                header = [name.strip() for name in cells]
                continue
            row = dict(zip(header, cells, strict=False))
            if len(cells) != len(header):
                reason = f"{where} has {len(cells)} cells, the header {len(header)}"
                row = BadRow(reason, "Quote a text that has commas, quotes or line breaks.")
            elif bad := undecodable(row.get(data.field, ""), data):
                row = bad
        if isinstance(row, BadRow):  # a quote that is not closed takes the lines after it too
            waiting.extendleft(reversed(lines[1:]))
            n_read -= len(lines) - 1
        number += 1
        yield number, row


def is_table(lines: list[str]) -> bool:
    """Return whether lines are CSV: a line of names, then rows with as many cells."""
    for delimiter in ",\t;|":
        rows: list[list[str]] = []
        with suppress(csv.Error):  # a quoted text that goes on after these lines
            rows += csv.reader(lines, delimiter=delimiter, strict=True)
        if len(rows) < 2 or not 1 < len(rows[0]) == len(set(rows[0])):
            continue
        is_header = all(
            re.fullmatch(r"[^\W\d][\w.-]{0,40}( [\w.-]{1,40}){0,3}", name) for name in rows[0]
        )
        if is_header and len(set(map(len, rows))) == 1:
            return True
    return False
