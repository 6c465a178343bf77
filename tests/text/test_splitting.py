"""Documents held out for validation, and prepared folders that record the choice."""

import json
import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from minigpt.config import DataConfig
from minigpt.errors import ConfigError, DataError
from minigpt.text import splitting
from minigpt.text.corpus import Document
from minigpt.text.prepared_folders import prepare_folder, prepared_settings
from minigpt.text.tokens import PreparedData, TokenSpan, prepare

DRAW = random.Random(3)
TEXTS = [f"{i:03d}" + "abcdefghij"[i % 10] * DRAW.randrange(5, 60) for i in range(80)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty working folder with its own cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIGPT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def write(name: str, texts: Iterable[str]) -> str:
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return name


def prepared(*paths: str, **options: object) -> PreparedData:
    return prepare(DataConfig(paths=paths, **options))  # type: ignore[arg-type]


def texts_of(data: PreparedData, span: TokenSpan) -> list[str]:
    if not len(span):
        return []
    ids = span.first_ids(len(span))
    return [text for text in data.tokenizer.decode(ids).split("<|endoftext|>") if text]


def parts(data: PreparedData, val_fraction: float = 0.1) -> tuple[list[str], list[str]]:
    """Return the documents for training and those for validation."""
    train, val = data.tokens.split(val_fraction)
    return texts_of(data, train), texts_of(data, val)


@pytest.mark.parametrize("val_fraction", [0.05, 0.1, 0.3, 0.5])
def test_whole_documents_are_held_out_up_to_the_fraction_of_bytes(val_fraction: float) -> None:
    data = prepared(write("a.jsonl", TEXTS), val_fraction=val_fraction)
    train, val = parts(data, val_fraction)
    assert sorted(train + val) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in set(train)]  # in file order
    share = sum(map(len, val)) / sum(map(len, TEXTS))
    assert val_fraction <= share <= 1.5 * val_fraction


def test_held_out_documents_do_not_depend_on_the_order_of_files_and_rows() -> None:
    one = parts(prepared(write("a.jsonl", TEXTS)))[1]
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    write("x.jsonl", shuffled[:30])
    write("y.jsonl", shuffled[30:])
    for names in (("x.jsonl", "y.jsonl"), ("y.jsonl", "x.jsonl")):
        assert sorted(parts(prepared(*names))[1]) == sorted(one)


def test_identical_texts_are_on_the_same_side_of_the_split() -> None:
    train, val = parts(prepared(write("a.jsonl", [*TEXTS, *TEXTS[::2], *TEXTS[::2]])))
    assert not set(train) & set(val)
    assert len(train) + len(val) == 2 * len(TEXTS)


def test_a_large_document_is_never_held_out_but_one_document_always_is() -> None:
    large = "x" * 100_000
    train, val = parts(prepared(write("a.jsonl", [large, *TEXTS])))
    assert large in train
    assert val
    same = parts(prepared(write("b.jsonl", [text * 200 for text in TEXTS[:10]])), 0.1)
    assert len(same[1]) >= 1


