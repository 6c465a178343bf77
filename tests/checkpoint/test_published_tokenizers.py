"""tokenizer.json as GPT-2, Llama 2 and 3, Qwen3, SmolLM and Mistral publish it, in miniature.

Each has the normalizer, pre_tokenizer, post_processor and decoder of the real file, and a small
vocabulary that the tokenizers library learnt; that library is the oracle.
"""

import functools
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzzed_texts import SAMPLE, fuzzed_texts

from minigpt.checkpoint.sentencepiece import json_from_scores
from minigpt.checkpoint.tokenizer_json import (
    tokenizer_config,
    tokenizer_from_json,
    tokenizer_to_json,
)
from minigpt.errors import CheckpointError
from minigpt.text.rules import NO_RULES
from minigpt.text.tokenizer import Tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="compares with the tokenizers library")

CORPUS = [SAMPLE, "aaaa aaa aaaaaaa bababab 1234567 漢字 🙂🙂 déjà  vu  2024   e\u0301te\u0301"]
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NUMBERS = {"llama3": r"\p{N}{1,3}", "qwen": r"\p{N}"}
NEMO = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


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
    """Learn a vocabulary and return the whole file; keys of parts replace its own."""
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
    """Give each token all its pairs, as files that were converted from ranks have them."""
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
    # Some tokens of the real one are never merged, and only found because of ignore_merges.
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
    """Ids without order, as a vocabulary sorted by frequency has them, and a dead token."""
    data = gpt2()
    vocab = data["model"]["vocab"] | {"neverĠmerged": 0}
    ids = random.Random(5).sample(range(750), len(vocab))
    data["model"]["vocab"] = dict(zip(vocab, ids, strict=True))
    return data | {"added_tokens": []}


def metaspace(**parts: Any) -> dict[str, Any]:
    """SentencePiece's layout: special tokens, bytes, what is merged, characters."""
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


Oracle = tuple[dict[str, Any], Any]


@functools.cache
def published(make: Callable[[], dict[str, Any]]) -> Oracle:
    data = make()
    theirs = tokenizers.Tokenizer.from_str(json.dumps(data))
    theirs.encode_special_tokens = True  # as our encode: the text of a special token is text
    return data, theirs


KINDS = [gpt2, smollm, llama3, qwen3, nemo, gpt4, unordered, llama2, mistral]
TEXTS = fuzzed_texts(350, ("<think>", "<thinking", "<|endoftext|>", "qzqz", " vuz", "▁", "<s>"))


def assert_encodes_alike(ours: Tokenizer, theirs: Any) -> None:
    for text in TEXTS:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == expected, text
        decoded = ours.decode(expected)
        if ours.rules.normalization.startswith("metaspace"):  # theirs drops the space it added
            decoded = decoded.removeprefix(" ")
        assert theirs.decode(expected, skip_special_tokens=False) == decoded
    assert ours.encode_prompt("It's 12") == theirs.encode("It's 12").ids


@pytest.mark.parametrize("kind", KINDS)
def test_published_tokenizer_gives_the_ids_of_the_tokenizers_library(
    kind: Callable[[], dict[str, Any]],
) -> None:
    data, theirs = published(kind)
    ours = tokenizer_from_json(data, "theirs")
    assert ours.vocab_size >= theirs.get_vocab_size()
    assert_encodes_alike(ours, theirs)
    assert {token["content"]: token["id"] for token in data["added_tokens"]} == ours.special_ids


@pytest.mark.parametrize("kind", KINDS)
def test_published_tokenizer_is_written_again_with_the_same_ids(
    kind: Callable[[], dict[str, Any]],
) -> None:
    data, theirs = published(kind)
    ours = tokenizer_from_json(data, "theirs")
    written = json.loads(json.dumps(tokenizer_to_json(ours)))
    again = tokenizers.Tokenizer.from_str(json.dumps(written))
    again.encode_special_tokens = True
    assert_encodes_alike(ours, again)
    assert again.get_vocab() == theirs.get_vocab()
    assert tokenizer_from_json(written, "again").fingerprint == ours.fingerprint
    assert Tokenizer.from_dict(json.loads(json.dumps(ours.to_dict()))).encode(
        SAMPLE
    ) == ours.encode(SAMPLE)


UNREADABLE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "the normalizer .*Lowercase": lambda d: d.update(normalizer={"type": "Lowercase"}),
    "the normalizer .*Prepend": lambda d: d.update(pre_tokenizer={"type": "Whitespace"}),
    "no token for the byte 0x00": lambda d: d["model"]["vocab"].pop("<0x00>"),
    "the added token 'x', which is not special": lambda d: d["added_tokens"].append(
        special(3, "x", is_special=False)
    ),
    "ignore_merges 'True'": lambda d: d["model"].update(ignore_merges=True),
    "the id 2000000000, far above": lambda d: d["model"]["vocab"].update({"qqq": 2_000_000_000}),
}


@pytest.mark.parametrize("says", UNREADABLE)
def test_vocabulary_of_sentencepiece_that_would_encode_otherwise_is_refused(says: str) -> None:
    data = json.loads(json.dumps(published(llama2)[0]))
    UNREADABLE[says](data)
    with pytest.raises(CheckpointError, match=says):
        tokenizer_from_json(data, "x")


