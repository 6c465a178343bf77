"""Decode text files; for bytes that are not UTF-8, find a remedy that preserves the text."""

import codecs
import re
from collections.abc import Iterator
from typing import BinaryIO

from minigpt.errors import DataError

_SAMPLE_BYTES = 2**16  # read to recognize an encoding

_WIDE = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_ICONV_NAMES = {
    "cp1252": "WINDOWS-1252",
    "latin-1": "LATIN1",
    "utf-16": "UTF-16",
    "utf-16-le": "UTF-16LE",
    "utf-16-be": "UTF-16BE",
    "utf-32": "UTF-32",
    "utf-32-le": "UTF-32LE",
    "utf-32-be": "UTF-32BE",
}
_EASTERN = ("gb18030", "big5", "shift_jis", "euc_jp", "euc_kr")
# Bytes that cp1252 does not define, or its punctuation inside a word.
_NOT_CP1252 = re.compile(
    rb"[\x81\x8d\x8f\x90\x9d]|[a-z][\x80\x82-\x87\x89\x8b\x8e\x91\x93-\x95\x98\x99\x9b\xd5][a-z]"
)
_OTHER_KINDS = {
    b"\x1f\x8b": "compressed twice. Decompress it once",
    b"PAR1": "a Parquet file. Give --format parquet",
    b"%PDF": "a PDF. Extract its text: pdftotext OLD NEW",
    b"PK\x03\x04": "a ZIP archive. Unpack it",
    b"\xd0\xcf\x11\xe0": "an Office document. Save it as plain text (.txt)",
    b"7z\xbc\xaf": "an archive. Unpack it",
    b"PK\x05\x06": "an empty ZIP archive. Pass text files",
    b"Rar!": "an archive. Unpack it",
    b"\x1f\x9d": "compressed by compress. Unpack it: uncompress OLD",
    b"\x7fELF": "a program. Pass text files",
    b"\x93NUMPY": "a NumPy array. Pass text files",
    b"SQLite format 3": "a database. Export its text as CSV",
    b"\x89PNG": "a picture. Pass text files",
    b"\xff\xd8\xff": "a picture. Pass text files",
    b"GGUF": "the weights of a model. Pass text files",
}
"""First bytes of files that are not text in any encoding -> type of the file, and the remedy."""
_NUL = r"Pass text files, or remove its NUL bytes: tr -d '\000' < OLD > NEW"
_LETTERS = b" abcdefghijklmnopqrstuvwxyz"
_IN_ZIP = {
    rb"application/epub\+zip": (
        "an e-book. Convert it to plain text: ebook-convert OLD.epub NEW.txt (part of Calibre)"
    ),
    rb"xl/(work|_rels)|opendocument\.spreadsheet": "a spreadsheet. Save it as CSV",
    rb"word/\w+\.xml|\[Content_Types\]\.xml|opendocument\.": (
        "an Office document. Save it as plain text (.txt)"
    ),
}
"""Pattern of a name in a ZIP archive -> type of the archive, and the remedy; first match wins."""
_TAR = slice(257, 262)
_CONTROLS = re.compile(r"[\0-\x08\x0e-\x1f\ud800-\udfff]")


def wide_encoding(data: bytes) -> str:
    """Return which UTF-16 or UTF-32 encoding the first bytes of a file are in; empty for none.

    Without a byte-order mark, it is recognized by its zero bytes.
    """
    for mark, name in _MARKS.items():
        if data.startswith(mark):
            return name
    # If the bytes look like UTF-8 or are mostly Latin letters, a quarter of them must be the high
    # byte of a UTF-16 character, 0 to 7 (Latin to Arabic): with fewer, the NUL bytes are stray.
    n_upper = len(data) - len(data.translate(None, bytes(range(8))))
    n_letters = len(data) - len(data.translate(None, _LETTERS))
    is_narrow = n_letters > 0.5 * len(data) or _utf8_part(data) is not None
    if not data.count(0) or (is_narrow and n_upper < 0.25 * len(data)):
        return ""
    found: dict[str, int] = {}
    for name in _WIDE:
        text = _decoded_part(data, name)
        if text is not None and not _CONTROLS.search(text):
            found[name] = sum(c < "\x7f" for c in text)
    # Decoded in the wrong byte order, a text has no spaces and no line breaks.
    best = max(found, key=lambda name: found[name], default="")
    return best if best and found[best] else ""


