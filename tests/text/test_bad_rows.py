"""Errors for rows and files that cannot be read, and skipping of bad rows."""

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from row_files import FORMATS, TEXTS, Reading, jsonl, refusal

from minigpt.config import DataConfig
from minigpt.text import rows as rows_of
from minigpt.text.sources import find_files

pytestmark = pytest.mark.usefixtures("folder")


def test_parquet_and_zstandard_errors_name_the_missing_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("a.parquet").write_bytes(b"PAR1 and so on")
    Path("a.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    for name in ("pyarrow", "compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install" in refusal("a.parquet")
    assert "parquet" in refusal("a.parquet")
    assert "zstd" in refusal("a.zst")


@pytest.mark.parametrize(("suffix", "kind", "pack"), FORMATS)
def test_a_missing_field_is_refused_with_the_fields_found_and_field_selects_another(
    suffix: str, kind: str, pack: Callable[[list[str]], bytes]
) -> None:
    Path(f"a{suffix}").write_bytes(pack(TEXTS))
    message = refusal(f"a{suffix}", field="body")
    assert '"body"' in message
    assert "its fields are 'n', 'text'" in message
    assert "--field" in message
    Path("b.jsonl").write_bytes(b'{"body": "one"}\n{"body": "two"}\n')
    assert Reading("b.jsonl", field="body").texts == ["one", "two"]


@pytest.mark.parametrize("row", [{"\x1b[2J": "a"}, {"text": {"\x1b[2J": "a"}}, {"\u202ea": "a"}])
def test_a_field_name_with_control_characters_is_not_suggested(row: object) -> None:
    Path("a.jsonl").write_bytes(json.dumps(row).encode())
    message = refusal("a.jsonl")
    assert message.isprintable()
    assert "as in" not in message


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


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("a.jsonl", b'{"body": "a", "n": 1}\n' * 9, "'body', 'n'. Name another one with --field"),
        ("a.jsonl", b'{"text": 5, "body": "a"}\n' * 9, "'text', 'body'. Name another one"),
        ("a.jsonl", b'{"text": null, "body": "a"}\n' * 9, "as in --field body"),
        ("a.jsonl", b'{"text": 5}\n' * 9, 'Write each row as {"text": "..."}.'),
        ("a.jsonl", b"5\n" * 9, 'Write each row as {"text": "..."}.'),
        ("a.jsonl", b"Once upon a time\n" * 9, "give --format text"),
        ("a.jsonl", b'{"text": "\xff"}\n' * 9, "Give --encoding latin-1"),
        ("a.json", b'[{"body": "a"}, {"body": "b"}]', "as in --field body"),
        ("a.json", b"[{'text': 'a'}, {'text': 'b'}]", "give --format text"),
        ("a.csv", b"n,body\n1,one\n2,two\n", "'n', 'body'. Name another one with --field"),
        ("a.csv", b"n,text\n1,a, b\n2,c, d\n", "Quote a text that has commas"),
    ],
)
def test_skip_bad_is_suggested_only_if_another_row_has_a_text(
    name: str, content: bytes, remedy: str
) -> None:
    Path(name).write_bytes(content)
    message = refusal(name)
    assert remedy in message
    assert "--skip-bad" not in message
    assert refusal(name, skip_bad=True).startswith("the corpus is empty")


@pytest.mark.parametrize(
    ("row", "seen"),
    [
        ({"q": "a", "a": "b"}, "Its fields are 'q', 'a'."),
        ({"messages": [{"role": "bot", "content": "a"}]}, "its roles are 'bot'."),
        (5, 'Each row needs a list of "messages"'),
    ],
)
def test_rows_without_any_conversation_are_refused_with_their_fields_or_roles(
    row: object, seen: str
) -> None:
    Path("a.jsonl").write_text(f"{json.dumps(row)}\n" * 9)
    message = refusal("a.jsonl", chat=True)
    assert seen in message
    assert "--skip-bad" not in message


