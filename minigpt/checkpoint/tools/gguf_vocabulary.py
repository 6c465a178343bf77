"""Convert a vocabulary to llama.cpp's form: tokens, merges, split pattern and special ids.

llama.cpp has a fixed list of named split patterns. A vocabulary whose pattern is not on the list
cannot be written, because its ids would differ.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from minigpt.checkpoint.byte_pair_json import GPT2_PATTERN
from minigpt.checkpoint.tokenizer_json import tokenizer_to_json
from minigpt.errors import CheckpointError, cut
from minigpt.text.byte_pairs import TiktokenTokenizer
from minigpt.text.chat import templates_of
from minigpt.text.tokenizer import Tokenizer, well_formed
from minigpt.text.tokenizer_classes import (
    PREPEND_SPACE,
    QWEN2_PATTERN,
    REPLACE_SPACES,
    SPACE,
    SPLIT_AT_SPACES,
    named_tokens,
    tokenizer_settings,
)
from minigpt.text.vocabulary_parts import BPE_PATTERN, BYTE_OF_CHARACTER, steps_of

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's token types."""

_DIGITS = r"\p{N}"
# tiktoken's spelling -> equivalent pattern, except that cl100k_base's does not split spaces at the
# end of a text from the line break before them.
_SPELLINGS = {
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++"
    r"| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": GPT2_PATTERN,
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|(?>\p{N}{1,3})"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s": BPE_PATTERN,
}
_CL100K = list(_SPELLINGS)[1]
# Patterns -> llama.cpp's name if all pieces are merged, and if pieces that are tokens are not.
_NAMES = {
    (GPT2_PATTERN,): ("gpt-2", None),
    (BPE_PATTERN,): ("dbrx", "llama-bpe"),
    (QWEN2_PATTERN,): ("qwen2", None),
    (_DIGITS, GPT2_PATTERN): ("smollm", None),
}
_MATCHING = ("lstrip", "rstrip", "single_word")
"""Options of an added token that llama.cpp does not have."""
_BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}
# llama.cpp rejects an empty list of merges. This merge never applies, because words are split into
# single characters first.
_NO_MERGE = "<none> <none>"


@dataclass
class GGUFVocabulary:
    """Vocabulary with which llama.cpp gives each text the same ids as our tokenizer."""

    model: str
    """Algorithm: ``gpt2`` for byte-level BPE, ``llama`` for BPE of characters with scores."""
    tokens: list[str]
    """Text of each id, one for each row of the embedding."""
    types: list[int]
    pre: str = "default"
    """llama.cpp's name of the split pattern."""
    merges: list[str] = field(default_factory=list)
    """Pairs in order of rank, for ``gpt2``."""
    scores: list[float] = field(default_factory=list)
    """Priority of each id in merging, for ``llama``."""
    has_space_prefix: bool = False
    """Whether a space is prepended to a text."""
    add_bos: bool = False
    """Whether a prompt begins with the bos token."""
    special_ids: dict[str, int] = field(default_factory=dict)
    """Ids by role: bos, eos, eot, eom, unk, pad."""
    notes: list[str] = field(default_factory=list)
    """How llama.cpp still differs, one sentence each."""


def gguf_vocabulary(folder: Path, tokenizer: Tokenizer, n_rows: int) -> GGUFVocabulary:
    """Return the vocabulary of a model folder for llama.cpp.

    Args: tokenizer, of that folder; n_rows, of its embedding, and the number of tokens returned.
    Raises: CheckpointError if llama.cpp would give some text other ids.
    """
    data = tokenizer_to_json(tokenizer)
    kind = data["model"].get("type", "BPE" if "merges" in data["model"] else None)
    if kind != "BPE":
        raise _refusal(f"it is of the kind {kind}, and only BPE can be written")
    if len(tokenizer.prefix) > 1:
        raise _refusal(f"a prompt begins with {len(tokenizer.prefix)} tokens, not at most one")
    model = data["model"]
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise _refusal(f"it has a {option}")
    tokens, types = _tokens(data, n_rows)
    is_bytes = any(step["type"] == "ByteLevel" for step in steps_of(data.get("pre_tokenizer")))
    if is_bytes:
        vocabulary = _byte_level(tokenizer, data, tokens, types)
    else:
        vocabulary = _characters(data, tokens, types)
    vocabulary.notes += _stripping(data)
    vocabulary.add_bos = bool(tokenizer.prefix)
    vocabulary.special_ids = _special_ids(folder, tokenizer, tokens, vocabulary.notes)
    return vocabulary


def chat_template(folder: Path) -> str | list[dict[str, str]] | None:
    """Return the chat template of a model folder, or its named templates; None if it has none."""
    templates = {name: well_formed(text) for name, text in templates_of(folder).items()}
    if templates.keys() <= {"default"}:
        return templates.get("default")
    return [{"name": name, "template": text} for name, text in templates.items()]


