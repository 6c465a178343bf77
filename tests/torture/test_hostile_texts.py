"""Untrusted corpora, chat templates and pickles are read or refused in one short line."""

import gzip
import io
import json
import pickle
import resource
import shlex
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_values import VALUES, changed, places, values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minigpt.checkpoint.model_folder import read_model
from minigpt.checkpoint.tools.pickled import import_pickled
from minigpt.config import DataConfig
from minigpt.errors import DataError, MinigptError
from minigpt.text import rows
from minigpt.text.chat import ChatTemplate
from minigpt.text.corpus import iter_documents
from minigpt.text.sources import find_files

QUIET = settings(
    max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
ROWS = [{"text": "to be"}, {"text": "or not", "n": 1}, {"text": '\u00e9 \u65e5\n,;\t"'}]
CHAT = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"instruction": "a", "input": "", "output": "b"},
    {"prompt": "a", "completion": "b"},
]


def read(path: Path, **options: Any) -> str:
    """Read all documents of a file; return the error message if it is refused."""
    data = DataConfig(**options)
    try:
        files = find_files([str(path)], path.parent / "cache", path.parent, data)
        for document in iter_documents(files, data):
            document.text.encode()  # fails on lone surrogates
    except DataError as error:
        message = str(error)
    else:
        message = ""
    assert len(message) < 700 + len(str(path)), message[:300]
    assert "\n" not in message
    return message


