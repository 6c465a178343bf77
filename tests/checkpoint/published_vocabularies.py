"""Miniatures of the tokenizer.json of GPT-2, Llama, Qwen3, SmolLM, Mistral, BERT and T5.

Each has the normalizer, pre_tokenizer, post_processor and decoder of the real file, and a small
vocabulary trained by the tokenizers library.
"""

import functools
import json
import random
from collections.abc import Callable
from typing import Any

import tokenizers
from fuzzed_texts import SAMPLE

CORPUS = [SAMPLE, "aaaa aaa aaaaaaa bababab 1234567 漢字 🙂🙂 déjà  vu  2024   e\u0301te\u0301"]
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NUMBERS = {"llama3": r"\p{N}{1,3}", "qwen": r"\p{N}"}
NEMO = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

WORDS = (
    "\n\n",
    "</think>",
    "    ",
    "<think>",
    "<thinking",
    "<|endoftext|>",
    "qzqz",
    " vuz",
    "▁",
    "<s>",
    " <mask>",
)
"""Texts that these vocabularies treat differently."""


def byte_level(*, use_regex: bool = True, trim_offsets: bool = True) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": trim_offsets,
        "use_regex": use_regex,
    }


def split(regex: str) -> dict[str, Any]:
    pattern = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}
    steps = [pattern | {"invert": False}, byte_level(use_regex=False)]
    return {"type": "Sequence", "pretokenizers": steps}


def begins_with(text: str, id_: int) -> dict[str, Any]:
    special = {"SpecialToken": {"id": text, "type_id": 0}}
    single = [special, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {text: {"id": text, "ids": [id_], "tokens": [text]}},
    }


def special(id_: int, content: str, *, is_special: bool = True) -> dict[str, Any]:
    options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id_, "content": content, "special": is_special} | options


