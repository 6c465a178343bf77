"""In-memory tokenization of plain texts, which the corpora ring must equal."""

from dataclasses import fields
from pathlib import Path

import pytest

from minigpt.config import DataConfig
from minigpt.errors import DataError
from minigpt.run_config import PlainDataConfig
from minigpt.text import tokens as module
from minigpt.text.tokens import PreparedData, prepare, prepare_in_memory


def all_tokens(data: PreparedData) -> list[int]:
    (span, _) = data.tokens.split(0.0)
    return span.first_ids(len(span))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_tokens_prepared_in_memory_equal_those_on_disk(tmp_path: Path, tokenizer: str) -> None:
    texts = ("The owl né <|endoftext|> \U0001f642.\n" * 40, "", "The nest.\r\n")
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(b"\xef\xbb\xbf" * (i == 2) + text.encode())
    paths = tuple(str(tmp_path / f"{i}.txt") for i in range(3))
    stored = prepare(DataConfig(paths=paths, tokenizer=tokenizer), tmp_path / "cache")
    plain = prepare_in_memory(DataConfig(paths=paths), stored.tokenizer)
    assert all_tokens(plain) == all_tokens(stored)
    assert plain.manifest.n_tokens == stored.manifest.n_tokens
    assert plain.manifest.n_bytes == stored.manifest.n_bytes
    assert [len(span) for span in plain.tokens.split(0.1)] == [
        len(span) for span in stored.tokens.split(0.1)
    ]


def test_without_the_ring_of_corpora_a_text_is_tokenized_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_ring", lambda name: None)
    (tmp_path / "a.txt").write_text("The owl.")
    data = prepare(DataConfig(paths=(str(tmp_path / "a.txt"),)))
    assert all_tokens(data) == [256, *b"The owl."]


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    for name, content in (("a.txt", b"\xff"), ("b.txt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            prepare_in_memory(DataConfig(paths=(str(tmp_path / name),)))
    with pytest.raises(DataError, match="missing"):
        prepare_in_memory(DataConfig(paths=("missing.txt",)))


def test_plain_data_settings_match_those_of_the_corpora_ring() -> None:
    # Without the ring, only these settings exist.
    full = {f.name: f for f in fields(DataConfig)}
    for plain in fields(PlainDataConfig):
        other = full[plain.name]
        assert plain.type == other.type
        assert plain.default == other.default or plain.name == "paths"
        assert plain.metadata == other.metadata
