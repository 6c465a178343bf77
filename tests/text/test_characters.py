"""Vocabularies of text with many characters: frequent ones are tokens of their own."""

import json
import random

import pytest

from minigpt.checkpoint.tokenizer_json import tokenizer_to_json
from minigpt.text.bpe import train_bpe
from minigpt.text.byte_pairs import TiktokenTokenizer
from minigpt.text.characters import character_tokens, frequent_characters, joined_ranks
from minigpt.text.tokenizer import make_tokenizer

ALPHABETS = {
    "Chinese": [chr(0x4E00 + 7 * i) for i in range(600)],
    "Hangul": [chr(0xAC00 + 13 * i) for i in range(400)],
    "Cyrillic": [chr(0x430 + i) for i in range(32)],
    "Devanagari": [chr(0x905 + i) for i in range(48)],
    "emoji": [chr(0x1F600 + i) for i in range(70)],
}


def text_in(alphabet: str, n_words: int = 4000) -> str:
    """Words of characters as frequent as in a language: the i-th by 1 / i."""
    source = random.Random(3)
    characters = ALPHABETS[alphabet]
    weights = [1 / (i + 2) for i in range(len(characters))]
    words = [source.choices(characters, weights, k=source.randint(1, 3)) for _ in range(n_words)]
    return " ".join(map("".join, words))


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_frequent_characters_are_one_token_each(alphabet: str) -> None:
    text = text_in(alphabet)
    tokenizer = make_tokenizer("bpe", [text])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) <= len(text)
    # What is not a token is rare: nearly all places in the text are between two characters.
    whole = [c for c in text if len(tokenizer.encode(c)) == 1]
    assert len(whole) > 0.99 * len(text)


def test_tokens_of_such_a_vocabulary_can_all_be_reached() -> None:
    text = text_in("Chinese")
    tokenizer = make_tokenizer("bpe", [text])
    for id_ in range(256, tokenizer.vocab_size - 1):
        token = tokenizer.token_bytes(id_)
        try:
            word = token.decode()
        except UnicodeDecodeError:
            continue  # the beginning of a character
        assert tokenizer.encode(word) == [id_]


def test_its_tokenizer_json_has_the_same_ids() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    text = text_in("Chinese")[:3000] + " and café 12 " + text_in("emoji")[:500]
    tokenizer = make_tokenizer("bpe", [text_in("Chinese"), text_in("emoji")])
    assert isinstance(tokenizer, TiktokenTokenizer)
    other = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_to_json(tokenizer)))
    assert other.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)


def test_a_text_in_ascii_has_the_merges_of_its_bytes_alone() -> None:
    text = "the cat sat \u2019" * 3 + "the cat sat on the mat " * 60
    assert frequent_characters([text]) == []
    assert train_bpe([text], 280).token_bytes(256) == b"at"


def test_a_fixed_size_is_kept_and_half_of_it_is_for_merges() -> None:
    tokenizer = train_bpe([text_in("Chinese")], 512)
    assert tokenizer.vocab_size == 512
    seeds = character_tokens(frequent_characters([text_in("Chinese")]), 10_000)
    assert len(seeds) > 255  # more than half


def test_characters_that_occur_once_are_no_tokens() -> None:
    assert frequent_characters(["\u65e5\u65e5\u672c"]) == ["\u65e5"]


def test_beginnings_of_characters_come_before_them() -> None:
    tokens = character_tokens(["\u65e5", "\u672c", "\u00e9"], 100)
    assert tokens == [b"\xe6\x97", b"\xe6\x9c", b"\xc3\xa9", b"\xe6\x97\xa5", b"\xe6\x9c\xac"]
    assert character_tokens(["\u65e5", "\u672c"], 3) == [b"\xe6\x97", b"\xe6\x97\xa5"]


def test_a_learned_token_of_two_half_characters_is_left_out() -> None:
    seeds = character_tokens(["\u65e5", "\u672c"], 100)
    ranks = joined_ranks(seeds, [b"\xa5\xe6", "\u65e5\u672c".encode(), b"ab"], 300)
    assert b"\xa5\xe6" not in ranks
    assert list(ranks)[-2:] == ["\u65e5\u672c".encode(), b"ab"]


def test_repeated_characters_do_not_become_tokens_of_any_length() -> None:
    # Each merge doubles the longest token of such a text, and its reach takes quadratic time.
    tokenizer = make_tokenizer("bpe", ["─" * 5000 + "\n哈哈\n"])
    lengths = [len(tokenizer.token_bytes(id_)) for id_ in range(tokenizer.vocab_size - 1)]
    assert 64 < max(lengths) <= 256


@pytest.mark.parametrize("alphabet", ["Devanagari", "Cyrillic", "Hangul"])
def test_merges_join_characters_whose_bytes_begin_alike(alphabet: str) -> None:
    # Every letter of Devanagari begins with the same two bytes: merges of bytes would join the end
    # of one with the beginning of the next, and hardly any whole letters.
    source = random.Random(5)
    lexicon = ["".join(source.choices(ALPHABETS[alphabet][:40], k=5)) for _ in range(300)]
    text = " ".join(source.choices(lexicon, k=9000))
    tokenizer = make_tokenizer("bpe:1024", [text])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == 1024
    assert len(text) / len(ids) > 2.5
