"""Files of rows -> the text of each row: JSONL, JSON, CSV and Parquet."""

import csv
import io
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, TextIO

from minigpt.config import DataConfig
from minigpt.errors import DataError, install_extra
from minigpt.rings import ring
from minigpt.text.encodings import advice, wide_encoding
from minigpt.text.tokenizer import well_formed

READ_CHARS = 2**20
LONGEST_CONVERSATION = 2**20
"""Most characters of a conversation, as JSON."""
LONGEST_CELL = 2**27
"""Longest cell of a CSV file, in characters: more is a quote that is not closed."""

_N_SNIFFED = 10  # rows
_N_FIELDS_SHOWN = 12
_LONGEST_LABEL = (
    80  # characters of a text that is not what a row is about, as a version or a source
)
_UNITS = {"jsonl": "line", "json": "item", "csv": "row", "parquet": "row"}
_BETWEEN = re.compile(r"[\s,\[\]]*")
_LITERAL_CHARS = 64  # more than the longest literal of JSON has


class BadRow(Exception):  # noqa: N818
    """A row without a text. Its arguments: why, and what to do about it, a sentence or nothing."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason, remedy)
        self.reason, self.remedy = reason, remedy


def texts(
    file: BinaryIO, kind: str, name: str, data: DataConfig, on_skip: Callable[[str], None] | None
) -> Iterator[str]:
    """Yield the text of each row of a file; those without one are refused or skipped.

    Args: kind, the format; name, of the file, for messages; on_skip, called with a message for
        each row that is skipped; None to refuse it.
    Raises: DataError for a row that is refused, or a file that is not of its format.
    """
    for number, row in _ROWS[kind](file, name, data):
        try:
            if isinstance(row, BadRow):
                raise row
            text = _conversation(row) if data.chat else row_text(row, data.field)
        except BadRow as error:
            message = f"{_UNITS[kind]} {number} of {name!r} {error.reason}"
            if on_skip is None:
                remedies = f"{error.remedy} Leave such rows out with --skip-bad."
                raise DataError(f"{message}. {remedies.strip()}") from None
            on_skip(message)
        else:
            yield text


def row_text(row: object, field: str) -> str:
    """Return the text of a row.

    Raises: BadRow if it has none.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f'is not an object with a "{field}" string')
    text = row.get(field)
    if isinstance(text, str):
        return well_formed(text)
    if field in row:
        found = "null" if text is None else f"of type {type(text).__name__}"
        raise BadRow(f'has no "{field}" string: it is {found}')
    remedy = "Name another one with --field."
    pairs = ({"messages"}, {"prompt", "completion"}, {"instruction", "output"})
    if any(names <= row.keys() for names in pairs):
        remedy = "Give --chat to read conversations."
    elif nested := _nested_lists(row):
        raise _a_nest(nested, field)
    raise BadRow(f'has no "{field}" string: {_fields_of(row)}', remedy)


def _nested_lists(row: Mapping[Any, Any], prefix: str = "") -> list[str]:
    """Return the keys of an object that hold lists of objects; those of an object in it are dotted.

    Lists of texts count too if it has no texts of its own. With a long text, it is a row itself.
    """
    texts_of_row = [value for value in row.values() if isinstance(value, str)]
    if any(len(text) > _LONGEST_LABEL for text in texts_of_row):
        return []
    wanted = Mapping if texts_of_row else (Mapping, str)
    found = []
    for key, value in row.items():
        name = f"{prefix}{str(key)[:60]}"
        if isinstance(value, list) and value and isinstance(value[0], wanted):
            found.append(name)
        elif isinstance(value, Mapping) and not prefix:
            found += _nested_lists(value, f"{name}.")
    return found


def _a_nest(keys: list[str], field: str) -> BadRow:
    first = ".".join(f'"{key}"' for key in keys[0].split("."))
    names = ", ".join(map(repr, keys[:_N_FIELDS_SHOWN]))
    return BadRow(
        f'is a JSON object without "{field}" that holds lists in {names}; rows are expected in a '
        "list or one a line",
        f"Write the list to a file of its own, as with jq '.{first}'.",
    )


def _conversation(row: object) -> str:
    try:
        text: str = ring("text.conversations").conversation_of_row(row)
    except DataError as error:
        if isinstance(row, Mapping) and "messages" not in row and (nested := _nested_lists(row)):
            raise _a_nest(nested, "messages") from None
        raise BadRow(str(error)) from None
    if len(text) > LONGEST_CONVERSATION:
        raise BadRow(f"is a conversation of more than {LONGEST_CONVERSATION} characters")
    return text


