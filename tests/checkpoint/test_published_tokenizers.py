"""Miniatures of published vocabularies, compared with the tokenizers library."""

import functools
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from fuzzed_texts import SAMPLE, fuzzed_texts
from published_vocabularies import (
    WORDS,
    bert,
    gemma,
    gpt2,
    gpt4,
    llama2,
    llama3,
    mistral,
    nemo,
    neox,
    phi3,
    prefixed,
    published,
    qwen3,
    smollm,
    special,
    unigram,
    unordered,
)

from minigpt.checkpoint.tokenizer_json import (
    tokenizer_config,
    tokenizer_from_json,
    tokenizer_to_json,
)
from minigpt.checkpoint.vocabulary_files import json_from_scores
from minigpt.errors import CheckpointError, DataError
from minigpt.generation.decoder import Step
from minigpt.generation.stream import stream_text
from minigpt.text.byte_pairs import TiktokenTokenizer
from minigpt.text.imported import ImportedTokenizer
from minigpt.text.shard_files import tokenizer_from_dict
from minigpt.text.tokenizer import BytesTokenizer

FAMILIES = [gpt2, smollm, llama3, qwen3, nemo, gpt4, unordered, llama2, mistral]
KINDS = [*FAMILIES, bert, unigram, prefixed]
TEXTS = fuzzed_texts(350, WORDS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_tokenizer_has_the_ids_and_text_of_the_tokenizers_library(
    kind: Callable[[], dict[str, Any]],
) -> None:
    data, theirs = published(kind)
    ours = tokenizer_from_json(data, "theirs")
    assert ours.vocab_size >= theirs.get_vocab_size()
    for text in TEXTS:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == expected, text
        if kind is bert and 0 in expected:  # the library adds a space before an unknown token, too
            continue
        decoded = ours.decode(expected)
        if data["decoder"]["type"] != "ByteLevel":  # the library drops the first space
            decoded = decoded.removeprefix(" ")
        assert theirs.decode(expected, skip_special_tokens=False) == decoded
    assert ours.encode_prompt("It's 12") == theirs.encode("It's 12").ids
    assert {token["content"]: token["id"] for token in data["added_tokens"]} == ours.special_ids


@pytest.mark.parametrize("kind", FAMILIES)
def test_byte_lengths_add_up_to_the_text(kind: Callable[[], dict[str, Any]]) -> None:
    data, _ = published(kind)
    ours = tokenizer_from_json(data, "theirs")
    for text in TEXTS:
        if "▁" in text or kind is qwen3:  # ▁ is a space to SentencePiece, NFC shortens texts
            continue
        is_prefixed = kind is llama2 or (kind is mistral and not text.startswith(" "))
        n_bytes = ours.token_byte_lengths[ours.encode(text)].sum()
        assert n_bytes == len(text.encode()) + (is_prefixed and text != "")
    assert (ours.token_byte_lengths[ours.textless_ids] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_layout_of_gpt2_is_read_with_tiktoken(kind: Callable[[], dict[str, Any]]) -> None:
    ours = tokenizer_from_json(published(kind)[0], "theirs")
    assert type(ours) is (TiktokenTokenizer if kind is gpt2 else ImportedTokenizer)


@pytest.mark.slow
def test_the_gpt2_pattern_splits_every_character_as_the_tokenizers_library() -> None:
    data, theirs = published(gpt2)
    ours = tokenizer_from_json(data, "theirs")
    for code in range(sys.maxunicode + 1):
        if not 0xD800 <= code < 0xE000:  # no surrogates
            c = chr(code)
            text = f"a{c}b {c}1{c}{c}! {c}.  {c}"
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, hex(code)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not gpt2])
def test_an_imported_tokenizer_is_saved_unchanged(
    kind: Callable[[], dict[str, Any]],
) -> None:
    data, _ = published(kind)
    ours = tokenizer_from_json(data, "theirs")
    written = json.loads(json.dumps(tokenizer_to_json(ours)))
    assert written == json.loads(json.dumps(data))
    assert tokenizer_from_json(written, "again").fingerprint == ours.fingerprint
    again = tokenizer_from_dict(json.loads(json.dumps(ours.to_dict())))
    assert (again.name, again.fingerprint) == (ours.name, ours.fingerprint)
    assert again.encode(SAMPLE) == ours.encode(SAMPLE)


@pytest.mark.parametrize("kind", [llama2, mistral, prefixed])
def test_only_the_first_piece_of_a_text_gets_a_space_prefix(
    kind: Callable[[], dict[str, Any]],
) -> None:
    ours = tokenizer_from_json(published(kind)[0], "theirs")
    pieces = ["the tokenizer", " reads", " a text\n", "and writes it"]
    ids = [id_ for i, p in enumerate(pieces) for id_ in ours.encode(p, is_start=i == 0)]
    assert ours.decode(ids) == " " + "".join(pieces)


