"""Imports of commands: no torch for --help, and no training code for generate."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from calls import ROOT

HEAVY = ["torch", "numpy", "rich", "tiktoken", "safetensors", "transformers"]


def modules_after(*words: str, cwd: Path = ROOT) -> set[str]:
    """Return the modules imported by a call of the program."""
    program = (
        "import json, sys\n"
        "from minigpt.commands import main\n"
        "try:\n    main()\n"
        "finally:\n    print(json.dumps(list(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=True,
    )
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train", "--help"],
        ["attention-trace", "--help"],
        ["heads", "--help"],
        ["evaluate", "--help"],
        ["plot", "--help"],
        ["compare", "--help"],
        ["prepare", "--help"],
        ["--version"],
    ],
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    assert not modules_after(*words) & set(HEAVY)


def test_help_of_the_program_imports_no_command() -> None:
    imported = modules_after("--help")
    assert "minigpt.config" not in imported
    assert {name for name in imported if name.startswith("minigpt.commands")} == {
        "minigpt.commands",
        "minigpt.commands.help",
        "minigpt.commands.help.failures",
        "minigpt.commands.help.texts",
        "minigpt.commands.help.pages",
        "minigpt.commands.help.usage",
        "minigpt.commands.registry",
    }


@pytest.mark.integration
def test_generate_imports_no_training_module(trained: Path) -> None:
    imported = modules_after("generate", "x", "--max-new-tokens", "1", cwd=trained)
    training = {n for n in imported if n.startswith(("minigpt.training", "minigpt.evaluation"))}
    assert not training
    assert "torch._dynamo" not in imported, "importing it takes over a second and is not needed"


def test_plot_imports_no_torch(trained: Path) -> None:
    assert not modules_after("plot", "tiny", cwd=trained) & {"torch", "matplotlib"}
