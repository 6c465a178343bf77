"""Read the text of each row of a JSONL, JSON, CSV or Parquet file."""

import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, BinaryIO

from minigpt.config import DataConfig
from minigpt.errors import DataError, install_extra
from minigpt.rings import ring
from minigpt.text.escape import printable
from minigpt.text.rows import (
    DECODER,
    BadRow,
    as_text,
    begins_with_json,
    csv_rows,
    is_table,
    json_lines,
    json_values,
    no_object,
)
from minigpt.text.tokenizer import well_formed

MAX_CONVERSATION_CHARS = 2**20
"""Maximum characters of a conversation, as JSON."""
_N_SNIFFED = 10  # rows
_N_TRIED = 1000  # rows read after a bad one; if none has text, --skip-bad is not suggested
_N_FIELDS_SHOWN = 12
_MAX_LABEL_CHARS = 80  # of a label, such as a source; longer strings are texts
_MISSING = object()
_UNITS = {"jsonl": "line", "json": "item", "csv": "row", "parquet": "row"}


def texts(
    file: BinaryIO, kind: str, name: str, data: DataConfig, on_skip: Callable[[str], None] | None
) -> Iterator[str]:
    """Yield the text of each row of a file; rows without text are refused or skipped.

    Args: kind, the format; name, the file's name for messages; on_skip, called with a message for
        each skipped row, None to refuse such rows.
    Raises: DataError for a refused row, or a file that does not match its format.
    """
    rows = _rows(file, kind, name, data)
    has_texts = False
    for number, row in rows:
        try:
            text = _text(row, data)
        except BadRow as error:
            message = f"{_UNITS[kind]} {number} of {name!r} {error.reason}"
            if on_skip is None:
                has_texts = has_texts or _have_texts(islice(rows, _N_TRIED), data)
                remedies = [error.remedy or ("" if has_texts else _remedy_without_texts(row, data))]
                remedies += ["Leave such rows out with --skip-bad."] * has_texts
                raise DataError(f"{message}. {' '.join(filter(None, remedies))}") from None
            on_skip(message)
        else:
            has_texts = has_texts or bool(text)
            yield text


def _text(row: object, data: DataConfig) -> str:
    """Return the text of a row, or its conversation as JSON. Raises: BadRow if it has none."""
    if isinstance(row, BadRow):
        raise row
    return _conversation(row) if data.chat else row_text(row, data.field)


def _have_texts(rows: Iterable[tuple[int, object]], data: DataConfig) -> bool:
    """Return whether one of these rows has text."""
    with suppress(DataError):  # the rest of the file cannot be read
        for _, row in rows:
            with suppress(BadRow):
                if _text(row, data):
                    return True
    return False


def _remedy_without_texts(row: object, data: DataConfig) -> str:
    """Return the remedy for a file in which no row has text. Args: row, one of the file's rows."""
    fields = (
        f"{_fields_of(row)}. " if isinstance(row, Mapping) and row.keys() - {data.field} else ""
    )
    if data.chat:
        remedy = 'Each row needs a list of "messages", one of them with the role "assistant".'
        return f"{fields[:1].upper()}{fields[1:]}{remedy}"
    if isinstance(row, Mapping) and fields:
        return f"No row has one; {fields}Name another one with --field{_longest_text(row)}."
    return f"Write each row as {json.dumps({data.field: '...'})}."


def row_text(row: object, field: str) -> str:
    """Return the text of a row.

    Raises: BadRow if it has none.
    """
    if isinstance(row, str):
        return well_formed(row)
    if not isinstance(row, Mapping):
        raise no_object(field)
    text = _value(row, field)
    if isinstance(text, bytes):  # some programs write Parquet texts as bytes
        with suppress(UnicodeDecodeError):
            text = text.decode()
    if isinstance(text, str):
        return well_formed(text)
    if text is _MISSING:
        raise _without_field(row, field)
    found = "null" if text is None else f"of type {type(text).__name__}"
    remedy = ""
    if isinstance(text, list):
        remedy = "Write one row per text, or join the texts."
    elif isinstance(text, Mapping):
        name = _names_of({field: text})[0]
        example = f", as in --field {shlex.quote(name)}" if name.isprintable() else ""
        remedy = f"Name one of its fields{example}.{_if_rows(field.split('.'))}"
    raise BadRow(f'has no "{field}" string: it is {found}', remedy)