UNREADABLE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "the id 2000000000, far above": lambda d: d["model"]["vocab"].update({"qqq": 2_000_000_000}),
    "two tokens that share an id": lambda d: d["model"]["vocab"].update({"qqq": 300}),
    "dropout '0.1'": lambda d: d["model"].update(dropout=0.1),
    "is damaged .*missing field": lambda d: d["added_tokens"].append({"id": 3, "content": "x"}),
    r"is damaged \(KeyError: .*model": lambda d: d.pop("model"),
    "is damaged .*vocab": lambda d: d["model"].pop("vocab"),
    "is damaged .*Token .q. out of vocabulary": lambda d: d["model"]["merges"].append("q z"),
    "is damaged .*32": lambda d: d["model"]["vocab"].update(a=2**40),
}


@pytest.mark.parametrize("says", UNREADABLE)
def test_an_unusable_vocabulary_is_refused_by_name(says: str) -> None:
    data = json.loads(json.dumps(published(llama2)[0]))
    UNREADABLE[says](data)
    with pytest.raises(CheckpointError, match=says) as caught:
        tokenizer_from_json(data, "x")
    assert str(caught.value).startswith("tokenizer.json")
    assert str(caught.value).isprintable()


NORMALIZERS: list[dict[str, Any]] = [
    {"type": "Sequence", "normalizers": []},
    {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
    {"type": "NFKC"},
    {"type": "NFD"},
    {"type": "Lowercase"},
    {"type": "StripAccents"},
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "Replace", "pattern": {"String": " "}, "content": "_"},
]


def changed(make: Callable[[], dict[str, Any]], **parts: Any) -> dict[str, Any]:
    return json.loads(json.dumps(published(make)[0])) | parts


def two_splits(first: dict[str, Any]) -> dict[str, Any]:
    data = changed(llama3)
    steps = data["pre_tokenizer"]["pretokenizers"]
    steps.insert(0, steps[0] | {"pattern": first})
    return data


def found(**options: bool) -> dict[str, Any]:
    return changed(gpt2, added_tokens=[special(700, "the", is_special=False) | options])


def scheme(prepend: str, *, splits: bool) -> dict[str, Any]:
    data = changed(mistral)
    data["pre_tokenizer"] |= {"prepend_scheme": prepend, "split": splits}
    return data


def word_level() -> dict[str, Any]:
    vocab = {"[UNK]": 0, "the": 1, "def": 2, "import": 3, "'": 4}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    return changed(bert, model=model, pre_tokenizer={"type": "Whitespace"}, decoder=None)


LOWERCASE = {"type": "Lowercase"}


def with_word(data: dict[str, Any], word: str) -> dict[str, Any]:
    """Add a token that matches a normalized word, like transformers' add_tokens."""
    id_ = 1 + max([*data["model"]["vocab"].values(), *(t["id"] for t in data["added_tokens"])])
    data["added_tokens"].append(special(id_, word, is_special=False) | {"normalized": True})
    return data


