"""JSONL, and JSON arrays or several objects -> rows, each read by itself."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import TextIO

from minigpt.config import DataConfig
from minigpt.errors import DataError
from minigpt.text.rows import BadRow, read_line, require_short, undecodable

READ_CHARS = 2**20
_BETWEEN = re.compile(r"[\s,\[\]]*")
_LITERAL_CHARS = 64  # more than the longest literal of JSON has
_LONGEST_INT = 4300  # digits that int() takes, as more take it long


def _integer(digits: str) -> float:
    return int(digits) if len(digits) < _LONGEST_INT else float(digits)


DECODER = json.JSONDecoder(parse_int=_integer)
"""Reads any JSON; an integer of thousands of digits as a float."""


def json_lines(stream: TextIO, name: str, data: DataConfig) -> Iterator[tuple[int, object]]:
    number = 1
    while line := read_line(stream, number, name):
        if not line.isspace():
            yield number, _json_line(line.removeprefix("\ufeff"), data)
        number += 1


def _json_line(line: str, data: DataConfig) -> object:
    if bad := undecodable(line, data):
        return bad
    try:
        return DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        remedy = "JSONL has one object a line; give --format text if it is plain text."
        return BadRow(f"is not JSON: {error}", remedy)


def json_values(stream: TextIO, name: str, data: DataConfig) -> Iterator[tuple[int, object]]:
    """Yield the items of a JSON array, or the objects of a file of several."""
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
            bad = undecodable(text[at:end], data)
            yield number, bad or row
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
                DECODER.raw_decode(rest, match.end())
                return rest[match.end() :], False
        block = stream.read(READ_CHARS)
        if not block:
            return "", True
        rest = rest[-_LITERAL_CHARS:] + block


def begins_with_json(text: str, *, is_whole: bool) -> bool:
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
