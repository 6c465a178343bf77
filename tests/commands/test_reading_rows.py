"""Commands read, count and report rows, encodings and splits."""

import json
from pathlib import Path
from typing import Any

import pytest
from calls import TINY, Run, error_line

from minigpt.checkpoint.folder import RunFolder

TEXTS = [f"Once there was a king, number {i}, who had {i} owls." for i in range(40)]


@pytest.fixture(autouse=True)
def rows(workplace: Path) -> None:
    """Write a JSONL file with a bad row, and the same texts in other formats."""
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (workplace / "good.jsonl").write_text("\n".join(lines))
    (workplace / "bad.jsonl").write_text("\n".join([*lines[:2], '{"text": null}', *lines[2:]]))
    bodies = json.dumps([{"id": 1, "body": text} for text in TEXTS])
    (workplace / "bodies.json").write_text(bodies)
    (workplace / "wide.txt").write_bytes("\n".join(TEXTS).encode("utf-16"))
    (workplace / "val.txt").write_text("\n".join(TEXTS[:9]))


def prepared(run: Run, *words: str, stdin: bytes = b"") -> tuple[dict[str, Any], str]:
    result = run("prepare", *words, "--tokenizer", "bytes", "--json", stdin=stdin)
    assert result.code == 0, result.err
    return json.loads(result.out), result.err


def evaluated(run: Run, *words: str, stdin: bytes = b"") -> dict[str, Any]:
    result = run("evaluate", *words, "--json", stdin=stdin)
    assert result.code == 0, result.err
    facts: dict[str, Any] = json.loads(result.out)
    return facts


def as_tiny(trained: Path) -> str:
    return str(RunFolder(trained / "checkpoints/tiny").latest().folder)  # type: ignore[union-attr]


def test_rows_in_a_pipe_are_documents_and_the_format_is_reported(run: Run) -> None:
    content = Path("good.jsonl").read_bytes()
    facts, said = prepared(run, "-", "--out", "a", stdin=content)
    assert (facts["n_documents"], facts["n_bytes"]) == (40, len("".join(TEXTS)))
    assert said.startswith("text   'standard input' is read as JSONL, field 'text'")
    facts, _ = prepared(run, "-", "--format", "text", "--out", "b", stdin=content)
    assert (facts["n_documents"], facts["n_bytes"]) == (1, len(content))


def test_a_bad_row_is_refused_with_its_number_or_skipped_and_reported(run: Run) -> None:
    result = run("prepare", "bad.jsonl", "--out", "a")
    line = error_line(result)
    assert result.code == 3
    assert line.startswith("line 3 of 'bad.jsonl' has no \"text\" string: it is null")
    assert "--skip-bad" in line
    facts, said = prepared(run, "bad.jsonl", "--skip-bad", "--out", "a")
    assert (facts["n_documents"], facts["n_bad_rows"]) == (40, 1)
    assert said.startswith("note   1 row was left out; the first: line 3 of 'bad.jsonl'")


def test_prepare_names_the_fields_if_text_is_missing_and_field_selects_one(run: Run) -> None:
    line = error_line(run("prepare", "bodies.json", "--out", "a"))
    assert "its fields are 'id', 'body'" in line
    assert "--field" in line
    assert prepared(run, "bodies.json", "--field", "body", "--out", "a")[0]["n_documents"] == 40


@pytest.mark.parametrize("words", [["--field", "body"], ["--skip-bad"]])
def test_row_options_are_refused_for_plain_text(run: Run, words: list[str]) -> None:
    result = run("prepare", "val.txt", "--out", "a", *words)
    assert result.code == 2
    assert "is for files of rows, and 'val.txt' is text" in error_line(result)