def _fields_of(row: Mapping[Any, Any]) -> str:
    names = [repr(str(name)[:60]) for name in list(row)[:_N_FIELDS_SHOWN]]
    if not names:
        return "it has no fields"
    more = ", ..." if len(row) > _N_FIELDS_SHOWN else ""
    return f"its fields are {', '.join(names)}{more}"


def has_field(file: BinaryIO, kind: str, name: str, data: DataConfig) -> bool:
    """Return whether the first row has the field of the text, or cannot be read at all."""
    try:
        _, row = next(_ROWS[kind](file, name, data), (0, None))
    except DataError:
        return True
    names = ("messages", "prompt", "instruction") if data.chat else (data.field,)
    return not isinstance(row, Mapping) or any(name in row for name in names)


def _json_lines(file: BinaryIO, name: str, data: DataConfig) -> Iterator[tuple[int, object]]:
    with _as_text(file, name, data) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.isspace():
                yield number, _json_line(line.removeprefix("\ufeff"), data)


def _json_line(line: str, data: DataConfig) -> object:
    if undecodable := _undecodable(line, data):
        return undecodable
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        remedy = "JSONL has one object a line; give --format text if it is plain text."
        return BadRow(f"is not JSON: {error}", remedy)


def _json_values(file: BinaryIO, name: str, data: DataConfig) -> Iterator[tuple[int, object]]:
    """Yield the items of a JSON array, or the objects of a file of several."""
    with _as_text(file, name, data) as stream:
        yield from _items(stream, name, data)


def _items(stream: TextIO, name: str, data: DataConfig) -> Iterator[tuple[int, object]]:
    decoder = json.JSONDecoder()
    text, n_open, number, is_end = "", 0, 0, False
    while not is_end:
        block = stream.read(max(READ_CHARS, len(text)))
        is_end = not block
        text, at = text + block, 0
        while True:
            between = _BETWEEN.match(text, at)
            assert between is not None
            n_open += between[0].count("[") - between[0].count("]")
            at = between.end()
            if at == len(text):
                break
            try:
                row, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                if not is_end and _is_cut(error, text):
                    break
                if not data.skip_bad:
                    raise DataError(
                        f"{name!r} is not JSON after item {number}: {error}. Get it again, leave "
                        "such items out with --skip-bad, or give --format text if it is plain text."
                    ) from None
                number += 1
                yield number, BadRow(f"is not JSON: {error}")
                text, is_end = _from_next_item(text, at, stream)
                at = 0
                n_open = n_open if text else 0
                continue
            if end == len(text) and not is_end:  # a number may go on
                break
            number += 1
            undecodable = _undecodable(text[at:end], data)
            yield number, undecodable or ({data.field: row} if isinstance(row, str) else row)
            at = end
        text = text[at:]
    if n_open:
        raise DataError(f"{name!r} ends within its array, after item {number}. Get it again.")


def _from_next_item(text: str, at: int, stream: TextIO) -> tuple[str, bool]:
    """Return the text from where the item after a broken one seems to begin, "" for none.

    Args: at, where the broken item begins. Returns also whether the stream has ended.
    """
    ends = {"{": r",\s*(?=\{)", '"': r'"\s*,\s*(?=")'}
    border = re.compile(ends.get(text[at], r",\s*"))
    rest = text[at + 1 :]
    while True:
        for match in border.finditer(rest):
            with suppress(ValueError, RecursionError):
                json.JSONDecoder().raw_decode(rest, match.end())
                return rest[match.end() :], False
        block = stream.read(READ_CHARS)
        if not block:
            return "", True
        rest = rest[-_LITERAL_CHARS:] + block


def _csv_rows(file: BinaryIO, name: str, data: DataConfig) -> Iterator[tuple[int, object]]:
    with _as_text(file, name, data) as stream:
        yield from _rows(stream, data)


def _rows(stream: TextIO, data: DataConfig) -> Iterator[tuple[int, object]]:
    lines = _Lines(stream)
    first = lines.peek()
    head = re.sub(r'"[^"]*"?', "", first)
    delimiter = max(",\t;|", key=head.count)
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
            row = BadRow(f"(line {lines.first}) is not CSV: {lines.reason(error)}")
        else:
            if not cells:
                continue
            if not header:
                header = cells
                continue
            row = dict(zip(header, cells, strict=False))
            if len(cells) != len(header):
                reason = f"(line {lines.first}) has {len(cells)} cells, the header {len(header)}"
                row = BadRow(reason, "Quote a text that has commas, quotes or line breaks.")
            elif undecodable := _undecodable(row.get(data.field, ""), data):
                row = undecodable
        if isinstance(row, BadRow):  # a quote that is not closed takes the lines after it too
            lines.put_back()
        number += 1
        yield number, row


