"""The examples run, each on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def minigpt(*words: str, cwd: Path) -> None:
    subprocess.run([sys.executable, "-m", "minigpt", *words], cwd=cwd, env=_env(cwd), check=True)


def run(*words: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=_env(cwd), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _env(folder: Path) -> dict[str, str]:
    cache = str(folder / "cache")
    return os.environ | {"PYTHONPATH": str(ROOT), "MINIGPT_CACHE_DIR": cache}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a text and the run checkpoints/book."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "my-book.txt").write_text("The king said: once upon a time.\n" * 90)
    tiny = "--tokenizer bytes --max-steps 4 --context-length 64 --batch-size 2 --n-layer 2"
    shape = "--n-head 2 --d-model 16 --set model.d_mlp=16 --set training.eval_tokens=256"
    options = f"{tiny} {shape}".split()
    minigpt("train", "my-book.txt", "--name", "book", *options, cwd=folder)
    return folder


@pytest.mark.integration
def test_a_trace_file_is_read_with_the_standard_library(workspace: Path) -> None:
    words = ["--model", "book", "--max-new-tokens", "5", "--temperature", "0", "The king"]
    minigpt("attention-trace", "--out", "king.jsonl", *words, cwd=workspace)
    out = run(str(EXAMPLES / "read_a_trace.py"), "king.jsonl", cwd=workspace)
    assert len(out.splitlines()) == 1 + 5 + 1
    assert "most from" in out


@pytest.mark.integration
@pytest.mark.parametrize("model", ["storyteller", "book"])
def test_the_notebook_runs_from_top_to_bottom(
    workspace: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MINIGPT_MODEL", raising=False)
    if model != "storyteller":  # the bundled model is the default
        monkeypatch.setenv("MINIGPT_MODEL", model)
    notebook = json.loads((EXAMPLES / "look_inside.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells), "outputs must not be committed"
    source = "\n".join("".join(cell["source"]) for cell in cells)
    out = run("-c", source, cwd=workspace)
    assert "sink" in out
    assert "control" in out
    if model == "storyteller":
        assert "head 4.1: " in out  # the induction head of docs/tutorial.md
        assert "Zilpo" in out.partition("without nothing")[2].splitlines()[0]
        assert "Zilpo" not in out.partition("without 4.1")[2]


@pytest.mark.integration
def test_fine_tuning_in_plain_pytorch_lowers_the_loss(workspace: Path) -> None:
    words = ["book", "my-book.txt", "letters"]
    out = run(str(EXAMPLES / "finetune.py"), *words, cwd=workspace)
    losses = [float(line.split()[3]) for line in out.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0] - 0.1
    assert (workspace / "letters" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["finetune.py", "read_a_trace.py"])
def test_an_example_without_arguments_shows_how_to_call_it(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(command, env=_env(tmp_path), capture_output=True, text=True)
    assert done.returncode == 1
    assert f"    python examples/{name} " in done.stderr
    assert "Traceback" not in done.stderr
