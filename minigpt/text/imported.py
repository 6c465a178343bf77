"""Vocabularies of other models, read and encoded by the tokenizers library.

Its ids are those of tokenizer.json by construction. Text of special tokens is plain text; added
tokens that are not special are found in a text, as the library does.
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
from minigpt.text.tokenizer import BYTE_OF_CHARACTER, Tokenizer, well_formed

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_VISIBLE_SPACE = "\u2581"
_MARK = "\x01"
_LARGEST_GAP = 2**20

JSONValue = dict[str, Any]


class ImportedTokenizer(Tokenizer):
    """A tokenizer.json, as ``tokenizers.Tokenizer`` reads it."""

    def __init__(
        self, name: str, data: Mapping[str, Any], end_of_text_ids: tuple[int, ...] = ()
    ) -> None:
        """Args: data, the parsed tokenizer.json; end_of_text_ids, () for ``<|endoftext|>``.

        Raises: CheckpointError if the library cannot read it, or it encodes at random or puts
            tokens after a text.
        """
        self.data = dict(data)
        self._library = _library(self.data)
        added = self._library.get_added_tokens_decoder()
        vocab = self._library.get_vocab(with_added_tokens=True)
        self._tokens = {id_: token for token, id_ in vocab.items()}
        if len(self._tokens) < len(vocab):
            raise _unsupported("two tokens that share an id")
        size = 1 + max(self._tokens, default=0)
        if size > _LARGEST_GAP + len(vocab):
            raise _unsupported(f"the id {size - 1}, far above all others")
        super().__init__(
            name,
            {token.content: id_ for id_, token in added.items()},
            vocab_size=size,
            textless_ids=[id_ for id_, token in added.items() if token.special],
            prefix=_prefix(self._library),
            end_of_text_ids=end_of_text_ids,
        )
        self._added_bytes = {id_: token.content.encode() for id_, token in added.items()}
        self._known = _known_characters(self.data, vocab)
        decoders = _types(self.data.get("decoder")) or _types(self.data.get("pre_tokenizer"))
        self._is_byte_level = "ByteLevel" in decoders
        self._has_byte_tokens = "ByteFallback" in decoders

    def encode_array(self, text: str, *, is_start: bool = True) -> npt.NDArray[np.uint32]:
        text = well_formed(text)
        library = self._library if is_start else self._continuing
        self._check_characters(library, text)
        try:
            # The fast variant leaves out offsets; it encodes alike.
            [encoding] = library.encode_batch_fast([text], add_special_tokens=False)
        except Exception as error:  # the library raises no narrower class
            raise DataError(
                f"the vocabulary {self.name!r} cannot encode this text ({str(error)[:80]}). "
                "Break its longest runs of the same character."
            ) from None
        return np.array(encoding.ids, np.uint32)

    def token_bytes(self, token: int) -> bytes:
        token = int(token)
        if token in self._added_bytes:
            return self._added_bytes[token]
        text = self._tokens.get(token, "")
        if self._is_byte_level:
            try:
                return bytes([BYTE_OF_CHARACTER[character] for character in text])
            except KeyError:
                return text.encode()
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(text)):
            return bytes([int(match[1], 16)])
        decoder = self._library.decoder
        if decoder is None:  # the library joins tokens with spaces
            return f" {text}".encode() if text else b""
        # The text that the library gives for a token between two others.
        gap = decoder.decode([_MARK, _MARK])[1:-1]
        inside = decoder.decode([_MARK, text, _MARK])[1:-1].removesuffix(gap)
        return inside.encode() if text else b""

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "tokenizer_json": self.data,
            "end_of_text": list(self.end_of_text_ids),
        }

    @staticmethod
    def from_dict(parts: Mapping[str, Any]) -> "ImportedTokenizer":
        try:
            ends = tuple(map(int, parts["end_of_text"]))
            return ImportedTokenizer(str(parts["name"]), parts["tokenizer_json"], ends)
        except (KeyError, TypeError, ValueError, CheckpointError) as error:
            raise DataError(f"the saved vocabulary is damaged: {error!r}.") from None

    @cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        """The library's tokenizer for later pieces of a text: without a space before the piece."""
        data = dict(self.data)
        normalizers = _steps(data.get("normalizer"))
        pre_tokenizers = _steps(data.get("pre_tokenizer"))
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
        lacking = next((c for piece in pieces for c in piece if c not in known), None)
        if lacking is not None:
            what = f"character {lacking!r}"
            if self._is_byte_level:
                what = f"byte {bytes([BYTE_OF_CHARACTER[lacking]])!r}"
            raise DataError(
                f"the vocabulary {self.name!r} has no token for the {what}. "
                "Leave that character out of the text."
            )


_NO_SPACE: Mapping[str, JSONValue] = {
    "Metaspace": {"prepend_scheme": "never", "add_prefix_space": False},
    "ByteLevel": {"add_prefix_space": False},
}


