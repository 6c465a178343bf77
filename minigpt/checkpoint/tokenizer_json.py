"""tokenizer.json of Hugging Face's tokenizers library <-> Tokenizer, for byte-level BPE.

tiktoken knows ranks: of all neighbouring parts whose union is a token, the one of least rank is
merged, leftmost first. tokenizers knows merges: an ordered list of pairs. One determines the
other. Parts that end up inside a token were merged as if it stood alone, since any merge across
its borders would have swallowed a border for good; so each token has one pair that can make it,
the last of its merges in isolation, and pairs in the order of their tokens' ranks merge alike.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tiktoken_ext.openai_public import r50k_pat_str  # type: ignore[import-untyped]

from minigpt.errors import CheckpointError, DataError
from minigpt.text.tokenizer import END_OF_TEXT, Tokenizer, make_encoding

NAME_FIELD = "name_or_path"
"""Where tokenizer_config.json keeps Tokenizer.name."""

_NO_RANK = 2**32
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
_PLAIN_BPE = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
}

_PROBE = "Don't WE\u2019LL x_1234567  \t\r\n\n é 漢字 ١٢ 🙂\u0301\u200d\u00a0\x00\x7f\u0085 end \n"


def _byte_alphabet() -> dict[int, str]:
    # GPT-2's bijection of bytes to printable characters: Radford et al. 2019, encoder.py.
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable}
    return alphabet | {byte: chr(256 + n) for n, byte in enumerate(others)}


_CHARACTERS = _byte_alphabet()
# Characters of the first 256 that stand for no byte become one that Latin-1 cannot encode.
_BYTES = dict.fromkeys(range(256), 0x10FFFF) | {ord(c): byte for byte, c in _CHARACTERS.items()}


def _to_characters(token: bytes) -> str:
    return token.decode("latin-1").translate(_CHARACTERS)


def _to_bytes(token: str) -> bytes:
    return token.translate(_BYTES).encode("latin-1")


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the pair that makes each token of more than one byte, in the order of the ranks.

    Raises: CheckpointError if merging does not reach a token from tokens of lesser rank.
    """
    made = _single_bytes(ranks)
    merges = []
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__):
        pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
        pair = next((pair for pair in pairs if _is_last_merge(*pair, made, ranks)), None)
        if pair is None:
            raise CheckpointError(
                f"merging never makes the token {token!r}, which tokenizer.json cannot express. "
                "Train the vocabulary again."
            )
        merges.append(pair)
        made[token] = (ranks[token], *pair)
    return merges


_Made = dict[bytes, tuple[int, bytes, bytes]]  # token -> when it is made, and of which parts


def _single_bytes(ranks: Mapping[bytes, int]) -> _Made:
    return {token: (-1, b"", b"") for token in ranks if len(token) == 1}


def _is_last_merge(left: bytes, right: bytes, made: _Made, ranks: Mapping[bytes, int]) -> bool:
    """Tell whether the bytes of left + right, merged as if alone, end as these two parts.

    Takes the merges of both apart, the last one first: at no moment may the two parts that meet
    at the border have been next in the order of ranks.
    """
    if left not in made or right not in made:
        return False
    left_until = right_until = _NO_RANK  # when the part at the border is merged into a larger one
    while True:
        (left_rank, _, tail), (right_rank, head, _) = made[left], made[right]
        if left_rank > right_rank:
            left, left_until = tail, left_rank
        elif right_rank >= 0:  # of equal ranks the rightmost is merged last
            right, right_until = head, right_rank
        else:
            return True
        rank = ranks.get(left + right, _NO_RANK)
        if rank < left_until and rank <= right_until:
            return False