def _decoded_part(data: bytes, encoding: str) -> str | None:
    """Decode a part of a file, which may end inside a character; None if that fails."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(data)
    except UnicodeError:
        return None


def _utf8_part(data: bytes) -> str | None:
    """Decode a part of a file that is UTF-8, which may begin or end inside a character."""
    return _decoded_part(data.lstrip(bytes(range(0x80, 0xC0))), "utf-8")


def is_utf8(encoding: str) -> bool:
    """Return whether this is a name of UTF-8, with or without a byte-order mark."""
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")


def decoded(file: BinaryIO, name: str, encoding: str, block_bytes: int) -> Iterator[str]:
    """Decode a text file block by block, without its byte-order mark.

    Raises: DataError if it is not text in this encoding, with a remedy that preserves the text.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    head = block = file.read(block_bytes)
    n_bytes = n_chars = 0  # in the previous blocks
    while True:
        error = None
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeError as raised:
            error = raised
        if error or "\0" in text:
            break
        yield text if n_bytes else text.removeprefix("\ufeff")
        if not block:
            return
        n_bytes, n_chars = n_bytes + len(block), n_chars + len(text)
        block = file.read(block_bytes)
    if kind := _binary_kind(head):
        raise DataError(f"{name!r} is {kind}.")
    if is_utf8(encoding) and b"\0" in block:
        raise _nul_error(name, block, n_bytes)
    if error is None:
        raise DataError(f"{name!r} is binary, or not {encoding}: it contains NUL characters.")
    if not isinstance(error, UnicodeDecodeError):  # no byte-order mark, or not a text encoding
        raise DataError(f"{name!r} is not {encoding}: {error}. Give another --encoding.")
    n_before = n_bytes + len(block) - len(error.object)  # the object includes buffered bytes
    position = n_before + error.start
    if not is_utf8(encoding):
        raise DataError(
            f"{name!r} is not {encoding}: byte {position} is invalid. Give another --encoding."
        )
    is_end = not block and error.reason == "unexpected end of data"
    sample = error.object + file.read(_SAMPLE_BYTES)
    remedy = advice(sample, position, n_multibyte=n_before - n_chars, is_end=is_end)
    raise _not_utf8(name, position, remedy)


def _binary_kind(head: bytes) -> str:
    """Return the type of a file that is not text, and the remedy; empty if it is not known."""
    if head[_TAR] == b"ustar":
        return "a tar archive. Unpack it"
    kind = next((kind for mark, kind in _OTHER_KINDS.items() if head.startswith(mark)), "")
    if head.startswith(b"PK\x03\x04"):
        return next((found for name, found in _IN_ZIP.items() if re.search(name, head)), kind)
    return kind


def _nul_error(name: str, block: bytes, n_bytes_before: int) -> DataError:
    """Return the error for a block of a UTF-8 file that has a NUL byte."""
    position = n_bytes_before + block.index(b"\0")
    if wide_encoding(block):
        return _not_utf8(name, position, advice(block, position))
    rest = block.replace(b"\0", b"")
    text = _utf8_part(rest)
    is_text = text is not None and len(rest) > len(block) / 2 and not _CONTROLS.search(text)
    remedy = _NUL if is_text else "Pass text files."
    return DataError(f"{name!r} looks binary: byte {position} is NUL. {remedy}")


def _not_utf8(name: str, position: int, remedy: str) -> DataError:
    return DataError(f"{name!r} is not UTF-8: byte {position} is invalid. {remedy}")


def advice(data: bytes, position: int, *, n_multibyte: int = 0, is_end: bool = False) -> str:
    """Return the remedy for a file that is not UTF-8, as one or two sentences.

    Args: data, a part of the file with the invalid bytes; position, that of the first one in the
        file; n_multibyte, number of valid multibyte characters before this part; is_end, whether
        the file ends in the middle of a character.
    """
    if wide := wide_encoding(data):
        return _convert(wide)
    text = data.decode("utf-8", "replace")
    n_multibyte += sum(c > "\x7f" and c != "\ufffd" for c in text)
    if is_end:
        is_alone = not n_multibyte and data[:-1].isascii()
        doubt = " (if it is complete, give --encoding latin-1)" if is_alone else ""
        return (
            f"It ends in the middle of a character, so it was cut{doubt}: get the complete file, "
            f"or drop its last bytes: head -c {position} OLD > NEW"
        )
    if n_multibyte > 4 * text.count("\ufffd"):
        return (
            "Most of it is UTF-8, so it is damaged: get it again, or drop the invalid bytes: "
            "iconv -c -f UTF-8 -t UTF-8 OLD > NEW"
        )
    n_high = sum(byte > 0x7F for byte in data)
    if n_high > 8 and n_high > 0.25 * len(b"".join(data.split())):
        fitting = [name for name in _EASTERN if _decoded_part(data, name) is not None]
        names = ", ".join([*fitting, "cp1251"])
        return f"Name its encoding with --encoding, which may be {names} or koi8-r."
    if _NOT_CP1252.search(data):
        return "Name its encoding with --encoding, as in --encoding cp437, mac-roman or gb18030."
    has_quotes = re.search(rb"[\x80-\x9f]", data)
    return _convert("cp1252" if has_quotes else "latin-1", " (Western European)")


def _convert(name: str, about: str = "") -> str:
    return (
        f"Give --encoding {name}{about}, or convert it: "
        f"iconv -f {_ICONV_NAMES[name]} -t UTF-8 OLD > NEW"
    )
