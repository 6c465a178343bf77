"""Vocabularies of other models, encoded by the tokenizers library.

Ids are those of tokenizer.json by construction. The text of a special token is plain text; added
tokens that are not special are recognized in text, as the library does.
"""

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from minigpt.errors import CheckpointError, DataError
from minigpt.text.tokenizer import Tokenizer, well_formed
from minigpt.text.vocabulary_parts import BYTE_OF_CHARACTER, steps_of, unencodable_error

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_MARK = "\x01"
_MAX_GAP = 2**20


class ImportedTokenizer(Tokenizer):
    """A vocabulary from a tokenizer.json, encoded by a ``tokenizers.Tokenizer``."""

    def __init__(
        self, name: str, data: Mapping[str, Any], end_of_text_ids: tuple[int, ...] = ()
    ) -> None:
        """Args: data, the parsed tokenizer.json; end_of_text_ids, () for ``<|endoftext|>``.

        Raises: CheckpointError if the library cannot read it, or if it encodes with BPE dropout.
        """
        self.data = dict(data)
        self._library = _library(self.data)
        added = self._library.get_added_tokens_decoder()
        vocab = self._library.get_vocab(with_added_tokens=True)
        self._tokens = {id_: token for token, id_ in vocab.items()}
        if len(self._tokens) < len(vocab):
            raise _unsupported("two tokens that share an id")
        size = 1 + max(self._tokens, default=0)
        if size > _MAX_GAP + len(vocab):
            raise _unsupported(f"the id {size - 1}, far above all others")
        super().__init__(
            name,
            {token.content: id_ for id_, token in added.items()},
            vocab_size=size,
            textless_ids=[id_ for id_, token in added.items() if token.special],
            prefix=_prefix(self._library),
            end_of_text_ids=end_of_text_ids,
        )
        for id_ in added:  # a normalized one has its normalized text
            self._tokens[id_] = self._library.id_to_token(id_) or ""
        self._added_bytes = {id_: self._tokens[id_].encode() for id_ in added}
        self._known = _known_characters(self.data, vocab)
        decoders = _types(self.data.get("decoder")) or _types(self.data.get("pre_tokenizer"))
        self._parsing: dict[bool, tokenizers.Tokenizer] = {}
        """Tokenizers that parse special tokens, by ``is_start``."""
        self._is_byte_level = "ByteLevel" in decoders
        self._has_byte_tokens = "ByteFallback" in decoders

    def encode_array(
        self, text: str, *, is_start: bool = True, special: bool = False
    ) -> npt.NDArray[np.uint32]:
        text = well_formed(text)
        library = self._library if is_start else self._continuing
        for plain in self.special_pattern.split(text)[::2] if special else [text]:
            self._check_characters(library, plain)
        if special:
            if is_start not in self._parsing:
                self._parsing[is_start] = _parsing(library)
            library = self._parsing[is_start]
        try:
            # The fast variant computes no offsets; its ids are the same.
            [encoding] = library.encode_batch_fast([text], add_special_tokens=False)
        except BaseException as error:
            if not _is_of_library(error):
                raise
            raise DataError(
                f"the vocabulary {self.name!r} cannot encode this text ({str(error)[:80]}). Leave "
                "out characters that are not in it, and break long runs of the same character."
            ) from None
        return np.array(encoding.ids, np.uint32)

    def token_bytes(self, token: int) -> bytes:
        token = int(token)
        text = self._tokens.get(token, "")
        if self._is_byte_level:
            if token in self._added_bytes:
                return self._added_bytes[token]
            try:
                return bytes([BYTE_OF_CHARACTER[character] for character in text])
            except KeyError:
                return text.encode()
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(text)):
            return bytes([int(match[1], 16)])
        decoder = self._library.decoder
        if decoder is None:  # the library joins tokens with spaces
            return f" {text}".encode() if text else b""
        # The text into which the library decodes a token between two others.
        gap = decoder.decode([_MARK, _MARK])[1:-1]
        inside = decoder.decode([_MARK, text, _MARK])[1:-1].removesuffix(gap)
        return inside.encode() if text else b""

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "tokenizer_json": self.data,
            "end_of_text": list(self.end_of_text_ids),
        }

    def unencodable(self, text: str) -> set[str]:
        if self._known is None:
            return set()
        missing = set()
        for character in set(text):
            try:
                self._check_characters(self._library, character)
            except DataError:
                missing.add(character)
        return missing

    @cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        """The library's tokenizer for later pieces of a text: it adds no space before a piece."""
        data = dict(self.data)
        normalizers = steps_of(data.get("normalizer"))
        pre_tokenizers = steps_of(data.get("pre_tokenizer"))
        kept = [step for step in normalizers if step["type"] != "Prepend"]
        plain = [step | _NO_SPACE.get(step["type"], {}) for step in pre_tokenizers]
        if (kept, plain) == (normalizers, pre_tokenizers):
            return self._library
        if kept != normalizers:
            data["normalizer"] = {"type": "Sequence", "normalizers": kept}
        if plain != pre_tokenizers:
            data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": plain}
        return _library(data)

    def _check_characters(self, library: tokenizers.Tokenizer, text: str) -> None:
        """Raise DataError for a character that the library would silently drop."""
        known = self._known
        if known is None:
            return
        if library.normalizer is not None:
            text = library.normalizer.normalize_str(text)
        pieces = [text]
        if library.pre_tokenizer is not None:
            pieces = [piece for piece, _ in library.pre_tokenizer.pre_tokenize_str(text)]
        missing = next((c for piece in pieces for c in piece if c not in known), None)
        if missing is not None:
            what = f"character {missing!r}"
            if self._is_byte_level and missing in BYTE_OF_CHARACTER:
                what = f"byte {bytes([BYTE_OF_CHARACTER[missing]])!r}"
            raise unencodable_error(self.name, what)