def test_beyond_a_limit_documents_are_held_out_by_their_hash(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(splitting, "MAX_MEASURED", 50)
    texts = [f"document {i} of many" for i in range(1000)]
    choose = splitting.choose((Document(text, True, 0) for text in texts), 0.1)
    assert 70 < sum(map(choose, texts)) < 130


def test_text_files_are_split_as_documents_too() -> None:
    for i in range(30):
        Path(f"{i:02d}.txt").write_text(TEXTS[i])
    data = prepared("*.txt")
    assert data.manifest.val_split == "documents"
    assert sorted([*parts(data)[0], *parts(data)[1]]) == sorted(TEXTS[:30])


@pytest.mark.parametrize(("n", "kind"), [(9, "tail"), (10, "documents")])
def test_with_fewer_than_ten_documents_the_tail_is_held_out(n: int, kind: str) -> None:
    data = prepared(write("a.jsonl", TEXTS[:n]))
    assert data.manifest.val_split == kind
    train, val = data.tokens.split(0.1)
    if kind == "tail":
        assert len(train) == int(len(data.tokens) * 0.9)
        assert data.manifest.validation(0.1) == "validation on the last 10%"
    else:
        assert len(val) == data.manifest.n_val_tokens
        assert "whole documents" in data.manifest.validation(0.1)


def test_val_split_overrides_the_number_of_documents() -> None:
    few, many = write("few.jsonl", TEXTS[:3]), write("many.jsonl", TEXTS)
    assert prepared(few, val_split="documents").manifest.val_split == "documents"
    tail = prepared(many, val_split="tail")
    assert tail.manifest.val_split == "tail"
    train, val = tail.tokens.split(0.1)
    assert texts_of(tail, TokenSpan(tail.tokens, 0, len(tail.tokens), "whole")) == TEXTS
    assert len(val) == len(tail.tokens) - len(train)


def test_with_val_all_of_data_is_training_text() -> None:
    Path("val.txt").write_text("a text of its own")
    for words in ({}, {"tokenizer": "bpe:300"}):
        data = prepared(write("a.jsonl", TEXTS), val=("val.txt",), **words)
        assert parts(data) == (TEXTS, ["a text of its own"])
        assert data.manifest.val_split == "own"


def test_val_accepts_rows_folders_and_several_paths() -> None:
    Path("d").mkdir()
    write("d/b.jsonl", ["one", "two"])
    Path("c.txt").write_text("three")
    data = prepared(write("a.jsonl", TEXTS), val=("d", "c.txt"))
    assert parts(data) == (TEXTS, ["one", "two", "three"])


def test_val_that_is_also_in_data_or_has_a_fraction_is_refused() -> None:
    write("a.jsonl", TEXTS)
    with pytest.raises(DataError, match=r"is in both DATA and --val\. Leave it out of one"):
        prepared("a.jsonl", val=("./a.jsonl",))
    with pytest.raises(ConfigError, match="val_split and val_fraction do not go with it"):
        DataConfig(val=("a.jsonl",), val_fraction=0.2)
    with pytest.raises(DataError, match=r"missing\.txt"):
        prepared("a.jsonl", val=("missing.txt",))


def test_val_fraction_0_trains_on_everything() -> None:
    data = prepared(write("a.jsonl", TEXTS), val_fraction=0)
    assert parts(data, 0) == (TEXTS, [])
    assert data.manifest.validation(0) == "no validation"


def test_no_merge_is_learned_from_validation_documents() -> None:
    write("a.jsonl", TEXTS)
    val = set(parts(prepared("a.jsonl"))[1])
    data = prepared(write("b.jsonl", TEXTS), tokenizer="bpe:400")
    training_only = [text for text in TEXTS if text not in val]
    alone = prepared(write("c.jsonl", training_only), tokenizer="bpe:400", val_fraction=0)
    assert data.tokenizer.fingerprint == alone.tokenizer.fingerprint


def test_pieces_of_a_long_document_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minigpt.text.corpus.PIECE_CHARS", 20)
    monkeypatch.setattr("minigpt.text.corpus.LOOKAHEAD_CHARS", 5)
    train, val = parts(prepared(write("a.jsonl", TEXTS), val_fraction=0.3), 0.3)
    assert sorted(train + val) == sorted(TEXTS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"val_fraction": 0.3},
        {"val_split": "tail"},
        {"val_fraction": 0},
        {"val": ("val.txt",)},
        {"val_split": "documents", "val_fraction": 0.2, "tokenizer": "bpe:300"},
    ],
)
def test_a_prepared_folder_keeps_its_split(options: dict[str, object]) -> None:
    Path("val.txt").write_text("a text of its own")
    text = DataConfig(paths=(write("a.jsonl", TEXTS),), **options)  # type: ignore[arg-type]
    made, _ = prepare_folder(text, Path("out"))
    share = float(options.get("val_fraction", 0.1))  # type: ignore[arg-type]
    direct = prepare(text)
    assert parts(made, share) == parts(direct, share)
    assert made.manifest.val_split == direct.manifest.val_split


def test_preparing_again_with_another_fraction_records_it() -> None:
    Path("a.txt").write_text("one text " * 200)
    for fraction in (0.1, 0.0, 0.3):
        data = DataConfig(paths=("a.txt",), val_fraction=fraction)
        manifest = prepare_folder(data, Path("out"))[0].manifest
        kind = "tail" if fraction else "none"
        assert (manifest.val_split, manifest.val_fraction) == (kind, fraction)
        settings = prepared_settings(DataConfig(paths=("out",)))
        assert settings["val_fraction"] == fraction
        assert prepare(data).manifest.val_split == kind


def test_a_folder_prepared_by_documents_refuses_another_split() -> None:
    text = DataConfig(paths=(write("a.jsonl", TEXTS),), val_fraction=0.3)
    prepare_folder(text, Path("out"))
    for other in ({"val_fraction": 0.2}, {"val_split": "tail", "val_fraction": 0.3}):
        with pytest.raises(ConfigError):
            prepared("out", **other)


def test_one_document_cannot_be_split_by_document(folder: Path) -> None:
    Path("a.txt").write_text("one text " * 200)
    for paths in (("a.txt",), (write("a.jsonl", ["the same " * 9] * 30),)):
        with pytest.raises(DataError, match="needs two different documents: this text has 1"):
            prepared(*paths, val_split="documents")
        assert prepared(*paths, val_split="tail").manifest.val_split == "tail"
