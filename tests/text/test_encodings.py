"""Texts in other encodings: following the advice in an error gives the right text."""

import codecs
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from minigpt.config import DataConfig
from minigpt.errors import ConfigError, DataError
from minigpt.settings import read_toml
from minigpt.text.corpus import iter_documents
from minigpt.text.sources import find_files
from minigpt.text.tokens import prepare

pytestmark = pytest.mark.usefixtures("folder")

ENGLISH = "The king sat by the fire.\nHe had a daughter, and she had an owl.\n"
FRENCH = "Le café était fermé, et la fille rêvait à côté.\nElle était là.\n" * 3
QUOTED = "“The owl,” she said — “isn’t ours…”\nIt cost 5 €.\n"  # noqa: RUF001
CHINESE = "世界上有一只猫头鹰。\n它住在树上。\n" * 20
RUSSIAN = "Однажды жил король. У него была дочь.\n" * 20  # noqa: RUF001


def read(name: str, encoding: str = "utf-8") -> list[str]:
    beside = Path.cwd().parent
    data = DataConfig(encoding=encoding)
    files = find_files([name], beside / "cache", beside / "spool", data)
    return [document.text for document in iter_documents(files, data)]


def refusal(name: str, encoding: str = "utf-8") -> str:
    with pytest.raises(DataError) as caught:
        read(name, encoding)
    message = str(caught.value)
    assert "\n" not in message
    return message


def advised_encoding(message: str) -> str:
    found = re.search(r"--encoding ([\w-]+)", message)
    assert found, message
    return found[1]


def advised_command(message: str) -> str:
    """Run the command suggested in a message on a.txt and return its output."""
    found = re.search(r"((?:iconv|head) .*) OLD > NEW$", message)
    assert found, message
    done = subprocess.run(f"{found[1]} a.txt", shell=True, capture_output=True)
    return done.stdout.decode()


WIDE = [("utf-16", True), ("utf-32", True)]
WIDE += [(f"utf-{n}-{order}", mark) for n in (16, 32) for order in ("le", "be") for mark in (0, 1)]


@pytest.mark.parametrize(("encoding", "has_mark"), WIDE)
@pytest.mark.parametrize("text", [ENGLISH, FRENCH, QUOTED, CHINESE, RUSSIAN])
def test_following_the_advice_for_utf16_or_utf32_gives_the_text(
    encoding: str, has_mark: bool, text: str
) -> None:
    marked = "\ufeff" + text if has_mark and encoding[-1] == "e" else text
    Path("a.txt").write_bytes(marked.encode(encoding))
    message = refusal("a.txt")
    assert read("a.txt", advised_encoding(message)) == [text]
    assert advised_command(message).removeprefix("\ufeff") == text


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("latin-1", FRENCH), ("cp1252", QUOTED), ("cp1252", FRENCH + QUOTED)],
)
def test_following_the_advice_for_a_western_encoding_gives_the_text(
    encoding: str, text: str
) -> None:
    Path("a.txt").write_bytes(text.encode(encoding))
    message = refusal("a.txt")
    assert read("a.txt", advised_encoding(message)) == [text]
    assert advised_command(message) == text


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("gb18030", CHINESE),
        ("big5", "世界上有一隻貓頭鷹。\n" * 20),
        ("shift_jis", "ふくろうは木に住んでいます。\n" * 20),
        ("euc_jp", "ふくろうは木に住んでいます。\n" * 20),
        ("euc_kr", "부엉이는 나무에 산다.\n" * 20),
        ("cp1251", RUSSIAN),
        ("koi8-r", RUSSIAN),
    ],
)
def test_advice_for_other_scripts_lists_the_right_encoding(encoding: str, text: str) -> None:
    Path("a.txt").write_bytes(text.encode(encoding))
    message = refusal("a.txt")
    assert encoding in message
    assert "iconv" not in message  # it would damage the text if the guess is wrong
    assert read("a.txt", encoding) == [text]


@pytest.mark.parametrize(
    "text", [CHINESE, FRENCH + "é", RUSSIAN + "я", ENGLISH + "é", ENGLISH + "😀"]
)
def test_a_file_cut_inside_its_last_character_is_reported_and_loses_only_it(text: str) -> None:
    text = text.rstrip()
    Path("a.txt").write_bytes(text.encode()[:-1])
    message = refusal("a.txt")
    assert "It ends in the middle of a character" in message
    assert advised_command(message) == text[:-1]


