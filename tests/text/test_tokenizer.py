"""Tokenizers against plain loops and tiktoken itself."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken

from minigpt.checkpoint.byte_pair_json import byte_pair_json
from minigpt.checkpoint.model_folder import BYTES_TOKENIZER
from minigpt.errors import ConfigError, DataError
from minigpt.files import to_json
from minigpt.text import bpe as module
from minigpt.text.bpe import parse_spec, train_bpe
from minigpt.text.byte_pairs import TiktokenTokenizer, make_encoding, named_tokenizer
from minigpt.text.shard_files import tokenizer_from_dict
from minigpt.text.tokenizer import (
    BYTES_PATTERN,
    END_OF_TEXT,
    BytesTokenizer,
    Tokenizer,
    make_tokenizer,
)
from minigpt.text.vocabulary_parts import BPE_PATTERN

PROSE = (
    "It's the owl's 1234 nests! We'll see them, they said;  and\n\nthe owls don't mind: "
    "über-owls €5.  The nest of the owl, the nests of the owls. THE END\r\n"
) * 3
UNICODE = "naïve 😀 \ufeff 東京\t\x00 e\u0301\n"


@pytest.fixture(scope="module")
def bpe() -> TiktokenTokenizer:
    return train_bpe([PROSE], 300)


def learn_merges(text: str, n_merges: int) -> list[bytes]:
    """Byte-pair encoding as in the paper: join the most frequent pair, or the smallest of ties."""
    words = [list(piece.encode()) for piece in regex.findall(BPE_PATTERN, text)]
    tokens = [bytes([b]) for b in range(256)]
    for _ in range(n_merges):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [len(tokens)]
                i += 1
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def test_bpe_learns_the_merges_of_a_plain_loop() -> None:
    bpe = train_bpe([PROSE], 300, n_seeds=0)
    expected = learn_merges(PROSE, 300 - 257)
    assert [bpe.token_bytes(i) for i in range(299)] == expected


def test_end_of_text_is_the_last_id_of_a_bpe_vocabulary(bpe: TiktokenTokenizer) -> None:
    assert (bpe.vocab_size, bpe.end_of_text, bpe.name) == (300, 299, "bpe:300")
    assert bpe.token_bytes(299) == END_OF_TEXT.encode()


def test_a_bpe_vocabulary_of_a_text_with_few_pairs_is_smaller_than_requested() -> None:
    tiny = train_bpe(["ab ab"], 1000)
    assert tiny.vocab_size == 256 + 2 + 1  # ab, " ab" and the end of text
    assert tiny.decode(tiny.encode("ab ab xyz")) == "ab ab xyz"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("n_bytes", "vocab_size"), [(10, 258), (50_000, 307), (767_000, 1024), (1_100_000, 1024)]
)
def test_the_default_bpe_size_depends_on_the_size_of_the_corpus(
    n_bytes: int, vocab_size: int
) -> None:
    letters = "".join(np.random.default_rng(0).choice(list("abcdefg "), size=n_bytes))
    tokenizer = make_tokenizer("bpe", [letters[: n_bytes // 2], letters[n_bytes // 2 :]])
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.name == f"bpe:{vocab_size}"
    same = train_bpe([letters[: n_bytes // 2], letters[n_bytes // 2 :]], vocab_size)
    assert tokenizer.fingerprint == same.fingerprint


def test_bpe_training_reads_at_most_its_limit_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BPE_TRAINING_BYTES", 100)
    n_read = 0

    def texts():  # type: ignore[no-untyped-def]
        nonlocal n_read
        while True:
            n_read += 1
            yield "the owl and the nest "

    train_bpe(texts(), 300)
    assert n_read == 5


@pytest.mark.parametrize("vocab_size", [0, 256, 257])
def test_a_bpe_size_without_room_for_a_merge_is_a_config_error(vocab_size: int) -> None:
    with pytest.raises(ConfigError, match=f"bpe:{vocab_size} leaves no room"):
        train_bpe(["text"], vocab_size)


def test_the_tokenizer_json_of_the_byte_tokenizer_has_no_merges() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = make_encoding("bytes", "(?s:.)", ranks, {END_OF_TEXT: 256})
    expected = byte_pair_json(TiktokenTokenizer("bytes", encoding))
    assert BYTES_TOKENIZER.read_bytes() == to_json(expected)


def test_byte_tokenizer_ids_are_the_bytes_of_the_text() -> None:
    tokenizer = BytesTokenizer()
    text = PROSE + UNICODE + END_OF_TEXT
    assert tokenizer.encode(text) == list(text.encode())
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = make_encoding("bytes", BYTES_PATTERN, ranks, {END_OF_TEXT: 256})
    assert tokenizer.encode_array(text).tolist() == encoding.encode_ordinary(text)
    assert tokenizer.to_dict() == TiktokenTokenizer("bytes", encoding).to_dict()
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)


@pytest.mark.parametrize("spec", ["bytes", "bpe:300", "gpt2", "cl100k_base"])
def test_decoding_restores_any_text(
    spec: str, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "tiktoken"))
    tokenizer = make_tokenizer(spec, [PROSE])
    text = PROSE + UNICODE + END_OF_TEXT
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    if spec != "bytes":
        assert tokenizer.decode(ids) == tokenizer.encoding.decode(ids)
    assert tokenizer.encode_array(text).tolist() == ids
    assert tokenizer.encode_array(text).dtype == np.uint32
    assert tokenizer.token_byte_lengths[ids].sum() == len(text.encode())


def test_end_of_text_in_a_text_is_plain_text(bpe: TiktokenTokenizer) -> None:
    for tokenizer in (bpe, BytesTokenizer()):
        assert tokenizer.end_of_text not in tokenizer.encode(f"a{END_OF_TEXT}b")


def test_lone_surrogates_become_the_replacement_character(bpe: TiktokenTokenizer) -> None:
    for tokenizer in (bpe, BytesTokenizer()):
        assert tokenizer.decode(tokenizer.encode("a\ud800b\udcff")) == "a\ufffdb\ufffd"
        assert tokenizer.encode_array("\ud83d\ude00").tolist() == tokenizer.encode("😀")


def test_a_named_tokenizer_equals_the_one_of_tiktoken(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "tiktoken"))
    gpt2 = named_tokenizer("gpt2")
    assert gpt2.encode("hello world") == [31373, 995]  # tiktoken's own documentation
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)


def test_unused_ids_and_special_tokens_count_no_text_bytes(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "tiktoken"))
    cl100k = named_tokenizer("cl100k_base")
    lengths = cl100k.token_byte_lengths
    assert lengths.shape == (cl100k.vocab_size,) == (100277,)
    assert np.flatnonzero(lengths == 0).tolist() == list(range(100256, 100277))
    assert cl100k.token_bytes(100256) == b""  # an unused id
    assert cl100k.token_bytes(100257) == END_OF_TEXT.encode()


def test_unused_ids_decode_to_no_text(bpe: TiktokenTokenizer) -> None:
    assert bpe.decode([*bpe.encode("a"), 300, 10**12, -1, *bpe.encode("b")]) == "ab"


def test_a_named_tokenizer_without_network_names_the_cache_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "o200k_base", raising=False)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # no server listens on this port
    with pytest.raises(DataError, match=r"o200k_base could not be downloaded.*TIKTOKEN_CACHE_DIR"):
        named_tokenizer("o200k_base")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("byte", "unknown tokenizer 'byte'. Did you mean bytes?"),
        ("gpt-2", "Did you mean gpt2?"),
        ("cl100k", "Did you mean cl100k_base?"),
        ("bpe:", "in digits, as in bpe:1024"),
        ("bp", "Did you mean bpe?"),
        ("bpe:1k", "in digits"),
        ("bpe:-5", "in digits"),
        ("", "Choose from bytes"),
    ],
)
def test_an_unknown_tokenizer_spec_gets_the_nearest_suggestion(spec: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_spec(spec)
    assert message in str(caught.value)


def test_a_saved_tokenizer_is_restored_completely(bpe: TiktokenTokenizer) -> None:
    again = tokenizer_from_dict(json.loads(json.dumps(bpe.to_dict())))
    assert again.name == bpe.name
    assert again.fingerprint == bpe.fingerprint
    assert again.encode(PROSE + UNICODE) == bpe.encode(PROSE + UNICODE)


@pytest.mark.parametrize(
    "damage",
    [
        {"ranks": {"YQ": 0}},
        {"ranks": {"YQ==": 0, "Yg==": 0}},
        {"ranks": {}},
        {"ranks": None},
        {"pattern": "("},
    ],
)
def test_a_damaged_vocabulary_is_a_data_error(bpe: Tokenizer, damage: dict[str, object]) -> None:
    with pytest.raises(DataError):
        tokenizer_from_dict(bpe.to_dict() | damage)
    with pytest.raises(DataError):
        tokenizer_from_dict({"name": "bpe:300"})


def test_the_fingerprint_depends_on_pattern_ranks_and_specials_but_not_the_name() -> None:
    ranks = {b"a": 0, b"b": 1}

    def fingerprint(name="n", pattern=".", ranks=ranks, specials=None):  # type: ignore[no-untyped-def]
        return TiktokenTokenizer(
            name, make_encoding(name, pattern, ranks, specials or {})
        ).fingerprint

    others = [
        fingerprint(pattern="..?"),
        fingerprint(ranks={b"a": 1, b"b": 0}),
        fingerprint(specials={END_OF_TEXT: 2}),
        fingerprint(),
    ]
    assert len(set(others)) == 4
    assert fingerprint(name="m") == fingerprint()


def test_a_byte_missing_in_the_vocabulary_is_a_data_error_not_a_panic() -> None:
    tokenizer = TiktokenTokenizer("abc", make_encoding("abc", ".", {b"a": 0, b"b": 1}, {}))
    assert tokenizer.encode("abba") == [0, 1, 1, 0]
    with pytest.raises(DataError, match=r"'abc' has no token for the byte b'c'"):
        tokenizer.encode("abc")
    with pytest.raises(DataError, match=r"b'\\xc3'"):
        tokenizer.encode_array("é")


@pytest.mark.integration
@pytest.mark.parametrize("blank", [" ", "\r\n"])
def test_a_million_spaces_or_line_breaks_are_encoded_without_a_panic(
    bpe: Tokenizer, blank: str
) -> None:
    text = "owl" + blank * 1_100_000 + "nest"
    assert bpe.decode(bpe.encode(text)) == text


def test_bpe_trains_on_a_million_spaces_without_a_panic() -> None:
    assert train_bpe(["owl owl" + " " * 1_100_000 + "nest"], 260).vocab_size == 260


@pytest.mark.integration
def test_a_pattern_that_overflows_its_stack_loses_no_text() -> None:
    ranks = {bytes([b]): b for b in range(256)}
    tokenizer = TiktokenTokenizer("odd", make_encoding("odd", r"x+(?!x)$|.", ranks, {}))
    text = "x" * 1_100_000 + "y"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer = TiktokenTokenizer(
        "odd", make_encoding("odd", r"x+(?!x)$|.", ranks | {b"ab": 256}, {})
    )
    with pytest.raises(DataError, match=r"split pattern of 'odd' failed .* longest runs"):
        tokenizer.encode(text)
