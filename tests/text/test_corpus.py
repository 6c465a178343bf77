"""Finding the files of a corpus, and reading their documents."""

import codecs
import gzip
import io
import json
import lzma
import os
import threading
import tracemalloc
from pathlib import Path

import pytest

from minigpt.config import DataConfig
from minigpt.errors import DataError, MinigptError, ResourceError
from minigpt.text import corpus, datasets
from minigpt.text.bpe import train_bpe
from minigpt.text.byte_pairs import named_tokenizer
from minigpt.text.corpus import Document, content_hash, iter_documents
from minigpt.text.sources import find_files
from minigpt.text.tokenizer import BytesTokenizer


def documents(*words: str, stdin: bytes = b"") -> list[Document]:
    beside = Path.cwd().parent
    files = find_files(
        words, beside / "cache", beside / "spool", DataConfig(), stdin=io.BytesIO(stdin)
    )
    return list(iter_documents(files))


def texts(*words: str, stdin: bytes = b"") -> list[str]:
    return [document.text for document in documents(*words, stdin=stdin)]


def error(*words: str) -> MinigptError:
    with pytest.raises(MinigptError) as caught:
        documents(*words)
    assert "\n" not in str(caught.value)
    return caught.value


def write(name: str, data: str | bytes) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def test_files_with_any_suffix_are_read_in_the_given_order(folder: Path) -> None:
    write("b.txt", "b")
    write("a.py", "a")
    assert texts("b.txt", "a.py") == ["b", "a"]


def test_a_folder_yields_its_text_files_sorted_without_hidden_ones(
    folder: Path,
) -> None:
    names = ["z.txt", "b/c.md", "b/a.txt", "b.txt", "x.jsonl", "A.TXT"]
    for name in names:
        write(f"d/{name}", json.dumps({"text": name}) if name == "x.jsonl" else name)
    for name in ("p.py", ".hidden.txt", ".git/h.txt", "image.png"):
        write(f"d/{name}", "no")
    assert texts("d") == ["A.TXT", "b/a.txt", "b/c.md", "b.txt", "x.jsonl", "z.txt"]


def test_a_glob_yields_its_files_sorted_and_each_file_once(folder: Path) -> None:
    for name in ("d/b.py", "d/e/a.py", "d/e/t.txt"):
        write(name, name)
    assert texts("d/**/*.py") == ["d/b.py", "d/e/a.py"]
    assert texts("d/e/a.py", "d/**/*.py", "./d/e/a.py") == ["d/e/a.py", "d/b.py"]


def test_a_file_with_glob_characters_in_its_name_is_that_file(folder: Path) -> None:
    write("a[1].txt", "here")
    assert texts("a[1].txt") == ["here"]


def test_each_jsonl_line_is_a_document(folder: Path) -> None:
    write("a.jsonl", '\ufeff{"text": "one\\n", "n": 1}\n\n  \n{"text": ""}\n{"text": "t\\u00e9"}')
    found = documents("a.jsonl")
    assert [d.text for d in found] == ["one\n", "té"]
    assert all(d.is_start for d in found)


def test_lone_surrogates_in_jsonl_become_the_replacement_character(folder: Path) -> None:
    write("a.jsonl", '{"text": "a\\ud800b \\ud83d\\ude00"}')
    assert texts("a.jsonl") == ["a\ufffdb 😀"]


@pytest.mark.parametrize(("suffix", "module"), [(".gz", gzip), (".xz", lzma)])
def test_compressed_files_are_decompressed(folder: Path, suffix: str, module) -> None:  # type: ignore[no-untyped-def]
    write(f"d/a.txt{suffix}", module.compress("café".encode()))
    write(f"d/b.jsonl{suffix}", module.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert texts("d") == ["café", "one", "two"]


def test_a_byte_order_mark_is_dropped_and_line_endings_are_kept(folder: Path) -> None:
    write("a.txt", codecs.BOM_UTF8 + b"a\r\nb\rc\n\xef\xbb\xbf")
    assert texts("a.txt") == ["a\r\nb\rc\n\ufeff"]


def test_standard_input_is_a_document(folder: Path) -> None:
    write("a.txt", "a")
    assert texts("-", "a.txt", stdin="né\n".encode()) == ["né\n", "a"]
    assert (
        find_files(["-"], folder, folder, DataConfig(), stdin=io.BytesIO())[0].name
        == "standard input"
    )


def test_a_pipe_is_read_like_a_file(folder: Path) -> None:
    os.mkfifo("pipe")
    writer = threading.Thread(target=write, args=("pipe", "from a pipe"))
    writer.start()
    assert texts("pipe") == ["from a pipe"]
    writer.join()


def test_a_corpus_name_is_resolved_to_its_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "dataset_path", lambda name, *_: Path(f"{name}.txt"))
    write("builtin:python.txt", "prose")
    write("shakespeare.txt", "verse")
    assert texts("shakespeare", "builtin:python") == ["verse", "prose"]