def _tokens(data: Mapping[str, Any], n_rows: int) -> tuple[list[str], list[int]]:
    """Return the text and type of each row's token; rows without one get an unused token."""
    texts = {id_: text for text, id_ in data["model"]["vocab"].items()}
    types = dict.fromkeys(texts, NORMAL)
    unknown = data["model"].get("unk_token")
    for token in data.get("added_tokens") or ():
        id_, text = token["id"], token["content"]
        texts[id_] = text
        types[id_] = CONTROL if token["special"] else USER_DEFINED
        if text == unknown:
            types[id_] = UNKNOWN
        if not token["special"] and any(map(token.get, _MATCHING)):
            raise _refusal(f"the added token {text[:40]!r} strips spaces or matches whole words")
    known = set(texts.values())
    # No text has these: byte-level tokens contain no space, and others have U+2581 instead.
    free = (name for i in count() if (name := f"<unused {i}>") not in known)
    tokens = [texts[i] if i in texts else next(free) for i in range(n_rows)]
    if len(set(tokens)) < n_rows:
        raise _refusal("two of its tokens have the same text")
    return tokens, [types.get(i, UNUSED) for i in range(n_rows)]


def _stripping(data: Mapping[str, Any]) -> list[str]:
    """Return a note on special tokens that are matched differently, as in a chat."""
    added = [t for t in data.get("added_tokens") or () if any(map(t.get, _MATCHING))]
    if not added:
        return []
    name = cut(added[0]["content"])
    return [f"llama.cpp keeps spaces beside special tokens such as {name}, which strips them"]


def _byte_level(
    tokenizer: Tokenizer, data: Mapping[str, Any], tokens: list[str], types: list[int]
) -> GGUFVocabulary:
    model, notes = data["model"], []
    for step in steps_of(data.get("normalizer")):
        if step["type"] != "NFC":
            raise _refusal(f"its normalizer is {step['type']}")
        notes.append("llama.cpp does not normalize text, so text that is not in NFC differs")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    keeps_words = bool(model.get("ignore_merges"))
    if not merges and all(
        len(t) == 1 for t, kind in zip(tokens, types, strict=True) if kind == NORMAL
    ):
        merges, pre = [_NO_MERGE], "gpt-2"  # nothing is merged, so the split does not matter
    else:
        pre, note = _split_name(tokenizer, data, keeps_words=keeps_words)
        notes += note
    if model.get("byte_fallback"):
        raise _refusal("it has both byte-level tokens and a byte fallback")
    if n_missing := 256 - len(BYTE_OF_CHARACTER.keys() & set(tokens)):
        notes.append(f"llama.cpp drops the {n_missing} bytes that the vocabulary does not have")
    return GGUFVocabulary("gpt2", tokens, types, pre, merges, notes=notes)


def _split_name(
    tokenizer: Tokenizer, data: Mapping[str, Any], *, keeps_words: bool
) -> tuple[str, list[str]]:
    """Return llama.cpp's name of a byte-level vocabulary's split, and notes on differences."""
    patterns = tuple(_patterns(data))
    merging, keeping = _NAMES.get(tuple(_SPELLINGS.get(p, p) for p in patterns), (None, None))
    # tiktoken keeps words too; if merges produce every token, that makes no difference.
    is_either = isinstance(tokenizer, TiktokenTokenizer) and not keeps_words
    name = keeping if keeps_words else (keeping or merging) if is_either else merging
    if name is None:
        shown = " then ".join(repr(p[:60]) for p in patterns) or "none"
        raise _refusal(f"its split pattern is not one of llama.cpp's: {shown}")
    notes = ["llama.cpp splits spaces at the end of a text from the line break before them"]
    return name, notes if _CL100K in patterns else []