@pytest.mark.parametrize("line", [b"null", b"[]", b'{"text": "a"', b"5"])
def test_a_pipe_whose_first_row_is_bad_is_still_recognized_as_jsonl(line: bytes) -> None:
    content = line + b"\n" + jsonl(TEXTS)
    reading = Reading("-", stdin=content, skip_bad=True)
    assert (reading.texts, len(reading.skipped)) == (TEXTS, 1)


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


def test_a_null_in_parquet_is_refused_with_its_row_number_or_skipped() -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="writes the Parquet file")
    from pyarrow import parquet as files

    files.write_table(pyarrow.table({"text": ["one", None, "two"]}), "a.parquet")
    assert refusal("a.parquet").startswith("row 2 of 'a.parquet' ")
    assert Reading("a.parquet", skip_bad=True).texts == ["one", "two"]
    Path("b.parquet").write_bytes(Path("a.parquet").read_bytes()[:-9])
    assert "cannot be read as Parquet" in refusal("b.parquet")


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.jsonl"])
def test_rows_without_any_text_are_an_empty_corpus_with_the_reason(name: str) -> None:
    rows = {"a.json": "[{}, {}]", "a.csv": "n,text\n1\n", "a.jsonl": '{"text": null}\n'}
    Path(name).write_text(rows[name])
    message = refusal(name, skip_bad=True)
    assert message.startswith("the corpus is empty")
    assert " 1 of " in message  # the first of the skipped rows


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b'[{"text": "a"}', "ends within its array, after item 1"),
        (b'[{"text": "a"}, {"te', "item 2 of 'a.json' is not JSON"),
        (b'[{"text": "a"} x]', "item 2 of 'a.json' is not JSON"),
    ],
)
def test_a_truncated_or_malformed_json_array_is_refused(content: bytes, where: str) -> None:
    Path("a.json").write_bytes(content)
    assert where in refusal("a.json", format="json")


def test_an_unclosed_quote_is_reported_by_row_and_skips_only_its_own_line() -> None:
    rows = [f"{i},text {i}" for i in range(8)]
    rows[3] = '3,"text 3'
    Path("a.csv").write_text("\n".join(["n,text", *rows, ""]))
    assert "row 4 of 'a.csv' (line 5) is not CSV: a quote in it is not closed" in refusal("a.csv")
    found = Reading("a.csv", skip_bad=True)
    assert found.texts == [f"text {i}" for i in range(8) if i != 3]
    assert len(found.skipped) == 1
    Path("a.csv").write_text("\n".join(["n,text", *rows, '8,"text, 8"', "9,text 9"]))
    found = Reading("a.csv", skip_bad=True)  # the next quote appears to close the first one
    assert found.texts == [f"text {i}" for i in range(8) if i != 3] + ["text, 8", "text 9"]