def tokenizer_to_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return tokenizer.json: the tokenizers library gives every text the same ids.

    As always there, special tokens in a text are found unless it is told not to look for them.
    Raises: CheckpointError if the split pattern cannot be said in the library's regex dialect, or
        merging does not reach a token.
    """
    ranks, specials = tokenizer.encoding._mergeable_ranks, tokenizer.encoding._special_tokens
    vocab = {_to_characters(token): rank for token, rank in ranks.items()} | specials
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id_, "content": text, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for text, id_ in sorted(specials.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": _pattern_to_oniguruma(tokenizer.encoding._pat_str)},
                    "behavior": "Isolated",
                    "invert": False,
                },
                _BYTE_LEVEL | {"use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": _PLAIN_BPE
        | {
            "ignore_merges": False,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [" ".join(map(_to_characters, pair)) for pair in merges_of(ranks)],
        },
    }


def tokenizer_config(tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
    """Return tokenizer_config.json, for transformers; the name in it is ours."""
    has_end = tokenizer.end_of_text is not None
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "bos_token": END_OF_TEXT if has_end else None,
        "eos_token": END_OF_TEXT if has_end else None,
        NAME_FIELD: tokenizer.name,
    }


def tokenizer_from_json(data: Mapping[str, Any], name: str) -> Tokenizer:
    """Read a tokenizer.json of byte-level BPE.

    Every added token becomes a special one: never found in a text, only put in by id.

    Args: data, the parsed file; name, for the Tokenizer.
    Raises: CheckpointError naming the part that is damaged, or that Tokenizer cannot do.
    """
    try:
        model = _checked_model(data)
        specials = {token["content"]: token["id"] for token in data.get("added_tokens") or ()}
        vocab = {token: id_ for token, id_ in model["vocab"].items() if token not in specials}
        ids = [*specials.values(), *vocab.values()]
        if not all(type(id_) is int and 0 <= id_ < _NO_RANK for id_ in ids):
            raise _unsupported("an id that is no 32-bit number")
        tokens = {token: _to_bytes(token) for token in vocab}
        ranks = {tokens[token]: id_ for token, id_ in vocab.items()}
        _check_merges(ranks, model["merges"], tokens)
        encoding = make_encoding(name, _split_pattern(data["pre_tokenizer"]), ranks, specials)
    except (KeyError, TypeError, ValueError, AttributeError, DataError) as error:
        raise CheckpointError(
            f"tokenizer.json is damaged ({type(error).__name__}: {str(error)[:120]!r}). "
            "Write or download it again."
        ) from None
    return _probed(Tokenizer(name, encoding))


def _unsupported(what: str) -> CheckpointError:
    return CheckpointError(
        f"tokenizer.json has {what}, and only plain byte-level BPE is read. Choose a model "
        "with GPT-2's kind of tokenizer."
    )


def _require(part: str, found: Any, allowed: Any) -> None:
    if found is not None and found != allowed:
        raise _unsupported(f"{part} {str(found)[:60]!r}")


def _checked_model(data: Mapping[str, Any]) -> Mapping[str, Any]:
    _require("the normalizer", data.get("normalizer"), None)
    _check_post_processor(data.get("post_processor") or {})
    _require("the decoder", (data.get("decoder") or {}).get("type"), "ByteLevel")
    model: Mapping[str, Any] = data["model"]
    for field, value in _PLAIN_BPE.items():
        found = model.get(field)
        _require(f"the model's {field}", found if found != "" else None, value)
    return model


def _check_post_processor(found: Mapping[str, Any]) -> None:
    # A template that adds no token is what transformers writes; ByteLevel moves only the offsets.
    is_idle = found.get("type") == "TemplateProcessing" and all(
        part.keys() == {"Sequence"} for part in found["single"]
    )
    if not is_idle:
        _require("the post-processor", found.get("type"), "ByteLevel")


def _check_merges(
    ranks: Mapping[bytes, int], merges: Iterable[str | list[str]], tokens: Mapping[str, bytes]
) -> None:
    """Refuse merges that are not ``merges_of`` the ranks, without having to search for those."""
    made = _single_bytes(ranks)
    last_rank = -1
    for merge in merges:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        left, right = tokens[first], tokens[second]
        rank = ranks[left + right]
        if rank <= last_rank or not _is_last_merge(left, right, made, ranks):
            raise _unsupported(f"the merge {merge!r} out of the order of its ids")
        made[left + right] = rank, left, right
        last_rank = rank
    # Whether ignore_merges is set does not matter then: a piece that is a token merges to it.
    if len(made) < len(ranks):
        raise _unsupported(f"{len(ranks) - len(made)} tokens that no merge makes")


def _split_pattern(pre_tokenizer: Any) -> str:
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    _require("the pre-tokenizers", [kind for kind in kinds if kind != "Split"], ["ByteLevel"])
    _require("the option add_prefix_space", steps[-1].get("add_prefix_space", True), False)
    uses_regex = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and uses_regex:
        return str(r50k_pat_str)  # GPT-2's own, said in a faster way
    _require("the pre-tokenizers", kinds, ["Split", "ByteLevel"])
    _require("the option use_regex", uses_regex, False)
    _require("the split's behavior", steps[0]["behavior"], "Isolated")
    _require("the split's invert", steps[0]["invert"], False)
    return _pattern_from_oniguruma(steps[0]["pattern"]["Regex"])


def _probed(tokenizer: Tokenizer) -> Tokenizer:
    # tokenizers keeps what lies between a pattern's matches as pieces; tiktoken drops it.
    for text in (_PROBE, *_PROBE):
        try:
            is_kept = tokenizer.decode(tokenizer.encode(text)) == text
        except DataError:  # a vocabulary without all bytes, which is its right
            continue
        if not is_kept:
            raise _unsupported("a split pattern that does not match all of a text")
    return tokenizer


# Oniguruma, which tokenizers uses, and fancy-regex, which tiktoken uses, disagree on these:
# X{1,3}+ is possessive only in fancy-regex, (?s:.) exists only there, and ^ and $ stand at every
# line's border in Oniguruma. After \s++ that is no difference: no line break can follow.
_ATOM_INTERVAL = r"(?P<atom>\\p\{\w+\}|\[[^\]]+\]|\\?[^\s{}()\[\]])(?P<interval>\{\d+(?:,\d*)?\})"
_POSSESSIVE = re.compile(_ATOM_INTERVAL + r"\+")
_ATOMIC = re.compile(rf"\(\?>{_ATOM_INTERVAL}\)")
_AMBIGUOUS = re.compile(
    r"\{\d+(?:,\d*)?\}\+|\(\?\w*[ms]\w*[:)]|(?<![\[\\])\^|(?<!\\)(?<!\\s\+\+)\$"
)


def _pattern_to_oniguruma(pattern: str) -> str:
    pattern = _POSSESSIVE.sub(r"(?>\g<atom>\g<interval>)", pattern.replace("(?s:.)", r"[\s\S]"))
    if found := _AMBIGUOUS.search(pattern):
        raise CheckpointError(
            f"the split pattern's {found[0]!r} means something else in tokenizer.json. "
            "Write the pattern without it."
        )
    return pattern


def _pattern_from_oniguruma(pattern: str) -> str:
    if found := _AMBIGUOUS.search(pattern):
        raise _unsupported(f"a split pattern with {found[0]!r}")
    return _ATOMIC.sub(r"\g<atom>\g<interval>+", pattern.replace(r"[\s\S]", "(?s:.)"))
