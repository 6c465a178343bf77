"""Folders and globs: the files that are read, and notes about skipped ones."""

import gzip
import io
import json
import os
import re
from pathlib import Path

import pytest

from minigpt.config import DataConfig
from minigpt.errors import DataError
from minigpt.text.corpus import iter_documents
from minigpt.text.sources import find_files

pytestmark = pytest.mark.usefixtures("folder")


def read(*words: str, **options: object) -> tuple[list[str], str]:
    """Return the texts and the note about the files."""
    beside = Path.cwd().parent
    data, notes = DataConfig(**options), [""]  # type: ignore[arg-type]
    files = find_files(
        words, beside / "cache", beside / "spool", data, stdin=io.BytesIO(), on_note=notes.append
    )
    assert len(notes) <= 2
    return [document.text for document in iter_documents(files, data)], notes[-1]


def refusal(*words: str) -> str:
    with pytest.raises(DataError) as caught:
        read(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(*names: str) -> None:
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) if ".json" in name.lower() else name)


def advised_glob(note: str) -> str:
    found = re.search(r"with a glob, as in '([^']+)'", note)
    assert found, note
    return found[1]


def test_skipped_files_are_counted_and_the_suggested_glob_reads_them() -> None:
    write("d/a.txt", "d/x.py", "d/e/y.py", "d/z.py", "d/b.html", "d/Makefile")
    texts, note = read("d")
    assert texts == ["d/a.txt"]
    assert "left out: 3 .py, 1 .html, 1 without a suffix" in note.replace(
        "1 without a suffix, 1 .html", "1 .html, 1 without a suffix"
    )
    assert "d/x.py" in read(advised_glob(note))[0]
    assert "d/e/y.py" in read(advised_glob(note))[0]


def test_the_suggested_glob_is_for_the_folder_with_the_skipped_files() -> None:
    write("c/a.txt", "d/a.txt", "d/x.PY")
    texts, note = read("c", "d")
    assert texts == ["c/a.txt", "d/a.txt"]
    assert "1 .PY" in note
    assert read(advised_glob(note))[0] == ["d/x.PY"]


def test_a_run_or_model_folder_given_as_text_is_refused_as_such() -> None:
    write("run/config.toml", "run/metrics.jsonl", "run/best.json", "m/config.json")
    write("m/model.safetensors")
    Path("run/best.json").write_text('{"step": 3}')
    Path("run/metrics.jsonl").write_text('{"step": 3}')
    Path("m/config.json").write_text('{"n_layer": 3}')
    for name in ("run", "m"):
        assert f"'{name}' is the folder of a run or a model, and has no text" in refusal(name)


def test_no_glob_is_suggested_for_hidden_files_and_pictures() -> None:
    write("d/a.md", "d/.DS_Store", "d/.git/x", "d/1.png", "d/2.jpg", "d/3.mp3")
    note = read("d")[1]
    assert "1 .png" in note
    assert "glob" not in note
    write("d/x.tex")
    assert advised_glob(read("d")[1]) == "d/**/*.tex"


def test_hidden_files_are_skipped_and_reported() -> None:
    write("d/a.txt", "d/.b.txt", "d/.git/c.txt")
    texts, note = read("d")
    assert texts == ["d/a.txt"]
    assert "hidden" in note
    assert "d/.b.txt" in read("d/**/.*")[0]


@pytest.mark.parametrize("word", ["a.rtf", "a.txt", "*"])
def test_rtf_is_refused_unless_read_as_plain_text(word: str) -> None:
    name = "a.rtf" if word == "*" else word
    Path(name).write_text("{\\rtf1\\ansi The owl.\\par}")
    assert f"'{name}' is RTF" in refusal(word)
    assert read(word, format="text")[0] == ["{\\rtf1\\ansi The owl.\\par}"]


@pytest.mark.parametrize("start", ["<!DOCTYPE html>\n<p>", " <html lang='en'>", "\ufeff\n<HTML>"])
@pytest.mark.parametrize("name", ["a.html", "a.txt", "page"])
def test_html_is_read_as_it_is_with_a_note(name: str, start: str) -> None:
    Path(name).write_text(f"{start}The owl.")
    texts, note = read(name)
    assert texts == [f"{start}The owl.".removeprefix("\ufeff")]
    assert note.endswith("; it is HTML, and its tags are a part of the text")
    write("b.txt")
    assert f"; {name!r} is HTML," in read(name, "b.txt")[1]
    assert read(name, format="text")[1] == "", "no note if plain text was requested"
    Path(name).write_text(f"The owl {start}.")
    assert "HTML" not in read(name)[1]


RUN = ("config.toml", "metrics.jsonl", "step-000005/README.md", "step-000005/config.json")


