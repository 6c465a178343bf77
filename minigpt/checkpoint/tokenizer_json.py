"""tokenizer.json of Hugging Face's tokenizers library <-> Tokenizer, for byte-level BPE."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from minigpt.checkpoint import sentencepiece
from minigpt.checkpoint.merges import merge_order, merges_of, unsupported
from minigpt.checkpoint.split_pattern import pattern_from_json, pattern_to_json
from minigpt.errors import CheckpointError, DataError
from minigpt.text.rules import Rules
from minigpt.text.tokenizer import END_OF_TEXT, Tokenizer, make_encoding

NAME_FIELD = "name_or_path"
"""Where tokenizer_config.json keeps Tokenizer.name."""

_LARGEST_ID = 2**32 - 1
_LARGEST_HOLE = 2**20
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
_UNKNOWN = ("unk_token", "fuse_unk", "byte_fallback")

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


def tokenizer_to_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return tokenizer.json: the tokenizers library gives every text the same ids.

    As always there, special tokens in a text are found unless it is told not to look for them.
    Raises: CheckpointError if the split pattern cannot be said in the library's regex dialect.
    """
    rules, specials = tokenizer.rules, tokenizer.special_ids
    parts = (
        sentencepiece.pieces_to_json(tokenizer)
        if rules.normalization.startswith("metaspace")
        else _byte_level_to_json(tokenizer)
    )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id_, "content": text, "special": text not in rules.added, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for text, id_ in sorted(specials.items(), key=lambda item: item[1])
        ],
        "normalizer": parts["normalizer"],
        "pre_tokenizer": parts["pre_tokenizer"],
        "post_processor": _prefix_to_json(rules.prefix, specials),
        "decoder": parts["decoder"],
        "model": _PLAIN_BPE
        | {name: parts[name] for name in ("fuse_unk", "byte_fallback") if name in parts}
        | {
            "ignore_merges": parts.get("ignore_merges", False),
            "vocab": dict(sorted((parts["vocab"] | specials).items(), key=lambda item: item[1])),
            "merges": [" ".join(pair) for pair in parts["merges"]],
        },
    }


def _byte_level_to_json(tokenizer: Tokenizer) -> dict[str, Any]:
    ranks, rules = tokenizer.encoding._mergeable_ranks, tokenizer.rules
    tokens = {token: id_ for id_, token in enumerate(rules.tokens) if token} or ranks
    merges = merges_of(ranks)
    n_reached = len(merges) + sum(len(token) == 1 for token in ranks)
    return {
        "normalizer": {"type": rules.normalization} if rules.normalization else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                pattern_to_json(tokenizer.encoding._pat_str),
                _BYTE_LEVEL | {"use_regex": False},
            ],
        },
        "decoder": _BYTE_LEVEL,
        "vocab": {_to_characters(token): id_ for token, id_ in tokens.items()},
        "merges": [tuple(map(_to_characters, pair)) for pair in merges],
        "ignore_merges": n_reached < len(ranks),
    }


def _prefix_to_json(prefix: Iterable[int], specials: Mapping[str, int]) -> dict[str, Any] | None:
    texts = {id_: text for text, id_ in specials.items()}
    used = {texts[id_]: {"id": texts[id_], "ids": [id_], "tokens": [texts[id_]]} for id_ in prefix}
    if not used:
        return None

    def template(sequence: str, type_id: int) -> list[dict[str, Any]]:
        parts = [("SpecialToken", text) for text in used] + [("Sequence", sequence)]
        return [{kind: {"id": id_, "type_id": type_id}} for kind, id_ in parts]

    return {
        "type": "TemplateProcessing",
        "single": template("A", 0),
        "pair": template("A", 0) + template("B", 1),
        "special_tokens": used,
    }


def tokenizer_config(tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
    """Return tokenizer_config.json, for transformers; the name in it is ours."""
    texts = {id_: text for text, id_ in tokenizer.special_ids.items()}
    end = texts.get(-1 if tokenizer.end_of_text is None else tokenizer.end_of_text)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "bos_token": texts[tokenizer.rules.prefix[0]] if tokenizer.rules.prefix else end,
        "eos_token": end,
        NAME_FIELD: tokenizer.name,
    }


def tokenizer_from_json(
    data: Mapping[str, Any],
    name: str,
    *,
    config: Mapping[str, Any] | None = None,
    end_of_text: tuple[int, ...] = (),
) -> Tokenizer:
    """Read a tokenizer.json of byte-level BPE, or of SentencePiece's BPE with byte fallback.

    Every added token becomes a special one, only put in by id; those that are not special there
    are found in a text too, as there.

    Args: data, the parsed file; name, for the Tokenizer; config, the parsed tokenizer_config.json,
        whose add_bos_token wins; end_of_text, the ids that end a text; none: ``<|endoftext|>``.
    Raises: CheckpointError naming the part that is damaged, or that Tokenizer cannot do.
    """
    try:
        model = _checked_model(data)
        added = data.get("added_tokens") or ()
        specials = {token["content"]: token["id"] for token in added}
        vocab = {token: id_ for token, id_ in model["vocab"].items() if token not in specials}
        ids = [*specials.values(), *vocab.values()]
        if not all(type(id_) is int and 0 <= id_ <= _LARGEST_ID for id_ in ids):
            raise unsupported("an id that is no 32-bit number")
        merges = [_pair(merge) for merge in model["merges"]]
        rules = Rules(
            added=_found_in_texts(added),
            prefix=_prefix(data.get("post_processor"), specials, config or {}),
            end_of_text=() if end_of_text == (specials.get(END_OF_TEXT),) else end_of_text,
        )
        if sentencepiece.is_sentencepiece(data):
            return _from_sentencepiece(data, name, vocab, merges, specials, rules)
        return _from_byte_level(data, name, vocab, merges, specials, rules)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, DataError) as error:
        raise CheckpointError(
            f"tokenizer.json is damaged ({type(error).__name__}: {str(error)[:120]!r}). "
            "Write or download it again."
        ) from None


