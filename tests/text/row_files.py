"""Files of rows in each format, and the results of reading them."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from minigpt.config import DataConfig
from minigpt.errors import DataError
from minigpt.text.corpus import iter_documents
from minigpt.text.sources import find_files

TEXTS = ["The owl, at night.", 'She said "né".', "two\nlines", "世界"]


class Reading:
    """The texts of some files, the notes about them, and the messages for skipped rows."""

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
