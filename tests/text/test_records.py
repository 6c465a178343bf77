"""Files of rows: recognized formats and extracted texts."""

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from row_files import FORMATS, TEXTS, Reading, json_array, jsonl, refusal

from minigpt.config import DataConfig
from minigpt.errors import ConfigError

pytestmark = pytest.mark.usefixtures("folder")


@pytest.mark.parametrize(("suffix", "kind", "pack"), FORMATS)
def test_the_suffix_determines_the_format(
    suffix: str, kind: str, pack: Callable[[list[str]], bytes]
) -> None:
    Path(f"a{suffix}").write_bytes(pack(TEXTS))
    reading = Reading(f"a{suffix}")
    assert reading.texts == TEXTS
    assert [file.format for file in reading.files] == [kind]


@pytest.mark.parametrize(("suffix", "kind", "pack"), FORMATS)
def test_pipes_and_unknown_suffixes_are_recognized_by_content_and_reported(
    suffix: str, kind: str, pack: Callable[[list[str]], bytes]
) -> None:
    Path("a.data").write_bytes(pack(TEXTS))
    for reading in (Reading("a.data"), Reading("-", stdin=pack(TEXTS))):
        assert reading.texts == TEXTS
        assert [file.format for file in reading.files] == [kind]
        assert "field 'text'" in reading.notes[0]
        assert "--format text reads it as it is" in reading.notes[0]


PROSE = [
    "Once upon a time, there was a king.\nHe had a daughter, and she had an owl.\n",
    "[1] A footnote, and no array.\n[2] Another.\n",
    "{curly words} begin this text\nand {others} this line\n",
    '"Yes," she said.\n"No," he said.\n',
    "a, b\n",
    "<p>one</p>\n\n\n- two\n- three\n",
    "name\nvalue\nother\n",
    "Winter, spring\nSummer, autumn\nDawn, dusk\n",
    "name; value\nfoo; bar\nbaz; qux\n",
    "| a | b |\n| - | - |\n| 1 | 2 |\n",
    'A call:\n\n{"id": 1}\n\nand its answer.\n',
    "",
]


@pytest.mark.parametrize("text", [text for text in PROSE if text])
def test_prose_that_resembles_rows_stays_text(text: str) -> None:
    assert Reading("-", stdin=text.encode()).texts == [text]


def test_a_text_file_that_looks_like_rows_is_text_with_a_hint_at_format() -> None:
    Path("a.txt").write_bytes(jsonl(TEXTS))
    reading = Reading("a.txt")
    assert reading.texts == [jsonl(TEXTS).decode()]
    assert "looks like JSONL: --format jsonl reads its rows" in reading.notes[0]
    assert Reading("a.txt", format="jsonl").texts == TEXTS


def test_format_text_reads_files_of_rows_as_plain_text() -> None:
    Path("a.jsonl").write_bytes(jsonl(TEXTS))
    assert Reading("a.jsonl", format="text").texts == [jsonl(TEXTS).decode()]


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".GZ", gzip.compress), (".gz", gzip.compress), (".bz2", bz2.compress)]
)
@pytest.mark.parametrize(("inner", "kind", "rows"), FORMATS[:6])
def test_compressed_rows_are_recognized_by_suffix_and_content(
    suffix: str,
    pack: Callable[[bytes], bytes],
    inner: str,
    kind: str,
    rows: Callable[[list[str]], bytes],
) -> None:
    Path(f"a{inner}{suffix}").write_bytes(pack(rows(TEXTS)))
    assert Reading(f"a{inner}{suffix}").texts == TEXTS
    assert Reading("-", stdin=pack(rows(TEXTS))).texts == TEXTS


def test_zstandard_is_recognized_and_a_truncated_file_is_refused() -> None:
    name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    compress = pytest.importorskip(name, reason="needs Python 3.14 or backports.zstd").compress
    packed = compress(jsonl(TEXTS[:2])) + compress(jsonl(TEXTS[2:]))
    Path("a.jsonl.zst").write_bytes(packed)
    assert Reading("a.jsonl.zst").texts == TEXTS
    assert Reading("-", stdin=packed).texts == TEXTS
    Path("cut.txt.zst").write_bytes(packed[:-3])
    assert "'cut.txt.zst' cannot be decompressed" in refusal("cut.txt.zst")


def test_a_table_with_spaces_in_its_column_names_is_recognized() -> None:
    content = b"Row ID,Full Text\n1,one\n2,two\n"
    assert Reading("-", stdin=content, field="Full Text").texts == ["one", "two"]