@pytest.mark.parametrize("names", [RUN, ("config.json", "model.safetensors", "README.md")])
@pytest.mark.parametrize("word", ["d", ".", "**/*.*"])
def test_runs_and_models_in_a_folder_are_skipped(names: tuple[str, ...], word: str) -> None:
    write("d/a.txt", "d/e/b.md", *(f"d/checkpoints/one/{name}" for name in names))
    texts, note = read(word)
    assert [text[-4:] for text in texts] == [".txt", "b.md"]
    assert word == "**/*.*" or "left out: 1 run or model" in note
    assert f"d/checkpoints/one/{names[2]}" in read(f"d/checkpoints/one/{names[2]}")[0]


@pytest.mark.parametrize("words", [("d",), ("d/*",), ("d/a.txt", "d/b.txt", "d/c.jsonl")])
def test_empty_files_among_others_are_skipped_and_reported(words: tuple[str, ...]) -> None:
    write("d/a.txt")
    Path("d/b.txt").write_bytes(b"")
    Path("d/c.jsonl").write_bytes(b"\xef\xbb\xbf")
    assert read(*words) == (["d/a.txt"], "'d/a.txt' is read as text; left out: 2 empty")


def test_a_folder_without_text_files_is_refused_with_a_glob_for_the_others() -> None:
    write("d/x.py", "d/e/y.py")
    message = refusal("d")
    assert "2 .py" in message
    assert read(advised_glob(message))[0] == ["d/e/y.py", "d/x.py"]


def test_a_folder_whose_files_are_all_read_says_so_in_one_line() -> None:
    write("d/a.txt", "d/b.md", "d/c.jsonl")
    texts, note = read("d")
    assert texts == ["d/a.txt", "d/b.md", "d/c.jsonl"]
    assert note.startswith("3 files are read: 2 text, 1 JSONL")
    assert "left out" not in note


def test_reading_a_single_text_file_prints_no_note() -> None:
    write("a.txt")
    assert read("a.txt")[1] == ""


@pytest.mark.parametrize("word", ["d", "d/**/*.txt", "d/**"])
def test_links_to_folders_are_followed_and_each_file_is_read_once(word: str) -> None:
    write("d/a.txt", "other/b.txt")
    os.symlink("../other", "d/link")
    os.symlink("../other", "d/second")
    os.symlink("..", "other/up")
    os.symlink(".", "d/self")
    texts, _ = read(word)
    assert sorted(texts) == ["d/a.txt", "other/b.txt"]


def test_a_dangling_link_is_reported_as_dangling(folder: Path) -> None:
    write("d/a.txt")
    os.symlink("nowhere.txt", "d/gone.txt")
    os.symlink("nowhere.txt", "link.txt")
    message = refusal("link.txt")
    assert "'link.txt' is a link to 'nowhere.txt', which does not exist" in message
    assert "disk" not in message
    for word in ("d", "d/*.txt"):
        texts, note = read(word)
        assert texts == ["d/a.txt"]
        assert "1 dangling link" in note
        assert "glob" not in note


def test_a_link_to_itself_is_refused_in_one_line() -> None:
    os.symlink("loop.txt", "loop.txt")
    assert "'loop.txt'" in refusal("loop.txt")


def test_special_files_in_a_folder_are_skipped_and_reported() -> None:
    write("d/a.txt")
    os.mkfifo("d/pipe.txt")
    texts, note = read("d")
    assert texts == ["d/a.txt"]
    assert "1 not a file" in note


def test_files_of_rows_without_the_field_are_skipped_and_reported() -> None:
    write("d/a.jsonl")
    Path("d/config.json").write_text('{"name": "x"}')
    texts, note = read("d")
    assert texts == ["d/a.jsonl"]
    assert '1 .json without "text"' in note
    Path("e").mkdir()
    Path("e/config.json").write_text('{"name": "x"}')
    assert "its fields are 'name'" in refusal("e")


def test_folders_with_glob_characters_are_read_and_get_an_escaped_glob() -> None:
    write("d[1]/a.txt", "d[1]/x.py")
    texts, note = read("d[1]")
    assert texts == ["d[1]/a.txt"]
    assert read(advised_glob(note))[0] == ["d[1]/x.py"]


def test_suffixes_are_case_insensitive() -> None:
    write("d/A.TXT", "d/B.Md", "d/C.JSONL")
    assert read("d")[0] == ["d/A.TXT", "d/B.Md", "d/C.JSONL"]


def test_skipped_compressed_files_are_counted_by_their_inner_suffix() -> None:
    write("d/a.txt")
    Path("d/x.py.gz").write_bytes(gzip.compress(b"packed"))
    texts, note = read("d")
    assert texts == ["d/a.txt"]
    assert ".py" in note
    assert read(advised_glob(note))[0] == ["packed"]


def test_skipped_files_without_a_suffix_get_a_glob_that_reads_them() -> None:
    write("d/a.txt", "d/README", "d/e/Makefile")
    _, note = read("d")
    assert "2 without a suffix" in note
    assert {"d/README", "d/e/Makefile"} <= set(read(advised_glob(note))[0])


def test_a_glob_without_matches_is_refused() -> None:
    assert "no file matches 'x/*.txt'" in refusal("x/*.txt")
