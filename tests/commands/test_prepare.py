"""minigpt prepare: its output, and training on its folders."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from calls import TINY, Result, Run, error_line
from small_models import small_model

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.model_folder import write_model
from minigpt.settings import read_toml
from minigpt.text import shard_files
from minigpt.text.bpe import train_bpe
from minigpt.text.corpus import PrepareProgress
from minigpt.text.tokenizer import BytesTokenizer

TEXT = "The king said: né, once upon a time.\n" * 90


@pytest.fixture(autouse=True)
def corpus(workplace: Path) -> str:
    """Write a text into the working directory and return it."""
    (workplace / "corpus.txt").write_text(TEXT)
    return "corpus.txt"


def facts_of(result: Result) -> dict[str, Any]:
    assert result.code == 0
    notes = [line for line in result.err.splitlines() if not line.startswith(("model ", "text "))]
    assert notes == []
    facts: dict[str, Any] = json.loads(result.out)
    return facts


def test_prepare_reports_tokens_bytes_per_token_and_speed(run: Run) -> None:
    words = ["prepare", "corpus.txt", "--tokenizer", "bpe:300", "--out"]
    facts = facts_of(run(*words, "a", "--json"))
    n_bytes, n_tokens = len(TEXT.encode()), facts["n_tokens"]
    stored = sum(path.stat().st_size for path in Path("a").glob("tokens-*.bin"))
    assert n_tokens == stored / 2 < n_bytes / 2
    assert (facts["n_bytes"], facts["n_documents"], facts["n_shards"]) == (n_bytes, 1, 1)
    assert facts["bytes_per_token"] == pytest.approx(n_bytes / n_tokens)
    assert facts["n_bytes_encoded"] == n_bytes
    assert facts["mb_per_s"] == pytest.approx(n_bytes / 1e6 / facts["seconds"])
    assert (facts["folder"], facts["tokenizer"]) == ("a", "bpe:300")
    result = run(*words, "b")
    expected = rf"""folder  b
