"""Read JSON and CSV row by row, so that a broken row does not affect the others."""

import csv
import io
import json
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, TextIO

from minigpt.config import DataConfig
from minigpt.errors import DataError
from minigpt.text.encodings import advice, is_utf8, wide_encoding

MAX_ROW_CHARS = 2**27
"""Maximum characters of a line of JSON or CSV, or of an item of a JSON array."""
READ_CHARS = 2**20
_BETWEEN = re.compile(r"[\s,\[\]]*")
_LITERAL_CHARS = 64  # longer than any JSON literal
_MAX_INT_DIGITS = 4300  # the limit of int(), which is slow for more digits


class BadRow(Exception):  # noqa: N818
    """A row without text. Args: reason; remedy, a sentence or empty."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason, remedy)
        self.reason, self.remedy = reason, remedy


@contextmanager
def as_text(file: BinaryIO, name: str, data: DataConfig) -> Iterator[TextIO]:
    """Open a file as text, in which an invalid byte becomes a lone surrogate."""
    buffered = io.BufferedReader(file)  # type: ignore[type-var]
    encoding = data.encoding
    if is_utf8(encoding):
        if wide := wide_encoding(buffered.peek(2**12)[: 2**12]):
            raise DataError(f"{name!r} is not UTF-8: it is {wide}. Give --encoding {wide}.")
        encoding = "utf-8-sig"
    stream = io.TextIOWrapper(buffered, encoding, errors="surrogateescape", newline="")
    try:
        yield stream
    except UnicodeError as error:
        raise DataError(f"{name!r} is not {encoding}: {error}. Give another --encoding.") from None
    finally:
        with suppress(ValueError):  # the file is closed already if an error ended the reading
            stream.detach().detach()


def read_line(stream: TextIO, number: int, name: str) -> str:
    """Read a line; "" at the end. Raises: DataError, as ``require_short``."""
    line = stream.readline(MAX_ROW_CHARS + 1)
    require_short(line, f"line {number} of {name!r}")
    return line


def require_short(text: str, what: str) -> None:
    """Raise DataError for a row that would fill memory; a small compressed file may have one."""
    if len(text) > MAX_ROW_CHARS:
        raise DataError(
            f"{what} has more than {MAX_ROW_CHARS:,} characters. Split it into several, or give "
            "--format text if it is plain text."
        )


def undecodable(text: str, data: DataConfig) -> BadRow | None:
    """Return a BadRow for text from ``as_text`` with an invalid byte; None for valid text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if "\udc80" <= text[error.start] <= "\udcff":  # from surrogateescape
            if not is_utf8(data.encoding):
                return BadRow(f"is not {data.encoding}", "Give another --encoding.")
            return BadRow(
                "is not UTF-8", f"{advice(text.encode(errors='surrogateescape'), 0).rstrip('.')}."
            )
    return None


def _integer(digits: str) -> float:
    return int(digits) if len(digits) < _MAX_INT_DIGITS else float(digits)


DECODER = json.JSONDecoder(parse_int=_integer)
"""Decodes any JSON; integers of thousands of digits become floats."""


def no_object(field: str) -> BadRow:
    """Return the error for a row of JSON that is neither an object nor a text."""
    return BadRow(f'is not an object with a "{field}" string')


def json_lines(stream: TextIO, name: str, data: DataConfig) -> Iterator[tuple[int, object]]:
    """Yield the rows of a JSONL file; after an object, a bare string is not a row."""
    number, has_objects = 1, False
    while line := read_line(stream, number, name):
        if not line.isspace():
            row = _json_line(line.removeprefix("\ufeff"), data)
            has_objects = has_objects or isinstance(row, dict)
            yield number, no_object(data.field) if has_objects and isinstance(row, str) else row
        number += 1


def _json_line(line: str, data: DataConfig) -> object:
    if bad := undecodable(line, data):
        return bad
    try:
        return DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        remedy = "JSONL has one object per line; give --format text if it is plain text."
        return BadRow(f"is not JSON: {error}", remedy)


def json_values(stream: TextIO, name: str, data: DataConfig) -> Iterator[tuple[int, object]]:
    """Yield the items of a JSON array, or of a file with several objects or arrays."""
    text, n_open, number, is_end = "", 0, 0, False
    while not is_end:
        block = stream.read(max(READ_CHARS, len(text)))
        is_end = not block
        text, at = text + block, 0
        require_short(text, f"item {number + 1} of {name!r}")
        while True:
            between = _BETWEEN.match(text, at)
            assert between is not None
            n_open += between[0].count("[") - between[0].count("]")
            at = between.end()
            if at == len(text):
                break
            try:
                row, end = DECODER.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                if not is_end and _is_cut(error, text):
                    break
                number += 1
                remedy = "Get the file again, or give --format text if it is plain text."
                yield number, BadRow(f"is not JSON: {error}", remedy)
                text, is_end = _from_next_item(text, at, stream)
                at = 0
                n_open = n_open if text else 0
                continue
            if end == len(text) and not is_end:  # a number may continue
                break
            number += 1
            bad = undecodable(text[at:end], data)
            yield number, bad or row
            at = end
        text = text[at:]
    if n_open:
        raise DataError(f"{name!r} ends within its array, after item {number}. Get it again.")


