"""Text <-> token ids: the Tokenizer interface, and bytes. Other vocabularies are in rings."""

import base64
import copy
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from minigpt.errors import CheckpointError
from minigpt.rings import ring

END_OF_TEXT = "<|endoftext|>"
RESIZE = (
    "In transformers, call model.resize_token_embeddings(len(tokenizer)), train the new rows, and "
    "save the model again."
)
"""Remedy for tokens that were added to a vocabulary, but not to its model."""
BYTES_PATTERN = r"(?s:.)"


class Tokenizer(ABC):
    """Text <-> token ids."""

    def __init__(
        self,
        name: str,
        special_ids: Mapping[str, int],
        *,
        vocab_size: int,
        textless_ids: Sequence[int],
        prefix: tuple[int, ...] = (),
        end_of_text_ids: tuple[int, ...] = (),
    ) -> None:
        self.name = name
        """Tokenizer spec (``bytes``, ``bpe:1024``, ``gpt2``), or the name of its model."""
        self.special_ids = special_ids
        """Added tokens, such as ``<|endoftext|>``, and their ids."""
        self.vocab_size = vocab_size
        """Ids run from 0 to vocab_size - 1; some vocabularies leave gaps."""
        self.textless_ids = list(textless_ids)
        """Ids without text: those of the special tokens."""
        self.prefix = prefix
        """Ids before every prompt, such as a beginning-of-text token."""
        usual = special_ids.get(END_OF_TEXT)
        self.end_of_text_ids = end_of_text_ids or (() if usual is None else (usual,))
        """Ids of end-of-text tokens, at which generation stops."""
        self.end_of_text = next(iter(self.end_of_text_ids), None) if usual is None else usual
        """Id of the token between documents. None if the vocabulary has none."""
        self.without_row: tuple[str, ...] = ()
        """Added tokens that are left out because the model's embedding has no row for them."""

    @abstractmethod
    def encode_array(
        self, text: str, *, is_start: bool = True, special: bool = False
    ) -> npt.NDArray[np.uint32]:
        """Return the ids of a text; ``<|endoftext|>`` in it is plain text, unless ``special``.

        Lone surrogates become U+FFFD.

        Args: is_start, False for a later piece of a text, before which no space is added; special,
            whether the text of a special token becomes its id.
        Raises: DataError if the vocabulary cannot represent the text.
        """

    def unencodable(self, text: str) -> set[str]:
        """Return the characters of a text that the vocabulary cannot represent."""
        return set()

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one id: a special token's text, b"" for an unused id.

        Models often have more embedding rows than the vocabulary has tokens, and may sample those.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return the complete tokenizer as JSON values, as stored in a prepared folder."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the parts of ``to_dict`` that the ids of a text depend on.

        These are not the name, nor the end-of-text ids after the first.
        """
        same = copy.copy(self)
        same.end_of_text_ids = self.end_of_text_ids[:1]
        parts = {key: value for key, value in same.to_dict().items() if key != "name"}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def separator(self) -> tuple[int, ...]:
        """Ids before each document of a corpus: end-of-text, then the prefix of prompts.

        Empty if the vocabulary has neither; documents then follow each other directly.
        """
        if self.end_of_text is None or self.end_of_text in self.prefix:
            return self.prefix
        return (self.end_of_text, *self.prefix)

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Pattern with one group that matches the longest special token's text at a position."""
        textless = set(self.textless_ids)
        texts = [text for text, id_ in self.special_ids.items() if text and id_ in textless]
        longest_first = sorted(texts, key=len, reverse=True)
        return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")

    def require_rows(self, text: str) -> None:
        """Raise CheckpointError if a text has a token of ``without_row``.

        It would be encoded as plain text, although special tokens are parsed.
        """
        for token in self.without_row:
            if token in text:
                raise CheckpointError(
                    f"{token!r} is a token of the vocabulary {self.name!r}, but the model has no "
                    f"embedding for it. {RESIZE}"
                )

    def encode_parsed(self, text: str) -> npt.NDArray[np.uint32]:
        """Return the ids of a text, with the text of special tokens parsed to their ids."""
        parts = self.special_pattern.split(text)
        return np.concatenate(
            [  # the odd parts are the special tokens
                np.array([self.special_ids[part]], np.uint32) if i % 2 else self.encode_array(part)
                for i, part in enumerate(parts)
            ]
        )

    @property
    def unusual_ends(self) -> dict[str, list[int]]:
        """The end-of-text ids for ``to_dict``; empty if they are those of ``<|endoftext|>``."""
        is_usual = self.end_of_text_ids in ((), (self.special_ids.get(END_OF_TEXT),))
        return {} if is_usual else {"end_of_text": list(self.end_of_text_ids)}

    def encode(self, text: str, *, is_start: bool = True, special: bool = False) -> list[int]:
        """Return the ids of a text as a list; see ``encode_array``.

        Raises: DataError as ``encode_array``; CheckpointError as ``require_rows``, if ``special``.
        """
        if special:
            self.require_rows(text)
        return self.encode_array(text, is_start=is_start, special=special).tolist()

    def encode_prompt(self, text: str, *, special: bool = False) -> list[int]:
        """Return the ids of a prompt: the prefix, then the text.

        An empty text gives the token that begins a document, or no ids if there is no such token.

        Raises: as ``encode``.
        """
        begin = list(self.prefix)
        if not text and not begin and self.end_of_text is not None:
            begin = [self.end_of_text]
        return begin + self.encode(text, special=special)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of the ids; unused ids have none."""
        return b"".join(map(self.token_bytes, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    @cached_property
    def token_byte_lengths(self) -> npt.NDArray[np.int32]:
        """Number of text bytes of each id, (V,); 0 for special tokens and unused ids."""
        lengths = np.array([len(self.token_bytes(i)) for i in range(self.vocab_size)], np.int32)
        lengths[self.textless_ids] = 0
        return lengths


class BytesTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 to 255, and 256 for ``<|endoftext|>``."""

    def __init__(self, name: str = "bytes", end_of_text_ids: tuple[int, ...] = ()) -> None:
        specials = {END_OF_TEXT: 256}
        ends = end_of_text_ids
        super().__init__(name, specials, vocab_size=257, textless_ids=[256], end_of_text_ids=ends)

    def encode_array(
        self, text: str, *, is_start: bool = True, special: bool = False
    ) -> npt.NDArray[np.uint32]:
        if special:
            return self.encode_parsed(text)
        return np.frombuffer(well_formed(text).encode(), np.uint8).astype(np.uint32)

    def token_bytes(self, token: int) -> bytes:
        return bytes([int(token)]) if 0 <= token < 256 else END_OF_TEXT.encode() * (token == 256)

    def to_dict(self) -> dict[str, Any]:
        ranks = {base64.b64encode(bytes([byte])).decode(): byte for byte in range(256)}
        parts = {"name": self.name, "pattern": BYTES_PATTERN, "ranks": ranks}
        return parts | {"specials": dict(self.special_ids)} | self.unusual_ends


def make_tokenizer(spec: str, texts: Iterable[str]) -> Tokenizer:
    """Return the tokenizer of a spec; ``texts`` are only read to train one.

    Raises: ConfigError for an unknown spec; DataError if it cannot be trained or downloaded.
    """
    if spec == "bytes":
        return BytesTokenizer()
    return ring("text.bpe").make_tokenizer(spec, texts)


def well_formed(text: str) -> str:
    """Return the text with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
