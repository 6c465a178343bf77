"""Each command reports its model and its text."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from calls import TINY, TRACE, Run, error_line

from minigpt.checkpoint import resolve
from minigpt.checkpoint.folder import RunFolder
from minigpt.model.device import resolve_dtype

STEP = "checkpoints/tiny/step-000004"


@pytest.fixture
def place(trained: Path, workplace: Path) -> Path:
    """Return the working directory with a copy of the tiny run and its text."""
    shutil.copytree(trained / "checkpoints", workplace / "checkpoints")
    shutil.copy(trained / "corpus.txt", workplace)
    return workplace


@pytest.mark.parametrize("model", [[], ["--model", "tiny"], ["--model", STEP]])
@pytest.mark.parametrize("as_json", [[], ["--json"]])
@pytest.mark.parametrize(
    "words",
    [
        ["generate", "The", "--max-new-tokens", "2", "--num-samples", "2"],
        ["generate", "The", "--max-new-tokens", "2", "--interactive"],
        ["attention-trace", "The", "--max-new-tokens", "2", "--num-samples", "2"],
        ["evaluate", "corpus.txt"],
        ["evaluate"],
        ["heads"],
    ],
)
def test_the_model_is_named_once_on_stderr(
    run: Run, place: Path, words: list[str], model: list[str], as_json: list[str]
) -> None:
    result = run(*words, *model, *as_json)
    assert result.code == 0, result.err
    assert result.err.splitlines().count(f"model {STEP}") == 1


def test_evaluate_without_data_uses_the_validation_text_of_the_run(run: Run, place: Path) -> None:
    metrics = (place / "checkpoints/tiny/metrics.jsonl").read_text().splitlines()
    evaluations = [e for line in metrics if (e := json.loads(line))["event"] == "eval"]
    trained_in = str(resolve_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    result = run("evaluate", "--json", "--eval-tokens", "256", "--dtype", trained_in)
    facts = json.loads(result.out)
    assert facts["nats_per_token"] == pytest.approx(evaluations[-1]["val_loss"], abs=2e-4)
    assert facts["data"] == ["corpus.txt"]
    assert facts["val_fraction"] == 0.1
    assert "text   corpus.txt: the run's own" in result.err
    whole = json.loads(run("evaluate", "--json", "--val-fraction", "0.5").out)
    assert whole["n_tokens"] > 4 * facts["n_tokens"]


def test_evaluate_without_data_refuses_a_changed_text(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluate", "--eval-tokens", "64", "--model"]
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "corpus.txt").write_text("Another text of the same name. " * 99)
    monkeypatch.chdir(elsewhere)
    result = run(*words, f"../{STEP}")
    assert (result.code, result.out) == (3, "")
    line = result.err.splitlines()[-1]
    assert "'corpus.txt' is not the text that '../checkpoints/tiny/step-000004' was" in line
    shutil.copy(place / "corpus.txt", elsewhere)
    assert run(*words, f"../{STEP}").code == 0


def test_evaluate_asks_for_a_text_that_has_moved(run: Run, at_trained: Path) -> None:
    (at_trained / "corpus.txt").rename(at_trained / "moved.txt")
    for words in (["evaluate", "--model", "tiny"], ["train", "--resume", "--name", "tiny"]):
        line = error_line(run(*words))
        assert line.startswith("the run's own text: there is no file or folder 'corpus.txt'.")
        assert line.endswith("If it has moved, give DATA.")
        assert run(words[0], "moved.txt", *words[1:]).code == 0
        assert "run's own" not in error_line(run(words[0], "no.txt", *words[1:]))


@pytest.mark.parametrize(
    ("name", "code"), [("tiny/step-000004", 0), ("tiny/step-000009", 4), ("", 4)]
)
def test_a_step_can_be_named_by_its_run_and_an_empty_name_is_refused(
    run: Run, place: Path, name: str, code: int
) -> None:
    shutil.copy(place / STEP / "config.json", place)  # so that this folder looks like a model
    result = run("generate", "The", "--max-new-tokens", "1", "--model", name)
    assert result.code == code, result.err
    if "9" in name:  # not looked up on the Hub
        assert error_line(result).endswith("That run has step-000004.")
    if code == 0:
        assert f"model {STEP}" in result.err.splitlines()
    elif not name:
        assert "the name of a model is empty. Choose from tiny" in error_line(result)


def test_a_model_file_is_refused_and_its_folder_suggested(run: Run, place: Path) -> None:
    line = error_line(run("generate", "The", "--model", f"{STEP}/model.safetensors"))
    assert line.endswith(f"is not a folder. Name the model's folder: '{STEP}'.")


def test_evaluate_without_data_needs_a_run_and_its_text(run: Run, place: Path) -> None:
    shutil.copytree(STEP, "alone")
    alone = run("evaluate", "--model", "alone")
    assert alone.code == 3
    assert "'alone' is not a step of a run" in error_line(alone)
    (place / "corpus.txt").unlink()
    gone = run("evaluate")
    assert gone.code == 3
    assert "'corpus.txt'" in error_line(gone)
    text = "The king said: once upon a time.\n" * 90
    assert run("train", "-", *TINY, "--name", "piped", stdin=text.encode()).code == 0
    piped = run("evaluate", "--model", "piped")
    assert piped.code == 3
    assert "standard input" in error_line(piped)


@pytest.mark.integration
def test_a_damaged_newest_step_is_reported_and_an_older_one_used(run: Run, place: Path) -> None:
    words = ["--resume", "--name", "tiny", "--max-steps"]
    assert run("train", *words, "6").code == 0
    path = place / "checkpoints/tiny/step-000006/model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    used = run("generate", "The", "--max-new-tokens", "2")
    assert used.code == 0
    assert "step-000006" in used.err
    assert "Step 4 is used." in used.err
    assert f"model {STEP}" in used.err
    resumed = run("train", *words, "6")
    assert resumed.code == 0
    assert "step-000006" in resumed.err
    assert "Step 4 is used." in resumed.err
    assert "used" not in run("generate", "The", "--max-new-tokens", "2").err


@pytest.mark.parametrize("more", [[], ["--num-samples", "2"]])
def test_a_sliding_window_accepts_a_prompt_longer_than_the_context(
    run: Run, place: Path, more: list[str]
) -> None:
    prompt = "The king said: once upon a time. " * 4  # 132 tokens; the context has 64
    words = ["generate", "--temperature", "0", "--max-new-tokens", "5", "--json", *more]
    facts = json.loads(run(*words, "--overflow", "slide", prompt).out.splitlines()[0])
    # See window.py: the first four tokens and the newest half of a window are kept.
    view = prompt[:4] + prompt[-32:]
    same = json.loads(run(*words, view).out.splitlines()[0])
    assert facts["text"] == same["text"]
    assert (facts["n_slides"], facts["n_forgotten"]) == (1, len(prompt) - len(view))
    refused = run(*words, prompt)
    assert refused.code == 3
    assert "--overflow slide" in error_line(refused)


@pytest.mark.integration
def test_unnamed_runs_that_start_together_get_different_names(run: Run, place: Path) -> None:
    taken = RunFolder(Path("checkpoints/corpus-nano"))
    with taken.lock():
        assert run("train", "corpus.txt", *TINY).code == 0
        assert RunFolder(Path("checkpoints/corpus-nano-2")).steps() == [4]
        named = run("train", "corpus.txt", *TINY, "--name", "corpus-nano")
        assert named.code == 7
    assert run("train", "corpus.txt", *TINY).code == 0
    assert taken.steps() == [4]


@pytest.fixture
def shipped(trained: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a bundled model in a folder of the installation."""
    folder = workplace / "installed" / "storyteller"
    shutil.copytree(trained / STEP, folder)
    monkeypatch.setattr(resolve, "shipped_model", lambda: folder)
    return folder


