"""Training, generating and tracing still work after deleting a ring and its commands."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
RINGS: dict[str, list[str]] = SETTINGS["minigpt"]["rings"]

JOBS = """
train corpus.txt --name tiny --tokenizer bytes --max-steps 2 --context-length 32 --batch-size 2
  --n-layer 1 --n-head 2 --d-model 16 --set model.d_mlp=16 --set training.eval_tokens=64
generate --model tiny --max-new-tokens 3 --temperature 0 "The king"
attention-trace --model tiny --max-new-tokens 3 --temperature 0 "The king"
"""
COMMANDS_OF_OTHER_RINGS = {
    "views": "heads --model tiny --json",
    "corpora": "evaluate --model tiny --json",
}
"""Commands of other rings that must still work without a ring."""


def without(paths: list[str], folder: Path) -> Path:
    """Copy the package to a folder without some of its files."""
    shutil.copytree(ROOT / "minigpt", folder / "minigpt", ignore=shutil.ignore_patterns("*.pyc"))
    for path in paths:
        target = folder / path
        assert target.exists(), f"pyproject.toml names {path!r} as part of a ring"
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    (folder / "corpus.txt").write_text("The king said: once upon a time.\n" * 90)
    return folder


DRIVER = """
import os, shlex, sys
import torch  # once, for all jobs
from minigpt.commands import main

for line in sys.argv[1].replace("\\n  ", " ").strip().splitlines():
    child = os.fork()
    if not child:
        sys.argv = ["minigpt", *shlex.split(line)]
        main()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        sys.exit(f"{line.split()[0]} ended with {status}")
"""


@pytest.mark.parametrize(
    "ring",
    [
        *(pytest.param(ring, marks=pytest.mark.slow) for ring in sorted(RINGS)),
        pytest.param("all rings", marks=pytest.mark.integration),
    ],
)
def test_training_generating_and_tracing_work_without_a_ring(ring: str, tmp_path: Path) -> None:
    paths = RINGS.get(ring) or [path for parts in RINGS.values() for path in parts]
    folder = without(paths, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, JOBS + COMMANDS_OF_OTHER_RINGS.get(ring, "")],
        cwd=folder,
        env={"PATH": "", "PYTHONPATH": str(folder), "MINIGPT_CACHE_DIR": "cache"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    text, *lines = done.stdout.splitlines()
    assert text
    assert sum("%" in line for line in lines) >= 3, "the trace must have a line for each token"


@pytest.mark.integration
def test_import_linter_finds_an_import_of_a_ring_in_the_core(tmp_path: Path) -> None:
    folder = without([], tmp_path)
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "ring_contract.py", folder / "tests")
    shutil.copy(ROOT / "pyproject.toml", folder)
    with (folder / "minigpt" / "evaluation.py").open("a") as file:
        file.write("\n\ndef plot() -> None:\n    import minigpt.training.reports\n")
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "minigpt.evaluation -> minigpt.training.reports" in done.stdout
