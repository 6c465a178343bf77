"""Reading and writing tokenizer.json, compared with the tokenizers library."""

import functools
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from fuzzed_texts import SAMPLE, fuzzed_texts

from minigpt.checkpoint.byte_pair_json import merges_of
from minigpt.checkpoint.tokenizer_json import tokenizer_from_json, tokenizer_to_json
from minigpt.errors import CheckpointError
from minigpt.text.bpe import train_bpe
from minigpt.text.byte_pairs import TiktokenTokenizer, make_encoding, named_tokenizer
from minigpt.text.imported import ImportedTokenizer
from minigpt.text.tokenizer import BytesTokenizer


def small_bpe() -> TiktokenTokenizer:
    return train_bpe([SAMPLE, "aaaa aaa aaaaaaa bababab 1234567 漢字 🙂🙂"], 600)


def gpt2() -> TiktokenTokenizer:
    return named_tokenizer("gpt2")


def cl100k() -> TiktokenTokenizer:
    return named_tokenizer("cl100k_base")


def merge_plainly(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the parts of a token before the final merge, or the parts that cannot be merged."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        unions = map(b"".join, itertools.pairwise(parts))
        rank, i = min((ranks.get(union, 10**9), i) for i, union in enumerate(unions))
        if rank == 10**9:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def random_merges() -> TiktokenTokenizer:
    """Return a vocabulary with overlapping tokens, as no training text would produce."""
    draw = random.Random(5)
    ranks = {bytes([b]): b for b in range(256)}
    letters = [b"a", b"b", b" "]
    while len(ranks) < 900:
        left, right = draw.choices(letters, k=2)
        token = left + right
        if token not in ranks and len(token) < 12 and merge_plainly(token, ranks) == [left, right]:
            ranks[token] = len(ranks)
            letters.append(token)
    pattern = r"[ab]{1,30}+|\s++$|(?s:.)"
    return TiktokenTokenizer(
        "random", make_encoding("random", pattern, ranks, {"<|endoftext|>": 950})
    )


Written = tuple[TiktokenTokenizer, dict[str, Any]]


@functools.cache
def written(make: Callable[[], TiktokenTokenizer]) -> Written:
    tokenizer = make()
    return tokenizer, tokenizer_to_json(tokenizer)


@pytest.fixture(
    params=[
        BytesTokenizer,
        small_bpe,
        random_merges,
        gpt2,
        pytest.param(cl100k, marks=pytest.mark.slow),
    ]
)
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Written:
    """Return a tokenizer and its tokenizer.json."""
    if request.param in (gpt2, cl100k):
        shared = request.getfixturevalue("shared")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "tiktoken"))
    return written(request.param)


@pytest.mark.integration
def test_the_tokenizers_library_gives_the_same_ids_and_text(pair: Written) -> None:
    tokenizer, data = pair
    theirs = tokenizers.Tokenizer.from_str(json.dumps(data))
    theirs.encode_special_tokens = True  # as in our encode: special tokens in a text are plain text
    for text in fuzzed_texts(500):
        ids = tokenizer.encode(text)
        assert theirs.encode(text).ids == ids, text
        assert theirs.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)
    end = tokenizer.end_of_text
    assert theirs.token_to_id("<|endoftext|>") == end
    theirs.encode_special_tokens = False
    assert theirs.encode("<|endoftext|>").ids == [end]


@pytest.mark.integration
def test_a_saved_tokenizer_json_is_read_back_equal(pair: Written) -> None:
    tokenizer, data = pair
    again = tokenizer_from_json(json.loads(json.dumps(data)), "again")
    assert again.name == "again"
    assert again.fingerprint == tokenizer.fingerprint


def test_written_merges_equal_those_that_openai_published(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = shared / "tiktoken"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    published = next(path for path in cache.iterdir() if path.read_bytes()[:9] == b"#version:")
    lines = published.read_text(encoding="utf-8").splitlines()[1:]
    assert written(gpt2)[1]["model"]["merges"] == lines


def test_only_byte_level_bpe_files_in_our_layout_are_read_with_tiktoken() -> None:
    _, data = written(small_bpe)
    assert type(tokenizer_from_json(data, "x")) is TiktokenTokenizer
    rewritten = json.loads(json.dumps(data))  # as transformers writes merges
    rewritten["model"]["merges"] = [merge.split(" ") for merge in data["model"]["merges"]]
    assert type(tokenizer_from_json(rewritten, "x")) is TiktokenTokenizer
    for change in (
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": data["pre_tokenizer"]["pretokenizers"][1] | {"add_prefix_space": True}},
        {"model": data["model"] | {"ignore_merges": not data["model"]["ignore_merges"]}},
        {"added_tokens": [token | {"lstrip": True} for token in data["added_tokens"]]},
    ):
        assert type(tokenizer_from_json(data | change, "x")) is ImportedTokenizer


@pytest.mark.integration
def test_files_with_changed_merges_encode_as_in_the_tokenizers_library() -> None:
    draw = random.Random(7)
    kinds = []
    for _ in range(150):
        pool, merges = ["a", "b", "c"], []
        while len(pool) < draw.choice([4, 6, 10]):
            left, right = draw.choice(pool), draw.choice(pool)
            if (left, right) not in merges and len(left + right) < 9:
                merges.append((left, right))
                pool.append(left + right)
        ranks = {bytes([b]): b for b in range(256)}
        ranks |= {t.encode(): 256 + i for i, t in enumerate(dict.fromkeys(pool[3:]))}
        encoding = make_encoding("x", draw.choice([r"[abc]+|(?s:.)", r"(?s:.)+"]), ranks, {})
        data = tokenizer_to_json(TiktokenTokenizer("x", encoding))
        if draw.random() < 0.5:
            draw.shuffle(data["model"]["merges"])
        ours = tokenizer_from_json(data, "x")
        kinds.append(type(ours))
        theirs = tokenizers.Tokenizer.from_str(json.dumps(data))
        for n in range(1, 40):
            text = "".join(draw.choices("aabbc ", k=n))
            assert ours.encode(text) == theirs.encode(text).ids
    assert min(kinds.count(TiktokenTokenizer), kinds.count(ImportedTokenizer)) > 15


def test_a_pattern_with_another_meaning_in_oniguruma_is_refused() -> None:
    ranks = {bytes([b]): b for b in range(256)}
    tokenizer = TiktokenTokenizer("x", make_encoding("x", r"(?:ab){2,3}+|(?s:.)", ranks, {}))
    with pytest.raises(CheckpointError, match=r"'\{2,3\}\+' means something else"):
        tokenizer_to_json(tokenizer)


def test_reconstructed_merges_equal_those_of_plain_merging() -> None:
    draw = random.Random(11)
    n_unreached = 0
    for _ in range(1000):
        words = {"".join(draw.choices("ab", k=draw.choice([2, 2, 3, 4, 5]))) for _ in range(6)}
        tokens = [b"a", b"b", *(word.encode() for word in sorted(words, key=len))]
        if draw.random() < 0.3:
            draw.shuffle(tokens)
        ranks = {token: rank for rank, token in enumerate(tokens)}
        plain = [merge_plainly(token, ranks) for token in ranks if len(token) > 1]
        expected = [tuple(parts) for parts in plain if len(parts) == 2]
        assert merges_of(ranks) == expected
        n_unreached += len(plain) - len(expected)
    assert n_unreached > 100
