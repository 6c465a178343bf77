"""minigpt checkpoints export and import."""

import json
import shutil
from pathlib import Path

import pytest
from calls import Run, error_line


@pytest.fixture(autouse=True)
def tiny(trained: Path, workplace: Path) -> Path:
    """The run tiny."""
    return Path(shutil.copytree(trained / "checkpoints" / "tiny", "checkpoints/tiny"))


def test_export_says_what_was_written_and_how_to_run_it(run: Run) -> None:
    pytest.importorskip("gguf", reason="writes GGUF files with the package gguf")
    result = run("checkpoints", "export", "tiny", "--gguf", "out/tiny it.gguf")
    assert (result.code, result.err) == (0, "")
    n_kb = Path("out/tiny it.gguf").stat().st_size / 1000
    assert result.out == (
        f"out/tiny it.gguf: {n_kb:.1f} kB, f16. "
        "Run it: llama-completion -p 'Once upon a time' -m 'out/tiny it.gguf'\n"
    )
    assert [path.name for path in Path("out").iterdir()] == ["tiny it.gguf"]


def test_export_as_json_has_type_and_size(run: Run) -> None:
    pytest.importorskip("gguf", reason="writes GGUF files with the package gguf")
    result = run("checkpoints", "export", "tiny", "--gguf", "t.gguf", "--type", "q8_0", "--json")
    facts = json.loads(result.out)
    assert (facts["file"], facts["type"]) == ("t.gguf", "q8_0")
    assert facts["n_bytes"] == Path("t.gguf").stat().st_size
    assert facts["notes"] == []


def test_export_refuses_bad_input_in_one_line(run: Run) -> None:
    pytest.importorskip("gguf", reason="writes GGUF files with the package gguf")
    Path("there.gguf").write_text("mine")

    def refused(code: int, message: str, *words: str) -> None:
        result = run("checkpoints", "export", *words)
        assert result.code == code
        assert message in error_line(result)

    refused(2, "'there.gguf' exists already", "tiny", "--gguf", "there.gguf")
    refused(2, "unknown --type 'q4'", "tiny", "--gguf", "a.gguf", "--type", "q4")
    refused(2, "'.' exists already", "tiny", "--gguf", "")
    refused(4, "Did you mean tiny?", "tine", "--gguf", "a.gguf")
    refused(6, "there.gguf", "tiny", "--gguf", "there.gguf/a.gguf")
    assert Path("there.gguf").read_text() == "mine"
    assert not Path("a.gguf").exists()
