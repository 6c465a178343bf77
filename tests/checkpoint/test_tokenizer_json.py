"""tokenizer.json <-> Tokenizer, against the tokenizers library itself."""

import functools
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzzed_texts import SAMPLE, fuzzed_texts

from minigpt.checkpoint.merges import merges_of
from minigpt.checkpoint.tokenizer_json import tokenizer_from_json, tokenizer_to_json
from minigpt.errors import CheckpointError, DataError
from minigpt.text.tokenizer import (
    Tokenizer,
    bytes_tokenizer,
    make_encoding,
    named_tokenizer,
    train_bpe,
)


def small_bpe() -> Tokenizer:
    return train_bpe([SAMPLE, "aaaa aaa aaaaaaa bababab 1234567 漢字 🙂🙂"], 600)


def gpt2() -> Tokenizer:
    return named_tokenizer("gpt2")


def cl100k() -> Tokenizer:
    return named_tokenizer("cl100k_base")


def merged_plainly(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The parts of a token when no merge, or only the one that makes it, is left to do."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        unions = map(b"".join, itertools.pairwise(parts))
        rank, i = min((ranks.get(union, 10**9), i) for i, union in enumerate(unions))
        if rank == 10**9:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def random_merges() -> Tokenizer:
    """A vocabulary whose tokens overlap in every way, as no text would teach it."""
    draw = random.Random(5)
    ranks = {bytes([b]): b for b in range(256)}
    letters = [b"a", b"b", b" "]
    while len(ranks) < 900:
        left, right = draw.choices(letters, k=2)
        token = left + right
        if token not in ranks and len(token) < 12 and merged_plainly(token, ranks) == [left, right]:
            ranks[token] = len(ranks)
            letters.append(token)
    pattern = r"[ab]{1,30}+|\s++$|(?s:.)"
    return Tokenizer("random", make_encoding("random", pattern, ranks, {"<|endoftext|>": 950}))


Written = tuple[Tokenizer, dict[str, Any]]


@functools.cache
def written(make: Callable[[], Tokenizer]) -> Written:
    tokenizer = make()
    return tokenizer, tokenizer_to_json(tokenizer)


@pytest.fixture(
    params=[
        bytes_tokenizer,
        small_bpe,
        random_merges,
        gpt2,
        pytest.param(cl100k, marks=pytest.mark.slow),
    ]
)
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Written:
    """A tokenizer and its tokenizer.json."""
    if request.param in (gpt2, cl100k):
        shared = request.getfixturevalue("shared")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "tiktoken"))
    return written(request.param)


def test_tokenizers_library_gives_the_same_ids_and_text(pair: Written) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="compares with the tokenizers library")
    tokenizer, data = pair
    theirs = tokenizers.Tokenizer.from_str(json.dumps(data))
    theirs.encode_special_tokens = True  # as our encode: the text of a special token is text
    for text in fuzzed_texts(500):
        ids = tokenizer.encode(text)
        assert theirs.encode(text).ids == ids, text
        assert theirs.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)
    end = tokenizer.end_of_text
    assert theirs.token_to_id("<|endoftext|>") == end
    theirs.encode_special_tokens = False
    assert theirs.encode("<|endoftext|>").ids == [end]


def test_reading_what_was_written_gives_an_equal_tokenizer(pair: Written) -> None:
    tokenizer, data = pair
    again = tokenizer_from_json(json.loads(json.dumps(data)), "again")
    assert again.name == "again"
    assert again.fingerprint == tokenizer.fingerprint


def test_merges_are_those_that_openai_published(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = shared / "tiktoken"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    published = next(path for path in cache.iterdir() if path.read_bytes()[:9] == b"#version:")
    lines = published.read_text(encoding="utf-8").splitlines()[1:]
    assert written(gpt2)[1]["model"]["merges"] == lines


def test_plain_byte_level_file_is_read_as_gpt2_encodes() -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="trains with the tokenizers library")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    theirs.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|user|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator([SAMPLE], trainer)
    ours = tokenizer_from_json(json.loads(theirs.to_str()), "theirs")
    assert (ours.vocab_size, ours.end_of_text) == (500, 0)
    theirs.encode_special_tokens = True
    for text in fuzzed_texts(500):
        assert ours.encode(text) == theirs.encode(text).ids, text


def test_vocabulary_without_all_bytes_refuses_what_it_lacks() -> None:
    data = tokenizer_to_json(bytes_tokenizer())
    del data["model"]["vocab"]["z"]
    ours = tokenizer_from_json(data, "no-z")
    assert ours.encode("ab") == [97, 98]
    with pytest.raises(DataError, match="no token for the byte b'z'"):
        ours.encode("az")


def split(data: dict[str, Any]) -> dict[str, Any]:
    found = data["pre_tokenizer"]["pretokenizers"][0]
    assert isinstance(found, dict)
    return found


def lacks_z(data: dict[str, Any]) -> dict[str, Any]:
    model = data["model"]
    model["merges"] = []
    model["vocab"] = {token: id_ for token, id_ in model["vocab"].items() if "z" not in token}
    return model