def test_a_long_json_array_is_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minigpt.text.rows.READ_CHARS", 7)
    for content in (json_array(TEXTS), json.dumps(TEXTS).encode(), b'["a", "b\\n", "\\u00e9"]'):
        Path("a.json").write_bytes(content)
        expected = json.loads(content)
        assert Reading("a.json", format="json").texts == [
            row if isinstance(row, str) else row["text"] for row in expected
        ]


def test_csv_keeps_quoted_delimiters_quotes_and_line_breaks_and_needs_a_column() -> None:
    Path("a.csv").write_bytes(b'text,n\r\n"a, ""b""\nc",1\r\nd,2\r\n')
    assert Reading("a.csv").texts == ['a, "b"\nc', "d"]
    Path("b.csv").write_bytes(b"text\none\n\ntwo\n")
    assert Reading("b.csv").texts == ["one", "two"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_rows_may_have_the_line_endings_of_any_system(end: str) -> None:
    cells = ["n,text", "1,one", '2,"two\rlines"', "3,three"]
    Path("a.csv").write_bytes(end.join([*cells, ""]).encode())
    Path("b.jsonl").write_bytes(end.join(json.dumps({"text": t}) for t in "xyz").encode())
    assert Reading("a.csv").texts == ["one", "two\rlines", "three"]
    assert Reading("b.jsonl").texts == ["x", "y", "z"]
    assert Reading("-", stdin=Path("a.csv").read_bytes()).files[0].format == "csv"


def test_bare_strings_are_rows_in_jsonl_and_json_arrays() -> None:
    lines = "\n".join(map(json.dumps, TEXTS))
    for name, content in (("a.jsonl", lines), ("a.json", json.dumps(TEXTS))):
        Path(name).write_text(content)
        assert Reading(name).texts == TEXTS


@pytest.mark.parametrize("sign", ["", "-"])
def test_a_row_with_an_integer_of_thousands_of_digits_is_read(sign: str) -> None:
    row = f'{{"text": "one", "n": {sign}{"9" * 10_000}}}'
    for stdin in (row, f"[{row}]", f"{row}\n{row}"):
        assert set(Reading("-", stdin=stdin.encode()).texts) == {"one"}


def test_a_nested_field_can_be_read_and_is_suggested_by_its_path() -> None:
    rows = [{"id": n, "data": {"text": text}} for n, text in enumerate(TEXTS)]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    message = refusal("a.jsonl")
    assert "its fields are 'id', 'data.text'. Name another" in message
    assert "as in --field data.text." in message
    assert "as in --field data.text." in refusal("a.jsonl", field="data")
    assert Reading("a.jsonl", field="data.text").texts == TEXTS
    Path("d").mkdir()
    Path("a.jsonl").rename("d/a.jsonl")
    assert Reading("d", field="data.text").texts == TEXTS
    rows = [{"a.b": text, "a": {"b": "other"}} for text in TEXTS]
    Path("b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert Reading("b.jsonl", field="a.b").texts == TEXTS


def test_binary_and_struct_columns_of_parquet_are_read_as_text() -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="writes the Parquet file")
    from pyarrow import parquet as files

    files.write_table(pyarrow.table({"text": [text.encode() for text in TEXTS]}), "a.parquet")
    assert Reading("a.parquet").texts == TEXTS
    files.write_table(pyarrow.table({"text": [b"\xff\xfe"]}), "b.parquet")
    assert "it is of type bytes" in refusal("b.parquet")
    files.write_table(pyarrow.table({"d": [{"text": text} for text in TEXTS]}), "c.parquet")
    assert Reading("c.parquet", field="d.text").texts == TEXTS


@pytest.mark.parametrize("start", ["sep=;\r\n", "\ufeffsep=;\n"])
def test_the_sep_line_of_excel_sets_the_delimiter(start: str) -> None:
    Path("a.csv").write_text(start + "n;text\n1;one, or two\n2;three\n", newline="")
    assert Reading("a.csv").texts == ["one, or two", "three"]


def test_standard_input_cannot_be_read_twice() -> None:
    for paths, val in ((("-", "-"), ()), (("-",), ("-",))):
        with pytest.raises(ConfigError, match="can be read only once"):
            DataConfig(paths=paths, val=val)


def test_lzma_files_are_read() -> None:
    Path("a.txt.lzma").write_bytes(lzma.compress(b"One tale.", format=lzma.FORMAT_ALONE))
    assert Reading("a.txt.lzma").texts == ["One tale."]


def test_spaces_around_column_names_are_dropped() -> None:
    Path("a.csv").write_text("id, text \n1,One tale.\n2,Two tales.\n")
    assert Reading("a.csv").texts == ["One tale.", "Two tales."]