def _without_field(row: Mapping[Any, Any], field: str) -> BadRow:
    """Return the error for a row without the text field; the remedy depends on its other fields."""
    remedy = f"Name another one with --field{_longest_text(row)}."
    pairs = ({"prompt", "completion"}, {"instruction", "output"})
    if _has_messages(row) or any(names <= row.keys() for names in pairs):
        remedy = "Give --chat to read conversations."
    elif nested := _nested_lists(row):
        return _nested_rows(nested, field)
    else:
        keys = next(([key] for key, value in row.items() if _is_table(value)), [])
        if keys or _is_table(row):
            remedy = f"Name another one with --field.{_if_rows(keys)}"
    return BadRow(f'has no "{field}" string: {_fields_of(row)}', remedy)


def _has_messages(row: Mapping[Any, Any]) -> bool:
    """Return whether a row is a conversation, with a list of messages that have roles."""
    return any(
        isinstance(turns := row.get(name), list)
        and turns
        and isinstance(turns[0], Mapping)
        and {role, content} <= turns[0].keys()
        for name in ("messages", "conversations")
        for role, content in (("role", "content"), ("from", "value"))
    )


def _longest_text(row: Mapping[Any, Any]) -> str:
    """Return an example of --field with the longest string, which may be the text; else empty."""
    values = {str(key): value for key, value in row.items()}
    for key, inner in row.items():
        if isinstance(inner, Mapping):
            values |= {f"{key}.{name}": value for name, value in inner.items()}
    lengths = {name: len(value) for name, value in values.items() if isinstance(value, str)}
    name = max(lengths, key=lambda name: lengths[name], default="")
    is_short = 0 < len(name) <= _MAX_LABEL_CHARS and name.isprintable()
    return f", as in --field {shlex.quote(name)}" if is_short else ""


def _is_table(value: object) -> bool:
    """Return whether a value is an object whose values may be rows.

    That is, objects with the same fields, or more strings than a row usually has.
    """
    rows = list(value.values()) if isinstance(value, Mapping) else []
    if len(rows) > _N_FIELDS_SHOWN and all(isinstance(row, str) for row in rows):
        return True
    return len(rows) > 1 and all(
        isinstance(r, Mapping) and r.keys() == rows[0].keys() for r in rows
    )


def _if_rows(keys: Sequence[str]) -> str:
    """Return the remedy if the values of an object are the rows. Args: keys, path to the object."""
    program = shlex.quote(f"[{_jq(keys)}[]]")
    return f" If its values are the rows, write them in a list: jq {program} OLD > NEW."


def _jq(keys: Sequence[str]) -> str:
    return printable("." + ".".join(map(json.dumps, keys)))


def _nested_lists(row: Mapping[Any, Any], prefix: str = "") -> list[str]:
    """Return the keys of lists of objects in an object; keys of an inner object are dotted.

    Lists of strings or lists count too if the object itself has no strings. An object with a long
    string is a row, for which nothing is returned.
    """
    texts_of_row = [value for value in row.values() if isinstance(value, str)]
    if any(len(text) > _MAX_LABEL_CHARS for text in texts_of_row):
        return []
    wanted = Mapping if texts_of_row else (Mapping, str, list)
    found = []
    n_items = {key: len(value) if isinstance(value, list) else 0 for key, value in row.items()}
    for key in sorted(row, key=lambda key: -n_items[key]):
        name, value = f"{prefix}{str(key)[:60]}", row[key]
        if isinstance(value, list) and value and isinstance(value[0], wanted):
            found.append(name)
        elif isinstance(value, Mapping) and not prefix:
            found += _nested_lists(value, f"{name}.")
    return found


def _nested_rows(keys: list[str], field: str) -> BadRow:
    names = ", ".join(map(repr, keys[:_N_FIELDS_SHOWN]))
    return BadRow(
        f'is a JSON object without "{field}" that contains lists in {names}; rows are expected in '
        "a list or one per line",
        f"Write the list to a separate file, as with jq {shlex.quote(_jq(keys[0].split('.')))}.",
    )