def import_tokenizer(
    data: Mapping[str, Any],
    name: str,
    *,
    config: Mapping[str, Any],
    end_of_text_ids: tuple[int, ...] = (),
) -> ImportedTokenizer:
    """Read a tokenizer.json of another model.

    Args: config, the parsed tokenizer_config.json; its add_bos_token takes precedence over
        tokenizer.json, as in transformers.
    Raises: CheckpointError as ``ImportedTokenizer``, or if bos_token is not in the vocabulary.
    """
    tokenizer = ImportedTokenizer(name, data, end_of_text_ids)
    begins = config.get("add_bos_token")
    if begins is None:
        return tokenizer
    token = config.get("bos_token")
    token = token["content"] if isinstance(token, dict) else token
    prefix = (tokenizer.special_ids[token],) if begins and token is not None else ()
    if prefix == tokenizer.prefix:
        return tokenizer
    processor = _beginning_with(str(token), prefix[0]) if prefix else None
    return ImportedTokenizer(name, {**data, "post_processor": processor}, end_of_text_ids)


def json_from_scores(data: Mapping[str, Any]) -> JSONValue:
    """Return llama2.c's vocabulary as a tokenizer.json.

    Its first three ids are unknown, beginning and end of text. It merges the two parts whose
    union has the highest score.

    Args: data, the tokens, with plain spaces, and their scores.
    Raises: CheckpointError if either is damaged, or their numbers differ.
    """
    try:
        tokens, scores = list(map(str, data["tokens"])), list(map(float, data["scores"]))
        if len(tokens) != len(scores):
            raise ValueError(f"{len(tokens)} tokens and {len(scores)} scores")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the vocabulary's tokens and scores are damaged ({str(error)[:80]!r}). "
            "Download it again."
        ) from None
    names = dict(enumerate(("<unk>", "<s>", "</s>")))
    vocab = {names.get(i, t.replace(" ", _VISIBLE_SPACE)): i for i, t in enumerate(tokens)}
    by_score = sorted(vocab.keys() - names.values(), key=lambda t: (-scores[vocab[t]], vocab[t]))
    splits = (
        (t[:i], t[i:]) for t in by_score if not _BYTE_TOKEN.fullmatch(t) for i in range(1, len(t))
    )
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _VISIBLE_SPACE}
    prepend = {"type": "Prepend", "prepend": _VISIBLE_SPACE}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id_, "content": name, "special": True} | flags for id_, name in names.items()
        ],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]},
        "pre_tokenizer": None,
        "post_processor": _beginning_with("<s>", 1),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _VISIBLE_SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [list(pair) for pair in splits if vocab.keys() >= set(pair)],
        },
    }


def _beginning_with(token: str, id_: int) -> JSONValue:
    single = [
        {"SpecialToken": {"id": token, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [id_], "tokens": [token]}},
    }


def _unsupported(what: str) -> CheckpointError:
    """Return the error for a tokenizer.json that cannot be used."""
    return CheckpointError(
        f"tokenizer.json has {what}, which is not supported. Choose another model."
    )


def _library(data: Mapping[str, Any]) -> tokenizers.Tokenizer:
    try:
        if data["model"].get("dropout"):
            raise _unsupported(f"the model's dropout {str(data['model']['dropout'])[:20]!r}")
        library = tokenizers.Tokenizer.from_str(json.dumps(data))
    except CheckpointError:
        raise
    except Exception as error:  # the library raises no narrower class
        raise CheckpointError(
            f"tokenizer.json is damaged ({type(error).__name__}: {str(error)[:120]!r}). "
            "Write or download it again."
        ) from None
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True  # the text of a special token is text
    return library


def _steps(part: Mapping[str, Any] | None) -> list[JSONValue]:
    """Return the steps of a part of tokenizer.json, in one list however they are nested."""
    if part is None:
        return []
    names = ("normalizers", "pretokenizers", "decoders")
    nested = [step for name in names for step in part.get(name, ())]
    return [inner for step in nested for inner in _steps(step)] if nested else [dict(part)]


def _types(part: Mapping[str, Any] | None) -> list[str]:
    return [step["type"] for step in _steps(part)]


def _prefix(library: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Return the ids that the post-processor puts before a text."""
    text = library.encode("a", add_special_tokens=False).ids
    whole = library.encode("a").ids
    n_before = len(whole) - len(text)
    if whole[n_before:] != text:
        raise _unsupported("a post-processor that puts tokens after a text")
    return tuple(whole[:n_before])


def _known_characters(data: Mapping[str, Any], vocab: Mapping[str, int]) -> frozenset[str] | None:
    """Return the characters that a BPE without an unknown token keeps, None if it keeps all."""
    model = data["model"]
    if model["type"] != "BPE" or model.get("unk_token") is not None:
        return None
    if model.get("byte_fallback") and all(f"<0x{b:02X}>" in vocab for b in range(256)):
        return None
    is_byte_level = "ByteLevel" in _types(data.get("pre_tokenizer"))
    if is_byte_level and vocab.keys() >= BYTE_OF_CHARACTER.keys():
        return None
    return frozenset(token for token in vocab if len(token) == 1)
