"""Escaping of untrusted text: no control character reaches the terminal."""

import re
import unicodedata

# Categories of characters that move the cursor, join or reorder others, or are invisible.
_UNSAFE_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
# Harmless in spite of their category: Persian and emoji need the joiners.
_HARMLESS = "\n\t\u200c\u200d"
# Jamo that join to a syllable, invisible Hangul fillers, skin tones: their category is not Mark.
_JOINING = re.compile("[\u115f-\u11ff\u3164\ud7b0-\ud7fb\uffa0\U0001f3fb-\U0001f3ff]")
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\", " ": "␣"}


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _is_unsafe(character: str) -> bool:
    return unicodedata.category(character) in _UNSAFE_CATEGORIES


def _joins_or_hides(character: str) -> bool:
    is_mark_or_space = unicodedata.category(character).startswith(("M", "Z"))
    return is_mark_or_space or bool(_JOINING.match(character))


def printable(text: str) -> str:
    """Escape characters that could control a terminal; line breaks, tabs and joiners stay."""
    if text.isprintable():  # no separators except spaces, and none of the categories above
        return text
    return "".join(c if c in _HARMLESS or not _is_unsafe(c) else _escape(c) for c in text)


def one_line(text: str) -> str:
    """Escape control characters and line breaks."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def visible(data: bytes) -> str:
    """Return a token's bytes as one visible line of text: ``b" a\\n"`` is ``␣a\\n``.

    Bytes that are not valid UTF-8, such as half a character, become ``\\xe2``; a mark that would
    join the character before it is escaped too.
    """
    shown = []
    for character in data.decode("utf-8", errors="surrogateescape"):
        code = ord(character)
        if character in _NAMED:
            shown.append(_NAMED[character])
        elif 0xDC80 <= code <= 0xDCFF:  # a byte that surrogateescape could not decode
            shown.append(f"\\x{code - 0xDC00:02x}")
        elif _is_unsafe(character) or _joins_or_hides(character):
            shown.append(_escape(character))
        else:
            shown.append(character)
    return "".join(shown)


def token_name(data: bytes) -> str:
    """Return the text of a single token: ``visible``, or ``∅`` for an id without text."""
    return visible(data) or "∅"
