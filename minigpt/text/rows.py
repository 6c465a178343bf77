"""Files of rows as text: what JSON and CSV have in common."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, TextIO

from minigpt.config import DataConfig
from minigpt.errors import DataError
from minigpt.text.encodings import advice, is_utf8, wide_encoding

LONGEST_ROW = 2**27
"""Most characters of a line of JSON or CSV, or of an item of a JSON array."""


class BadRow(Exception):  # noqa: N818
    """A row without a text. Its arguments: why, and what to do about it, a sentence or nothing."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason, remedy)
        self.reason, self.remedy = reason, remedy


@contextmanager
def as_text(file: BinaryIO, name: str, data: DataConfig) -> Iterator[TextIO]:
    """Read a file as text, in which an invalid byte is a lone surrogate."""
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
    line = stream.readline(LONGEST_ROW + 1)
    require_short(line, f"line {number} of {name!r}")
    return line


def require_short(text: str, what: str) -> None:
    """Raise DataError for a row that would fill the memory, as a small file may unpack to."""
    if len(text) > LONGEST_ROW:
        raise DataError(
            f"{what} has more than {LONGEST_ROW:,} characters. Split it into several, or give "
            "--format text if it is plain text."
        )


def undecodable(text: str, data: DataConfig) -> BadRow | None:
    """Return what is wrong with text of ``as_text`` that has an invalid byte; else None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if "\udc80" <= text[error.start] <= "\udcff":  # from surrogateescape
            if not is_utf8(data.encoding):
                return BadRow(f"is not {data.encoding}")
            return BadRow(
                "is not UTF-8", f"{advice(text.encode(errors='surrogateescape'), 0).rstrip('.')}."
            )
    return None