class _Lines:
    """The lines of a stream. Those of a row after its first line can be put back."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._waiting: deque[str] = deque()
        self._row: list[str] = []
        self._n_read = 0
        self.first = 1
        """Number of the first line of the row."""

    def peek(self) -> str:
        """Return the first line."""
        self._waiting.append(self._stream.readline())
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
        line = self._waiting.popleft() if self._waiting else self._stream.readline()
        if not line:
            raise StopIteration
        self._n_read += 1
        self._row.append(line)
        return line


def _parquet_rows(file: BinaryIO, name: str, data: DataConfig) -> Iterator[tuple[int, object]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(
            f"{name!r} is a Parquet file, which needs pyarrow: {install_extra('parquet')}"
        ) from None
    number = 0
    try:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        columns = [data.field] if data.field in names and not data.chat else None
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(
            f"{name!r} cannot be read as Parquet after row {number}: {reason}. Get it again."
        ) from None


_ROWS: Mapping[str, Callable[[BinaryIO, str, DataConfig], Iterator[tuple[int, object]]]] = {
    "jsonl": _json_lines,
    "json": _json_values,
    "csv": _csv_rows,
    "parquet": _parquet_rows,
}


@contextmanager
def _as_text(file: BinaryIO, name: str, data: DataConfig) -> Iterator[TextIO]:
    """Read a file as text, in which an invalid byte is a lone surrogate."""
    buffered = io.BufferedReader(file)  # type: ignore[type-var]
    encoding = data.encoding
    if _is_utf8(encoding):
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


def _is_utf8(encoding: str) -> bool:
    return encoding.lower().replace("_", "-") in ("utf-8", "utf8", "utf-8-sig")


def _undecodable(text: str, data: DataConfig) -> BadRow | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if "\udc80" <= text[error.start] <= "\udcff":  # from surrogateescape
            if not _is_utf8(data.encoding):
                return BadRow(f"is not {data.encoding}")
            return BadRow("is not UTF-8", advice(text.encode(errors="surrogateescape"), 0))
    return None


def sniffed(head: bytes, encoding: str, *, is_whole: bool) -> str:
    """Return the format that the beginning of a file looks like: text, jsonl, json, csv, parquet.

    Args: head, its first bytes, unpacked; is_whole, whether these are all.
    """
    if head.startswith(b"PAR1"):
        return "parquet"
    text = head.decode(encoding, "ignore").removeprefix("\ufeff").lstrip()
    lines = [line for line in re.split("\r\n|\n|\r", text) if line and not line.isspace()]
    if not is_whole and len(lines) > 1:
        del lines[-1]
    lines = lines[:_N_SNIFFED]
    n_objects = sum(isinstance(_parsed(line), dict) for line in lines)
    if is_whole and len(lines) == 1 and n_objects and _nested_lists(json.loads(lines[0])):
        return "json"  # an object that holds the rows
    if 2 * n_objects >= len(lines) and n_objects >= (1 if text.startswith("{") else 2):
        return "jsonl"  # some of its rows may be bad, the first one too
    if re.match(r'\{\s*"|\[\s*(\{\s*"|"|\]\s*$)', text):
        if len(lines) == 1 and not is_whole and text.startswith("{"):
            return "jsonl"  # its first line is longer than the head
        return "json" if _begins_with_json(text, is_whole=is_whole) else "text"
    return "csv" if _is_table(lines) else "text"


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _begins_with_json(text: str, *, is_whole: bool) -> bool:
    start = text.index("[") + 1 if text.startswith("[") else 0
    at = len(text) - len(text[start:].lstrip())
    if text[at] == "]":
        return True
    try:
        _, end = json.JSONDecoder().raw_decode(text, at)
    except json.JSONDecodeError as error:
        return not is_whole and _is_cut(error, text)
    except RecursionError:
        return False
    return text[end:].lstrip()[:1] in ("", ",", "]", "{")


def _is_cut(error: Exception, text: str) -> bool:
    """Return whether JSON may be invalid only because its end is missing."""
    position = getattr(error, "pos", 0)
    return "Unterminated" in str(error) or position > len(text) - _LITERAL_CHARS


def _is_table(lines: list[str]) -> bool:
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
