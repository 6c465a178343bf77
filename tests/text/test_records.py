"""Files of rows: which format is recognized, and what becomes of rows without a text."""

import bz2
import csv
import gzip
import importlib.util
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minigpt.config import DataConfig
from minigpt.errors import ConfigError, DataError
from minigpt.text import json_rows
from minigpt.text.corpus import iter_documents
from minigpt.text.sources import find_files

TEXTS = ["The owl, at night.", 'She said "né".', "two\nlines", "世界"]
needs_zstd = pytest.mark.skipif(
    sys.version_info < (3, 14) and not importlib.util.find_spec("zstandard"),
    reason="needs Python 3.14 or zstandard",
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; cache and spool are beside it."""
    for name in ("work", "cache", "spool"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


class Reading:
    """The texts of some files, the line about them, and the messages of skipped rows."""

    def __init__(self, *words: str, stdin: bytes = b"", **options: object) -> None:
        data = DataConfig(**options)  # type: ignore[arg-type]
        beside = Path.cwd().parent
        self.notes: list[str] = []
        self.skipped: list[str] = []
        self.files = find_files(
            words,
            beside / "cache",
            beside / "spool",
            data,
            stdin=io.BytesIO(stdin),
            on_note=self.notes.append,
        )
        documents = list(iter_documents(self.files, data, self.skipped.append))
        self.texts = [document.text for document in documents]


def refusal(*words: str, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        Reading(*words, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"n": 1, "text": text}) + "\n" for text in texts).encode()


def json_array(texts: list[str]) -> bytes:
    return json.dumps([{"n": 1, "text": text} for text in texts], indent=1).encode()


def table(texts: list[str], delimiter: str = ",") -> bytes:
    out = io.StringIO(newline="")
    rows = csv.writer(out, delimiter=delimiter)
    rows.writerows([["n", "text"], *((i, text) for i, text in enumerate(texts))])
    return out.getvalue().encode()


def tsv(texts: list[str]) -> bytes:
    return table(texts, "\t")


def semicolons(texts: list[str]) -> bytes:
    return table(texts, ";")


def parquet(texts: list[str]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="writes the Parquet file")
    from pyarrow import parquet as files

    out = io.BytesIO()
    files.write_table(pyarrow.table({"n": list(range(len(texts))), "text": texts}), out)
    return out.getvalue()


FORMATS: list[tuple[str, str, Callable[[list[str]], bytes]]] = [
    (".jsonl", "jsonl", jsonl),
    (".NDJSON", "jsonl", jsonl),
    (".json", "json", json_array),
    (".json", "jsonl", jsonl),
    (".csv", "csv", table),
    (".tsv", "csv", tsv),
    (".csv", "csv", semicolons),
    (".parquet", "parquet", parquet),
]


@pytest.mark.parametrize(("suffix", "kind", "pack"), FORMATS)
def test_the_suffix_names_the_format(
    suffix: str, kind: str, pack: Callable[[list[str]], bytes]
) -> None:
    Path(f"a{suffix}").write_bytes(pack(TEXTS))
    reading = Reading(f"a{suffix}")
    assert reading.texts == TEXTS
    assert [file.format for file in reading.files] == [kind]


@pytest.mark.parametrize(("suffix", "kind", "pack"), FORMATS)
def test_a_pipe_and_an_unknown_suffix_are_recognized_by_content_and_said(
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


def test_a_text_file_that_looks_like_rows_is_text_and_the_option_is_named() -> None:
    Path("a.txt").write_bytes(jsonl(TEXTS))
    reading = Reading("a.txt")
    assert reading.texts == [jsonl(TEXTS).decode()]
    assert "looks like JSONL: --format jsonl reads its rows" in reading.notes[0]
    assert Reading("a.txt", format="jsonl").texts == TEXTS


def test_format_text_reads_rows_as_they_are() -> None:
    Path("a.jsonl").write_bytes(jsonl(TEXTS))
    assert Reading("a.jsonl", format="text").texts == [jsonl(TEXTS).decode()]


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".GZ", gzip.compress), (".gz", gzip.compress), (".bz2", bz2.compress)]
)
@pytest.mark.parametrize(("inner", "kind", "rows"), FORMATS[:6])
def test_packed_rows_are_recognized_by_suffix_and_content(
    suffix: str,
    pack: Callable[[bytes], bytes],
    inner: str,
    kind: str,
    rows: Callable[[list[str]], bytes],
) -> None:
    Path(f"a{inner}{suffix}").write_bytes(pack(rows(TEXTS)))
    assert Reading(f"a{inner}{suffix}").texts == TEXTS
    assert Reading("-", stdin=pack(rows(TEXTS))).texts == TEXTS


@needs_zstd
def test_zstandard_is_unpacked_by_suffix_and_content_and_a_cut_file_is_refused() -> None:
    compress = _zstd_compress()
    packed = compress(jsonl(TEXTS[:2])) + compress(jsonl(TEXTS[2:]))
    Path("a.jsonl.zst").write_bytes(packed)
    assert Reading("a.jsonl.zst").texts == TEXTS
    assert Reading("-", stdin=packed).texts == TEXTS
    Path("cut.txt.zst").write_bytes(packed[:-3])
    assert "'cut.txt.zst' cannot be unpacked" in refusal("cut.txt.zst")


def _zstd_compress() -> Callable[[bytes], bytes]:
    if sys.version_info >= (3, 14):
        return importlib.import_module("compression.zstd").compress  # type: ignore[no-any-return]
    return importlib.import_module("zstandard").compress  # type: ignore[no-any-return]


def test_without_the_extra_parquet_and_zstandard_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.parquet").write_bytes(b"PAR1 and so on")
    Path("a.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    for name in ("pyarrow", "compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install" in refusal("a.parquet")
    assert "parquet" in refusal("a.parquet")
    assert "zstd" in refusal("a.zst")


@pytest.mark.parametrize(("suffix", "kind", "pack"), FORMATS)
def test_a_missing_field_is_refused_with_the_fields_seen_and_another_is_read(
    suffix: str, kind: str, pack: Callable[[list[str]], bytes]
) -> None:
    Path(f"a{suffix}").write_bytes(pack(TEXTS))
    message = refusal(f"a{suffix}", field="body")
    assert '"body"' in message
    assert "its fields are 'n', 'text'" in message
    assert "--field" in message
    Path("b.jsonl").write_bytes(b'{"body": "one"}\n{"body": "two"}\n')
    assert Reading("b.jsonl", field="body").texts == ["one", "two"]


BAD_LINES = [
    (b'{"text": null}', "it is null"),
    (b'{"text": 5}', "of type int"),
    (b'{"text": ["a"]}', "of type list"),
    (b"{}", "it has no fields"),
    (b'{"other": "a"}', "its fields are 'other'"),
    (b"null", "is not an object"),
    (b'["a"]', "is not an object"),
    (b'{"text": "a"', "is not JSON"),
    (b'{"text": "a\xff"}', "is not UTF-8"),
    (b"[" * 100_000, "is not JSON"),
]


@pytest.mark.parametrize(("line", "why"), BAD_LINES)
def test_a_bad_line_is_refused_with_its_number_or_skipped_and_counted(
    line: bytes, why: str
) -> None:
    Path("a.jsonl").write_bytes(jsonl(TEXTS[:2]) + line + b"\n" + jsonl(TEXTS[2:]) + line)
    message = refusal("a.jsonl")
    assert message.startswith("line 3 of 'a.jsonl' ")
    assert why in message
    assert "--skip-bad" in message
    reading = Reading("a.jsonl", skip_bad=True)
    assert reading.texts == TEXTS
    assert [skipped.split(" of ")[0] for skipped in reading.skipped] == ["line 3", "line 6"]
    assert why in reading.skipped[0]


@pytest.mark.parametrize("line", [b"null", b"[]", b'{"text": "a"', b"5"])
def test_a_pipe_whose_first_row_is_bad_is_jsonl_too(line: bytes) -> None:
    content = line + b"\n" + jsonl(TEXTS)
    reading = Reading("-", stdin=content, skip_bad=True)
    assert (reading.texts, len(reading.skipped)) == (TEXTS, 1)


def test_a_table_whose_names_have_spaces_is_recognized() -> None:
    content = b"Row ID,Full Text\n1,one\n2,two\n"
    assert Reading("-", stdin=content, field="Full Text").texts == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.json", b'[{"text": "one"}, {"text": null}, {"text": "two"}]', "item 2"),
        ("a.json", b'["one", 5, "two"]', "item 2"),
        ("a.json", b'[{"text": "one"}, {"text": "\xff"}, {"text": "two"}]', "item 2"),
        ("a.csv", b"n,text\n1,one\n2\n3,two\n", "row 2"),
        ("a.csv", b"n,text\n1,one\n2,b,c\n3,two\n", "row 2"),
        ("a.csv", b"n,text\n1,one\n2,\xff\n3,two\n", "row 2"),
        ("a.csv", b'n,text\n1,one\n2,"a"b\n3,two\n', "row 2"),
        ("a.tsv", b"n\ttext\n1\tone\n2\n3\ttwo\n", "row 2"),
    ],
)
def test_a_bad_item_or_row_is_refused_with_its_number_or_skipped(
    name: str, content: bytes, where: str
) -> None:
    Path(name).write_bytes(content)
    message = refusal(name)
    assert message.startswith(f"{where} of {name!r} ")
    assert "--skip-bad" in message
    reading = Reading(name, skip_bad=True)
    assert (reading.texts, len(reading.skipped)) == (["one", "two"], 1)


def test_a_null_of_parquet_is_refused_with_its_number_or_skipped() -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="writes the Parquet file")
    from pyarrow import parquet as files

    files.write_table(pyarrow.table({"text": ["one", None, "two"]}), "a.parquet")
    assert refusal("a.parquet").startswith("row 2 of 'a.parquet' ")
    assert Reading("a.parquet", skip_bad=True).texts == ["one", "two"]
    Path("b.parquet").write_bytes(Path("a.parquet").read_bytes()[:-9])
    assert "cannot be read as Parquet" in refusal("b.parquet")


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.jsonl"])
def test_rows_of_which_none_has_a_text_are_an_empty_corpus_that_says_why(name: str) -> None:
    rows = {"a.json": "[{}, {}]", "a.csv": "n,text\n1\n", "a.jsonl": '{"text": null}\n'}
    Path(name).write_text(rows[name])
    message = refusal(name, skip_bad=True)
    assert message.startswith("the corpus is empty")
    assert " 1 of " in message  # the first of the rows that were left out


@pytest.mark.parametrize(
    "content", [b'[{"text": "a"}', b'[{"text": "a"}, {"te', b'[{"text": "a"} x]']
)
def test_a_json_array_that_is_cut_or_broken_is_refused(content: bytes) -> None:
    Path("a.json").write_bytes(content)
    assert "item 1" in refusal("a.json", format="json")


def test_a_long_json_array_is_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minigpt.text.json_rows.READ_CHARS", 7)
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


def test_an_unclosed_quote_is_named_by_its_row_and_costs_only_its_own_line() -> None:
    rows = [f"{i},text {i}" for i in range(8)]
    rows[3] = '3,"text 3'
    Path("a.csv").write_text("\n".join(["n,text", *rows, ""]))
    assert "row 4 of 'a.csv' (line 5) is not CSV: a quote in it is not closed" in refusal("a.csv")
    found = Reading("a.csv", skip_bad=True)
    assert found.texts == [f"text {i}" for i in range(8) if i != 3]
    assert len(found.skipped) == 1
    Path("a.csv").write_text("\n".join(["n,text", *rows, '8,"text, 8"', "9,text 9"]))
    found = Reading("a.csv", skip_bad=True)  # the next quote seems to close it
    assert found.texts == [f"text {i}" for i in range(8) if i != 3] + ["text, 8", "text 9"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_rows_may_end_as_on_any_system(end: str) -> None:
    cells = ["n,text", "1,one", '2,"two\rlines"', "3,three"]
    Path("a.csv").write_bytes(end.join([*cells, ""]).encode())
    Path("b.jsonl").write_bytes(end.join(json.dumps({"text": t}) for t in "xyz").encode())
    assert Reading("a.csv").texts == ["one", "two\rlines", "three"]
    assert Reading("b.jsonl").texts == ["x", "y", "z"]
    assert Reading("-", stdin=Path("a.csv").read_bytes()).files[0].format == "csv"


@pytest.mark.parametrize(
    ("broken", "n_lost"),
    [
        ('{"text": "b", oops}', 1),
        ('{"text": "b" "n": 1}', 1),
        ('{"text": nul}', 1),
        ('{"text": "b"', 1),
        ('{"text": {"a": 1}, {"x": 2}}', 3),  # what follows the error may look like items
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_broken_item_of_an_array_is_left_out_with_skip_bad(
    broken: str, n_lost: int, indent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "READ_CHARS", 64)
    items = [json.dumps({"text": f"text {i}", "n": {"m": i}}, indent=indent) for i in range(9)]
    items[4] = broken
    Path("a.json").write_text("[" + ",\n".join(items) + "]")
    assert "is not JSON after item 4" in refusal("a.json")
    found = Reading("a.json", skip_bad=True)
    assert found.texts == [f"text {i}" for i in range(9) if i != 4]
    assert len(found.skipped) == n_lost
    items[8] = broken
    Path("a.json").write_text("[" + ",\n".join(items) + "]")
    assert Reading("a.json", skip_bad=True).texts == [f"text {i}" for i in range(8) if i != 4]


@pytest.mark.parametrize(
    ("value", "keys"),
    [
        ({"data": [{"text": "a"}]}, "'data'"),
        ({"version": "1", "train": [{"text": "a"}], "test": [{"text": "b"}]}, "'train', 'test'"),
        ({"data": {"rows": [{"text": "a"}]}}, "'data.rows'"),
        ({"texts": ["a", "b"]}, "'texts'"),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_that_nests_its_rows_is_called_one(
    value: object, keys: str, indent: int | None
) -> None:
    Path("a.json").write_text(json.dumps(value, indent=indent))
    message = refusal("a.json")
    assert message.startswith("item 1 of 'a.json' is a JSON object without \"text\"")
    assert f"holds lists in {keys}; rows are expected in a list or one a line" in message
    assert "JSONL" not in message
    assert find_files(["a.json"], Path("c"), Path("s"), DataConfig())[0].format == "json"


@pytest.mark.parametrize(
    ("value", "program"),
    [
        ({"0": {"text": "a"}, "1": {"text": "b"}}, "[.[]]"),
        ({"x": {"text": "a", "n": 1}, "it's": {"text": "b", "n": 2}}, "[.[]]"),
        ({"version": 1, "rows": {"7": {"text": "a"}, "8": {"text": "b"}}}, '[."rows"[]]'),
        ({"text": {"0": "a", "1": "b"}}, '[."text"[]]'),
        ({"columns": ["text"], "index": [0, 1], "data": [["a"], ["b"]]}, '."data"'),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_rows_in_an_object_are_refused_with_the_command_that_lists_them(
    value: object, program: str, indent: int | None
) -> None:
    Path("a.json").write_text(json.dumps(value, indent=indent))
    assert f"jq '{program}'" in refusal("a.json")
    if jq := shutil.which("jq"):
        listed = subprocess.run([jq, program, "a.json"], capture_output=True, check=True)
        Path("b.json").write_bytes(listed.stdout)
        assert Reading("b.json").texts == ["a", "b"]


def test_a_row_whose_objects_differ_is_not_called_a_table() -> None:
    Path("a.jsonl").write_text('{"a": {"text": "one"}, "b": {"title": "two"}}\n')
    message = refusal("a.jsonl")
    assert "its fields are 'a.text', 'b.title'" in message
    assert "jq" not in message


def test_strings_are_rows_of_jsonl_as_of_a_json_array() -> None:
    lines = "\n".join(map(json.dumps, TEXTS))
    for name, content in (("a.jsonl", lines), ("a.json", json.dumps(TEXTS))):
        Path(name).write_text(content)
        assert Reading(name).texts == TEXTS


@pytest.mark.parametrize("sign", ["", "-"])
def test_an_integer_of_thousands_of_digits_beside_the_text_is_read(sign: str) -> None:
    row = f'{{"text": "one", "n": {sign}{"9" * 10_000}}}'
    for stdin in (row, f"[{row}]", f"{row}\n{row}"):
        assert set(Reading("-", stdin=stdin.encode()).texts) == {"one"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_line_that_is_too_long_is_named_with_its_file(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minigpt.text.rows.LONGEST_ROW", 100)
    Path(name).write_text("text,n\n" if name == "a.csv" else "")
    with Path(name).open("a") as file:
        file.write("x" * 200)
    assert f"of '{name}' has more than 100 characters. Split it" in refusal(name)


def test_the_remedy_for_a_row_in_another_encoding_ends_before_that_of_skipping_it() -> None:
    Path("a.jsonl").write_bytes('{"text": "né"}\n'.encode("latin-1"))
    assert "iconv -f LATIN1 -t UTF-8 OLD > NEW. Leave such rows out" in refusal("a.jsonl")


def test_a_field_may_be_in_an_object_and_the_message_names_it() -> None:
    rows = [{"id": n, "data": {"text": text}} for n, text in enumerate(TEXTS)]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "its fields are 'id', 'data.text'. Name another" in refusal("a.jsonl")
    assert "as in --field data.text." in refusal("a.jsonl", field="data")
    assert Reading("a.jsonl", field="data.text").texts == TEXTS
    Path("d").mkdir()
    Path("a.jsonl").rename("d/a.jsonl")
    assert Reading("d", field="data.text").texts == TEXTS
    rows = [{"a.b": text, "a": {"b": "other"}} for text in TEXTS]
    Path("b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert Reading("b.jsonl", field="a.b").texts == TEXTS


def test_bytes_and_structs_of_parquet_are_texts() -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="writes the Parquet file")
    from pyarrow import parquet as files

    files.write_table(pyarrow.table({"text": [text.encode() for text in TEXTS]}), "a.parquet")
    assert Reading("a.parquet").texts == TEXTS
    files.write_table(pyarrow.table({"text": [b"\xff\xfe"]}), "b.parquet")
    assert "it is of type bytes" in refusal("b.parquet")
    files.write_table(pyarrow.table({"d": [{"text": text} for text in TEXTS]}), "c.parquet")
    assert Reading("c.parquet", field="d.text").texts == TEXTS


@pytest.mark.parametrize("start", ["sep=;\r\n", "\ufeffsep=;\n"])
def test_the_delimiter_that_excel_writes_in_the_first_line_is_used(start: str) -> None:
    Path("a.csv").write_text(start + "n;text\n1;one, or two\n2;three\n", newline="")
    assert Reading("a.csv").texts == ["one, or two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("a.jsonl", b'{"text": ["a", "b"]}', "Write a row for each of its texts, or join them."),
        ("a.tsv", b'n\ttext\n1\t"so" she said\n', 'write a quote twice: "".'),
        ("a.gz", b"Once upon a time", "does not begin as a .gz file"),
        ("a.zst", b"Once upon a time", "does not begin as a .zst file"),
        ("a.xz", b"Once upon a time", "does not begin as a .xz file"),
        ("a.bz2", b"Once upon a time", "does not begin as a .bz2 file"),
        (
            "a.txt.gz",
            gzip.compress(gzip.compress(b"Once", mtime=0), mtime=0),
            "is packed twice. Unpack it once.",
        ),
        ("a.txt", b"On\0ce", r"leave its NUL bytes out: tr -d '\000' < OLD > NEW"),
    ],
)
def test_the_message_of_a_file_that_cannot_be_read_has_its_remedy(
    name: str, content: bytes, remedy: str
) -> None:
    Path(name).write_bytes(content)
    assert remedy in refusal(name)


def test_parquet_that_is_called_text_is_named_as_what_it_is() -> None:
    Path("a.parquet").write_bytes(b"PAR1" + b"\0" * 50)
    assert "is a Parquet file. Give --format parquet" in refusal("a.parquet", format="text")


def test_standard_input_cannot_be_read_twice() -> None:
    for paths, val in ((("-", "-"), ()), (("-",), ("-",))):
        with pytest.raises(ConfigError, match="can be read only once"):
            DataConfig(paths=paths, val=val)
