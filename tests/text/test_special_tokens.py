"""Special tokens in a text: plain text by default, ids if parsed; skipped characters."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from minigpt.checkpoint.tokenizer_json import tokenizer_from_json, tokenizer_to_json
from minigpt.config import DataConfig
from minigpt.errors import ConfigError, DataError
from minigpt.text.bpe import train_bpe
from minigpt.text.byte_pairs import TiktokenTokenizer, make_encoding
from minigpt.text.prepared_folders import prepare_folder
from minigpt.text.tokenizer import BYTES_PATTERN, Tokenizer
from minigpt.text.tokens import PreparedData, TokenSpan, prepare

SPECIALS = ["<|im_start|>", "<|im_end|>", "<|im_end|>>", "<|endoftext|>", "<s>", "né"]
TEXTS = [
    "",
    "plain",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|><|im_end|>>> <|im_end|",
    " <|endoftext|> a<s>b <s> c<|endoftext|>",
    "né <|im_start|> né<s>",
]


def bytes_of_tiktoken() -> TiktokenTokenizer:
    ranks = {bytes([byte]): byte for byte in range(256)}
    return TiktokenTokenizer("bytes", make_encoding("bytes", BYTES_PATTERN, ranks, {}))


def own(make: Callable[[], TiktokenTokenizer]) -> Callable[[], Tokenizer]:
    """Return a function that creates one of our vocabularies with more special tokens."""

    def made() -> Tokenizer:
        ranks = make().encoding._mergeable_ranks
        specials = {text: len(ranks) + i for i, text in enumerate(SPECIALS)}
        return TiktokenTokenizer("own", make_encoding("own", r"\S+|\s+", ranks, specials))

    return made


def imported(pre_tokenizer: Any, normalizer: Any = None) -> Callable[[], Tokenizer]:
    """Return a function that creates a character vocabulary for the tokenizers library."""

    def made() -> Tokenizer:
        characters = ["<unk>", "\u2581", *map(chr, range(32, 127)), "\n"]
        vocab = {text: i for i, text in enumerate(dict.fromkeys(characters))}
        library = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
        library.pre_tokenizer = pre_tokenizer
        library.normalizer = normalizer
        library.decoder = decoders.Fuse()
        library.add_special_tokens(
            [*SPECIALS[:-1], AddedToken("né", special=True, lstrip=True, rstrip=True)]
        )
        return tokenizer_from_json(_json(library), "imported")

    return made


def _json(library: tokenizers.Tokenizer) -> dict[str, Any]:
    import json

    data: dict[str, Any] = json.loads(library.to_str())
    return data


KINDS = {
    "bytes": own(bytes_of_tiktoken),
    "bpe": own(lambda: train_bpe(["the owl in the tree " * 9], 280)),
    "metaspace always": imported(pre_tokenizers.Metaspace(prepend_scheme="always")),
    "metaspace first": imported(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "prepend": imported(None, normalizers.Prepend("\u2581")),
    "whitespace": imported(pre_tokenizers.WhitespaceSplit()),
}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


@pytest.mark.parametrize("text", TEXTS)
def test_parsed_ids_are_those_of_the_tokenizers_library(tokenizer: Tokenizer, text: str) -> None:
    import json

    library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_to_json(tokenizer)))
    library.encode_special_tokens = False
    expected = library.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text, special=True) == expected


@pytest.mark.parametrize("text", TEXTS)
def test_text_never_encodes_to_special_ids_unless_special_is_set(
    tokenizer: Tokenizer, text: str
) -> None:
    assert not {*tokenizer.encode(text)} & {*tokenizer.textless_ids} - {0}
    if not tokenizer.special_pattern.search(text):
        assert tokenizer.encode(text) == tokenizer.encode(text, special=True)


def ids(data: PreparedData) -> list[int]:
    whole = TokenSpan(data.tokens, 0, len(data.tokens), "whole")
    return whole.first_ids(len(whole))


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], DataConfig]:
    """Return a function that writes a text and returns the config that reads it."""
    monkeypatch.setenv("MINIGPT_CACHE_DIR", str(tmp_path / "cache"))

    def write(text: str) -> DataConfig:
        (tmp_path / "text.txt").write_text(text)
        return DataConfig(paths=(str(tmp_path / "text.txt"),))

    return write


def test_parsed_end_of_text_tokens_split_a_corpus_into_documents(
    corpus: Callable[[str], DataConfig],
) -> None:
    data = corpus("<|endoftext|>one\n<|endoftext|>\ntwo<|endoftext|><|endoftext|>three")
    plain, parsed = prepare(data), prepare(replace(data, special=True))
    assert ids(parsed) == [256, *b"one\n", 256, *b"\ntwo", 256, *b"three"]
    assert (parsed.manifest.n_documents, parsed.manifest.n_bytes) == (3, 13)
    assert ids(plain) == [256, *Path(data.paths[0]).read_bytes()]
    assert plain.manifest.unparsed == {"<|endoftext|>": 4}
    assert parsed.manifest.unparsed == {}
    assert "<|endoftext|> 4 times" in next(plain.manifest.notes())
    assert not list(parsed.manifest.notes())


@pytest.mark.parametrize("n_before", range(285, 301))
def test_a_special_token_in_text_without_spaces_is_not_split_between_pieces(
    n_before: int, corpus: Callable[[str], DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minigpt.text.corpus.PIECE_CHARS", 200)
    monkeypatch.setattr("minigpt.text.corpus.LOOKAHEAD_CHARS", 100)
    text = "\u6625" * n_before + "<|endoftext|>" + "\u7720" * 400
    data = prepare(replace(corpus(text), special=True))
    assert data.manifest.n_documents == 2
    assert data.manifest.n_bytes == 3 * (n_before + 400)


def test_special_splits_the_fairy_tales_into_278_documents(shared: Path, tmp_path: Path) -> None:
    path = shared / "data" / "fairytales.txt"
    if not path.exists():
        pytest.skip(f"needs {path}")
    data = DataConfig(paths=(str(path),), special=True, val_split="tail")
    parsed = prepare(data, tmp_path)
    assert parsed.manifest.n_documents == 278
    text = path.read_text(encoding="utf-8")
    assert parsed.manifest.n_bytes == len(text.encode()) - 277 * len("<|endoftext|>")
    assert (
        ids(parsed)[:50_000]
        == parsed.tokenizer.encode(f"<|endoftext|>{text[:60_000]}", special=True)[:50_000]
    )
    assert prepare(replace(data, special=False), tmp_path).manifest.unparsed == {
        "<|endoftext|>": 277
    }


def test_no_merge_is_learned_from_special_tokens(corpus: Callable[[str], DataConfig]) -> None:
    data = replace(corpus("a b c <|endoftext|>" * 300), tokenizer="bpe:270")
    assert any(b"end" in token for token in tokens_of(prepare(data).tokenizer))
    assert not any(
        b"end" in token for token in tokens_of(prepare(replace(data, special=True)).tokenizer)
    )


def tokens_of(tokenizer: Tokenizer) -> list[bytes]:
    return [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size - 1)]


def abc() -> Tokenizer:
    ranks = {bytes([b]): i for i, b in enumerate(b"abc ")}
    return TiktokenTokenizer("abc", make_encoding("abc", ".", ranks, {"<|endoftext|>": 9}))


def imported_abc() -> Tokenizer:
    library = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "\u2581": 3}, []))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    library.add_special_tokens(["<|endoftext|>"])
    return tokenizer_from_json(_json(library), "abc")


@pytest.mark.parametrize("make", [abc, imported_abc])
def test_characters_missing_in_a_vocabulary_are_counted_and_skipped(
    make: Callable[[], Tokenizer], corpus: Callable[[str], DataConfig], tmp_path: Path
) -> None:
    made = make()
    data = corpus("a béc<|endoftext|>a€€ <")
    with pytest.raises(DataError, match="--skip-unencodable"):
        prepare(data, tokenizer=made)
    skipping = replace(data, skip_unencodable=True, special=True)
    prepared = prepare(skipping, tokenizer=made)
    end = made.special_ids["<|endoftext|>"]
    assert ids(prepared) == [end, *made.encode("a bc"), end, *made.encode("a ")]
    assert prepared.manifest.skipped == {"é": 1, "€": 2, "<": 1}
    assert prepared.manifest.n_bytes == 6
    assert next(prepared.manifest.notes()).startswith("skipped 4 characters")
    folder, _ = prepare_folder(skipping, tmp_path / "folder", tokenizer=made)
    assert folder.manifest == replace(prepared.manifest, shards=folder.manifest.shards)


def test_a_folder_prepared_without_special_is_not_trained_with_it(
    corpus: Callable[[str], DataConfig], tmp_path: Path
) -> None:
    prepare_folder(corpus("some text"), tmp_path / "folder")
    with pytest.raises(ConfigError, match="without --special"):
        prepare(DataConfig(paths=(str(tmp_path / "folder"),), special=True))