@pytest.mark.parametrize("name", ["builtin:", "builtin:x", "builtin:Python", "builtin:tales.txt"])
def test_an_unknown_builtin_corpus_is_refused_with_the_choices(folder: Path, name: str) -> None:
    message = str(error(name))
    assert message.startswith(f"unknown corpus {name!r}. ")
    assert "Choose from builtin:tales, builtin:python, shakespeare." in message


def test_path_takes_precedence_over_a_corpus_name(folder: Path) -> None:
    write("shakespeare", "mine")
    assert texts("shakespeare") == ["mine"]


def test_pieces_join_to_the_document_and_only_the_first_is_marked_as_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "PIECE_CHARS", 50)
    monkeypatch.setattr(corpus, "LOOKAHEAD_CHARS", 20)
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 7)
    text = "é word and\nline 😀\n\n" * 40 + "x" * 300 + "\n" * 300
    write("a.txt", text)
    write("b.jsonl", json.dumps({"text": text}) + "\n" + json.dumps({"text": text}))
    for name, n_documents in (("a.txt", 1), ("b.jsonl", 2)):
        found = documents(name)
        assert "".join(d.text for d in found) == text * n_documents
        assert [d.is_start for d in found].count(True) == n_documents
        assert found[0].is_start
        assert max(len(d.text) for d in found) <= 70
        assert found[-1].position == Path(name).stat().st_size


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["bytes", "bpe:400", "gpt2", "cl100k_base"])
def test_tokens_of_pieces_equal_tokens_of_the_whole(
    folder: Path, shared: Path, monkeypatch: pytest.MonkeyPatch, name: str, newline: str
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "tiktoken"))
    monkeypatch.setattr(corpus, "PIECE_CHARS", 100)
    monkeypatch.setattr(corpus, "LOOKAHEAD_CHARS", 100)
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 500)
    text = (shared / "data" / "tinyshakespeare.txt").read_text()[:60_000]
    text += (shared / "data" / "fairytales.txt").read_text(encoding="utf-8")[:60_000]
    text = text.replace("\n", newline)
    if name == "bytes":
        tokenizer = BytesTokenizer()
    else:
        tokenizer = train_bpe([text], 400) if name == "bpe:400" else named_tokenizer(name)
    write("a.txt", text)
    pieces = texts("a.txt")
    assert len(pieces) > 500
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_a_long_file_is_read_in_bounded_memory(folder: Path) -> None:
    with open("a.txt", "w") as file:
        for _ in range(30):
            file.write("a line of words\n" * 2**16)
    tracemalloc.start()
    n_chars = 0
    for document in iter_documents(find_files(["a.txt"], folder, folder, DataConfig())):
        n_chars += len(document.text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_chars == Path("a.txt").stat().st_size == 30 * 2**20
    assert peak < 10 * 2**20


def test_content_hash_depends_on_contents_and_order_not_names(folder: Path) -> None:
    def of(*words: str) -> str:
        return content_hash(find_files(words, folder, folder, DataConfig()))

    for name, data in (("a.txt", "1"), ("b.txt", "2"), ("c.txt", "1"), ("d.txt", "12")):
        write(name, data)
    write("a.jsonl", "1")
    hashes = [of("a.txt"), of("b.txt"), of("a.txt", "b.txt"), of("b.txt", "a.txt"), of("d.txt")]
    assert len({*hashes, of("a.jsonl")}) == 6
    assert of("a.txt") == of("c.txt")


def test_a_missing_path_names_the_nearest_existing_one(folder: Path) -> None:
    write("d/stories.txt", "x")
    assert str(error("d/storys.txt")) == (
        "there is no file or folder 'd/storys.txt'. Did you mean 'stories.txt'?"
    )
    assert "Did you mean 'shakespeare'?" in str(error("shakespear"))
    assert "the named corpora are builtin:tales, builtin:python, shakespeare" in str(
        error("qqqqqqqq")
    )
    assert "the folder 'nowhere' does not exist" in str(error("nowhere/a.txt"))


def test_a_text_given_as_a_path_is_a_data_error(folder: Path) -> None:
    message = str(error("once upon a time " * 100))
    assert "cannot be read: File name too long" in message
    assert len(message) < 400


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs Linux's /proc")
def test_an_unreadable_special_file_is_reported_as_a_special_file(folder: Path) -> None:
    assert "special system file: name a text file" in str(error("/proc/self/mem"))


@pytest.mark.parametrize("name", ["tale.txt", "tales.jsonl", "tales.csv", "rows.parquet"])
def test_a_git_lfs_pointer_is_not_read_as_text(folder: Path, name: str) -> None:
    write(name, "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 1234\n")
    assert str(error(name)) == (
        f"'{name}' cannot be read: it is a Git LFS pointer: run `git lfs pull` in its repository."
    )


def test_control_bytes_of_file_names_do_not_reach_the_message(folder: Path) -> None:
    write("evil\x1b[31m.txt", "x")
    assert "\x1b" not in str(error("evil\x1b[3m.txt"))


def test_an_empty_corpus_is_a_data_error(folder: Path) -> None:
    write("a.txt", "")
    write("b.jsonl", '{"text": ""}\n')
    assert "the corpus is empty: no text in 'a.txt', 'b.jsonl'." in str(error("a.txt", "b.jsonl"))
    with pytest.raises(DataError, match="no text in 'standard input'"):
        documents("-", stdin=b"")


def test_without_text_files_the_error_says_how_to_select_other_files(folder: Path) -> None:
    write("d/a.py", "x")
    assert "has no .txt" in str(error("d"))
    assert "'d/**/*.py'" in str(error("d"))
    assert "no file matches 'd/*.txt'" in str(error("d/*.txt"))


def test_the_error_for_a_binary_file_has_the_position_of_its_nul_byte(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 8)
    write("a.txt", b"0123456789\0rest")
    assert "'a.txt' looks binary: byte 10 is NUL" in str(error("a.txt"))


@pytest.mark.parametrize("block_bytes", [1, 4, 100])
def test_the_error_for_a_file_that_is_not_utf8_has_the_position_and_a_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(corpus, "BLOCK_BYTES", block_bytes)
    data = "né".encode() + b"xyz caf\xe9 x"
    with pytest.raises(UnicodeDecodeError) as oracle:
        data.decode()
    write("a.txt", data)
    message = str(error("a.txt"))
    assert f"'a.txt' is not UTF-8: byte {oracle.value.start} is invalid" in message
    assert "iconv -f LATIN1 -t UTF-8" in message
    write("b.txt", b"cut \xe2\x82")
    assert "byte 4 is invalid" in str(error("b.txt"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_the_error_for_a_utf16_file_shows_how_to_convert_it(folder: Path, encoding: str) -> None:
    write("a.txt", "\ufeff".encode(encoding) * (encoding != "utf-16") + "text".encode(encoding))
    assert "iconv -f UTF-16 -t UTF-8" in str(error("a.txt"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops}", "line 2 of 'a.jsonl' is not JSON"),
        ('"text"', "line 2 of 'a.jsonl' is not an object with a \"text\" string"),
        ('{"body": "x"}', "line 2 of 'a.jsonl' has no \"text\" string: its fields are 'body'"),
        ('{"text": 1}', "line 2 of 'a.jsonl' has no \"text\" string: it is of type int"),
        ('{"text": null}', 'has no "text" string: it is null'),
        (b'{"text": "\xff"}', "line 2 of 'a.jsonl' is not UTF-8"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_malformed_jsonl_line_is_refused_with_its_number(
    folder: Path, line: str | bytes, message: str
) -> None:
    data = line if isinstance(line, bytes) else line.encode()
    write("a.jsonl", b'{"text": "fine"}\n' + data + b"\n")
    assert message in str(error("a.jsonl"))


@pytest.mark.parametrize(("name", "pack"), [("a.txt.gz", gzip.compress), ("a.xz", lzma.compress)])
def test_a_damaged_compressed_file_is_a_data_error(folder: Path, name: str, pack) -> None:  # type: ignore[no-untyped-def]
    packed = pack(os.urandom(1000).hex().encode())
    for data in (packed[:-20], b"no " + packed):
        write(name, data)
        assert f"'{name}' cannot be decompressed" in str(error(name))


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_a_file_without_permission_is_a_resource_error(folder: Path) -> None:
    write("a.txt", "x")
    Path("a.txt").chmod(0)
    refused = error("a.txt")
    assert isinstance(refused, ResourceError)
    assert "permission denied" in str(refused)


def test_permission_denied_on_a_file_or_folder_is_a_resource_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    write("d/a.txt", "x")
    monkeypatch.setattr(Path, "open", refuse)
    assert isinstance(error("d/a.txt"), ResourceError)
    monkeypatch.setattr(os, "scandir", refuse)
    assert "'d' cannot be read: permission denied" in str(error("d"))


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "-"])
def test_a_device_is_refused_before_it_is_read(tmp_path: Path, name: str) -> None:
    with open("/dev/zero", "rb") as zero, pytest.raises(DataError, match="is a device"):
        find_files([name], tmp_path, tmp_path, DataConfig(), stdin=zero)


def test_a_text_that_is_typed_in_a_terminal_is_asked_for(tmp_path: Path) -> None:
    class Terminal(io.BytesIO):
        def isatty(self) -> bool:
            return True

    notes: list[str] = []
    for stream in (io.BytesIO(b"a king"), Terminal(b"a king")):
        files = find_files(
            ["-"], tmp_path, tmp_path, DataConfig(), stdin=stream, on_note=notes.append
        )
        assert files[0].path.read_bytes() == b"a king"
    assert notes == ["type or paste the text; Ctrl-D ends it"]
