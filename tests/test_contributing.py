"""The worked examples of CONTRIBUTING.md work exactly as written."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "--tokenizer",
    "bytes",
    "--max-steps",
    "2",
    "--context-length",
    "32",
    "--batch-size",
    "2",
    "--n-layer",
    "1",
    "--n-head",
    "2",
    "--d-model",
    "16",
    "--set",
    "model.d_mlp=16",
    "--set",
    "training.eval_tokens=64",
]


def example(heading: str, number: int = 0) -> str:
    """Return a Python code block below a heading of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.split(f"### {heading}\n")[1].split("\n### ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)[number]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return the path of a copy of the package that a test may change."""
    ignored = shutil.ignore_patterns("*.pyc")
    shutil.copytree(ROOT / "minigpt", tmp_path / "minigpt", ignore=ignored)
    (tmp_path / "corpus.txt").write_text("The king said: once upon a time.\n" * 90)
    return tmp_path


def insert(path: Path, after: str, text: str) -> None:
    before, found, rest = path.read_text().partition(after)
    assert found, f"{path.name} has no {after!r}"
    path.write_text(before + found + text + rest)


def run(copy: Path, *commands: list[str]) -> str:
    """Run commands of the changed copy in one process; return the output."""
    code = (
        "import os, sys\nimport torch\nfrom minigpt.commands import main\n"
        f"for words in {list(commands)!r}:\n"
        "    child = os.fork()\n    if not child:\n"
        "        sys.argv = ['minigpt', *words]\n        main()\n"
        "    assert os.waitpid(child, 0)[1] == 0, words\n"
    )
    env = {"PATH": "", "PYTHONPATH": str(copy), "MINIGPT_CACHE_DIR": "cache"}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=copy, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


GENERATE = ["generate", "--model", "a", "--max-new-tokens", "3", "--seed", "1", "The king"]
TRACE = ["attention-trace", *GENERATE[1:]]


@pytest.mark.integration
def test_an_attention_score_can_be_added_as_a_class_and_an_entry(copy: Path) -> None:
    scores = copy / "minigpt/model/scores.py"
    scores.write_text(scores.read_text() + "\n\n" + example("An attention score"))
    entry = next(line for line in example("An attention score", 1).splitlines() if "cosine" in line)
    insert(copy / "minigpt/model_config.py", "ATTENTIONS = {\n", entry + "\n")
    train = ["train", "corpus.txt", "--name", "a", "--attention", "cosine", *TINY]
    out = run(copy, train, GENERATE, TRACE)
    assert "sink" in out


@pytest.mark.integration
def test_a_sampling_option_can_be_added_as_a_field_and_a_line(copy: Path) -> None:
    insert(
        copy / "minigpt/config.py",
        '"""Action when the context window is full. See generation/sliding.py."""\n',
        example("A sampling option"),
    )
    insert(
        copy / "minigpt/generation/sampling.py",
        "        logits = self._penalized(logits)\n",
        example("A sampling option", 1),
    )
    train = ["train", "corpus.txt", "--name", "a", *TINY]
    capped = [*GENERATE, "--softcap", "0.001"]
    out = run(copy, train, [*GENERATE, "--json"], [*capped, "--json"])
    plain, other = out.splitlines()
    assert '"softcap": 0.001' in other
    assert plain != other


@pytest.mark.integration
def test_a_view_can_be_added_in_one_file(copy: Path) -> None:
    (copy / "minigpt/tracing/views/sinks.py").write_text(example("A view of a trace"))
    out = run(copy, ["train", "corpus.txt", "--name", "a", *TINY], [*TRACE, "--view", "sinks"])
    assert "##" in out


@pytest.mark.integration
def test_a_measure_of_a_row_can_be_added_in_one_file(copy: Path) -> None:
    folder = copy / "minigpt/tracing/analysis/measures"
    (folder / "length.py").write_text(example("A measure of a row"))
    slope = (folder / "gradient.py").read_text().replace("def gradient(", "def slope(")
    (folder / "slope.py").write_text(slope)
    train = ["train", "corpus.txt", "--name", "a", *TINY]
    signed = [*TRACE, "--measure", "slope", "--against", "a", "--json"]
    out = run(copy, train, [*TRACE, "--measure", "length", "--json"], signed)
    assert '"measure": "length"' in out
    assert '"measure": "slope"' in out