text    {n_bytes:,} bytes, 1 document
tokens  {n_tokens:,} \(bpe:300\), {n_bytes / n_tokens:.3f} bytes/token
speed   \S+ MB/s: 3\.42 kB in \d+\.\d s
"""
    assert re.fullmatch(expected, result.out), result.out
    assert re.fullmatch(r"next    .*train b\n", result.err)
    again = run(*words, "b")
    assert again.out.splitlines()[-1] == "speed   all tokens existed already"
    assert facts_of(run(*words, "b", "--json"))["mb_per_s"] is None


@pytest.mark.integration
def test_prepare_does_not_import_torch(workplace: Path) -> None:
    code = (
        "import sys\n"
        "from minigpt.commands import main\n"
        "try:\n    main()\n"
        "finally:\n    print('torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "prepare", "corpus.txt", "--out", "tokens", "--json"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "False\n")


@pytest.mark.integration
def test_training_on_a_prepared_folder_equals_training_on_its_text(run: Run) -> None:
    assert run("prepare", "corpus.txt", "--tokenizer", "bpe:300", "--out", "tokens").code == 0
    of_text = run("train", "corpus.txt", "--tokenizer", "bpe:300", "--name", "text", *TINY[2:])
    of_folder = run("train", "tokens", "--name", "folder", *TINY[2:])
    assert (of_text.code, of_folder.code) == (0, 0)
    bests = [RunFolder(Path("checkpoints", name)).best() for name in ("text", "folder")]
    assert bests[0] is not None
    assert bests[1] is not None
    assert bests[0].facts == bests[1].facts
    assert read_toml(Path("checkpoints/folder/config.toml"))["data"]["tokenizer"] == "bpe:300"
    # Both identify the corpus by its tokens, so each can resume from the other.
    resumed = run("train", "tokens", "--resume", "--name", "text", "--max-steps", "6")
    assert resumed.code == 0, resumed.err
    resumed = run("train", "--resume", "--name", "folder", "--max-steps", "6")
    assert resumed.code == 0, resumed.err
    losses = [
        facts_of(run("evaluate", data, "--model", "folder", "--json"))["nats_per_token"]
        for data in ("tokens", "corpus.txt")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("command", ["train --dry-run", "evaluate --model m"])
def test_text_options_are_refused_for_prepared_folders_and_named_corpora(
    run: Run, workplace: Path, command: str
) -> None:
    write_model(workplace / "m", small_model(vocab_size=257), BytesTokenizer())
    assert run("prepare", "corpus.txt", "--tokenizer", "bytes", "--out", "tokens").code == 0
    for words in ("--encoding cp1252", "--skip-bad", "--skip-unencodable"):
        line = error_line(run(*command.split(), "tokens", *words.split()))
        assert f"{words.split()[0]} has no effect on 'tokens', which is already prepared" in line
    result = run(*command.split(), "builtin:tales", "--format", "csv")
    assert result.code == 2
    assert error_line(result).startswith("--format csv is for files, and 'builtin:tales'")
    if command.startswith("train"):
        line = error_line(run("train", "tokens", "--val", "corpus.txt", "--dry-run"))
        assert "'tokens' was prepared to validate on its tail. Leave --val" in line


@pytest.mark.integration
def test_prepare_from_a_model_uses_its_tokenizer(run: Run, workplace: Path) -> None:
    tokenizer = train_bpe([TEXT], 290)
    write_model(workplace / "m", small_model(vocab_size=tokenizer.vocab_size), tokenizer)
    result = run("prepare", "corpus.txt", "--from", "m", "--out", "tokens")
    assert result.err.endswith("train tokens --from m\n")
    facts = facts_of(run("prepare", "corpus.txt", "--from", "m", "--out", "tokens", "--json"))
    assert facts["n_tokens"] == 1 + len(tokenizer.encode(TEXT))
    tiny = ["--max-steps", "2", "--context-length", "16", "--batch-size", "2"]
    assert run("train", "tokens", "--from", "m", "--name", "tuned", *tiny).code == 0
    assert run("train", "--resume", "--name", "tuned", "--max-steps", "3").code == 0
    assert run("train", "tokens", "--name", "fresh", *TINY[2:]).code == 0
    run("prepare", "corpus.txt", "--tokenizer", "bytes", "--out", "bytes")
    refused = run("train", "bytes", "--from", "m", *tiny)
    assert refused.code == 2
    assert "the tokenizer 'bytes', not with the model's" in error_line(refused)


def test_a_prepared_folder_is_refused_as_validation_text(run: Run) -> None:
    shutil.copy("corpus.txt", "other.txt")
    assert run("prepare", "other.txt", "--out", "tokens").code == 0
    result = run("train", "corpus.txt", "--val", "tokens", *TINY)
    assert result.code == 3
    assert "'tokens' is a prepared corpus, which cannot be --val." in error_line(result)


@pytest.mark.parametrize("options", [["--chat"], ["--chat", "--loss-on", "all"]])
def test_evaluating_a_folder_of_conversations_names_the_options_it_needs(
    run: Run, trained: Path, options: list[str]
) -> None:
    row = {"prompt": "Who are you?", "completion": "A king."}
    Path("rows.jsonl").write_text(f"{json.dumps(row)}\n" * 20)
    words = ["--tokenizer", "bytes", "--val-split", "tail", *options]
    assert run("prepare", "rows.jsonl", "--out", "tokens", *words).code == 0
    model = ["--model", str(trained / "checkpoints/tiny")]
    line = error_line(run("evaluate", "tokens", *model))
    assert line == f"'tokens' contains conversations. Give {' '.join(options)}."
    assert run("evaluate", "tokens", *model, *options).code == 0


def test_an_interrupted_prepare_is_resumed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"text": TEXT[: 40 * i]}) + "\n" for i in range(1, 60)]
    Path("docs.jsonl").write_text("".join(lines))
    monkeypatch.setattr(shard_files, "MAX_SHARD_TOKENS", 10_000)
    monkeypatch.setattr("minigpt.text.corpus.PROGRESS_BYTES", 1)
    monkeypatch.setattr("minigpt.text.building.CHUNK_CHARS", 1000)
    from minigpt.commands.display.progress import ProgressLine

    def interrupt(self: ProgressLine, progress: PrepareProgress) -> None:
        if progress.stage == "encode" and progress.done > progress.total / 2:
            raise KeyboardInterrupt

    words = ["prepare", "docs.jsonl", "--tokenizer", "bytes", "--out", "tokens", "--workers", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(ProgressLine, "preparing", interrupt)
        interrupted = run(*words)
    assert (interrupted.code, interrupted.out) == (130, "")
    trained = run("train", "tokens", *TINY)
    assert trained.code == 3
    assert "the preparation of 'tokens' is unfinished" in error_line(trained)
    facts = facts_of(run(*words, "--json"))
    assert 0 < facts["n_bytes_encoded"] < 0.7 * facts["n_bytes"]
    whole = facts_of(
        run("prepare", "docs.jsonl", "--tokenizer", "bytes", "--out", "whole", "--json")
    )
    assert facts["n_tokens"] == whole["n_tokens"]
    for path in Path("whole").glob("tokens-*.bin"):
        assert path.read_bytes() == Path("tokens", path.name).read_bytes()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("prepare corpus.txt", 2, ["missing option '--out'", "minigpt prepare --help"]),
        ("checkpoints export m", 2, ["'--gguf'. See minigpt checkpoints export --help."]),
        ("prepare corpus.txt --out a --workers 0", 2, ["--workers must be at least 1"]),
        ("prepare corpus.txt --out a --tokenizer gpt3", 2, ["Did you mean gpt2?"]),
        ("prepare corpus.txt --out a --from m --tokenizer bytes", 2, ["--from brings its own"]),
        ("prepare corpus.txt --out a --from nowhere", 4, ["'nowhere'"]),
        ("prepare missing.txt --out a", 3, ["'missing.txt'"]),
        ("prepare corpus.txt --out corpus.txt", 6, ["'corpus.txt'", "another --out"]),
        ("prepare corpus.txt --out .", 2, ["contains 'corpus.txt'", "an empty or new folder"]),
        (
            "train tokens --tokenizer bpe:300",
            2,
            ["'tokens' was prepared", "'bytes', not 'bpe:300'"],
        ),
        ("train tokens corpus.txt", 3, ["'tokens' is a prepared corpus", "Name it alone"]),
    ],
)
def test_invalid_calls_are_refused_in_one_line(
    run: Run, words: str, code: int, said: list[str]
) -> None:
    if words.startswith("train"):
        assert run("prepare", "corpus.txt", "--tokenizer", "bytes", "--out", "tokens").code == 0
    result = run(*words.split())
    line = error_line(result)
    assert result.code == code, line
    assert all(part in line for part in said), line
    assert not Path("a").exists() or not list(Path("a").glob("*.bin"))
