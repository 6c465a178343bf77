"""minigpt train --dry-run: the plan of a run, which writes nothing."""

import json
import shutil
from pathlib import Path

import pytest
from calls import TINY, Run, error_line


@pytest.fixture(autouse=True)
def corpus(trained: Path, workplace: Path) -> None:
    shutil.copy(trained / "corpus.txt", workplace)


def plan_lines(out: str) -> dict[str, str]:
    return {line[:19].strip(): line[19:].strip() for line in out.splitlines()}


@pytest.mark.integration
def test_a_dry_run_prints_the_plan_and_writes_nothing(run: Run) -> None:
    words = ["train", "corpus.txt", "--name", "a", *TINY, "--dry-run"]
    result = run(*words)
    assert (result.code, result.err) == (0, "")
    assert not Path("checkpoints").exists()
    assert all(len(line) <= 80 for line in result.out.splitlines())
    facts = json.loads(run(*words, "--json").out)
    assert not Path("checkpoints").exists()
    assert run(*words[:-1]).code == 0
    weights = Path("checkpoints/a/step-000004/model.safetensors").stat().st_size
    assert 4 * facts["n_parameters"] == pytest.approx(weights, rel=0.2)  # plus a header
    assert (facts["max_steps"], facts["step_tokens"]) == (4, 2 * 64)
    assert facts["n_train_tokens"] + facts["n_val_tokens"] == 2971
    assert facts["memory"]["total"] > 16 * facts["n_parameters"] > 0
    assert facts["peak_flops"] is facts["mfu"] is None
    assert facts["training_s"] > 0
    shown = plan_lines(result.out)
    assert shown["parameters"].split()[0] == f"{facts['n_parameters']:,}"
    assert shown["steps"].split()[:2] == ["4", "4"]
    assert "MFU unknown" in shown["device"]


@pytest.mark.integration
def test_the_plan_names_model_and_tokenizer_like_the_run(run: Run) -> None:
    words = ["train", "corpus.txt", "--name", "a", *TINY, "--tokenizer", "bpe"]
    shown = plan_lines(run(*words, "--dry-run").out)
    said = run(*words).err
    kind = shown["parameters"].split()[1]
    tokenizer = shown["training tokens"].split()[1]
    config = json.loads(Path("checkpoints/a/step-000004/config.json").read_text())
    assert (kind, tokenizer[:4]) == (config["model_type"], "bpe:")
    assert f"({kind}): " in said
    assert f" tokens ({tokenizer}) of " in said


@pytest.mark.integration
def test_a_dry_run_reports_whether_the_run_is_compiled(run: Run) -> None:
    words = ["train", "corpus.txt", *TINY, "--set", "training.max_epochs=0", "--dry-run"]
    long = [*words, "--set", "training.max_steps=100000000"]
    for call, expected in (
        (words, ""),
        (long, "uncompiled, unlike the run (--no-compile)"),
        ([*long, "--no-compile"], ""),
        ([*words, "--compile"], "uncompiled, unlike the run"),
    ):
        result = run(*call)
        assert (result.code, result.err) == (0, "")
        assert all(len(line) <= 80 for line in result.out.splitlines())
        assert plan_lines(result.out)["per step"].partition("ms")[2].strip() == expected
        assert json.loads(run(*call, "--json").out)["is_compiled"] is bool(expected)


@pytest.mark.integration
def test_a_dry_run_of_a_resumed_run_plans_the_remaining_steps(run: Run, trained: Path) -> None:
    shutil.copytree(trained / "checkpoints", "checkpoints")
    before = {path: path.stat().st_mtime_ns for path in Path("checkpoints").rglob("*")}
    words = ["--resume", "--name", "tiny", "--max-steps", "10", "--dry-run", "--json"]
    result = run("train", *words)
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    assert (facts["max_steps"], facts["n_steps_left"]) == (10, 6)
    assert {path: path.stat().st_mtime_ns for path in Path("checkpoints").rglob("*")} == before


def test_json_without_a_dry_run_is_refused(run: Run) -> None:
    result = run("train", "corpus.txt", *TINY, "--json")
    assert "--json has no effect without --dry-run" in error_line(result)
    assert result.code == 2


def test_a_model_larger_than_memory_is_refused_before_it_is_created(run: Run) -> None:
    size = ["--n-layer", "4096", "--d-model", "65536", "--n-head", "64"]
    result = run("train", "no-such-text.txt", *size)
    assert result.code == 6
    line = error_line(result)
    assert "training needs at least" in line
    assert "Use a smaller model" in line
    assert not Path("checkpoints").exists()