SUFFIXES = [
    *(".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".jsonl.gz", ".csv.gz"),
    *(".xz", ".bz2", ".zst", ".json.zst", ""),
]
HEADS = [
    *(
        b"",
        b"\x1f\x8b\x08",
        b"\xfd7zXZ\x00",
        b"BZh9",
        b"\x28\xb5\x2f\xfd",
        b"PAR1",
        b"%PDF",
        b"PK\x03\x04",
    ),
    *(
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\xff\xfe\0\0",
        b"[",
        b'[{"text":',
        b'{"text": "',
        b"text\n",
        b'"',
    ),
]


@pytest.mark.integration
@QUIET
@given(st.sampled_from(SUFFIXES), st.sampled_from(HEADS), st.binary(max_size=200), st.booleans())
def test_any_bytes_as_a_corpus_are_read_or_refused(
    tmp_path: Path, suffix: str, head: bytes, rest: bytes, skip_bad: bool
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(head + rest)
    read(path, skip_bad=skip_bad)
    read(path, skip_bad=skip_bad, format="jsonl")
    read(path, skip_bad=skip_bad, format="csv")


@pytest.mark.integration
@QUIET
@given(st.data(), st.booleans(), st.booleans())
def test_any_changed_rows_are_read_skipped_or_refused(
    tmp_path: Path, data: st.DataObject, skip_bad: bool, is_chat: bool
) -> None:
    rows: Any = CHAT if is_chat else ROWS
    place = data.draw(st.sampled_from([place for place in places(rows) if place]))
    try:
        text = [json.dumps(row) for row in changed(rows, place, data.draw(values))]
    except TypeError:
        return
    for name, content in (("a.jsonl", "\n".join(text)), ("a.json", f"[{','.join(text)}]")):
        (tmp_path / name).write_text(content, "utf-8")
        message = read(tmp_path / name, skip_bad=skip_bad, chat=is_chat)
        assert not skip_bad or not message or "JSON" in message or "no row" in message


@pytest.mark.integration
@QUIET
@given(st.data())
def test_any_table_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra parquet")
    from pyarrow import parquet

    columns = st.sampled_from(
        [["a", None], [b"\xff", b"x"], [1, 2], [["a"], ["b"]], [{"text": "a"}] * 2, ["\x1b[2J"] * 2]
    )
    names = st.sampled_from(["text", "", "\x1b[2J", "x" * 300])
    table = pyarrow.table(data.draw(st.dictionaries(names, columns, min_size=1, max_size=3)))
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path)
    assert "\x1b" not in read(path, skip_bad=data.draw(st.booleans())).replace("\\x1b", "")
    content = bytearray(path.read_bytes())
    for _ in range(3):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    read(path)


@pytest.mark.integration
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_a_small_file_that_decompresses_to_one_huge_row_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MAX_ROW_CHARS", 2**21)
    begins = {"a.jsonl.gz": b'{"text": "', "a.json.gz": b'["', "a.csv.gz": b'text\n"'}
    with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
        file.write(begins[name])
        for _ in range(200):
            file.write(b"a" * 2**20)
    assert (tmp_path / name).stat().st_size < 2**21
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = read(tmp_path / name)
    assert "more than 2,097,152 characters" in message or "not closed" in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


PARTS = [
    *(
        "{{ messages }}",
        "{{",
        "}}",
        "{%",
        "%}",
        "{#",
        "messages[0]",
        ".content",
        "|tojson",
        "|safe",
    ),
    *(
        "{% for m in messages %}",
        "{% endfor %}",
        "{% for i in range(10**9) %}x",
        "{% if",
        "* 10**9",
    ),
    *(
        "{% set x = 'a' * 999999 %}",
        "{{ x * 9999 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ),
    *(
        "().__class__.__mro__",
        "{{ cycler.__init__.__globals__ }}",
        "|map('upper')",
        "{{ ''.join }}",
    ),
    *("{{ '%99999999d' % 1 }}", "{{ raise_exception('\x1b[2J') }}", "{% include '/etc/passwd' %}"),
    *("{{ lipsum }}", "{{ [1] * 10**8 }}", "{{ 9**9**9 }}", "{{ namespace() }}", "{{ 1/0 }}"),
]


@pytest.mark.integration
@QUIET
@given(st.lists(st.sampled_from(PARTS) | st.text(max_size=5), max_size=6))
def test_any_chat_template_is_rendered_or_refused(parts: list[str]) -> None:
    template = ChatTemplate("".join(parts), {"bos_token": "<s>"}, "the template")
    messages: Any = [{"role": "user", "content": "a"}]
    try:
        text = template.render(messages)
    except MinigptError as error:
        assert len(str(error)) < 700  # noqa: PT017
        assert "root:" not in str(error)  # noqa: PT017
    else:
        assert len(text) < 2**24
        assert "root:" not in text


FILES = {
    "vocab.json": {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3},
    "merges.txt": None,
    "generation_config.json": {"eos_token_id": 256, "temperature": 0.7, "do_sample": True},
    "tokenizer_config.json": {
        "eos_token": "<|endoftext|>",
        "added_tokens_decoder": {"256": {"content": "<|endoftext|>", "special": True}},
        "chat_template": "{{ messages }}",
        "tokenizer_class": "GPT2Tokenizer",
    },
}


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:.* has no row for:minigpt.errors.MinigptWarning")
@QUIET
@given(st.sampled_from(sorted(FILES)), st.data())
def test_any_changed_file_of_a_model_is_read_or_refused(
    model_folder: Path, name: str, data: st.DataObject
) -> None:
    kept = {path: path.read_bytes() for path in model_folder.iterdir()}
    if name in ("vocab.json", "merges.txt"):
        (model_folder / "tokenizer.json").unlink(missing_ok=True)
        (model_folder / "vocab.json").write_text(json.dumps(FILES["vocab.json"]))
        (model_folder / "merges.txt").write_text("#version: 0.2\na b\n")
    content: Any = FILES[name]
    try:
        if content is None:
            (model_folder / name).write_bytes(
                b"#version: 0.2\n" + data.draw(st.binary(max_size=60))
            )
        else:
            place = data.draw(st.sampled_from(list(places(content))))
            text = json.dumps(changed(content, place, data.draw(values)))
            (model_folder / name).write_text(text, "utf-8")
        read_model(model_folder)
    except TypeError as error:
        assert "not JSON serializable" in str(error)  # noqa: PT017
    except MinigptError as error:
        assert len(str(error)) < 900 + len(str(model_folder))  # noqa: PT017
    finally:
        for path in model_folder.iterdir():
            path.unlink()
        for path, old in kept.items():
            path.write_bytes(old)


class CommandPickle:
    """A value whose pickle runs a command that creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        import os

        return os.system, (f"touch {shlex.quote(str(self.mark))}",)


def import_or_refuse(folder: Path, content: bytes) -> None:
    path = folder / "ckpt.pt"
    path.write_bytes(content)
    with pytest.raises(MinigptError) as caught:
        import_pickled(path, folder / "new")
    assert len(str(caught.value)) < 700 + 2 * len(str(folder))
    assert not (folder / "new").exists()


@pytest.mark.integration
@QUIET
@given(st.binary(max_size=200) | values.map(lambda value: pickle.dumps(repr(value))))
def test_any_bytes_as_a_pickle_are_refused(tmp_path: Path, content: bytes) -> None:
    import_or_refuse(tmp_path, content)


@pytest.mark.integration
def test_a_hostile_pickle_runs_no_code(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    runs = CommandPickle(ran)
    for value in (runs, {"model": runs}, {"model": {}, "model_args": {"n_layer": runs}}):
        import_or_refuse(tmp_path, pickle.dumps(value))
        buffer = io.BytesIO()
        torch.save(value, buffer)
        import_or_refuse(tmp_path, buffer.getvalue())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:  # decompresses to 100 MB
        archive.writestr("a/data.pkl", bytes(10**8))
    import_or_refuse(tmp_path, buffer.getvalue())
    assert not ran.exists()


@pytest.mark.integration
@QUIET
@given(
    st.sampled_from(["n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "model"]),
    st.sampled_from([value for value in VALUES if not isinstance(value, float)]),
)
def test_any_malformed_nanogpt_checkpoint_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    args = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "vocab_size": 9, "bias": True}
    content: dict[str, Any] = {"model": {"transformer.wte.weight": torch.zeros(9, 8)}}
    content["model_args"] = args | {name: value}
    if name == "model":
        content["model"] = value
    buffer = io.BytesIO()
    torch.save(content, buffer)
    import_or_refuse(tmp_path, buffer.getvalue())
