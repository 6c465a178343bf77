"""Suggestions are similar names that apply, and following a remedy works."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import TINY, Run, error_line

from minigpt.checkpoint.model_folder import read_model, write_model
from minigpt.errors import did_you_mean


@pytest.mark.parametrize(
    ("words", "near"),
    [
        ("generate --temp 1", "--temperature"),
        ("generate -temp 1", "--temperature"),
        ("generate --n-samples 2", "--num-samples"),
        ("generate --max-tokens 2", "--max-new-tokens"),
        ("generate --tokens 2", "--max-new-tokens"),
        ("generate --top 2", "--top-k or --top-p"),
        ("generate --rep-penalty 2", "--repetition-penalty"),
        ("generate --quantise int8", "--quantize"),
        ("generate --no-strem", "--no-stream"),
        ("train --epochs 2", "--max-epochs"),
        ("train --steps 2", "--max-steps"),
        ("train --layers 2", "--n-layer"),
        ("train --heads 2", "--n-head"),
        ("train --batch 2", "--batch-size"),
        ("train --context 2", "--context-length"),
        ("attention-trace --verif 2", "--n-verified or --verify-layers or --verify-heads"),
        ("train --learning-rate 2", "--lr"),
        ("train --n-embd 4", "--d-model"),
        ("train --block-size 4", "--context-length"),
        ("train --max-iters 4", "--max-steps"),
        ("train --vocab-size 4", "--tokenizer bpe:N"),
        ("train --hidden_size 4", "--d-model"),
        ("train --num-train-epochs 4", "--max-epochs"),
        ("train --eval-interval 4", "--eval-every"),
        ("train --out-dir x", "--name"),
        ("generate --max-length 4", "--max-new-tokens"),
        ("generate --n-predict 4", "--max-new-tokens"),
        ("generate --num-return-sequences 4", "--num-samples"),
        ("attention-trace --output x", "--out"),
        ("train --tokenizer char", "bytes"),
        ("train --n_layer 4", "--n-layer"),
        ("generate --device gpu", "cuda"),
        ("train --dtype bf16", "bfloat16"),
        ("train --model gpt2", "--from MODEL"),
        ("prepare --model gpt2", "--from MODEL"),
        ("-help", "--help"),
        ("generate -help", "--help"),
        ("--verison", "--version"),
        ("hlep", "help"),
        ("checkpoints hlep", "help"),
        ("trace x", "attention-trace"),
        ("eval", "evaluate"),
        ("checkpoints lst", "list"),
    ],
)
def test_similar_names_are_suggested(run: Run, words: str, near: str) -> None:
    result = run(*words.split())
    assert result.code == 2
    assert f"Did you mean {near}?" in error_line(result)


@pytest.mark.parametrize(
    "words",
    [
        "generate --num-beams 2",
        "generate --greedy",
        "generate --length 2",
        "generate -n 2",
        "generate --prompt x",
        "train --optimizer x",
        "train --gpu",
        "train --data x",
        "train --xyzzy",
        "train --temp 1",
        "chat",
        "ls",
        "nonsense",
    ],
)
def test_dissimilar_names_are_not_suggested(run: Run, words: str) -> None:
    result = run(*words.split())
    assert result.code == 2
    assert "Did you mean" not in error_line(result)


@pytest.mark.parametrize(
    ("option", "setting"),
    [
        ("--weight-decay", "training.weight_decay"),
        ("--grad-clip=1", "training.grad_clip"),
        ("--d-mlp", "model.d_mlp"),
        ("--optimizer", "training.optimizer"),
        ("--max-grad-norm", "training.grad_clip"),
        ("--log-interval", "training.log_every"),
    ],
)
def test_an_option_named_like_a_setting_gets_the_set_option_suggested(
    run: Run, option: str, setting: str
) -> None:
    for command in ("train", "compare"):
        advice = error_line(run(command, option, "1")).rpartition(". ")[2]
        assert advice == f"It is a setting: --set {setting}=VALUE"
    assert "--set" not in error_line(run("generate", option, "1"))


def test_a_common_file_suffix_does_not_count_as_similarity() -> None:
    names = ["my-book.txt", "a.txt", "notes.md", "autumn.txt"]
    assert did_you_mean("nope.txt", names) == ""
    assert did_you_mean("x.txt", names) == ""
    assert did_you_mean("my-bok.txt", names) == "Did you mean my-book.txt?"
    assert did_you_mean("gpt2", ["gpt-nano", "book"]) == ""
    # A name that is found in two places, such as checkpoints/storyteller and the shipped model.
    assert did_you_mean("storytelle", ["storyteller"] * 2) == "Did you mean storyteller?"


@pytest.mark.parametrize("words", [[], ["help"], ["generate"], ["train"], ["checkpoints", "list"]])
def test_help_is_a_command_too(run: Run, words: list[str]) -> None:
    if words[:1] == ["checkpoints"]:
        inner = run("checkpoints", "help", *words[1:])
        assert (inner.code, inner.out) == (0, run(*words, "--help").out)
    asked, shown = run("help", *words), run(*words, "--help")
    assert (asked.code, asked.err) == (0, "")
    assert asked.out == shown.out


@pytest.mark.parametrize(
    "words",
    [
        ["--", "-5 degrees", "--max-new-tokens", "3"],
        ["--seed", "1", "--", "-5", "--max-new-tokens=3", "--no-stream"],
    ],
)
def test_an_option_after_two_dashes_gets_a_working_call_suggested(
    run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(trained)
    result = run("generate", *words)
    assert result.code == 2
    _, _, advice = error_line(result).partition("Put options before it: ")
    call = shlex.split(advice)
    n_before = words.index("--")
    assert call[: 2 + n_before] == ["minigpt", "generate", *words[:n_before]]
    assert run(*call[1:]).code == 0


@pytest.mark.parametrize(
    ("words", "call"),
    [("generate --prompt x", "generate PROMPT"), ("train --data x", "train DATA")],
)
def test_an_argument_given_as_an_option_is_explained(run: Run, words: str, call: str) -> None:
    assert f"Give it without a name: minigpt {call}" in error_line(run(*words.split()))


@pytest.mark.parametrize("prompt", ["-5 degrees", "-5", "-- a list", "-hello there", "--x y"])
def test_the_suggestion_for_a_prompt_that_begins_with_a_dash_works(
    run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    monkeypatch.chdir(trained)
    for command in ("generate", "attention-trace"):
        result = run(command, "--max-new-tokens", "2", prompt)
        line = error_line(result)
        assert result.code == 2
        *_, advice = line.partition("after all options: ")
        words = shlex.split(advice)
        assert words[:2] == ["minigpt", command]
        assert words[-2:] == ["--", prompt]
        assert run(*words[1:-2], "--max-new-tokens", "2", *words[-2:]).code == 0


@pytest.mark.integration
@pytest.mark.parametrize(
    "words",
    [
        ["--n-head", "5"],
        ["--n-head", "7"],
        ["--n-head", "3", "--d-model", "128"],
        ["--n-head", "4", "--d-model", "12"],
        ["--n-head", "5", "--family", "gpt2"],
        ["--d-model", "100"],
        ["--n-head", "500"],
    ],
)
def test_each_suggested_width_is_valid(run: Run, trained: Path, words: list[str]) -> None:
    text = str(trained / "corpus.txt")
    tiny = [text, "--tokenizer", "bytes", "--batch-size", "1", "--context-length", "16"]
    result = run("train", *tiny, "--dry-run", *words)
    assert result.code == 2
    widths = re.search(
        r"Try --d-model (\d+)\.(?: The next smaller one is (\d+)\.)?", error_line(result)
    )
    assert widths
    for width in filter(None, widths.groups()):
        assert run("train", *tiny, "--dry-run", *words, "--d-model", width).code == 0


def test_train_has_threads_and_dropout(run: Run, trained: Path) -> None:
    before = torch.get_num_threads()
    try:
        text = str(trained / "corpus.txt")
        result = run("train", text, *TINY, "--name", "a", "--threads", "1", "--dropout", "0.25")
        assert result.code == 0, result.err
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert read_model(Path("checkpoints/a/step-000004")).model.config.dropout == 0.25


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--threads 0", ["--threads", "at least 1"]),
        ("--threads 50000", ["--threads", "[1, 1024]"]),
        ("--threads 99999999999", ["--threads", "[1, 1024]"]),
        ("--dropout 1", ["--dropout", "[0, 1)"]),
        ("--set training.max_epochs=1e300", ["max_epochs", "[0, 1e6]"]),
        ("--max-epochs 1e300", ["--max-epochs", "[0, 1e6]"]),
        ("--set training.max_minutes=1e300", ["max_minutes", "[0, 1e8]"]),
        ("--set training.lr=1e308", ["lr", "below 1e+30"]),
        ("--lr 1e308", ["--lr", "below 1e+30"]),
        ("--set training.weight_decay=1e308", ["weight_decay", "below 1e+30"]),
        ("--set model.rope_theta=1e308", ["rope_theta", "below 1e+30"]),
        ("--name=", ["--name ''", "not a folder name"]),
        ("--resume --name=", ["--name ''", "not a folder name"]),
        ("--shard", ["--shard", "torchrun"]),
        ("--set training.shard=true", ["--shard", "torchrun"]),
    ],
)
def test_invalid_numbers_and_run_names_are_refused(
    run: Run, trained: Path, words: str, said: list[str]
) -> None:
    result = run("train", str(trained / "corpus.txt"), *TINY, "--dry-run", *words.split(" "))
    line = error_line(result)
    assert result.code == 2
    assert all(part in line for part in said), line


def test_generate_limits_the_number_of_threads(run: Run) -> None:
    for command in ("generate", "attention-trace", "evaluate", "heads"):
        result = run(command, "--threads", "50000")
        assert result.code == 2
        assert "--threads must be in [1, 1024]" in error_line(result)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("generate --model https://huggingface.co/org/name", 4, "as the Hub does: org/name."),
        ("generate --model https://huggingface.co/org/name/tree/main", 4, "does: org/name."),
        ("generate --model https://example.com/model", 4, "is a URL"),
        ("train --from https://huggingface.co/org/name", 4, "as the Hub does: org/name."),
        ("train https://example.com/a.txt", 3, "curl -LO https://example.com/a.txt"),
        ("evaluate https://example.com/a.txt --model tiny", 3, "is a URL"),
        ("train x --from gpt2", 4, "names such as openai-community/gpt2"),
        ("generate --model gpt2", 4, "names such as openai-community/gpt2"),
    ],
)
def test_a_url_or_a_bare_name_gets_a_working_model_name_suggested(
    run: Run, trained: Path, workplace: Path, words: str, code: int, said: str
) -> None:
    (workplace / "checkpoints").symlink_to(trained / "checkpoints")
    result = run(*words.split())
    assert result.code == code
    assert said in error_line(result)


def test_nan_weights_of_a_base_model_are_reported(run: Run, trained: Path, workplace: Path) -> None:
    loaded = read_model(trained / "checkpoints/tiny/step-000004")
    assert loaded.tokenizer is not None
    with torch.no_grad():
        next(loaded.model.parameters())[0] = torch.nan
    write_model(workplace / "nan", loaded.model, loaded.tokenizer)
    result = run("train", str(trained / "corpus.txt"), "--from", "nan", "--max-steps", "1")
    assert result.code == 4
    line = error_line(result)
    assert "'nan' are damaged" in line
    assert "has NaN or inf" in line
    assert "--lr" not in line


def test_the_plan_shows_slow_steps_in_seconds() -> None:
    from minigpt.commands.train import plan
    from minigpt.config import RunConfig
    from minigpt.presets import default_run

    config: RunConfig = default_run()

    def shown(step_s: float) -> str:
        class Facts(dict[str, Any]):
            def __missing__(self, key: str) -> Any:
                return {} if key == "parameters" else {"total": 1} if key == "memory" else 1

        rows = plan._rows(Facts(step_s=step_s, mfu=None, device="cpu", dtype="float32"), config)
        return next(row[1] for row in rows if row[0] == "  per step")

    assert [shown(s) for s in (0.0123, 0.9994, 0.9999, 1.07, 1234.5)] == [
        "12.3 ms",
        "999 ms",
        "0.9999 s",
        "1.07 s",
        "1,234 s",
    ]


def test_a_file_name_that_begins_with_a_dash_is_shown_with_its_folder(
    run: Run, workplace: Path
) -> None:
    Path("-my text.txt").write_text("Once upon a time.")
    for command in ("train", "evaluate", "prepare"):
        result = run(command, "-my text.txt")
        assert result.code == 2
        assert error_line(result).endswith("To name the file, write './-my text.txt'.")