@pytest.mark.integration
def test_evaluate_reads_the_same_formats_as_training(run: Run, trained: Path) -> None:
    model = ["--model", as_tiny(trained)]
    good = evaluated(run, "good.jsonl", *model)
    for words in (
        ["bad.jsonl", "--skip-bad"],
        ["bodies.json", "--field", "body"],
        ["bodies.json", "--format", "json", "--field", "body"],
    ):
        facts = evaluated(run, *words, *model)
        assert facts["nats_per_token"] == pytest.approx(good["nats_per_token"], rel=1e-6)
        assert (facts["n_tokens"], facts["n_bytes"]) == (good["n_tokens"], good["n_bytes"])
        assert facts["n_bad_rows"] == ("--skip-bad" in words)
    assert 'has no "" string' in error_line(run("evaluate", "good.jsonl", "--field", "", *model))
    wide = evaluated(run, "wide.txt", "--encoding", "utf-16", *model)
    assert wide["n_bytes"] == len("\n".join(TEXTS))
    assert "line 3" in error_line(run("evaluate", "bad.jsonl", *model))
    assert "--encoding utf-16" in error_line(run("evaluate", "wide.txt", *model))


@pytest.mark.integration
def test_a_split_by_document_is_reported_resumed_and_evaluated(run: Run) -> None:
    result = run("train", "good.jsonl", "--name", "split", *TINY)
    assert "tokens in whole documents" in result.err + result.out
    best = RunFolder(Path("checkpoints/split")).best()
    assert best is not None
    assert "for training, whole documents with about 10%" in (best.folder / "README.md").read_text()
    facts = evaluated(run, "--model", "split", "--dtype", "bfloat16")
    assert facts["val_split"] == "documents"
    assert facts["nats_per_token"] == pytest.approx(best.facts["val_loss"], rel=1e-2)
    assert "the documents for validation" in run("evaluate", "--model", "split").out
    for words in (
        ["--val-split", "tail"],
        ["--val-fraction", "0.2"],
        ["--val", "val.txt", "--set", "data.val_fraction=0.1"],
    ):
        refused = run("train", "--resume", "--name", "split", "--max-steps", "6", *words)
        assert refused.code == 2, words
        assert refused.err.startswith("error: "), words
    assert run("train", "--resume", "--name", "split", "--max-steps", "6").code == 0


def test_without_validation_evaluate_asks_for_data(run: Run) -> None:
    result = run("train", "good.jsonl", "--name", "all", "--val-fraction", "0", *TINY)
    assert result.code == 0
    assert "no validation" in result.err + result.out
    refused = run("evaluate", "--model", "all")
    assert refused.code == 3
    assert "validates on none. Give DATA" in error_line(refused)
    card = (RunFolder(Path("checkpoints/all")).latest().folder / "README.md").read_text()  # type: ignore[union-attr]
    assert "for training, none for validation." in card


def test_val_validates_on_a_separate_text(run: Run) -> None:
    result = run("train", "good.jsonl", "--name", "own", "--val", "val.txt", *TINY)
    assert result.code == 0
    assert "tokens of the --val text" in result.err + result.out
    facts = evaluated(run, "--model", "own", "--eval-tokens", "256")
    assert facts["val_split"] == "own"
    best = RunFolder(Path("checkpoints/own")).best()
    assert best is not None
    assert facts["nats_per_token"] == pytest.approx(best.facts["val_loss"], rel=1e-2)
    assert "for training, a separate text for" in (best.folder / "README.md").read_text()


@pytest.mark.integration
def test_a_prepared_folder_is_trained_with_its_split_and_evaluated_entirely(
    run: Run, trained: Path
) -> None:
    prepared(run, "good.jsonl", "--val-fraction", "0.3", "--out", "tokens")
    result = run("train", "tokens", "--name", "folder", *TINY)
    assert result.code == 0, result.err
    assert "tokens in whole documents" in result.err + result.out
    refused = run("train", "tokens", "--name", "other", "--val-split", "tail", *TINY)
    assert refused.code == 2
    assert "was prepared to validate on some of its documents, 0.3 of its bytes" in refused.err
    facts = evaluated(run, "tokens", "--model", as_tiny(trained))
    assert facts["n_bytes"] == len("".join(TEXTS))
    assert evaluated(run, "--model", "folder")["val_split"] == "documents"