def test_a_non_ascii_last_byte_is_reported_as_truncation_or_another_encoding() -> None:
    Path("a.txt").write_bytes("né".encode("latin-1"))
    message = refusal("a.txt")
    assert "so it was cut" in message
    assert read("a.txt", advised_encoding(message)) == ["né"]


@pytest.mark.parametrize("text", [FRENCH, QUOTED, CHINESE, RUSSIAN, "word " * 2**18 + FRENCH])
@pytest.mark.parametrize("place", [0.1, 0.5, 0.999])
def test_utf8_with_a_stray_nul_is_not_mistaken_for_utf16(text: str, place: float) -> None:
    border = int(place * len(text))
    Path("a.txt").write_text(f"{text[:border]}\0{text[border:]}", encoding="utf-8")
    message = refusal("a.txt")
    assert "looks binary" in message
    assert "tr -d '\\000'" in message
    assert "utf-16" not in message


def test_a_row_may_contain_a_nul_character() -> None:
    Path("a.csv").write_text(f'id,text\n1,"{FRENCH[:20]}\0"\n2,two\n', encoding="utf-8")
    assert read("a.csv") == [f"{FRENCH[:20]}\0", "two"]


def test_ascii_with_a_stray_nul_is_reported_as_binary() -> None:
    Path("a.txt").write_bytes(ENGLISH.encode() + b"\0\0" + ENGLISH.encode())
    message = refusal("a.txt")
    assert "looks binary" in message
    assert "tr -d" in message


def test_removing_nul_bytes_is_suggested_only_for_text() -> None:
    for data in (bytes(5000), bytes(range(200)) * 20, b"RIFF" + bytes(range(256)) * 20):
        Path("a.txt").write_bytes(data)
        assert "tr -d" not in refusal("a.txt")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"PK\x05\x06" + bytes(18), "an empty ZIP archive"),
        (b"\x7fELF\x02\x01\x01" + bytes(99), "a program"),
        (b"\x93NUMPY\x01\x00" + bytes(99), "a NumPy array"),
        (b"\x1f\x9d\x90" + bytes(99), "compressed by compress"),
    ],
)
def test_files_of_known_binary_formats_are_named(data: bytes, kind: str) -> None:
    Path("a.txt").write_bytes(data)
    assert f"'a.txt' is {kind}" in refusal("a.txt")


def test_a_utf8_file_with_one_invalid_byte_is_reported_as_damaged() -> None:
    data = CHINESE.encode()
    Path("a.txt").write_bytes(data[:50] + b"\xff" + data[50:])
    message = refusal("a.txt")
    assert "byte 50 is invalid" in message
    assert "Most of it is UTF-8" in message
    assert advised_command(message) == CHINESE


def test_error_positions_after_the_first_block_count_from_the_start_of_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("minigpt.text.corpus.BLOCK_BYTES", 64)
    data = CHINESE.encode()
    Path("a.txt").write_bytes(data[:300] + b"\xff" + data[300:])
    assert "byte 300 is invalid" in refusal("a.txt")
    Path("a.txt").write_bytes(data)
    assert read("a.txt") == [CHINESE]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "UTF_8", "utf8"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "né"}\n'),
        ("a.json", '[{"text": "né"}]'),
        ("a.csv", "text,n\nné,1\n"),
        ("a.txt", "né"),
        ("pipe-like", "text,n\nné,1\n"),
    ],
)
def test_a_byte_order_mark_is_not_part_of_the_text(encoding: str, name: str, content: str) -> None:
    Path(name).write_bytes(codecs.BOM_UTF8 + content.encode())
    assert read(name, encoding) == ["né"]