def llama2_c(vocab: dict[str, int], scores: list[float], text: str) -> list[int]:
    """Merge as its run.c does: the pair whose union has the highest score, until there is none."""
    pieces = list(f" {text}") if text else []
    ids = [i for c in pieces for i in ([vocab[c]] if c in vocab else [b + 3 for b in c.encode()])]
    texts = {id_: piece for piece, id_ in vocab.items()}
    while True:
        unions = [vocab.get(texts[left] + texts[right]) for left, right in itertools.pairwise(ids)]
        found = [(-scores[id_], i, id_) for i, id_ in enumerate(unions) if id_ is not None]
        if not found:
            return ids
        _, i, id_ = min(found)
        ids[i : i + 2] = [id_]


def test_vocabulary_of_llama2_c_gives_its_ids(shared: Path) -> None:
    file = json.loads((shared / "weights" / "stories260K" / "sp_vocab.json").read_text())
    ours = tokenizer_from_json(json_from_scores(file), "stories")
    assert (ours.vocab_size, ours.encode_prompt("")) == (512, [1])
    vocab = {token: id_ for id_, token in enumerate(file["tokens"])}
    for text in [*fuzzed_texts(300, ("Once upon a time", "Lily", " Tim", "   "))[3:], "", "  a "]:
        text = text.replace("\u2581", "")  # to SentencePiece it is a space, to llama2.c it is not
        ids = llama2_c(vocab, file["scores"], text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == (f" {text}" if text else "")
    assert ours.decode([1, 2, 0, 104, 3 + 0xE2]) == "<s></s><unk>e\ufffd"


def test_tokenizer_config_decides_whether_prompts_begin_with_a_token() -> None:
    data, _ = published(llama3)
    begin = data["added_tokens"][0]["id"]
    end = begin + 1

    def prefix(data: dict[str, Any], **config: Any) -> tuple[int, ...]:
        return tokenizer_from_json(data, "x", config=config).rules.prefix

    assert prefix(data) == prefix(data, bos_token="<|eot_id|>") == (begin,)
    assert prefix(data, add_bos_token=False) == ()
    assert prefix(data, add_bos_token=True, bos_token={"content": "<|eot_id|>"}) == (end,)
    assert prefix(data | {"post_processor": None}) == ()
    with pytest.raises(CheckpointError, match=r"damaged \(KeyError: .*nowhere"):
        prefix(data, add_bos_token=True, bos_token="nowhere")


def test_texts_end_as_is_said_or_with_the_usual_token() -> None:
    data, _ = published(llama3)
    assert tokenizer_from_json(data, "x").end_of_text is None
    end = data["added_tokens"][1]["id"]
    ours = tokenizer_from_json(data, "x", end_of_text=(end, 7))
    again = Tokenizer.from_dict(json.loads(json.dumps(ours.to_dict())))
    assert again.end_of_text_ids == ours.end_of_text_ids == (end, 7)
    assert again.end_of_text == ours.end_of_text == end
    written = tokenizer_config(ours, 32)
    assert (written["bos_token"], written["eos_token"]) == ("<|begin_of_text|>", "<|eot_id|>")
    assert ours.encode_prompt("") == [data["added_tokens"][0]["id"]]
    usual = tokenizer_from_json(published(qwen3)[0], "x", end_of_text=(701,))
    assert usual.encode_prompt("") == [700]
    assert (usual.end_of_text, usual.end_of_text_ids) == (700, (701,))
    plain = tokenizer_from_json(published(gpt2)[0], "x", end_of_text=(700,))
    assert plain.rules == NO_RULES
    assert plain.end_of_text_ids == (700,)


def test_merges_that_were_tampered_with_encode_alike_or_are_refused() -> None:
    draw = random.Random(7)
    n_read = 0
    for _ in range(150):
        vocab = {c: i for i, c in enumerate(tokenizers.pre_tokenizers.ByteLevel.alphabet())}
        pool, merges = ["a", "b", "c"], []
        while len(pool) < draw.choice([6, 10, 30]):
            pair = draw.choice(pool), draw.choice(pool)
            if pair not in merges and len("".join(pair)) < 9:
                merges.append(pair)
                pool.append("".join(pair))
        ids = {token: len(vocab) + i for i, token in enumerate(dict.fromkeys([*pool[3:], "abcab"]))}
        for _ in range(draw.randrange(3)):
            i, j = draw.randrange(len(merges)), draw.randrange(len(merges))
            merges[i], merges[j] = merges[j], merges[i]
        if draw.random() < 0.3:
            del merges[draw.randrange(len(merges))]
        model = {"type": "BPE", "vocab": vocab | ids, "merges": merges}
        data = {
            "pre_tokenizer": split(draw.choice([r"[abc]+|[\s\S]", r"[\s\S]+"])),
            "decoder": byte_level(),
            "model": model | {"ignore_merges": draw.random() < 0.5},
        }
        theirs = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0"} | data))
        try:
            ours = tokenizer_from_json(data, "x")
        except CheckpointError:
            continue
        n_read += 1
        for n in range(1, 40):
            text = "".join(draw.choices("aabbc ", k=n))
            assert ours.encode(text) == theirs.encode(text).ids
    assert 20 < n_read < 140