def trained(pre_tokenizer: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """Train a vocabulary and return its tokenizer.json; ``parts`` replaces top-level keys."""
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    data = {"version": "1.0", "pre_tokenizer": pre_tokenizer, "model": empty} | {
        key: value for key, value in parts.items() if key == "normalizer"
    }
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=parts.pop("first", []),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    decoder = byte_level() | {"add_prefix_space": True}
    data = json.loads(tokenizer.to_str()) | {"decoder": decoder} | parts
    assert isinstance(data, dict)
    return data


def gpt2() -> dict[str, Any]:
    return trained(
        byte_level(),
        post_processor=byte_level(trim_offsets=False),
        added_tokens=[special(700, "<|endoftext|>")],
    )


def smollm(*, individual_digits: bool = True) -> dict[str, Any]:
    digits = {"type": "Digits", "individual_digits": individual_digits}
    return trained(
        {"type": "Sequence", "pretokenizers": [digits, byte_level()]},
        first=["<|endoftext|>", "<|im_start|>", "<repo_name>"],
    )


def every_pair(data: dict[str, Any]) -> dict[str, Any]:
    """List all pairs of each token as merges, as in files converted from ranks."""
    vocab, merges = data["model"]["vocab"], []
    for token in vocab:
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    data["model"]["merges"] = [" ".join(pair) for pair in merges]
    return data


def llama3() -> dict[str, Any]:
    data = trained(split(CONTRACTIONS + NUMBERS["llama3"] + REST))
    vocab = data["model"]["vocab"]
    # Some tokens of the real vocabulary are found only because of ignore_merges.
    vocab |= {"qzqz": len(vocab), "Ġvuz": len(vocab) + 1}
    data = every_pair(data)
    begin = len(vocab)
    data["added_tokens"] = [special(begin, "<|begin_of_text|>"), special(begin + 1, "<|eot_id|>")]
    offsets = byte_level(trim_offsets=False)
    steps = [offsets, begins_with("<|begin_of_text|>", begin)]
    data["post_processor"] = {"type": "Sequence", "processors": steps}
    data["model"]["ignore_merges"] = True
    return data


def qwen3() -> dict[str, Any]:
    added = [special(700, "<|endoftext|>"), special(701, "<|im_start|>")]
    found = [special(702, "<think>", is_special=False), special(703, "<thinking", is_special=False)]
    data = trained(
        split(CONTRACTIONS + NUMBERS["qwen"] + REST),
        normalizer={"type": "NFC"},
        post_processor=byte_level(use_regex=False, trim_offsets=False),
        decoder=byte_level(use_regex=False, trim_offsets=False),
        added_tokens=added + found,
    )
    data["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    return data


def nemo() -> dict[str, Any]:
    data = trained(split(NEMO), first=["<unk>", "<s>", "</s>", "[INST]"])
    data["post_processor"] = begins_with("<s>", 1)
    data["model"]["ignore_merges"] = True
    return every_pair(data)


def gpt4() -> dict[str, Any]:
    data = trained(split(CONTRACTIONS + NUMBERS["llama3"] + REST))
    data["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    return data


def unordered() -> dict[str, Any]:
    """Return a vocabulary with ids in another order than its merges, and an unreachable token."""
    data = gpt2()
    vocab = data["model"]["vocab"] | {"neverĠmerged": 0}
    ids = random.Random(5).sample(range(750), len(vocab))
    data["model"]["vocab"] = dict(zip(vocab, ids, strict=True))
    return data | {"added_tokens": []}


def metaspace(**parts: Any) -> dict[str, Any]:
    """Return SentencePiece's layout: special tokens, bytes, merged tokens, characters."""
    data = trained({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"})
    known = [token for token in data["model"]["vocab"] if all(c in CHARACTERS for c in token)]
    merged = [token for token in known if len(token) > 1]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *merged]
    pieces += [token for token in known if len(token) == 1] + ["🙂", "é", "漢", "字"]
    vocab = {piece: id_ for id_, piece in enumerate(pieces)}
    data["model"]["vocab"] = {token: id_ for token, id_ in vocab.items() if id_ >= 259}
    data = every_pair(data)
    data["model"] |= {"vocab": vocab, "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    return data | {
        "added_tokens": [special(id_, pieces[id_]) for id_ in range(3)],
        "post_processor": begins_with("<s>", 1),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        **parts,
    }


CHARACTERS = {*"▁abcdefghiklmnoprstuvwxyABCDEFGHIJKLMNOPRSTUV0123456789.,()'\"_=:[]-|\\\n"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}


def llama2() -> dict[str, Any]:
    normalizer = {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}
    return metaspace(normalizer=normalizer, pre_tokenizer=None)


def mistral() -> dict[str, Any]:
    scheme = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return metaspace(normalizer=None, pre_tokenizer=scheme)


def bert() -> dict[str, Any]:
    """Return a WordPiece vocabulary of lower-case words with stripped accents."""
    words = ["[UNK]", *"abcdefghijklmnopqrstuvwxyz0123456789.,'<>|", "the", "cat", "hat"]
    pieces = [*words, *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789"), "##ing", "##s"]
    return {
        "version": "1.0",
        "added_tokens": [special(0, "[UNK]")],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {piece: id_ for id_, piece in enumerate(pieces)},
        },
    }


def unigram() -> dict[str, Any]:
    """Return a Unigram vocabulary with NFKC normalization."""
    pieces = ["<unk>", "▁", "▁the", "s", "▁c", "at", *"abcdefghijklmnoprtuvwxyz0123456789", "é"]
    scheme = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    vocab = [[piece, -float(n + 1)] for n, piece in enumerate(pieces)]
    return {
        "version": "1.0",
        "added_tokens": [special(0, "<unk>")],
        "normalizer": {"type": "NFKC"},
        "pre_tokenizer": scheme,
        "post_processor": None,
        "decoder": scheme,
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False},
    }


def gemma() -> dict[str, Any]:
    """Return Gemma's layout: byte fallback and visible spaces, but none before the text."""
    by_space = {"pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    data = metaspace(normalizer=REPLACE, pre_tokenizer={"type": "Split"} | by_space)
    data["decoder"]["decoders"].pop()  # no stripping of leading spaces
    newlines = special(data["model"]["vocab"]["\n\n"], "\n\n", is_special=False)
    data["added_tokens"] += [newlines]
    return data


def neox() -> dict[str, Any]:
    """Return GPT-2's layout with tokens for runs of spaces, after NFC normalization."""
    runs = [special(701 + n, " " * n, is_special=False) | {"normalized": True} for n in (2, 3, 4)]
    offsets = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return trained(
        {"type": "ByteLevel"} | offsets,
        normalizer={"type": "NFC"},
        post_processor={"type": "ByteLevel"} | offsets,
        added_tokens=[special(700, "<|endoftext|>"), *runs],
    )


def phi3() -> dict[str, Any]:
    """Return Llama 2's layout with special tokens that absorb the white space after them."""
    data = llama2()
    n = len(data["model"]["vocab"])
    data["added_tokens"] += [special(n, "<|assistant|>") | {"rstrip": True}]
    data["added_tokens"] += [special(n + 1, "</think>", is_special=False) | {"rstrip": True}]
    return data


def prefixed() -> dict[str, Any]:
    """Return GPT-2's layout with a space before each text, as in RoBERTa and OPT."""
    data = trained(byte_level(), added_tokens=[special(700, "<mask>") | {"lstrip": True}])
    data["added_tokens"][0]["special"] = False
    data["pre_tokenizer"]["add_prefix_space"] = True
    return data


Oracle = tuple[dict[str, Any], Any]


@functools.cache
def published(make: Callable[[], dict[str, Any]]) -> Oracle:
    data = make()
    theirs = tokenizers.Tokenizer.from_str(json.dumps(data))
    theirs.encode_special_tokens = True  # as in our encode: special tokens in a text are plain text
    return data, theirs
