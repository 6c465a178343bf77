"""Escaping of untrusted text: no control character reaches the terminal."""

import codecs
import re
import unicodedata
from collections.abc import Callable, Iterable

# Categories of characters that move the cursor, join or reorder others, or are invisible.
_UNSAFE_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
# Harmless in spite of their category: Persian and emoji need the joiners.
_HARMLESS = "\n\t\u200c\u200d"
# Jamo that join a syllable, Hangul fillers that show nothing, skin tones: no mark by category.
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
    if text.isprintable():  # no separator but the space, and nothing of the categories above
        return text
    return "".join(c if c in _HARMLESS or not _is_unsafe(c) else _escape(c) for c in text)


def visible(data: bytes) -> str:
    """Show a token's bytes on one line, with nothing hidden: ``b" a\\n"`` is ``␣a\\n``.

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


CONTINUATION = "⋯"
"""Mark of a token that continues the character that an earlier one began."""


class JoinedTokens:
    """Texts of the tokens of a sequence, escaped, with characters joined that tokens split.

    Bytes that no later token completes to a character stay escaped.
    """

    def __init__(
        self, tokens: Iterable[bytes] = (), *, escape: Callable[[bytes], str] = visible
    ) -> None:
        """Begin a sequence with these tokens; ``escape`` turns whole characters into text."""
        self.texts: list[str] = []
        """Text of each token within the sequence: of three tokens of ``日``, the first has it all,
        and the others have none."""
        self.names: list[str] = []
        """Text of each token by itself: ``日``, ``⋯日`` and ``⋯日``."""
        self._escape = escape
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._open: list[int] = []  # tokens of the character that is not yet complete
        self._before = ""  # text of the first of them before that character
        for data in tokens:
            self.add(data)

    @property
    def is_open(self) -> bool:
        """Whether the next token may complete a character."""
        return bool(self._open)

    def add(self, data: bytes) -> None:
        """Append a token."""
        begun = self._decoder.getstate()[0]
        decoded = self._decoder.decode(data)
        pending = self._decoder.getstate()[0]
        first = decoded[:1].encode("utf-8", "surrogateescape")
        mark = ""
        if begun and first.startswith(begun) and len(first) > len(begun):
            data = data[len(first) - len(begun) :]
            mark = self._complete(self._escape(first))
        self.texts.append(self._escape(data))
        self.names.append(mark + self.texts[-1])
        if not pending:
            self._open = []
        elif begun and not decoded:
            self._open.append(len(self.texts) - 1)
        else:
            self._open = [len(self.texts) - 1]
            self._before = self._escape(data[: len(data) - len(pending)])

    def _complete(self, character: str) -> str:
        """Join the tokens of a character, and return the mark of those that continue it."""
        start, *inner = self._open
        old = self.texts[start]
        self.texts[start] = self._before + character
        self.names[start] = self.names[start].removesuffix(old) + self.texts[start]
        for i in inner:
            if self.texts[i]:
                self.texts[i], self.names[i] = "", CONTINUATION + character
        return CONTINUATION + character
