"""Escaped texts of the tokens of a sequence, with characters rejoined that span several tokens."""

import codecs
from collections.abc import Callable, Iterable

from minigpt.text.escape import token_name, visible

CONTINUATION = "⋯"
"""Mark of a token that continues a character of an earlier token."""


class JoinedTokens:
    """Escaped texts of the tokens of a sequence, with characters rejoined that span several tokens.

    Bytes that no later token completes to a character stay escaped.
    """

    def __init__(
        self, tokens: Iterable[bytes] = (), *, escape: Callable[[bytes], str] = visible
    ) -> None:
        """Begin a sequence with these tokens; ``escape`` turns complete characters into text."""
        self.texts: list[str] = []
        """Text of each token in the sequence: of three tokens of ``日``, the first has all of it,
        the others are empty."""
        self.names: list[str] = []
        """Text of each token on its own: ``日``, ``⋯日`` and ``⋯日``."""
        self._escape = escape
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._open: list[int] = []  # indices of the tokens of an incomplete character
        self._before = ""  # text of the first of these tokens before that character
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
        self.names.append(mark + self.texts[-1] or token_name(data))
        if not pending:
            self._open = []
        elif begun and not decoded:
            self._open.append(len(self.texts) - 1)
        else:
            self._open = [len(self.texts) - 1]
            self._before = self._escape(data[: len(data) - len(pending)])

    def _complete(self, character: str) -> str:
        """Join the tokens of a character, and return the name of a token that completes it."""
        start, *inner = self._open
        old = self.texts[start]
        self.texts[start] = self._before + character
        self.names[start] = self.names[start].removesuffix(old) + self.texts[start]
        for i in inner:
            if self.texts[i]:
                self.texts[i], self.names[i] = "", CONTINUATION + character
        return CONTINUATION + character