@pytest.mark.parametrize("command", ["generate", "attention-trace", "heads"])
def test_without_any_run_the_bundled_model_is_used(run: Run, shipped: Path, command: str) -> None:
    words = ["The", "--max-new-tokens", "2"] if command != "heads" else []
    for model in ([], ["--model", "storyteller"]):
        result = run(command, *words, *model)
        assert result.code == 0, result.err
        assert "model storyteller, which ships with minigpt" in result.err.splitlines()


def test_traces_show_the_bundled_model_without_its_folder(run: Run, shipped: Path) -> None:
    result = run(*TRACE, "--out", "a.jsonl", "--html", "a.html", "--view", "lines")
    assert result.out.splitlines()[0].split() == ["model", "storyteller"]
    assert json.loads(Path("a.jsonl").read_text().splitlines()[0])["model"] == "storyteller"
    assert str(shipped) not in Path("a.html").read_text()


def test_own_runs_take_precedence_over_the_bundled_model(
    run: Run, place: Path, shipped: Path
) -> None:
    assert f"model {STEP}" in run("generate", "The", "--max-new-tokens", "1").err.splitlines()
    named = run("generate", "The", "--max-new-tokens", "1", "--model", "storyteller")
    assert "model storyteller, which ships with minigpt" in named.err.splitlines()
    shutil.copytree("checkpoints/tiny", "checkpoints/storyteller")
    own = run("generate", "The", "--max-new-tokens", "1", "--model", "storyteller")
    assert "model checkpoints/storyteller/step-000004" in own.err.splitlines()