def test_a_byte_order_mark_in_toml_is_dropped() -> None:
    Path("a.toml").write_bytes(codecs.BOM_UTF8 + b"[data]\nfield = 'n\xc3\xa9'\n")
    assert read_toml(Path("a.toml")) == {"data": {"field": "né"}}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32-be", "cp1252", "gb18030"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "né “q”"}\n{"text": "b"}\n'),
        ("a.csv", "text,n\nné “q”,1\nb,2\n"),
        ("a.json", '["né “q”", "b"]'),
    ],
)
def test_rows_are_read_in_the_given_encoding(encoding: str, name: str, content: str) -> None:
    Path(name).write_bytes(content.encode(encoding))
    assert read(name, encoding) == ["né “q”", "b"]
    message = refusal(name)
    if "utf" in encoding:
        assert read(name, advised_encoding(message)) == ["né “q”", "b"]


def test_text_that_is_not_in_the_named_encoding_is_refused_with_its_position() -> None:
    Path("a.txt").write_bytes(b"abc \x81")
    assert "is not cp1252: byte 4 is invalid" in refusal("a.txt", "cp1252")
    Path("b.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\x81"}\n')
    assert "line 2 of 'b.jsonl' is not cp1252" in refusal("b.jsonl", "cp1252")
    Path("odd.txt").write_bytes("né".encode("utf-16")[:-1])
    assert "is not utf-16" in refusal("odd.txt", "utf-16")
    Path("odd.jsonl").write_bytes('{"text": "né"}'.encode("utf-16")[:-1])
    assert "is not utf-16" in refusal("odd.jsonl", "utf-16")


@pytest.mark.parametrize("encoding", ["klingon", "", "base64", "rot13", "utf-8\0", "hex"])
def test_an_unknown_encoding_is_refused_with_known_names(encoding: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown encoding .* Use a name that Python knows"):
        DataConfig(encoding=encoding)


@pytest.mark.parametrize("encoding", ["idna", "undefined", "hex", "no-such"])
def test_a_codec_that_is_not_a_text_encoding_is_refused(encoding: str) -> None:
    with pytest.raises(ConfigError, match="unknown encoding"):
        DataConfig(encoding=encoding)


@pytest.mark.parametrize("encoding", ["utf-16", "punycode"])
def test_text_in_another_encoding_than_the_given_one_is_a_data_error(
    encoding: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("The owl in the tree. " * 50)
    data = DataConfig(paths=(str(tmp_path / "a.txt"),), encoding=encoding)
    with pytest.raises(DataError, match=f"is not {encoding}"):
        prepare(data, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["[Content_Types].xml", "word/document.xml"], "Save it as plain text (.txt)"),
        (["_rels/.rels", "word/document.xml"], "Save it as plain text (.txt)"),
        (["mimetype=application/vnd.oasis.opendocument.text"], "Save it as plain text (.txt)"),
        (["_rels/.rels", "xl/workbook.xml"], "Save it as CSV"),
        (["[Content_Types].xml", "xl/workbook.xml"], "Save it as CSV"),
        (["mimetype=application/vnd.oasis.opendocument.spreadsheet"], "Save it as CSV"),
        (["mimetype=application/epub+zip", "a.html"], "ebook-convert"),
        (["a.txt", "b.txt"], "Unpack it"),
    ],
)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_office_documents_and_archives_are_refused_with_how_to_convert_them(
    names: list[str], says: str, compression: int
) -> None:
    with zipfile.ZipFile("a.docx", "w") as archive:
        for entry in names:
            name, _, content = entry.partition("=")
            how = zipfile.ZIP_STORED if content else compression
            archive.writestr(name, content or "\u00e9 and more " * 90, how)
    message = refusal("a.docx")
    assert says in message
    assert ("Unpack" in message) == (says == "Unpack it")


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "is a PDF. Extract its text: pdftotext OLD NEW"),
        (b"PK\x03\x04\x14\x00\x06\x00", "is a ZIP archive. Unpack it"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is an Office document. Save it as plain text"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is a picture"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "is a picture"),
        (b"SQLite format 3\0", "is a database. Export its text as CSV"),
        (b"a.txt".ljust(257, b"\0") + b"ustar\x0000", "is a tar archive. Unpack it"),
    ],
)
def test_binary_formats_are_named_and_no_encoding_is_suggested(head: bytes, says: str) -> None:
    for rest in (bytes(range(128, 256)) * 40, b"\0" * 300, FRENCH.encode("latin-1")):
        Path("a.txt").write_bytes(head + rest)
        message = refusal("a.txt")
        assert says in message
        assert "--encoding" not in message
        assert "iconv" not in message