def _from_next_item(text: str, at: int, stream: TextIO) -> tuple[str, bool]:
    """Find the item after a broken one, which begins at index ``at``.

    Returns: the text from its probable start, "" for none; whether the stream has ended.
    """
    ends = {"{": r",\s*(?=\{)", '"': r'"\s*,\s*(?=")'}
    border = re.compile(ends.get(text[at], r",\s*"))
    rest = text[at + 1 :]
    while True:
        for match in border.finditer(rest):
            with suppress(ValueError, RecursionError):
                DECODER.raw_decode(rest, match.end())
                return rest[match.end() :], False
        block = stream.read(READ_CHARS)
        if not block:
            return "", True
        rest = rest[-_LITERAL_CHARS:] + block


def begins_with_json(text: str, *, is_whole: bool) -> bool:
    """Return whether a text begins with JSON. Args: is_whole, as for ``records.sniffed``."""
    start = text.index("[") + 1 if text.startswith("[") else 0
    at = len(text) - len(text[start:].lstrip())
    if text[at] == "]":
        return True
    try:
        _, end = DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        return not is_whole and _is_cut(error, text)
    except RecursionError:
        return False
    return text[end:].lstrip()[:1] in ("", ",", "]", "{")


def _is_cut(error: Exception, text: str) -> bool:
    """Return whether JSON may be invalid only because its end is missing."""
    position = getattr(error, "pos", 0)
    return "Unterminated" in str(error) or position > len(text) - _LITERAL_CHARS


class _Lines(Iterator[str]):
    """The lines of a table; those of a broken row can be read again."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name
        self._waiting: deque[str] = deque()
        self.n_read = 0
        self.of_row: list[str] = []
        """The lines of the row that is being read."""

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else self._new_line()
        if not line:
            raise StopIteration
        self.n_read += 1
        self.of_row.append(line)
        return line

    def _new_line(self) -> str:
        return read_line(self._stream, self.n_read + 1, self._name)

    def unread(self, start: int) -> None:
        """Put back the lines of the row from index ``start`` on."""
        lines = self.of_row[start:]
        self._waiting.extendleft(reversed(lines))
        self.n_read -= len(lines)


def csv_rows(stream: TextIO, name: str, data: DataConfig) -> Iterator[tuple[int, object]]:
    """Yield the rows of a table below its header; a broken one loses only its first line."""
    lines = _Lines(stream, name)
    first = next(lines, "")
    delimiter = max(",\t;|", key=re.sub(r'"[^"]*"?', "", first).count)
    if named := re.fullmatch(r"\ufeff?sep=(.)\r?\n?", first):  # in Excel's files
        delimiter = named[1]
    else:
        lines.unread(0)
    header: list[str] = []
    number = 0
    csv.field_size_limit(MAX_ROW_CHARS)  # a longer cell has an unclosed quote
    while True:
        lines.of_row.clear()
        where = f"(line {lines.n_read + 1})"
        try:
            cells = next(csv.reader(lines, delimiter=delimiter, strict=True))
        except StopIteration:
            return
        except csv.Error as error:
            is_cut = "unexpected end" in str(error) or "field larger" in str(error)
            reason = "a quote in it is not closed" if is_cut else str(error)
            remedy = 'Within a quoted text, write a quote twice: "".'
            row: object = BadRow(f"{where} is not CSV: {reason}", remedy)
        else:
            if not cells:
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                continue
            row = _csv_row(cells, header, where, data)
        if isinstance(row, BadRow):  # an unclosed quote includes the lines after it
            lines.unread(1)
        number += 1
        yield number, row


def _csv_row(cells: list[str], header: list[str], where: str, data: DataConfig) -> object:
    """Return a row by column; a BadRow if it does not match the header or has invalid bytes."""
    if len(cells) != len(header):
        reason = f"{where} has {len(cells)} cells, but the header has {len(header)}"
        return BadRow(reason, "Quote a text that has commas, quotes or line breaks.")
    row = dict(zip(header, cells, strict=True))
    return undecodable(row.get(data.field, ""), data) or row


def is_table(lines: list[str]) -> bool:
    """Return whether lines are CSV: a line of names, then rows with as many cells."""
    for delimiter in ",\t;|":
        rows: list[list[str]] = []
        with suppress(csv.Error):  # a quoted text that continues after these lines
            rows += csv.reader(lines, delimiter=delimiter, strict=True)
        if len(rows) < 2 or not 1 < len(rows[0]) == len(set(rows[0])):
            continue
        is_header = all(
            re.fullmatch(r"[^\W\d][\w.-]{0,40}( [\w.-]{1,40}){0,3}", name) for name in rows[0]
        )
        if is_header and len(set(map(len, rows))) == 1:
            return True
    return False