def _from_byte_level(
    data: Mapping[str, Any],
    name: str,
    vocab: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    specials: Mapping[str, int],
    rules: Rules,
) -> Tokenizer:
    model = data["model"]
    tokens = {token: _to_bytes(token) for token in vocab}
    ids = {tokens[token]: id_ for token, id_ in vocab.items()}
    atoms = [token for token in ids if len(token) == 1]
    if len(atoms) < 256:  # else no byte is unknown
        for field in _UNKNOWN:
            _require(f"the model's {field}", model.get(field), _PLAIN_BPE[field])
    normalizer = data.get("normalizer") or {"type": ""}
    if normalizer not in ({"type": ""}, {"type": "NFC"}):
        raise unsupported(f"the normalizer {str(normalizer)[:60]!r}")
    rules = replace(rules, normalization=normalizer["type"])
    pattern = pattern_from_json(data["pre_tokenizer"])
    pairs = [(tokens[left], tokens[right]) for left, right in merges]
    order = merge_order(pairs, ids, atoms, keeps_whole=bool(model.get("ignore_merges")))
    if len(atoms) + len(order) == len(ids) and all(ids[a] < ids[b] for a, b in pairwise(order)):
        return _probed(Tokenizer(name, make_encoding(name, pattern, ids, specials), rules))
    numbered = {token: (ids[token],) for token in [*sorted(atoms), *order]}
    texts = {id_: token for token, id_ in ids.items()}
    return _probed(_renumbered(name, pattern, numbered, texts, specials, rules))


def _from_sentencepiece(
    data: Mapping[str, Any],
    name: str,
    vocab: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    specials: Mapping[str, int],
    rules: Rules,
) -> Tokenizer:
    _require("the model's ignore_merges", data["model"].get("ignore_merges") or None, None)
    if rules.added:
        raise unsupported(f"the added token {rules.added[0]!r}, which is not special")
    rules = replace(rules, normalization=sentencepiece.normalization_of(data))
    pieces = sentencepiece.pieces_from_json(vocab, merges)
    return _renumbered(name, pieces.pattern, pieces.ids, pieces.tokens, specials, rules)


def _renumbered(
    name: str,
    pattern: str,
    numbered: Mapping[bytes, tuple[int, ...]],
    texts: Mapping[int, bytes],
    specials: Mapping[str, int],
    rules: Rules,
) -> Tokenizer:
    """Build a tokenizer whose ids are not in the order in which its tokens are merged.

    Args: numbered, the tokens in that order and the ids that each stands for; texts, of all ids
        that are not special.
    """
    ranks = {token: rank for rank, token in enumerate(numbered)}
    numbers = {text: len(ranks) + n for n, text in enumerate(specials)}
    size = 1 + max([*texts, *specials.values()])
    if size > _LARGEST_HOLE + len(texts) + len(specials):
        raise unsupported(f"the id {size - 1}, far above all others")
    rules = replace(
        rules,
        ids=(*numbered.values(), *((id_,) for id_ in specials.values())),
        tokens=tuple(texts.get(id_, b"") for id_ in range(size)),
    )
    return Tokenizer(name, make_encoding(name, pattern, ranks, numbers), rules)


def _require(part: str, found: Any, allowed: Any) -> None:
    if found is not None and found != allowed:
        raise unsupported(f"{part} {str(found)[:60]!r}")


def _checked_model(data: Mapping[str, Any]) -> Mapping[str, Any]:
    if not sentencepiece.is_sentencepiece(data):
        _require("the decoder", (data.get("decoder") or {}).get("type"), "ByteLevel")
    model: Mapping[str, Any] = data["model"]
    for field, value in _PLAIN_BPE.items():
        found = model.get(field)
        if field not in _UNKNOWN:
            _require(f"the model's {field}", found if found != "" else None, value)
    return model


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _found_in_texts(added: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    plain = [token for token in added if not token.get("special", True)]
    for token in plain:
        for option in ("lstrip", "rstrip", "single_word"):
            _require(
                f"the added token {token['content']!r} with {option}", token.get(option), False
            )
    return tuple(token["content"] for token in plain)


def _prefix(
    found: Mapping[str, Any] | None, specials: Mapping[str, int], config: Mapping[str, Any]
) -> tuple[int, ...]:
    begins = config.get("add_bos_token")
    if begins is not None:  # as transformers has it, this wins
        token = config.get("bos_token")
        token = token["content"] if isinstance(token, dict) else token
        return (specials[token],) if begins and token is not None else ()
    steps = (found or {}).get("processors", [found] if found else [])
    prefix: list[int] = []
    for step in steps:
        if step["type"] == "ByteLevel":  # moves only the offsets
            continue
        _require("the post-processor", step["type"], "TemplateProcessing")
        *before, text = step["single"]
        _require("the post-processor's end", [*text], ["Sequence"])
        for part in before:
            prefix += step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    if not set(prefix) <= set(specials.values()):
        raise unsupported(f"the post-processor's ids {str(prefix)[:60]}, which are not special")
    return tuple(prefix)


def _probed(tokenizer: Tokenizer) -> Tokenizer:
    # tokenizers keeps what lies between a pattern's matches as pieces; tiktoken drops it.
    for text in (_PROBE, *_PROBE):
        try:
            is_kept = tokenizer.decode(tokenizer.encode(text)) == text
        except DataError:  # a vocabulary without all bytes, which is its right
            continue
        if not is_kept:
            raise unsupported("a split pattern that does not match all of a text")
    return tokenizer
