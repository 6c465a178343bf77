"""Read and write the tokenizer.json of byte-level BPE vocabularies with tiktoken.

Our vocabularies are written so that the tokenizers library gives every text the same ids. They,
and those in GPT-2's layout, are read back with tiktoken.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from minigpt.errors import CheckpointError, MinigptError
from minigpt.text.byte_pairs import TiktokenTokenizer, make_encoding
from minigpt.text.characters import last_parts
from minigpt.text.vocabulary_parts import BYTE_OF_CHARACTER

CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
ANY_CHARACTER = r"[\s\S]"
"""Split pattern that isolates each character, so that nothing is merged."""
PLAIN_BPE = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
}
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MOST_STEPS = 2**25  # five times as many as for cl100k_base

# Oniguruma, which tokenizers uses, and fancy-regex, which tiktoken uses, disagree on these:
# X{1,3}+ is possessive only in fancy-regex, (?s:.) exists only there, and ^ and $ match at every
# line in Oniguruma. For $ after \s++ that makes no difference: no line break can follow.
_ATOM_INTERVAL = r"(?P<atom>\\p\{\w+\}|\[[^\]]+\]|\\?[^\s{}()\[\]])(?P<interval>\{\d+(?:,\d*)?\})"
_POSSESSIVE = re.compile(_ATOM_INTERVAL + r"\+")
_ATOMIC = re.compile(rf"\(\?>{_ATOM_INTERVAL}\)")
_AMBIGUOUS = re.compile(
    r"\{\d+(?:,\d*)?\}\+|\(\?\w*[ms]\w*[:)]|(?<![\[\\])\^|(?<!\\)(?<!\\s\+\+)\$"
)


def tiktoken_tokenizer(
    data: Mapping[str, Any], name: str, end_of_text_ids: tuple[int, ...]
) -> TiktokenTokenizer | None:
    """Read a byte-level BPE with tiktoken; None if tiktoken could give other ids.

    Writing the result must reproduce the file, except for differences that change no ids.
    """
    try:
        parts = _normalized_parts(data)
        specials = {token["content"]: token["id"] for token in parts["added_tokens"]}
        ranks = {
            bytes([BYTE_OF_CHARACTER[character] for character in token]): id_
            for token, id_ in parts["model"]["vocab"].items()
            if token not in specials
        }
        is_byte_special = not specials.keys().isdisjoint(BYTE_OF_CHARACTER)
        if _changes_text(data) or is_byte_special:
            return None
        if sum(len(token) ** 2 for token in ranks) > _MOST_STEPS:
            return None  # merges_of would take minutes
        pattern = parts["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        encoding = make_encoding(name, _from_oniguruma(pattern), ranks, specials)
        tokenizer = TiktokenTokenizer(name, encoding, end_of_text_ids)
        written = byte_pair_json(tokenizer)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, MinigptError):
        return None
    return tokenizer if written | parts == written else None


def _normalized_parts(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a tokenizer.json that ``byte_pair_json`` writes, spelled as it does.

    Merges may be lists, empty options omitted, and GPT-2's pattern implied by ByteLevel.
    """
    added = [token | {"normalized": False} for token in data["added_tokens"]]
    model = PLAIN_BPE | {"ignore_merges": False} | data["model"]
    for option in ("continuing_subword_prefix", "end_of_word_suffix"):
        model[option] = model[option] or None
    model["merges"] = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    model["vocab"] = {token["content"]: token["id"] for token in added} | model["vocab"]
    splits = data["pre_tokenizer"]
    implied = {"use_regex": True} | splits | {"trim_offsets": False}
    if implied == BYTE_LEVEL | {"use_regex": True}:
        splits = splits_by(GPT2_PATTERN)
    return {"added_tokens": added, "pre_tokenizer": splits, "model": model}


def _changes_text(data: Mapping[str, Any]) -> bool:
    """Return whether a file normalizes texts, decodes other than bytes, or adds tokens."""
    processor = data["post_processor"] or {"type": "ByteLevel"}
    around = [] if processor["type"] == "ByteLevel" else processor["single"]
    adds_tokens = not all("Sequence" in part for part in around)
    is_changed = data["normalizer"] is not None or data["decoder"]["type"] != "ByteLevel"
    return is_changed or adds_tokens


def byte_pair_json(tokenizer: TiktokenTokenizer) -> dict[str, Any]:
    """Return a tokenizer.json with which the tokenizers library gives every text the same ids.

    Raises: CheckpointError if the library's regex dialect cannot express the split pattern.
    """
    ranks, specials = tokenizer.encoding._mergeable_ranks, tokenizer.special_ids
    merges = merges_of(ranks)
    n_reached = len(merges) + sum(len(token) == 1 for token in ranks)
    vocab = {to_characters(token): id_ for token, id_ in ranks.items()} | dict(specials)
    return tokenizer_file(
        added_tokens=[
            {"id": id_, "content": text, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for text, id_ in sorted(specials.items(), key=lambda item: item[1])
        ],
        pre_tokenizer=splits_by(_to_oniguruma(tokenizer.encoding._pat_str)),
        decoder=BYTE_LEVEL,
        model=PLAIN_BPE
        | {
            # A piece in the vocabulary is one token for tiktoken, even if no merges produce it.
            "ignore_merges": n_reached < len(ranks),
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [" ".join(map(to_characters, pair)) for pair in merges],
        },
    )


def tokenizer_file(
    *,
    model: dict[str, Any],
    decoder: dict[str, Any],
    added_tokens: Sequence[dict[str, Any]] = (),
    normalizer: dict[str, Any] | None = None,
    pre_tokenizer: dict[str, Any] | None = None,
    post_processor: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a tokenizer.json with these parts."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added_tokens),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": model,
    }


def splits_by(pattern: str) -> dict[str, Any]:
    """Return the pre_tokenizer that splits a text by a pattern in Oniguruma's dialect."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    steps = [split | {"invert": False}, BYTE_LEVEL | {"use_regex": False}]
    return {"type": "Sequence", "pretokenizers": steps}


def to_characters(token: bytes) -> str:
    """Return a token's bytes as the printable characters of byte-level BPE."""
    return "".join(map(CHARACTER_OF_BYTE.__getitem__, token))


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the ordered merges that are equivalent to tiktoken's ranks.

    The pair of a token is its two parts before the last merge. A token that no merges produce has
    no pair.
    """
    parts = (last_parts(token, ranks) for token in sorted(ranks, key=ranks.__getitem__))
    return [(pair[0], pair[1]) for pair in parts if len(pair) == 2]


def _from_oniguruma(pattern: str) -> str:
    return _ATOMIC.sub(r"\g<atom>\g<interval>+", pattern.replace(ANY_CHARACTER, "(?s:.)"))


def _to_oniguruma(pattern: str) -> str:
    pattern = _POSSESSIVE.sub(r"(?>\g<atom>\g<interval>)", pattern.replace("(?s:.)", ANY_CHARACTER))
    if found := _AMBIGUOUS.search(pattern):
        raise CheckpointError(
            f"the split pattern's {found[0]!r} means something else in tokenizer.json. "
            "Write the pattern without it."
        )
    return pattern