UNUSUAL: dict[str, Callable[[], dict[str, Any]]] = {
    **{
        f"normalizer {n}": functools.partial(changed, gpt2, normalizer=normalizer)
        for n, normalizer in enumerate(NORMALIZERS)
    },
    "two splits": lambda: two_splits({"Regex": r"[一-龥]+"}),
    "split at a string": lambda: two_splits({"String": " "}),
    **{name: functools.partial(found, **{name: True}) for name in ("lstrip", "rstrip")},
    "single_word": lambda: found(single_word=True),
    "normalized": lambda: found(normalized=True),
    "normalized with a space": lambda: with_word(llama2(), "qzqz"),
    "normalized to lowercase": lambda: with_word(changed(gpt2, normalizer=LOWERCASE), "QZqz"),
    **{
        f"Metaspace {prepend} {splits}": functools.partial(scheme, prepend, splits=splits)
        for prepend in ("never", "first", "always")
        for splits in (False, True)
    },
    "WordLevel": word_level,
    "Gemma": gemma,
    "GPT-NeoX": neox,
    "Phi-3": phi3,
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_tokenizer_files_have_the_ids_and_text_of_the_library(name: str) -> None:
    data = UNUSUAL[name]()
    theirs = tokenizers.Tokenizer.from_str(json.dumps(data))
    theirs.encode_special_tokens = True
    ours = tokenizer_from_json(data, "theirs")
    for text in TEXTS[3::3]:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == expected, text
        decoded = ours.decode(expected)
        # The library may drop a leading space; we keep it, because the text may be a later piece.
        text = theirs.decode(expected, skip_special_tokens=False)
        assert text in (decoded, decoded.removeprefix(" "))


@pytest.mark.parametrize("name", UNUSUAL)
def test_streamed_text_of_unusual_tokenizers_equals_decoded_text(name: str) -> None:
    ours = tokenizer_from_json(UNUSUAL[name](), "theirs")
    for text in TEXTS[::10]:
        ids = ours.encode(text)
        steps = [
            Step(i, i, id_, 0.0, "length" if i + 1 == len(ids) else None)
            for i, id_ in enumerate(ids)
        ]
        streamed = "".join(step.text for step in stream_text(steps, ours))
        assert streamed == ours.decode(ids)


def test_tokens_that_a_post_processor_appends_are_omitted_from_prompts() -> None:
    data = changed(mistral)
    data["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    data["post_processor"]["special_tokens"]["</s>"] = {
        "id": "</s>",
        "ids": [2],
        "tokens": ["</s>"],
    }
    ours = tokenizer_from_json(data, "x", end_of_text_ids=(2,))
    theirs = tokenizers.Tokenizer.from_str(json.dumps(data))
    assert [*ours.encode_prompt("It's 12"), 2] == theirs.encode("It's 12").ids
    assert (ours.prefix, ours.separator) == ((1,), (2, 1))


def test_an_unknown_word_without_an_unknown_token_is_a_one_line_error() -> None:
    data = word_level()
    data["model"]["vocab"] = {"the": 0, "cat": 1}
    data["added_tokens"] = []
    ours = tokenizer_from_json(data, "words")
    assert ours.encode("the cat") == [0, 1]
    with pytest.raises(DataError, match=r"cannot encode this text .*Leave out characters"):
        ours.encode("the dog")


def test_a_panic_of_the_tokenizers_library_is_reported_as_a_damaged_file() -> None:
    data = changed(gpt2)
    data["model"]["continuing_subword_prefix"] = "##"
    with pytest.raises(CheckpointError, match=r"is damaged .*PanicException"):
        tokenizer_from_json(data, "x")


def test_a_byte_missing_in_an_imported_vocabulary_is_refused() -> None:
    data = tokenizer_to_json(BytesTokenizer())
    del data["model"]["vocab"]["z"]
    ours = tokenizer_from_json(data, "no-z")
    assert ours.encode("ab") == [97, 98]
    with pytest.raises(DataError, match="no token for the byte b'z'"):
        ours.encode("az")


def test_a_byte_without_a_token_becomes_the_unknown_token() -> None:
    data = json.loads(json.dumps(published(llama2)[0]))
    data["model"]["vocab"].pop("<0xC3>")
    ours = tokenizer_from_json(data, "x")
    assert ours.decode(ours.encode("ß")) == " <unk>"


def llama2_c(vocab: dict[str, int], scores: list[float], text: str) -> list[int]:
    """Merge as in run.c: always the pair whose union has the highest score."""
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


@pytest.mark.integration
def test_the_vocabulary_of_llama2_c_gives_its_ids(shared: Path) -> None:
    file = json.loads((shared / "weights" / "stories260K" / "sp_vocab.json").read_text())
    ours = tokenizer_from_json(json_from_scores(file), "stories")
    assert (ours.vocab_size, ours.encode_prompt("")) == (512, [1])
    vocab = {token: id_ for id_, token in enumerate(file["tokens"])}
    for text in [*fuzzed_texts(300, ("Once upon a time", "Lily", " Tim", "   "))[3:], "", "  a "]:
        text = text.replace("\u2581", "")  # a space for SentencePiece, but not for llama2.c
        ids = llama2_c(vocab, file["scores"], text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == (f" {text}" if text else "")
    assert ours.decode([1, 2, 0, 104, 3 + 0xE2]) == "<s></s><unk>e\ufffd"


def test_the_post_processor_decides_whether_prompts_begin_with_a_token() -> None:
    data, _ = published(llama3)
    begin = data["added_tokens"][0]["id"]

    assert tokenizer_from_json(data, "x").prefix == (begin,)
    assert tokenizer_from_json(data | {"post_processor": None}, "x").prefix == ()


def test_end_of_text_ids_default_to_the_usual_token() -> None:
    data, _ = published(llama3)
    assert tokenizer_from_json(data, "x").end_of_text is None
    end = data["added_tokens"][1]["id"]
    ours = tokenizer_from_json(data, "x", end_of_text_ids=(end, 7))
    again = tokenizer_from_dict(json.loads(json.dumps(ours.to_dict())))
    assert again.end_of_text_ids == ours.end_of_text_ids == (end, 7)
    assert again.end_of_text == ours.end_of_text == end
    written = tokenizer_config(ours, 32)
    assert (written["bos_token"], written["eos_token"]) == ("<|begin_of_text|>", "<|eot_id|>")
    assert ours.encode_prompt("") == [data["added_tokens"][0]["id"]]
    usual = tokenizer_from_json(published(qwen3)[0], "x", end_of_text_ids=(701,))
    assert usual.encode_prompt("") == [700]
    assert (usual.end_of_text, usual.end_of_text_ids) == (700, (701,))
    plain = tokenizer_from_json(published(gpt2)[0], "x", end_of_text_ids=(700,))
    assert plain.end_of_text_ids == (700,)
