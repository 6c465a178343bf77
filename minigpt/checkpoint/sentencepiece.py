"""SentencePiece's BPE with byte fallback, as Llama 2, Mistral and llama2.c use it, over bytes.

Its parts are characters at first, and bytes where it has no token for a character; a space is
written as a visible character, one before each text. Ranks over bytes do the same if the bytes
of each character that is a token merge before all else; what is left of other characters then
falls apart into bytes again, each with an id of its own.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from minigpt.checkpoint.merges import merge_order, merges_of, unsupported
from minigpt.errors import CheckpointError
from minigpt.text.rules import VISIBLE_SPACE
from minigpt.text.tokenizer import Tokenizer

_BYTE = re.compile("<0x([0-9A-F]{2})>")
# No token has a space after something else, as a rule: then words are merged one by one.
_WORDS = f"{VISIBLE_SPACE}+[^{VISIBLE_SPACE}]*|[^{VISIBLE_SPACE}]+"
_WHOLE = r"(?s:.+)"

_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": VISIBLE_SPACE}
_PREPEND = {"type": "Prepend", "prepend": VISIBLE_SPACE}
_METASPACE = {"type": "Metaspace", "replacement": VISIBLE_SPACE, "split": False}
_DECODERS = [
    {"type": "Replace", "pattern": {"String": VISIBLE_SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]


@dataclass(frozen=True)
class Pieces:
    """A SentencePiece vocabulary in terms of an encoding."""

    ids: Mapping[bytes, tuple[int, ...]]
    """The encoding's tokens in the order of their ranks, and what each stands for."""
    tokens: Mapping[int, bytes]
    """The text of each id."""
    pattern: str
    """The regex that splits a normalized text."""


def is_sentencepiece(data: Mapping[str, Any]) -> bool:
    """Tell whether a tokenizer.json has its bytes as tokens of their own."""
    has_sequence = (data.get("decoder") or {}).get("type") == "Sequence"
    return has_sequence and data["model"].get("byte_fallback") is True


def normalization_of(data: Mapping[str, Any]) -> str:
    """Return the normalization, a key of NORMALIZATIONS, of a tokenizer.json.

    Raises: CheckpointError if it is none of them.
    """
    normalizer, pre_tokenizer = data.get("normalizer"), data.get("pre_tokenizer")
    if normalizer == {"type": "Sequence", "normalizers": [_PREPEND, _REPLACE]}:
        if pre_tokenizer is None:
            return "metaspace"
    elif normalizer is None and isinstance(pre_tokenizer, dict):
        rest = {key: value for key, value in pre_tokenizer.items() if key != "prepend_scheme"}
        if rest == _METASPACE and pre_tokenizer.get("prepend_scheme") in ("first", "always"):
            return "metaspace once"
    raise unsupported(f"the normalizer {str(normalizer)[:60]!r}")


def pieces_from_json(vocab: Mapping[str, int], merges: Iterable[tuple[str, str]]) -> Pieces:
    """Return what a vocabulary and its merges are over bytes; special tokens are not among them.

    Raises: CheckpointError if bytes are lacking, or no order of ranks merges alike.
    """
    bytes_ = {int(match[1], 16): vocab[t] for t in vocab if (match := _BYTE.fullmatch(t))}
    others = {token.encode(): id_ for token, id_ in vocab.items() if not _BYTE.fullmatch(token)}
    characters = [token.encode() for token in vocab if len(token) == 1]
    if lacking := [b for b in range(256) if b not in bytes_ and bytes([b]) not in characters]:
        raise unsupported(f"no token for the byte {lacking[0]:#04x}")
    pairs = [(left.encode(), right.encode()) for left, right in merges]
    order = merge_order(pairs, others, characters, keeps_whole=False)
    ids: dict[bytes, tuple[int, ...]]
    ids = {bytes([b]): (bytes_.get(b, -1),) for b in range(256)}
    beginnings = {token[:n] for token in characters for n in range(2, len(token))}
    for beginning in sorted(beginnings, key=len):
        ids[beginning] = tuple(bytes_[b] for b in beginning)
    ids |= {token: (others[token],) for token in [*characters, *order]}
    tokens = {id_: token.decode().replace(VISIBLE_SPACE, " ") for token, id_ in others.items()}
    crosses = any(re.search(f"[^{VISIBLE_SPACE}]{VISIBLE_SPACE}", token) for token in vocab)
    return Pieces(
        ids=ids,
        tokens={id_: bytes([b]) for b, id_ in bytes_.items()}
        | {id_: token.encode() for id_, token in tokens.items()},
        pattern=_WHOLE if crosses else _WORDS,
    )


def pieces_to_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the parts of tokenizer.json that are not as byte-level BPE has them.

    Args: tokenizer, of a vocabulary that ``pieces_from_json`` read.
    """
    is_once = tokenizer.rules.normalization == "metaspace once"
    ids, texts = tokenizer.rules.ids, dict(enumerate(tokenizer.rules.tokens))
    ranks = tokenizer.encoding._mergeable_ranks
    ranks = {token: rank for token, rank in ranks.items() if len(ids[rank]) == 1}
    longer = {ids[rank][0]: token.decode() for token, rank in ranks.items() if len(token) > 1}
    single = {id_: text[0] for id_, text in texts.items() if len(text) == 1 and id_ not in longer}
    counts = Counter(single.values())  # two if a character has a token besides its byte's
    are_bytes = {id_: b for id_, b in single.items() if counts[b] == 1 or ids[b] != (id_,)}
    unmerged = {
        id_: text.decode().replace(" ", VISIBLE_SPACE)
        for id_, text in texts.items()
        if id_ not in are_bytes and text
    }
    strings = unmerged | longer | {id_: f"<0x{b:02X}>" for id_, b in are_bytes.items()}
    characters = [token for token in ranks if len(token) == 1 or len(token.decode()) == 1]
    sequence = {"type": "Sequence", "normalizers": [_PREPEND, _REPLACE]}
    return {
        "normalizer": None if is_once else sequence,
        "pre_tokenizer": _METASPACE | {"prepend_scheme": "first"} if is_once else None,
        "decoder": {"type": "Sequence", "decoders": _DECODERS},
        "vocab": {text: id_ for id_, text in strings.items()},
        "merges": [(left.decode(), right.decode()) for left, right in merges_of(ranks, characters)],
        "byte_fallback": True,
        "fuse_unk": True,
    }


def json_from_scores(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return llama2.c's vocabulary as a tokenizer.json.

    Its first three ids are unknown, beginning and end of text. It merges the two parts whose
    union has the highest score.

    Args: data, the tokens, in which spaces are plain, and their scores.
    Raises: CheckpointError if they are not that, or not as many of each.
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
    vocab = {names.get(i, t.replace(" ", VISIBLE_SPACE)): i for i, t in enumerate(tokens)}
    by_score = sorted(vocab.keys() - names.values(), key=lambda t: (-scores[vocab[t]], vocab[t]))
    splits = ((t[:i], t[i:]) for t in by_score if not _BYTE.fullmatch(t) for i in range(1, len(t)))
    return {
        "added_tokens": [{"id": id_, "content": n, "special": True} for id_, n in names.items()],
        "normalizer": {"type": "Sequence", "normalizers": [_PREPEND, _REPLACE]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": _DECODERS},
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [pair for pair in splits if vocab.keys() >= set(pair)],
        },
    }
