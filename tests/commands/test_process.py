"""Threads that spin, signals during the import of torch, and commands that call the program."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.commands import openmp
from minigpt.commands.process import command_line

ALONE, BESIDE_ANOTHER = "0.52 0.30 0.11 1/212 4711\n", "0.00 0.01 0.05 2/212 4711\n"


@pytest.mark.parametrize(
    ("command", "load", "count"),
    [
        ("generate", ALONE, "100000"),
        ("attention-trace", ALONE, "100000"),
        ("generate", BESIDE_ANOTHER, "10000"),
        ("generate", "", "10000"),
        ("generate", None, "10000"),
        ("train", ALONE, "10000"),
        ("", ALONE, "10000"),
    ],
)
def test_threads_spin_long_only_for_decoding_on_an_idle_machine(
    command: str, load: str | None, count: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if load is not None:
        (tmp_path / "loadavg").write_text(load)
    monkeypatch.setattr(openmp, "_LOAD", tmp_path / "loadavg")
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that it is restored
    monkeypatch.delenv("GOMP_SPINCOUNT")
    openmp.set_spin_count([*command.split(), "train"])
    assert os.environ["GOMP_SPINCOUNT"] == count


def test_the_environment_takes_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    openmp.set_spin_count(["generate"])
    assert os.environ["GOMP_SPINCOUNT"] == "7"


@pytest.mark.skipif(os.name == "nt", reason="sends signals of POSIX")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_while_torch_is_imported_exits_at_once(name: str, tmp_path: Path) -> None:
    # As C++ code does that calls Python, this one aborts on an exception.
    lines = [
        "import os, signal, time",
        "try:",
        f"    os.kill(os.getpid(), signal.{name})",
        "    time.sleep(1)",
        "except BaseException:",
        "    os.abort()",
    ]
    (tmp_path / "torch.py").write_text("\n".join(lines))
    path = os.pathsep.join([str(tmp_path), *sys.path])
    result = subprocess.run(
        [sys.executable, "-m", "minigpt", "generate", "Hello"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 128 + signal.Signals[name]
    assert result.stderr == ("interrupted\n" if name == "SIGINT" else "")


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
