"""Narrow terminals, NO_COLOR, and columns counted in cells."""

import json
import os
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from calls import ROOT, TINY, Run
from rich.cells import cell_len
from screens import Screen
from typer.testing import CliRunner

from minigpt.commands import app
from minigpt.commands.generate.samples import Sample
from minigpt.generation.decoder import Step
from minigpt.generation.stream import TextStep
from minigpt.tracing.views.matrix import DENSITY, _ticks

pty = pytest.importorskip("pty", reason="needs pseudo-terminals")
TRACE = ["attention-trace", "The king", "--temperature", "0", "--max-new-tokens", "12"]
CODES = re.compile(r"\x1b\[[\d;]*[A-Za-z]")


def shown(trained: Path, *words: str, width: int, **environment: str) -> str:
    """Return the stdout of the program in a terminal of a given width."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, width))
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "FORCE_COLOR")}
    env |= {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "minigpt", *words],
        cwd=trained,
        env=env | environment,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(theirs)
        data = b""
        try:
            while part := os.read(ours, 4096):
                data += part
        except OSError:  # Linux raises it once the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0, data
    return data.decode().replace("\r\n", "\n")


@pytest.mark.integration
@pytest.mark.parametrize("width", [8, 20])
@pytest.mark.parametrize("view", ["lines", "text", "matrix", "heads"])
def test_no_line_of_a_trace_wraps_in_a_narrow_terminal(
    trained: Path, width: int, view: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    out = shown(trained, *TRACE, "--view", view, "--model", "tiny", width=width)
    lines = CODES.sub("", out).split("\n")
    if view == "lines":
        text = run(*TRACE, "--model", "tiny").out.split("\n\n")[-1]
        lines = lines[: -text.count("\n") - 1]  # without the generated text, which is not wrapped
    assert len(lines) > 5
    assert max(map(cell_len, lines)) <= width


@pytest.mark.integration
def test_without_colours_the_map_uses_density_characters(trained: Path) -> None:
    words = [*TRACE, "--view", "matrix", "--model", "tiny"]
    plain = shown(trained, *words, width=80, NO_COLOR="1")
    coloured = shown(trained, *words, width=80)
    assert "█" in coloured
    assert "█" not in plain
    rows = [line for line in CODES.sub("", plain).split("\n") if line.endswith("|")]
    assert len(rows) == 12
    assert len(set("".join(rows)) & set(DENSITY)) > 3, "cells must differ"


def test_axis_labels_are_never_truncated() -> None:
    for n_columns in range(1, 130):
        for cell_width in (1, 2):
            numbers = _ticks(n_columns, 1, cell_width).split()
            assert numbers == [str(int(n)) for n in numbers]
            assert all(int(n) % 5 == 0 for n in numbers)
            line = _ticks(n_columns, 1, cell_width)
            for n in numbers[1:]:
                assert line.index(f" {n}") + 1 == int(n) * cell_width


def test_logprobs_columns_are_aligned_by_cell_width() -> None:
    class Words:
        def token_bytes(self, token: int) -> bytes:
            return ["a", "日本語", "é", "😀"][token].encode()

    sample = Sample(1, 0.0)
    for token in range(4):
        step = Step(token, token, token, -1.0, None, ((0, -1.0),))
        sample.steps.append(TextStep(step, ""))
    lines = list(sample.probable(Words()))  # type: ignore[arg-type]
    assert {cell_len(line.partition("%")[0]) for line in lines} == {19}


@pytest.mark.parametrize("words", [[], ["generate"], ["attention-trace"], ["train"]])
@pytest.mark.parametrize("width", [34, 40, 60, 140])
def test_help_fits_narrow_terminals(words: list[str], width: int) -> None:
    result = CliRunner().invoke(
        app, [*words, "--help"], env={"COLUMNS": str(width)}, prog_name="minigpt"
    )
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= min(width, 80)


def test_json_does_not_depend_on_the_terminal(
    run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    header = json.loads(run(*TRACE, "--json", "--model", "tiny", "--seed", "7").out.splitlines()[0])
    monkeypatch.setenv("COLUMNS", "20")
    narrow = run(*TRACE, "--json", "--model", "tiny", "--seed", "7")
    assert json.loads(narrow.out.splitlines()[0]) == header


NARROW = [
    "generate a --model tiny --max-new-tokens 5 --logprobs 3",
    "generate a --model tiny --max-new-tokens 5 --num-samples 3",
    "checkpoints list",
    "checkpoints show tiny",
    "evaluate --model tiny",
    "plot tiny",
    "heads --model tiny",
    "attention-trace ab --model tiny --max-new-tokens 3 --n-verified 1 --candidates 2 --lens",
    "attention-trace ab --model tiny --max-new-tokens 3 --measure logit --against b",
    "--help",
    "train --help",
]


@pytest.mark.parametrize("words", NARROW)
def test_every_command_works_in_a_terminal_of_20_columns(
    words: str, trained: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    with monkeypatch.context() as patch:
        screen = Screen(patch, width=20)
        result = run(*words.split())
    shown = screen.text()
    assert result.code == 0, shown
    assert len(shown.strip()) > 20


@pytest.mark.integration
def test_the_status_line_of_training_fits_20_columns(
    trained: Path, workplace: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", str(trained / "corpus.txt"), *TINY, "--eval-every", "2"]
    with monkeypatch.context() as patch:
        screen = Screen(patch, width=20)
        result = run(*words)
    shown = screen.text()
    assert result.code == 0, shown
    redrawn = re.findall(r"\r\x1b\[2K([^\r\n]*)", shown)
    assert len(redrawn) > 2
    notes = ("text ", "model ", "run ", "note ", "step ", "best ", "  ", "next ", "seed ")
    lines = [CODES.sub("", part) for part in redrawn]
    assert max(cell_len(line) for line in lines if not line.startswith(notes)) <= 20


@pytest.mark.parametrize(("width", "is_wrapped"), [(40, True), (200, False)])
def test_an_error_on_a_terminal_wraps_between_words(
    width: int, is_wrapped: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        screen = Screen(patch, width=width)
        result = run("train", "--special", "--chat", "--dry-run")
    _, error, text = screen.text().partition("error: ")
    lines = f"{error}{text}".splitlines()
    assert result.code == 2
    assert " ".join(lines).startswith("error: --special ")
    assert (len(lines) > 1) == is_wrapped
    assert max(map(len, lines)) <= width
