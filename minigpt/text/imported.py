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
from minigpt.text.tokenizer import (
    BPE_PATTERN,
    BYTE_OF_CHARACTER,
    END_OF_TEXT,
    Tokenizer,
    unencodable_error,
    well_formed,
)

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_VISIBLE_SPACE = "\u2581"
_MARK = "\x01"
_LARGEST_GAP = 2**20
# How Qwen2's tokenizer class splits text before merging, as its tokenizer.json publishes it.
_QWEN2_PATTERN = BPE_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_END_OF_TEXT = dict.fromkeys(("unk_token", "bos_token", "eos_token"), END_OF_TEXT)

JSONValue = dict[str, Any]


class ImportedTokenizer(Tokenizer):
    """A tokenizer.json, as ``tokenizers.Tokenizer`` reads it."""

    def __init__(
        self, name: str, data: Mapping[str, Any], end_of_text_ids: tuple[int, ...] = ()
    ) -> None:
        """Args: data, the parsed tokenizer.json; end_of_text_ids, () for ``<|endoftext|>``.

        Raises: CheckpointError if the library cannot read it, or it encodes at random.
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

    def encode_array(
        self, text: str, *, is_start: bool = True, special: bool = False
    ) -> npt.NDArray[np.uint32]:
        text = well_formed(text)
        library = self._library if is_start else self._continuing
        for plain in self.special_pattern.split(text)[::2] if special else [text]:
            self._check_characters(library, plain)
        if special:
            library = self._parsing if is_start else self._parsing_continuing
        try:
            # The fast variant leaves out offsets; it encodes alike.
            [encoding] = library.encode_batch_fast([text], add_special_tokens=False)
        except BaseException as error:
            if not _is_of_library(error):
                raise
            raise DataError(
                f"the vocabulary {self.name!r} cannot encode this text ({str(error)[:80]}). Leave "
                "out the characters that it lacks, and break long runs of the same character."
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

    def unencodable(self, text: str) -> set[str]:
        lacking = set()
        for character in set(text) if self._known is not None else ():
            try:
                self._check_characters(self._library, character)
            except DataError:
                lacking.add(character)
        return lacking

    @cached_property
    def _parsing(self) -> tokenizers.Tokenizer:
        """The library's tokenizer that finds special tokens in a text."""
        return _parsing(self._library)

    @cached_property
    def _parsing_continuing(self) -> tokenizers.Tokenizer:
        """As ``_parsing``, for later pieces of a text."""
        return _parsing(self._continuing)

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
            if self._is_byte_level and lacking in BYTE_OF_CHARACTER:
                what = f"byte {bytes([BYTE_OF_CHARACTER[lacking]])!r}"
            raise unencodable_error(self.name, what)


_NO_SPACE: Mapping[str, JSONValue] = {
    "Metaspace": {"prepend_scheme": "never", "add_prefix_space": False},
    "ByteLevel": {"add_prefix_space": False},
}


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


def json_from_merges(
    vocab: Mapping[str, Any], merges: str, config: Mapping[str, Any], added: Mapping[str, Any]
) -> JSONValue:
    """Return vocab.json and merges.txt as the tokenizer.json that transformers makes of them.

    Args: merges, the text of merges.txt; config, the parsed tokenizer_config.json, whose
        tokenizer_class decides how a text is split; added, the parsed added_tokens.json.
    Raises: CheckpointError for another class, or if a file is damaged.
    """
    kind = str(config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if kind not in ("GPT2Tokenizer", "CodeGenTokenizer", "Qwen2Tokenizer"):
        raise CheckpointError(
            f"vocab.json and merges.txt of a {kind[:40]!r} cannot be read without tokenizer.json. "
            "Write it with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained("
            "FOLDER)."
        )
    is_qwen = kind == "Qwen2Tokenizer"
    lines = [line for line in merges.split("\n") if line and not line.startswith("#version")]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": bool(config.get("add_prefix_space")),
        "trim_offsets": True,
        "use_regex": not is_qwen,
    }
    splits: JSONValue = byte_level
    if is_qwen:
        regex = {"Regex": _QWEN2_PATTERN}
        split = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
        splits = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    options: dict[str, JSONValue] = {str(token): {"id": id_} for token, id_ in added.items()}
    for id_, token in dict(config.get("added_tokens_decoder") or {}).items():
        options[token["content"]] = token | {"id": int(id_)}
    for field in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if (token := _content(config.get(field, _END_OF_TEXT.get(field)))) is not None:
            options.setdefault(token, {})
    ids = {str(token): int(id_) for token, id_ in vocab.items()}
    for token, option in options.items():
        ids.setdefault(token, option.get("id", 1 + max(ids.values(), default=-1)))
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    begin = _content(config.get("bos_token", _END_OF_TEXT["bos_token"]))
    begins = bool(config.get("add_bos_token")) and begin is not None
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            plain | {"special": True} | options[token] | {"id": ids[token], "content": token}
            for token in sorted(options, key=ids.__getitem__)
        ],
        "normalizer": {"type": "NFC"} if is_qwen else None,
        "pre_tokenizer": splits,
        "post_processor": _beginning_with(begin, ids[begin]) if begins else None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(vocab),
            "merges": [line.rstrip("\r") for line in lines],
        },
    }


def _content(token: Any) -> Any:
    """Return the text of a token, which may be given with its options."""
    return token["content"] if isinstance(token, dict) else token


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
    except BaseException as error:
        if isinstance(error, CheckpointError) or not _is_of_library(error):
            raise
        raise CheckpointError(
            f"tokenizer.json is damaged ({type(error).__name__}: {str(error)[:120]!r}). "
            "Write or download it again."
        ) from None
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True  # the text of a special token is text
    return library


def _parsing(library: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    copy = tokenizers.Tokenizer.from_str(library.to_str())
    copy.encode_special_tokens = False
    return copy


def _steps(part: Mapping[str, Any] | None) -> list[JSONValue]:
    """Return the steps of a part of tokenizer.json, in one list however they are nested."""
    if part is None:
        return []
    names = ("normalizers", "pretokenizers", "decoders")
    nested = [step for name in names for step in part.get(name, ())]
    return [inner for step in nested for inner in _steps(step)] if nested else [dict(part)]


def _types(part: Mapping[str, Any] | None) -> list[str]:
    return [step["type"] for step in _steps(part)]


def _is_of_library(error: BaseException) -> bool:
    """Return whether the library may have raised an error: it has no narrower class."""
    # A panic of its Rust code is not an Exception, and its class cannot be imported.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _prefix(library: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Return the ids that the post-processor puts before a text.

    Those that it puts after a text, such as an end-of-text token, are left out: a prompt is
    continued, and documents of a corpus have their own separator.
    """
    # A vocabulary of one token: no real one has a text that every one can encode.
    word = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    if library.post_processor is not None:
        word.post_processor = library.post_processor
    encoding = word.encode("a")
    is_added = encoding.special_tokens_mask
    return tuple(encoding.ids[: is_added.index(0) if 0 in is_added else None])


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
