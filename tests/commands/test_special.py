"""--special and --skip-unencodable of every command that reads a text."""

import json
from pathlib import Path

import numpy as np
import pytest
from calls import TINY, Run, error_line
from small_models import small_model

from minigpt.checkpoint.model_folder import write_model
from minigpt.text.byte_pairs import TiktokenTokenizer, make_encoding
from minigpt.text.tokens import CONTEXT_ONLY

pytestmark = pytest.mark.usefixtures("in_trained")

END = "<|endoftext|>"
MARKED = f"once upon a time {END} there was " * 30


@pytest.mark.parametrize("command", ["generate", "attention-trace"])
def test_special_tokens_in_a_prompt_are_reported_as_plain_text_or_parsed(
    run: Run, command: str
) -> None:
    words = [command, f"ab{END}", "--max-new-tokens", "2", "--seed", "1", "--json"]

    def n_prompt(out: str) -> int:
        facts = json.loads(out.splitlines()[0])
        return int(facts["n_prompt_tokens"] if command == "generate" else len(facts["prompt"]))

    plain, parsed = run(*words), run(*words, "--special")
    assert plain.err.count(f"{END} in the prompt is plain text; --special") == 1
    assert "plain text" not in parsed.err
    assert (n_prompt(plain.out), n_prompt(parsed.out)) == (15, 3)


def test_special_tokens_in_typed_lines_are_parsed_too(run: Run) -> None:
    words = ["generate", "--interactive", "--special", "--max-new-tokens", "1", "--json"]
    out = run(*words, stdin=f"a{END}\n{END}b\n".encode()).out
    assert [json.loads(line)["n_prompt_tokens"] for line in out.splitlines()] == [2, 5]
    plain = run(
        *[word for word in words if word != "--special"], stdin=f"a{END}\n{END}b\n".encode()
    )
    assert plain.err.count(f"{END} in the prompt is plain text") == 1


def test_evaluate_reports_special_tokens_as_plain_text_or_parses_them(
    run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "marked.txt"
    path.write_text(MARKED)
    words = ["evaluate", str(path), "--model", "tiny", "--json"]
    plain, parsed = run(*words), run(*words, "--special")
    assert plain.err.count(f"{END} 30 times") == 1
    assert (plain.code, parsed.code, "plain text" in parsed.err) == (0, 0, False)
    n_bytes = len(MARKED) - 30 * len(END)
    assert json.loads(parsed.out)["n_bytes"] == n_bytes
    assert json.loads(parsed.out)["n_tokens"] == n_bytes + 30
    assert json.loads(plain.out)["n_bytes"] == len(MARKED)


@pytest.mark.integration
def test_train_and_prepare_report_special_tokens_or_parse_them(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("marked.txt").write_text(MARKED)
    assert f"{END} 30 times" in run("prepare", "marked.txt", "--out", "plain").err
    result = run("prepare", "marked.txt", "--out", "parsed", "--special", "--json")
    assert "plain text" not in result.err
    assert json.loads(result.out)["n_documents"] == 31
    plain = run("train", "marked.txt", "--name", "one", *TINY)
    assert plain.err.count(f"{END} 30 times") == 1
    parsed = run("train", "marked.txt", "--name", "two", "--special", "--val-split", "tail", *TINY)
    assert (parsed.code, parsed.err.count("30 times")) == (0, 0)
    resumed = run("train", "--resume", "--name", "two", "--max-steps", "6")
    assert resumed.code == 0


def test_bytes_missing_in_a_vocabulary_are_refused_with_the_option_or_skipped(
    run: Run, tmp_path: Path
) -> None:
    ranks = {bytes([b]): i for i, b in enumerate(b"abcdefg \n")}
    encoding = make_encoding("few", ".|\\n", ranks, {END: len(ranks)})
    write_model(tmp_path / "few", small_model(), TiktokenTokenizer("few", encoding))
    path = tmp_path / "text.txt"
    path.write_text("bad cafe\nface éé bag!\n" * 9)
    for words in (
        ["evaluate", "--model", str(tmp_path / "few")],
        ["prepare", "--from", str(tmp_path / "few"), "--out", str(tmp_path / "out")],
    ):
        refused = run(*words, str(path))
        assert refused.code == 3
        assert "--skip-unencodable" in error_line(refused)
        result = run(*words, str(path), "--skip-unencodable", "--json")
        assert result.code == 0
        assert json.loads(result.out)["n_skipped"] == 27
        assert result.err.count("skipped 27 characters missing from the vocabulary") == 1


def test_characters_missing_in_a_vocabulary_are_skipped_in_conversations_too(
    run: Run, tmp_path: Path
) -> None:
    letters = b"abcdefghijklmnopqrstuvwxyzUA: \n"  # without the characters of <|endoftext|>
    ranks = {bytes([b]): i for i, b in enumerate(letters)}
    encoding = make_encoding("few", ".|\n", ranks, {END: len(ranks)})
    write_model(tmp_path / "few", small_model(), TiktokenTokenizer("few", encoding))
    row = {"prompt": 'what is "\u4e2d" {', "completion": "caf\u00e9\u4e2d"}
    path = tmp_path / "chats.jsonl"
    path.write_text(9 * (json.dumps(row) + "\n"))
    words = ["prepare", str(path), "--chat", "--from", str(tmp_path / "few"), "--out", "tokens"]
    assert "--skip-unencodable" in run(*words).err
    result = run(*words, "--skip-unencodable", "--json")
    assert result.code == 0
    assert json.loads(result.out)["n_skipped"] == 9 * 6
    assert "'\u4e2d' 18 times" in result.err
    tokens = np.fromfile("tokens/tokens-00000.bin", "<u4") % CONTEXT_ONLY
    ids = encoding.encode("User:\nwhat is\n\nAssistant:\ncaf")
    assert tokens.tolist() == 9 * [len(ranks), *ids, len(ranks)]