def _conversation(row: object) -> str:
    try:
        text: str = ring("text.conversations").conversation_of_row(row)
    except DataError as error:
        named = {"messages", "conversations"}
        if isinstance(row, Mapping) and not named & row.keys() and (nested := _nested_lists(row)):
            raise _nested_rows(nested, "messages") from None
        raise BadRow(str(error)) from None
    if len(text) > MAX_CONVERSATION_CHARS:
        raise BadRow(f"is a conversation of more than {MAX_CONVERSATION_CHARS} characters")
    return text


def _value(row: Mapping[Any, Any], field: str) -> object:
    """Return the value of a field, or of a nested one with a dotted name; _MISSING for none."""
    if field in row:
        return row[field]
    first, _, rest = field.partition(".")
    inner = row.get(first)
    return _value(inner, rest) if rest and isinstance(inner, Mapping) else _MISSING


def _names_of(row: Mapping[Any, Any]) -> list[str]:
    """Return the names of a row's fields; those of an inner object are dotted."""
    names = []
    for name, value in list(row.items())[: _N_FIELDS_SHOWN + 1]:
        inner = list(value)[:_N_FIELDS_SHOWN] if isinstance(value, Mapping) else []
        names += [f"{str(name)[:60]}.{str(key)[:60]}" for key in inner] or [str(name)[:60]]
    return names


def _fields_of(row: Mapping[Any, Any]) -> str:
    names = _names_of(row)
    if not names:
        return "it has no fields"
    more = ", ..." if len(names) > _N_FIELDS_SHOWN else ""
    return f"its fields are {', '.join(map(repr, names[:_N_FIELDS_SHOWN]))}{more}"


def has_field(file: BinaryIO, kind: str, name: str, data: DataConfig) -> bool:
    """Return whether the first row has the text field, or cannot be read at all."""
    try:
        _, row = next(_rows(file, kind, name, data), (0, None))
    except DataError:
        return True
    chats = ("messages", "conversations", "prompt", "instruction")
    names = chats if data.chat else (data.field,)
    return not isinstance(row, Mapping) or any(_value(row, n) is not _MISSING for n in names)


def _rows(file: BinaryIO, kind: str, name: str, data: DataConfig) -> Iterator[tuple[int, object]]:
    """Yield the number and value of each row of a file; a BadRow for one that cannot be read."""
    if kind == "parquet":
        yield from _parquet_rows(file, name, data)
        return
    rows = {"jsonl": json_lines, "json": json_values, "csv": csv_rows}[kind]
    with as_text(file, name, data) as stream:
        yield from rows(stream, name, data)


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
    except (ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(
            f"{name!r} cannot be read as Parquet after row {number}: {reason}. Get it again."
        ) from None


def sniffed(head: bytes, encoding: str, *, is_whole: bool) -> str:
    """Guess the format of a file from its first bytes: text, jsonl, json, csv or parquet.

    Args: head, the first bytes, decompressed; is_whole, whether the file has no others.
    """
    if head.startswith(b"PAR1"):
        return "parquet"
    text = head.decode(encoding, "ignore").removeprefix("\ufeff").lstrip()
    lines = [line for line in re.split("\r\n|\n|\r", text) if line and not line.isspace()]
    if not is_whole and len(lines) > 1:
        del lines[-1]
    lines = lines[:_N_SNIFFED]
    if _is_jsonl(lines, is_whole=is_whole):
        return "jsonl"
    may_be_json = re.match(r'\{\s*"|\[\s*(\{\s*"|"|\]\s*$)', text)
    if may_be_json and begins_with_json(text, is_whole=is_whole):
        return "json"
    return "csv" if is_table(lines) else "text"


def _is_jsonl(lines: list[str], *, is_whole: bool) -> bool:
    """Return whether the first lines of a file are JSON objects; some may be bad, even the first.

    Args: is_whole, whether the file has no other lines.
    """
    rows = [row for line in lines if isinstance(row := _parsed(line), dict)]
    begins_with_object = bool(lines) and lines[0].startswith("{")
    if len(lines) == 1 and not is_whole and not rows:
        return re.match(r'\{\s*"', lines[0]) is not None  # it is longer than the head
    if len(lines) == 1 and is_whole and rows and _nested_lists(rows[0]):
        return False  # an object that contains the rows
    return 2 * len(rows) >= len(lines) and len(rows) >= (1 if begins_with_object else 2)


def _parsed(line: str) -> object:
    try:
        return DECODER.decode(line)
    except (ValueError, RecursionError):
        return None
