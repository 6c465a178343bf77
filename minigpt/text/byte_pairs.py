"""Byte-pair vocabularies trained by minigpt or published by OpenAI, encoded by tiktoken.

tiktoken and rustbpe panic on some inputs, with an exception that is not a subclass of
``Exception``. The checks here reject or split such inputs first.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import regex
import tiktoken

from minigpt.errors import DataError, cut
from minigpt.text.tokenizer import Tokenizer, well_formed
from minigpt.text.vocabulary_parts import unencodable_error

# The backtracking of \s+(?!\S) overflows the regex engine's stack at about a million spaces.
_LONG_WHITESPACE = re.compile(r"(\s{65536})")
# Contains every kind of adjacent characters that a pattern may distinguish.
_PROBE = "".join(map(chr, range(128))) + "a b  cc\n\nd's 12 345\t\u00e9\u65e5\u672c\U0001f642 q"


class TiktokenTokenizer(Tokenizer):
    """A byte-pair vocabulary that a ``tiktoken.Encoding`` encodes."""

    def __init__(
        self, name: str, encoding: tiktoken.Encoding, end_of_text_ids: tuple[int, ...] = ()
    ) -> None:
        super().__init__(
            name,
            dict(encoding._special_tokens),
            vocab_size=encoding.n_vocab,
            textless_ids=list(encoding._special_tokens.values()),
            end_of_text_ids=end_of_text_ids,
        )
        self.encoding = encoding
        ranks = encoding._mergeable_ranks
        self._single_bytes = bytes(b for b in range(256) if bytes([b]) in ranks)
        self._is_bytes = len(ranks) == 256 and all(ranks.get(bytes([b])) == b for b in range(256))

    def encode_array(
        self, text: str, *, is_start: bool = True, special: bool = False
    ) -> npt.NDArray[np.uint32]:
        text = well_formed(text)
        if special:
            return self.encode_parsed(text)
        if self._is_bytes:  # no split pattern can fail or drop text
            return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)
        if missing := self._missing_bytes(text):
            raise unencodable_error(self.name, f"byte {missing[:1]!r}")
        try:
            # Arrays avoid a list of ids, which would take a tenth of the encoding time.
            encode = partial(self.encoding.encode_to_numpy, disallowed_special=())
            arrays = list(map(encode, split_whitespace(text)))
        except BaseException as error:
            # A ValueError of its regex, or a PanicException, which cannot be imported.
            if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
                raise
            raise DataError(
                f"the split pattern of {self.name!r} failed on this text ({error}). "
                "Break its longest runs of the same character."
            ) from None
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def unencodable(self, text: str) -> set[str]:
        if not self._missing_bytes(text):
            return set()
        return {c for c in set(text) if self._missing_bytes(c)}

    def _missing_bytes(self, text: str) -> bytes:
        if len(self._single_bytes) == 256:
            return b""
        return text.encode().translate(None, self._single_bytes)

    def token_bytes(self, token: int) -> bytes:
        return self._bytes_of.get(int(token), b"")

    def to_dict(self) -> dict[str, Any]:
        ranks = sorted(self.encoding._mergeable_ranks.items(), key=lambda item: item[1])
        parts = {
            "name": self.name,
            "pattern": self.encoding._pat_str,
            "ranks": {base64.b64encode(token).decode(): rank for token, rank in ranks},
            "specials": dict(self.special_ids),
        }
        return parts | self.unusual_ends

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        tokens = {rank: token for token, rank in self.encoding._mergeable_ranks.items()}
        return tokens | {i: text.encode() for text, i in self.special_ids.items()}


def from_dict(parts: Mapping[str, Any]) -> TiktokenTokenizer:
    """Rebuild a tokenizer from ``TiktokenTokenizer.to_dict``."""
    try:
        name, pattern = str(parts["name"]), str(parts["pattern"])
        ranks = {base64.b64decode(t, validate=True): int(r) for t, r in parts["ranks"].items()}
        specials = {str(text): int(token) for text, token in parts["specials"].items()}
        ends = tuple(map(int, parts.get("end_of_text", ())))
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise DataError(f"the saved vocabulary is damaged: {error!r}.") from None
    return TiktokenTokenizer(name, make_encoding(name, pattern, ranks, specials), ends)


def make_encoding(
    name: str, pattern: str, ranks: Mapping[bytes, int], specials: Mapping[str, int]
) -> tiktoken.Encoding:
    """Build a ``tiktoken.Encoding`` from its parts.

    Args: pattern, the regex that splits text before merging; ranks, token bytes -> id, where a
        lower id is merged first; specials, text -> id.
    Raises: DataError if there are no ranks, two tokens share an id, or the pattern is not a regex.
    """
    ids = [*ranks.values(), *specials.values()]
    if not ranks or len(set(ids)) != len(ids) or not 0 <= min(ids) <= max(ids) < 2**31:
        raise DataError(
            f"the vocabulary {name!r} is empty, two of its tokens share an id, or an id is not in "
            "[0, 2**31)."
        )
    if _matches_empty(pattern):
        raise DataError(f"the split pattern of {name!r} matches the empty string: {cut(pattern)}.")
    try:
        return tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=dict(specials)
        )
    except ValueError as error:
        raise DataError(f"the split pattern of {name!r} is not a regex: {error}.") from None


def _matches_empty(pattern: str) -> bool:
    """Return whether a pattern can match the empty string, on which tiktoken panics.

    True for a pattern that takes too long, False for one that only tiktoken's engine accepts.
    """
    try:
        matches = regex.finditer(pattern, _PROBE, timeout=1)
        return any(match.start() == match.end() for match in matches)
    except TimeoutError:
        return True
    except regex.error:
        return False


def named_tokenizer(name: str) -> TiktokenTokenizer:
    """Return one of OpenAI's published tokenizers; the first use downloads its ranks.

    Raises: DataError if they are neither in tiktoken's cache nor can be downloaded.
    """
    try:
        return TiktokenTokenizer(name, tiktoken.get_encoding(name))
    except (OSError, ValueError) as error:
        raise DataError(
            f"the tokenizer {name} could not be downloaded ({type(error).__name__}). Connect to "
            "the internet once, point TIKTOKEN_CACHE_DIR at a folder that has its ranks, or use "
            "--tokenizer bytes."
        ) from None


def split_whitespace(text: str) -> list[str]:
    """Split very long runs of whitespace in a text, on which the regex engine would overflow."""
    # Such a run contains at least 15 adjacent samples, so most texts need no full search.
    if not re.search(r"\s{15}", text[::4096]):
        return [text]
    return [part for part in _LONG_WHITESPACE.split(text) if part]
