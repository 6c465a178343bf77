"""The collection of tales included in the package."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from minigpt.config import DataConfig
from minigpt.text import datasets
from minigpt.text.corpus import content_hash, iter_documents
from minigpt.text.datasets import dataset_path
from minigpt.text.sources import find_files
from minigpt.text.tokenizer import END_OF_TEXT

FILE = Path(datasets.__file__).with_name("tales.txt")
TALES = [tale.strip() for tale in FILE.read_text(encoding="utf-8").split(END_OF_TEXT)]
TALES = [tale for tale in TALES if tale]
CAST = re.findall(
    r"\w+",
    "Biscuit Brill Burr Dot Dunn Ember Fenna Fig Gorm Grubb Hal Hester Juno Marta "
    "Mila Moss Nan Odo Ollo Oswin Pearl Pim Rook Sprat Tilda Tobin Tock Wren",
)


def names_in(tale: str) -> Counter[str]:
    return Counter(word for word in re.findall(r"[A-Z][a-z]+", tale) if word in CAST)


def test_there_are_150_short_tales_in_plain_ascii() -> None:
    assert len(TALES) == len(set(TALES)) >= 150
    assert 130_000 < FILE.stat().st_size < 200_000
    text = FILE.read_bytes()
    assert text.isascii()
    assert not set(text) & {0, 9, 13}
    assert not re.search(r" $|  |\n\n\n", text.decode(), re.MULTILINE)
    assert all(500 < len(tale) < 2200 for tale in TALES)


def test_every_tale_has_recurring_characters() -> None:
    for tale in TALES:
        assert names_in(tale).most_common(1)[0][1] >= 2, tale
    n_tales = Counter(name for tale in TALES for name in names_in(tale))
    assert min(n_tales[name] for name in CAST) >= 5, n_tales
    n_names = sum(sum(names_in(tale).values()) for tale in TALES)
    assert n_names > 8 * len(TALES), (
        "names must recur in a tale, so that a model can attend to them"
    )


def test_long_sentences_and_openings_are_not_repeated() -> None:
    sentences = Counter(
        sentence
        for tale in TALES
        for sentence in re.split(r"(?<=[.!?])\W*\s+", tale)
        if len(sentence) > 60
    )
    assert [sentence for sentence, n in sentences.items() if n > 1] == []
    openings = Counter(" ".join(tale.split()[:4]) for tale in TALES)
    most, n = openings.most_common(1)[0]
    assert (most, n <= 25) == ("Once upon a time", True)
    assert all(n <= 3 for opening, n in openings.items() if opening != most), openings


def test_quotation_marks_are_closed_in_every_paragraph() -> None:
    for tale in TALES:
        for paragraph in tale.split("\n\n"):
            assert "\n" not in paragraph, "paragraphs must not be hard-wrapped"
            assert paragraph.count('"') % 2 == 0, paragraph
            assert paragraph[-1] in '.!?":', paragraph


@pytest.mark.parametrize("name", ["builtin", "builtin:tales"])
def test_each_tale_is_a_document(name: str, tmp_path: Path) -> None:
    files = find_files([name], tmp_path, tmp_path, DataConfig())
    documents = list(iter_documents(files))
    assert [document.text for document in documents] == [tale + "\n" for tale in TALES]
    assert all(document.is_start for document in documents)


def test_the_cached_tales_are_updated_when_the_package_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content_hash(find_files(["builtin:tales"], tmp_path, tmp_path, DataConfig()))
    monkeypatch.setattr(datasets, "__file__", str(tmp_path / "datasets.py"))
    (tmp_path / "tales.txt").write_text(f"A cat.\n{END_OF_TEXT}\nA dog.\n")
    path = dataset_path("builtin:tales", tmp_path)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert texts == ["A cat.\n", "A dog.\n"]
    assert content_hash(find_files(["builtin:tales"], tmp_path, tmp_path, DataConfig())) != before