@pytest.mark.parametrize(
    ("broken", "n_lost"),
    [
        ('{"text": "b", oops}', 1),
        ('{"text": "b" "n": 1}', 1),
        ('{"text": nul}', 1),
        ('{"text": "b"', 1),
        ('{"text": {"a": 1}, {"x": 2}}', 3),  # text after the error may look like items
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_skip_bad_skips_a_malformed_item_of_a_json_array(
    broken: str, n_lost: int, indent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_of, "READ_CHARS", 64)
    items = [json.dumps({"text": f"text {i}", "n": {"m": i}}, indent=indent) for i in range(9)]
    items[4] = broken
    Path("a.json").write_text("[" + ",\n".join(items) + "]")
    message = refusal("a.json")
    assert message.startswith("item 5 of 'a.json' is not JSON")
    assert "--skip-bad" in message
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
def test_an_object_with_nested_lists_of_rows_is_refused_with_their_keys(
    value: object, keys: str, indent: int | None
) -> None:
    Path("a.json").write_text(json.dumps(value, indent=indent))
    message = refusal("a.json")
    assert message.startswith("item 1 of 'a.json' is a JSON object without \"text\"")
    assert f"contains lists in {keys}; rows are expected in a list or one per line" in message
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
def test_rows_in_an_object_are_refused_with_the_jq_command_that_extracts_them(
    value: object, program: str, indent: int | None
) -> None:
    Path("a.json").write_text(json.dumps(value, indent=indent))
    assert f"jq '{program}'" in refusal("a.json")
    if jq := shutil.which("jq"):
        listed = subprocess.run([jq, program, "a.json"], capture_output=True, check=True)
        Path("b.json").write_bytes(listed.stdout)
        assert Reading("b.json").texts == ["a", "b"]


def test_a_row_whose_nested_objects_differ_gets_no_jq_command() -> None:
    Path("a.jsonl").write_text('{"a": {"text": "one"}, "b": {"title": "two"}}\n')
    message = refusal("a.jsonl")
    assert "its fields are 'a.text', 'b.title'" in message
    assert "jq" not in message


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_row_that_is_too_long_is_refused_with_its_file(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minigpt.text.rows.MAX_ROW_CHARS", 100)
    Path(name).write_text("text,n\n" if name == "a.csv" else "")
    with Path(name).open("a") as file:
        file.write("x" * 200)
    assert f"of '{name}' has more than 100 characters. Split it" in refusal(name)


def test_a_row_in_another_encoding_gets_two_separate_remedies() -> None:
    Path("a.jsonl").write_bytes('{"text": "né"}\n{"text": "a"}\n'.encode("latin-1"))
    assert "iconv -f LATIN1 -t UTF-8 OLD > NEW. Leave such rows out" in refusal("a.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("a.jsonl", b'{"text": ["a", "b"]}', "Write one row per text, or join the texts."),
        ("a.tsv", b'n\ttext\n1\t"so" she said\n', 'write a quote twice: "".'),
        ("a.gz", b"Once upon a time", "does not begin like a .gz file"),
        ("a.zst", b"Once upon a time", "does not begin like a .zst file"),
        ("a.xz", b"Once upon a time", "does not begin like a .xz file"),
        ("a.bz2", b"Once upon a time", "does not begin like a .bz2 file"),
        (
            "a.txt.gz",
            gzip.compress(gzip.compress(b"Once", mtime=0), mtime=0),
            "is compressed twice. Decompress it once.",
        ),
        ("a.txt", b"On\0ce", r"remove its NUL bytes: tr -d '\000' < OLD > NEW"),
    ],
)
def test_the_error_for_an_unreadable_file_has_a_remedy(
    name: str, content: bytes, remedy: str
) -> None:
    Path(name).write_bytes(content)
    assert remedy in refusal(name)


def test_parquet_given_as_text_is_recognized_in_the_error() -> None:
    Path("a.parquet").write_bytes(b"PAR1" + b"\0" * 50)
    assert "is a Parquet file. Give --format parquet" in refusal("a.parquet", format="text")


def test_the_field_with_the_longest_string_is_suggested_as_the_text() -> None:
    rows = [{"id": "a1", "body text": "It rained all day.", "n": 3}] * 3
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "--field 'body text'" in refusal("a.jsonl")
    Path("b.jsonl").write_text('{"n": 3}\n' * 3)
    assert "with --field." in refusal("b.jsonl")


def test_chat_is_not_suggested_for_messages_without_roles() -> None:
    rows = {"name": "Ann", "messages": [{"id": 1, "text": "hello"}, {"id": 2, "text": "bye"}]}
    Path("chat.json").write_text(json.dumps(rows))
    message = refusal("chat.json")
    assert "--chat" not in message
    assert "jq '.\"messages\"'" in message


@pytest.mark.parametrize(
    "turn", [{"from": "human", "value": "Hi"}, {"role": "user", "content": ""}]
)
def test_chat_is_suggested_for_rows_with_conversations(turn: dict[str, str]) -> None:
    Path("chat.jsonl").write_text((json.dumps({"conversations": [turn]}) + "\n") * 3)
    assert "--chat" in refusal("chat.jsonl")


def test_a_jq_command_is_suggested_for_an_object_of_many_strings() -> None:
    Path("a.json").write_text(json.dumps({str(i): f"Tale {i}." for i in range(20)}))
    assert "jq '[.[]]'" in refusal("a.json")
