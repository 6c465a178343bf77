"""CSV -> rows; a broken one costs only its first line."""

import csv
import re
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO, TextIO

from minigpt.config import DataConfig
from minigpt.text.rows import BadRow, as_text, read_line, undecodable

LONGEST_CELL = 2**27
"""Longest cell of a CSV file, in characters: more is a quote that is not closed."""


def csv_rows(file: BinaryIO, name: str, data: DataConfig) -> Iterator[tuple[int, object]]:
    with as_text(file, name, data) as stream:
        yield from _rows(stream, name, data)


def _rows(stream: TextIO, name: str, data: DataConfig) -> Iterator[tuple[int, object]]:
    lines = _Lines(stream, name)
    first = lines.peek()
    head = re.sub(r'"[^"]*"?', "", first)
    delimiter = max(",\t;|", key=head.count)
    if named := re.fullmatch(r"\ufeff?sep=(.)\r?\n?", first):  # the first line, in files of Excel
        delimiter = named[1]
        next(lines)
    header: list[str] = []
    number = 0
    csv.field_size_limit(LONGEST_CELL)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        row: object
        lines.begin_row()
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            reason = f"(line {lines.first}) is not CSV: {lines.reason(error)}"
            row = BadRow(reason, 'In a text in quotes, write a quote twice: "".')
        else:
            if not cells:
                continue
            if not header:
                header = [name.strip() for name in cells]
                continue
            row = dict(zip(header, cells, strict=False))
            if len(cells) != len(header):
                reason = f"(line {lines.first}) has {len(cells)} cells, the header {len(header)}"
                row = BadRow(reason, "Quote a text that has commas, quotes or line breaks.")
            elif bad := undecodable(row.get(data.field, ""), data):
                row = bad
        if isinstance(row, BadRow):  # a quote that is not closed takes the lines after it too
            lines.put_back()
        number += 1
        yield number, row


class _Lines:
    """The lines of a stream. Those of a row after its first line can be put back."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name
        self._waiting: deque[str] = deque()
        self._row: list[str] = []
        self._n_read = 0
        self.first = 1
        """Number of the first line of the row."""

    def peek(self) -> str:
        """Return the first line."""
        self._waiting.append(read_line(self._stream, 1, self._name))
        return self._waiting[0]

    def begin_row(self) -> None:
        """Begin a row with the next line."""
        self._row, self.first = [], self._n_read + 1

    def put_back(self) -> None:
        """Put the lines of the row back, except the first."""
        self._waiting.extendleft(reversed(self._row[1:]))
        self._n_read -= len(self._row) - 1

    def reason(self, error: Exception) -> str:
        """Return what is wrong with a row that is not CSV."""
        is_cut = "unexpected end" in str(error) or "field larger" in str(error)
        return "a quote in it is not closed" if is_cut else str(error)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._waiting:
            line = self._waiting.popleft()
        else:
            line = read_line(self._stream, self._n_read + 1, self._name)
        if not line:
            raise StopIteration
        self._n_read += 1
        self._row.append(line)
        return line


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