UNREADABLE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "the normalizer .*NFKC": lambda d: d.update(normalizer={"type": "NFKC"}),
    "the normalizer .*Lowercase": lambda d: d.update(
        normalizer={"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}
    ),
    "post-processor 'BertProcessing'": lambda d: d.update(
        post_processor={"type": "BertProcessing"}
    ),
    "post-processor's end .*SpecialToken": lambda d: d.update(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<|endoftext|>"}}],
        }
    ),
    "post-processor's ids .5., which are not special": lambda d: d.update(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "a"}}, {"Sequence": {"id": "A"}}],
            "special_tokens": {"a": {"ids": [5]}},
        }
    ),
    "the decoder 'Sequence'": lambda d: d.update(decoder={"type": "Sequence"}),
    "added token 'x' with lstrip": lambda d: d["added_tokens"].append(
        {"id": 999, "content": "x", "special": False, "lstrip": True}
    ),
    "the decoder 'Metaspace'": lambda d: d.update(decoder={"type": "Metaspace"}),
    "model's type 'WordPiece'": lambda d: d["model"].update(type="WordPiece"),
    "dropout '0.1'": lambda d: d["model"].update(dropout=0.1),
    "byte_fallback 'True'": lambda d: lacks_z(d).update(byte_fallback=True),
    "unk_token '<unk>'": lambda d: lacks_z(d).update(unk_token="<unk>"),
    "the option add_prefix_space": lambda d: d.update(
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}
    ),
    "pre-tokenizers .*Whitespace": lambda d: d.update(pre_tokenizer={"type": "Whitespace"}),
    "pre-tokenizers .*Digits": lambda d: d["pre_tokenizer"]["pretokenizers"].insert(
        0, {"type": "Digits"}
    ),
    "pre-tokenizers .* use_regex": lambda d: d["pre_tokenizer"]["pretokenizers"][-1].update(
        use_regex=True
    ),
    "behavior and invert .*Removed": lambda d: split(d).update(behavior="Removed"),
    r"split pattern with '\{1,3\}\+'": lambda d: split(d)["pattern"].update(Regex=r"\p{N}{1,3}+|."),
    r"split pattern with '\$'": lambda d: split(d)["pattern"].update(Regex=r"\s+$|[\s\S]"),
    r"split pattern with '\^'": lambda d: split(d)["pattern"].update(Regex=r"^[^a]|[\s\S]"),
    "does not match all": lambda d: split(d)["pattern"].update(Regex=r"\w+"),
    "is no regex": lambda d: split(d)["pattern"].update(Regex="(\x1b\n"),
    "a merge that is there twice": lambda d: d["model"]["merges"].append("Ġ a"),
    r"damaged \(KeyError: .*qz": lambda d: d["model"]["merges"].append("q z"),
    "share an id": lambda d: d["model"]["vocab"].update(a=5),
    "no 32-bit number": lambda d: d["model"]["vocab"].update(a=2**40),
    r"damaged \(KeyError: .*model": lambda d: d.pop("model"),
    r"damaged \(UnicodeEncodeError": lambda d: d["model"]["vocab"].update({"世": 9999}),
    r"damaged \(AttributeError": lambda d: d["model"].update(vocab=["a"]),
    r"damaged \(TypeError": lambda d: d.update(added_tokens=[5]),
    r"damaged \(ValueError": lambda d: d["model"]["merges"].append("a b c"),
}


@pytest.mark.parametrize("says", UNREADABLE)
def test_what_would_encode_otherwise_is_refused_by_name(says: str) -> None:
    data = json.loads(json.dumps(written(small_bpe)[1]))
    UNREADABLE[says](data)
    with pytest.raises(CheckpointError, match=says) as caught:
        tokenizer_from_json(data, "x")
    assert str(caught.value).startswith("tokenizer.json")
    assert str(caught.value).isprintable()


def test_pattern_that_the_other_dialect_reads_otherwise_is_not_written() -> None:
    ranks = {bytes([b]): b for b in range(256)}
    tokenizer = Tokenizer("x", make_encoding("x", r"(?:ab){2,3}+|(?s:.)", ranks, {}))
    with pytest.raises(CheckpointError, match=r"'\{2,3\}\+' means something else"):
        tokenizer_to_json(tokenizer)


def test_merges_are_found_exactly_where_plain_merging_ends_in_two_parts() -> None:
    draw = random.Random(11)
    n_unreached = 0
    for _ in range(1000):
        words = {"".join(draw.choices("ab", k=draw.choice([2, 2, 3, 4, 5]))) for _ in range(6)}
        tokens = [b"a", b"b", *(word.encode() for word in sorted(words, key=len))]
        if draw.random() < 0.3:
            draw.shuffle(tokens)
        ranks = {token: rank for rank, token in enumerate(tokens)}
        plain = [merged_plainly(token, ranks) for token in ranks if len(token) > 1]
        expected = [tuple(parts) for parts in plain if len(parts) == 2]
        assert merges_of(ranks) == expected
        n_unreached += len(plain) - len(expected)
    assert n_unreached > 100
