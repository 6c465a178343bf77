"""Vocabularies of scripts with many characters, where frequent characters are single tokens."""

import json
import random

import pytest
import tokenizers

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
    """Return words with Zipf-distributed characters: the frequency of the i-th is 1 / i."""
    source = random.Random(3)
    characters = ALPHABETS[alphabet]
    weights = [1 / (i + 2) for i in range(len(characters))]
    words = [source.choices(characters, weights, k=source.randint(1, 3)) for _ in range(n_words)]
    return " ".join(map("".join, words))


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_frequent_characters_are_single_tokens(alphabet: str) -> None:
    text = text_in(alphabet)
    tokenizer = make_tokenizer("bpe", [text])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) <= len(text)
    # Characters without a token of their own are rare.
    whole = [c for c in text if len(tokenizer.encode(c)) == 1]
    assert len(whole) > 0.99 * len(text)


def test_every_token_of_a_character_vocabulary_can_be_produced() -> None:
    text = text_in("Chinese")
    tokenizer = make_tokenizer("bpe", [text])
    for id_ in range(256, tokenizer.vocab_size - 1):
        token = tokenizer.token_bytes(id_)
        try:
            word = token.decode()
        except UnicodeDecodeError:
            continue  # the first bytes of a character
        assert tokenizer.encode(word) == [id_]


@pytest.mark.integration
def test_the_tokenizer_json_of_a_character_vocabulary_gives_the_same_ids() -> None:
    text = text_in("Chinese")[:3000] + " and café 12 " + text_in("emoji")[:500]
    tokenizer = make_tokenizer("bpe", [text_in("Chinese"), text_in("emoji")])
    assert isinstance(tokenizer, TiktokenTokenizer)
    other = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_to_json(tokenizer)))
    assert other.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)


def test_mostly_ascii_text_gets_only_byte_merges() -> None:
    text = "the cat sat \u2019" * 3 + "the cat sat on the mat " * 60
    assert frequent_characters([text]) == []
    assert train_bpe([text], 280).token_bytes(256) == b"at"


@pytest.mark.integration
def test_a_fixed_vocabulary_size_reserves_half_for_merges() -> None:
    tokenizer = train_bpe([text_in("Chinese")], 512)
    assert tokenizer.vocab_size == 512
    seeds = character_tokens(frequent_characters([text_in("Chinese")]), 10_000)
    assert len(seeds) > 255  # more than half


def test_characters_that_occur_only_once_are_not_tokens() -> None:
    assert frequent_characters(["\u65e5\u65e5\u672c"]) == ["\u65e5"]


def test_byte_prefixes_of_characters_have_lower_ids_than_the_characters() -> None:
    tokens = character_tokens(["\u65e5", "\u672c", "\u00e9"], 100)
    assert tokens == [b"\xe6\x97", b"\xe6\x9c", b"\xc3\xa9", b"\xe6\x97\xa5", b"\xe6\x9c\xac"]
    assert character_tokens(["\u65e5", "\u672c"], 3) == [b"\xe6\x97", b"\xe6\x97\xa5"]


def test_a_merge_of_two_partial_characters_is_dropped() -> None:
    seeds = character_tokens(["\u65e5", "\u672c"], 100)
    ranks = joined_ranks(seeds, [b"\xa5\xe6", "\u65e5\u672c".encode(), b"ab"], 300)
    assert b"\xa5\xe6" not in ranks
    assert list(ranks)[-2:] == ["\u65e5\u672c".encode(), b"ab"]


def test_tokens_of_repeated_characters_have_a_bounded_length() -> None:
    # Each merge doubles the longest token of such a text, and long tokens take quadratic time.
    tokenizer = make_tokenizer("bpe", ["─" * 5000 + "\n哈哈\n"])
    lengths = [len(tokenizer.token_bytes(id_)) for id_ in range(tokenizer.vocab_size - 1)]
    assert 64 < max(lengths) <= 256


@pytest.mark.parametrize("alphabet", ["Devanagari", "Cyrillic", "Hangul"])
def test_characters_that_share_leading_bytes_are_merged_as_whole_characters(alphabet: str) -> None:
    # All Devanagari letters share their first two bytes, so byte merges would join the end of a
    # letter with the start of the next one and rarely form whole letters.
    source = random.Random(5)
    lexicon = ["".join(source.choices(ALPHABETS[alphabet][:40], k=5)) for _ in range(300)]
    text = " ".join(source.choices(lexicon, k=9000))
    tokenizer = make_tokenizer("bpe:1024", [text])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == 1024
    assert len(text) / len(ids) > 2.5
