"""Output on terminals, in pipes and to closed streams, without control characters."""

import io
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import TINY, Result, Run
from screens import HOSTILE, OURS, Screen, control_characters

from minigpt.checkpoint.model_folder import read_model, write_model
from minigpt.commands.train import display
from minigpt.config import SamplingConfig
from minigpt.generation.decoder import Decoder
from minigpt.generation.stream import stream_text

Start = Callable[..., Any]
pytest.importorskip("pty", reason="needs pseudo-terminals")


@pytest.fixture
def on_terminal(
    workplace: Path, trained: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Return a function that calls the program in a terminal, in the folder of the tiny run."""

    def call(*words: str, cwd: Path = trained) -> str:
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            screen = Screen(patch)
            result = run(*words)
        shown = screen.text()
        assert result.code == 0, shown
        return shown

    return call


def test_an_error_while_text_is_generated_begins_a_line_of_its_own(
    trained: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = read_model(trained / "checkpoints/tiny/step-000004")
    with torch.no_grad():
        next(loaded.model.parameters()).fill_(math.nan)
    write_model(tmp_path, loaded.model, loaded.tokenizer)
    with monkeypatch.context() as patch:
        screen = Screen(patch)
        result = run("generate", "--model", str(tmp_path), "ab")
    shown = screen.text()
    assert result.code == 4, shown
    assert "ab\r\nerror: the model's logits are NaN or inf" in shown


@pytest.fixture(scope="module")
def hostile(trained: Path) -> tuple[list[str], str]:
    """Return options with which the barely trained model samples ESC and invalid UTF-8.

    Returns: the options with the prompt, and the generated text.
    """
    loaded = read_model(trained / "checkpoints/tiny/step-000004")
    assert loaded.tokenizer is not None
    decoder = Decoder(loaded.model, loaded.tokenizer.encode("x"))
    config, end = SamplingConfig(temperature=99), loaded.tokenizer.end_of_text_ids
    for seed in range(1000):
        steps = decoder.generate(config, seed=seed, end_of_text=end)
        text = "".join(item.text for item in stream_text(steps, loaded.tokenizer))
        if {"\x1b", "\ufffd"} <= set(text):
            return ["x", "--temperature", "99", "--seed", str(seed)], text
    raise AssertionError("no such text")


@pytest.mark.integration
def test_model_text_reaches_a_pipe_byte_for_byte(
    run: Run, trained: Path, hostile: tuple[list[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, text = hostile
    monkeypatch.chdir(trained)
    assert run("generate", *words).out == text + "\n"


@pytest.mark.parametrize("command", ["generate", "attention-trace"])
def test_model_text_cannot_control_a_terminal(
    on_terminal: Callable[..., str], hostile: tuple[list[str], str], command: str
) -> None:
    shown = on_terminal(command, *hostile[0])
    assert r"\x1b" in shown
    assert not control_characters(shown)


@pytest.mark.parametrize("command", ["generate", "attention-trace"])
def test_a_hostile_prompt_cannot_control_a_terminal(
    on_terminal: Callable[..., str], command: str
) -> None:
    shown = on_terminal(command, HOSTILE, "--max-new-tokens", "1")
    # A trace lists the tokens of the prompt one by one, and shows a carriage return as \r.
    assert r"\x7f" in shown
    assert r"\x0d" in shown or r"\r" in shown
    assert not control_characters(shown)


def test_samples_during_training_are_escaped_and_marked(
    on_terminal: Callable[..., str], trained: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        display, "draw_sample", lambda *_: f"{HOSTILE}\nbest   fake\x0bnext\u2028fake"
    )
    text = str(trained / "corpus.txt")
    shown = on_terminal("train", text, *TINY, "--sample-every", "4", cwd=workplace)
    assert not control_characters(shown)
    left = OURS.sub("", shown)
    assert r"| \x1b]0;title\x07\x1b[2J\x9b31m\u202egnp.exe" in left
    assert "| best   fake" in left
    assert not re.search(r"(?m)^(next|fake)", left.split("best   checkpoints")[0])


@pytest.mark.integration
def test_a_terminal_shows_one_line_of_a_sample_at_each_evaluation(
    on_terminal: Callable[..., str],
    run: Run,
    trained: Path,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = []

    def sample(model: object, trainer: object, config: object = None) -> str:
        drawn.append(config)
        return f"{HOSTILE}\nbest   fake\x0bnext\u2028fake {'long ' * 90}"

    monkeypatch.setattr(display, "draw_sample", sample)
    words = ["train", str(trained / "corpus.txt"), *TINY, "--eval-every", "2"]
    shown = on_terminal(*words, cwd=workplace)
    assert not control_characters(shown)
    lines = [line for line in OURS.sub("\n", shown).split("\n") if "| " in line]
    assert len(lines) == len(drawn) == 2
    assert all(line.startswith(r"  | \x1b]0;title") for line in lines)
    assert all("best   fake" not in line and len(line) < 78 for line in lines)
    on_terminal(*words, "--sample-every", "3", cwd=workplace)
    assert len(drawn) == 4, "samples at step 3 and at the end, and none for evaluations"
    run(*words)
    assert len(drawn) == 4, "no samples in a pipe"
    on_terminal(*words, "--sample-every", "0", cwd=workplace)
    assert len(drawn) == 4, "no samples if they are turned off"


@pytest.mark.integration
def test_samples_during_training_do_not_change_the_run(
    on_terminal: Callable[..., str], run: Run, trained: Path, workplace: Path
) -> None:
    words = ["train", str(trained / "corpus.txt"), *TINY, "--eval-every", "1"]
    words += ["--set", "model.dropout=0.2"]
    shown = on_terminal(*words, "--name", "watched", cwd=workplace)
    assert "  | " in shown
    assert run(*words, "--name", "alone").code == 0
    one, other = (
        workplace / "checkpoints" / name / "step-000004/model.safetensors"
        for name in ("watched", "alone")
    )
    assert one.read_bytes() == other.read_bytes()


def test_a_terminal_shows_the_prompt_before_the_text(
    on_terminal: Callable[..., str], run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["generate", "The king", "--temperature", "0", "--max-new-tokens", "5"]
    monkeypatch.chdir(trained)
    model, _, shown = on_terminal(*words).partition("\r\n")
    assert "model checkpoints/tiny/step-000004" in model
    assert shown.startswith("The king" + run(*words).out.splitlines()[0])


@pytest.mark.integration
def test_the_live_line_fits_80_columns_and_is_erased(
    on_terminal: Callable[..., str], trained: Path, workplace: Path
) -> None:
    text = str(trained / "corpus.txt")
    words = ["train", text, *TINY, "--max-steps", "30", "--eval-every", "10"]
    shown = on_terminal(*words, cwd=workplace)
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is visible again
    pieces = [re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", p) for p in re.split(r"[\r\n]+", shown)]
    live = [piece for piece in pieces if piece.startswith("train ")]
    assert live
    assert all(len(piece) < 78 for piece in live)  # with space for ^C
    # Each live line is erased (2K) before anything else is written.
    assert len(re.findall(r"\x1b\[2K", shown)) >= len(live)
    assert "next" in shown.split("\x1b[?25h")[1]


def test_a_terminal_of_unknown_width_has_80_columns(
    trained: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["attention-trace", "The king", "--max-new-tokens", "2", "--seed", "1"]
    shown = []
    for width in (80, 0):  # 0 in COLUMNS too, as set by some programs that run others
        with monkeypatch.context() as patch:
            patch.chdir(trained)
            screen = Screen(patch, width=width)
            result = run(*words)
        shown.append(screen.text())
        assert result.code == 0
    assert "step token" in shown[0]
    assert shown[0] == shown[1]


def test_no_color_disables_color(
    on_terminal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["attention-trace", "The king", "--max-new-tokens", "3"]
    colour = re.compile(r"\x1b\[(?:\d;)?[34]8;|\x1b\[(?:\d;)?[39]\d")
    assert colour.search(on_terminal(*words))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colour.search(on_terminal(*words))


def test_an_ascii_stdout_gets_escapes_instead_of_an_error(
    run: Run, trained: Path, hostile: tuple[list[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ascii_run(*words: str) -> tuple[Result, bytes]:
        out = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.chdir(trained)
            patch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
            result = run(*words)
            return result, out.getvalue()

    result, out = ascii_run("generate", *hostile[0])
    assert result.code == 0
    assert b"\\ufffd" in out
    result, out = ascii_run("attention-trace", "a b", "--max-new-tokens", "2")
    assert result.code == 0
    assert b"  1 _ " in out  # the ASCII sign for a space


@pytest.mark.integration
def test_a_closed_pipe_ends_the_program_quietly(start: Start, trained: Path, run: Run) -> None:
    with start("generate", "x", "--num-samples", "1000", cwd=trained) as process:
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read().decode()
    assert process.returncode == 0
    model, *lines = err.splitlines()
    assert model == "model checkpoints/tiny/step-000004"
    assert all(re.fullmatch(r"\d+ tokens, .* seed \d+.*", line) for line in lines)


@pytest.mark.integration
def test_full_devices_and_closed_streams_give_no_traceback(workplace: Path) -> None:
    def shell(redirection: str) -> subprocess.CompletedProcess[str]:
        line = f'"{sys.executable}" -m minigpt --help {redirection}'
        root = Path(__file__).resolve().parents[2]
        return subprocess.run(
            ["sh", "-c", line],
            env=os.environ | {"PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
        )

    closed = shell(">&-")
    assert (closed.returncode, closed.stderr) == (0, "")
    assert shell("2>&-").returncode == 0
    if Path("/dev/full").exists():
        full = shell("> /dev/full")
        assert full.returncode == 6
        assert re.fullmatch(r"error: No space left on device\. .*\n", full.stderr)


def test_a_trace_names_its_model_once_on_a_terminal(
    on_terminal: Callable[..., str], run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["attention-trace", "The king", "--temperature", "0", "--max-new-tokens", "2"]
    monkeypatch.chdir(trained)
    assert on_terminal(*words).count("step-000004") == 1
    assert "step-000004" in run(*words).out  # stdout may be saved without stderr
    with Path("both.txt").open("w+") as both, monkeypatch.context() as patch:  # as with 2>&1
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, both)
        run(*words)
        both.seek(0)
        assert both.read().count("step-000004") == 1