def from_dict(parts: Mapping[str, Any]) -> ImportedTokenizer:
    """Rebuild a tokenizer from ``ImportedTokenizer.to_dict``."""
    try:
        ends = tuple(map(int, parts["end_of_text"]))
        return ImportedTokenizer(str(parts["name"]), parts["tokenizer_json"], ends)
    except (KeyError, TypeError, ValueError, CheckpointError) as error:
        raise DataError(f"the saved vocabulary is damaged: {error!r}.") from None


_NO_SPACE: Mapping[str, dict[str, Any]] = {
    "Metaspace": {"prepend_scheme": "never", "add_prefix_space": False},
    "ByteLevel": {"add_prefix_space": False},
}


def _unsupported(what: str) -> CheckpointError:
    """Return the error for a tokenizer.json that cannot be used."""
    return CheckpointError(
        f"tokenizer.json has {what}, which is not supported. Remove that from the file."
    )


def _library(data: Mapping[str, Any]) -> tokenizers.Tokenizer:
    try:
        if data["model"].get("dropout"):
            raise _unsupported(f"the model's dropout {str(data['model']['dropout'])[:20]!r}")
        library = tokenizers.Tokenizer.from_str(json.dumps(data))
    except BaseException as error:
        if isinstance(error, CheckpointError) or not _is_of_library(error):
            raise
        raise CheckpointError(
            f"tokenizer.json is damaged ({type(error).__name__}: {str(error)[:120]!r}). "
            "Write or download it again."
        ) from None
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True  # as plain text
    return library


def _parsing(library: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    copy = tokenizers.Tokenizer.from_str(library.to_str())
    copy.encode_special_tokens = False
    return copy


def _types(part: Mapping[str, Any] | None) -> list[str]:
    return [step["type"] for step in steps_of(part)]


def _is_of_library(error: BaseException) -> bool:
    """Return whether the library may have raised an error: it has no exception class of its own."""
    # A panic in its Rust code is not an Exception, and its class cannot be imported.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _prefix(library: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Return the ids that the post-processor adds before a text.

    Ids that it adds after a text, such as an end-of-text token, are left out: a prompt is
    continued, and documents of a corpus have their own separator.
    """
    # A one-token vocabulary, because there is no text that every real vocabulary can encode.
    word = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    if library.post_processor is not None:
        word.post_processor = library.post_processor
    encoding = word.encode("a")
    is_added = encoding.special_tokens_mask
    return tuple(encoding.ids[: is_added.index(0) if 0 in is_added else None])


def _known_characters(data: Mapping[str, Any], vocab: Mapping[str, int]) -> frozenset[str] | None:
    """Return the characters that a BPE model without an unknown token encodes; None for all."""
    model = data["model"]
    if model["type"] != "BPE" or model.get("unk_token") is not None:
        return None
    if model.get("byte_fallback") and all(f"<0x{b:02X}>" in vocab for b in range(256)):
        return None
    is_byte_level = "ByteLevel" in _types(data.get("pre_tokenizer"))
    if is_byte_level and vocab.keys() >= BYTE_OF_CHARACTER.keys():
        return None
    return frozenset(token for token in vocab if len(token) == 1)