def _patterns(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the regexes that a byte-level vocabulary applies in order to split a text."""
    for step in steps_of(data.get("pre_tokenizer")):
        match step:
            # Both do the same here, because llama.cpp's patterns match all of a text.
            case {"type": "Split", "pattern": {"Regex": str(regex)}} if (
                step.get("behavior"),
                bool(step.get("invert")),
            ) in (("Isolated", False), ("Removed", True)):
                yield regex
            case {"type": "Digits", "individual_digits": True}:
                yield _DIGITS
            case {"type": "ByteLevel"} if not step.get("add_prefix_space"):
                if step.get("use_regex", True):
                    yield GPT2_PATTERN
            case {"type": "ByteLevel"}:
                raise _refusal("it adds a space before a text")
            case _:
                raise _refusal(f"it splits by {step['type']} in a way that llama.cpp does not")


def _characters(data: Mapping[str, Any], tokens: list[str], types: list[int]) -> GGUFVocabulary:
    """Return a SentencePiece vocabulary: characters are merged by the scores of tokens."""
    model = data["model"]
    if not model.get("byte_fallback") or not set(tokens) >= _BYTE_TOKENS:
        raise _refusal("its characters have no byte fallback")
    normalizers, splits = steps_of(data.get("normalizer")), steps_of(data.get("pre_tokenizer"))
    notes = []
    if normalizers == [REPLACE_SPACES] and splits == [SPLIT_AT_SPACES]:
        splits = []  # no space is left to split at
    if not splits and normalizers in ([PREPEND_SPACE, REPLACE_SPACES], [REPLACE_SPACES]):
        has_prefix = PREPEND_SPACE in normalizers
        for token in data.get("added_tokens") or ():
            if has_prefix and token.get("normalized") and not token["special"]:
                raise _refusal(
                    f"the added token {cut(token['content'])} is found after spaces only"
                )
    elif not normalizers and [step["type"] for step in splits] == ["Metaspace"]:
        if splits[0].get("split", True) or splits[0].get("replacement") != SPACE:
            raise _refusal("it splits a text into words before merging")
        scheme = splits[0].get("prepend_scheme", "always")
        has_prefix = scheme != "never"
        if has_prefix:
            after = " or follows a special token, as in a chat" if scheme == "first" else ""
            notes.append(f"llama.cpp also adds a space before a text that begins with one{after}")
    else:
        names = ", ".join(step["type"] for step in [*normalizers, *splits]) or "none"
        raise _refusal(f"its treatment of spaces ({names}) is not one of llama.cpp's")
    symbols = {*tokens, *"".join(tokens)}  # llama.cpp starts from characters, known or not
    scores = _scores(data, tokens, symbols)
    for token, kind in zip(tokens, types, strict=True):
        if kind == CONTROL and any(map(symbols.issuperset, _pairs(token))):
            notes.append(f"llama.cpp reads {cut(token)} in a text as the special token")
    types = [BYTE if t in _BYTE_TOKENS else kind for t, kind in zip(tokens, types, strict=True)]
    return GGUFVocabulary(
        "llama",
        tokens,
        types,
        scores=[scores.get(token, 0.0) for token in tokens],
        has_space_prefix=has_prefix,
        notes=notes,
    )


def _pairs(token: str) -> Iterator[tuple[str, str]]:
    """Yield all pairs of texts that form a token."""
    return ((token[:i], token[i:]) for i in range(1, len(token)))


def _scores(data: Mapping[str, Any], tokens: list[str], symbols: set[str]) -> dict[str, float]:
    """Return token -> score; llama.cpp merges the adjacent pair with the highest-scoring result.

    Args: symbols, texts that llama.cpp merges if a token is the result.
    Raises: CheckpointError if no scores reproduce the ranks: all pairs that form a token must have
        consecutive ranks.
    """
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in data["model"]["merges"]]
    scores: dict[str, float] = {}
    last = ""
    for left, right in merges:
        token = left + right
        if token != last and token in scores:
            raise _refusal(f"its merges to {token[:40]!r} are not consecutive")
        scores.setdefault(token, -float(len(scores)))
        last = token
    special = {token["content"] for token in data.get("added_tokens") or ()} | _BYTE_TOKENS
    pairs = set(merges)
    for token in set(tokens) - special:
        for pair in _pairs(token):
            if pair not in pairs and symbols.issuperset(pair):
                raise _refusal(f"it never merges {pair[0]!r} and {pair[1]!r}, but llama.cpp would")
    return scores


def _special_ids(
    folder: Path, tokenizer: Tokenizer, tokens: list[str], notes: list[str]
) -> dict[str, int]:
    """Return the ids of special tokens by role."""
    id_of = {token: id_ for id_, token in enumerate(tokens)}
    named = named_tokens(tokenizer_settings(folder))
    roles = {role: named.get(f"{role}_token", "") for role in ("bos", "eos", "unk", "pad")}
    ids = {role: id_of[token] for role, token in roles.items() if token in id_of}
    ends = [id_ for id_ in tokenizer.end_of_text_ids if id_ < len(tokens)]
    ends.sort(key=lambda id_: id_ != ids.get("eos"))  # the tokenizer's own first
    ids |= zip(("eos", "eot", "eom"), ends, strict=False)
    if len(ends) > 3:
        notes.append(f"llama.cpp may not stop at the ids {ends[3:]}, as it has three end tokens")
    if "eos" not in ids:
        raise _refusal(
            "it has no end-of-text token, and llama.cpp would use another token as one",
            "Name one as eos_token_id in generation_config.json",
        )
    ids["bos"] = tokenizer.prefix[0] if tokenizer.prefix else ids.get("bos", ids["eos"])
    return ids


def _refusal(what: str, remedy: str = "") -> CheckpointError:
    remedy = remedy or "Train with --tokenizer bpe, bytes or gpt2 for a model that llama.cpp runs"
    return CheckpointError(
        f"llama.cpp would not give the same ids as this vocabulary: {what}. {remedy}."
    )
