"""Suggested commands call the program the way it was called."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.commands.program import command_line


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A script bin/minigpt that prints its arguments."""
    path = tmp_path / "a bin" / "minigpt"
    path.parent.mkdir()
    path.write_text('#!/bin/sh\nfor word; do printf "%s|" "$word"; done\n')
    path.chmod(0o755)
    return path


ODD = ["--name", "it's; $(touch x) `y` *", "two words"]


@pytest.mark.parametrize("is_on_path", [True, False])
def test_a_pasted_command_calls_the_same_script_with_the_same_words(
    script: Path, monkeypatch: pytest.MonkeyPatch, is_on_path: bool
) -> None:
    monkeypatch.chdir(script.parents[1])
    path = f"{script.parent}:{os.environ['PATH']}" if is_on_path else os.environ["PATH"]
    monkeypatch.setenv("PATH", path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    line = command_line("train", *ODD)
    assert line.split()[0] == ("minigpt" if is_on_path else "'./a")
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout == "|".join(["train", *ODD, ""])
    assert not Path("x").exists()


def test_a_script_elsewhere_is_called_by_its_full_path(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert shlex.split(command_line("train")) == [str(script), "train"]


def test_modules_and_files_are_called_with_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/minigpt/__main__.py", "train"])
    words = shlex.split(command_line("generate"))
    assert words[1:] == ["-m", "minigpt", "generate"]
    python = subprocess.run([words[0], "-c", "import sys; print(sys.prefix)"], capture_output=True)
    assert python.stdout.decode().strip() == sys.prefix
    monkeypatch.setattr(sys, "argv", ["cli.py", "train"])
    assert shlex.split(command_line("generate"))[1:] == ["cli.py", "generate"]
