"""Fixtures: one tiny trained run, and calls of the program as by a user."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from calls import ROOT, TINY, Result, Run

from minigpt.checkpoint import resolve
from minigpt.checkpoint.folder import RunFolder
from minigpt.commands import main
from minigpt.commands.registry import Commands


@pytest.fixture(scope="session", autouse=True)
def _commands_are_made_once() -> Iterator[None]:
    """Build the options of each command once instead of for each of a thousand calls."""
    make, made = Commands.get_command, {}

    def get_command(program: Commands, ctx: Any, name: str) -> Any:
        if name not in made:
            made[name] = make(program, ctx, name)
        return made[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Commands, "get_command", get_command)
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a shared, read-only folder with corpus.txt and the run checkpoints/tiny."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MINIGPT_CACHE_DIR", str(folder / "cache"))
        (folder / "corpus.txt").write_text("The king said: once upon a time.\n" * 90)
        patch.setattr(sys, "argv", ["minigpt", "train", "corpus.txt", "--name", "tiny", *TINY])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        yield folder


@pytest.fixture
def workplace(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty working directory, isolated from the user's environment."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MINIGPT_CACHE_DIR", str(trained / "cache"))
    monkeypatch.setattr(resolve, "shipped_model", lambda: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def runs(trained: Path, workplace: Path) -> Path:
    """Return the working directory with the run tiny (steps 1 to 4; best 2) and the model plain."""
    tiny = workplace / "checkpoints" / "tiny"
    shutil.copytree(trained / "checkpoints" / "tiny", tiny)
    run = RunFolder(tiny)
    for step in (1, 2, 3):
        shutil.copytree(run.step_folder(4), run.step_folder(step))
        path = run.step_folder(step) / "manifest.json"
        facts = {"val_loss": 1.25, "bits_per_byte": 1.75} if step == 2 else {}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"facts": facts}))
    plain = workplace / "checkpoints" / "plain"
    shutil.copytree(run.step_folder(4), plain, ignore=shutil.ignore_patterns("manifest.json"))
    return workplace


@pytest.fixture
def in_trained(trained: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to the shared folder of the tiny run, for commands that write nothing."""
    monkeypatch.chdir(trained)


@pytest.fixture
def at_trained(trained: Path, workplace: Path) -> Path:
    """Return the working directory with a copy of the tiny run and its text."""
    shutil.copytree(trained / "checkpoints", workplace / "checkpoints")
    shutil.copy(trained / "corpus.txt", workplace)
    return workplace


@pytest.fixture
def run(workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Call ``main`` in this process: run("generate", "text", stdin=b"...") -> Result."""

    def call(*words: str, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "argv", ["minigpt", *words])
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(stdin)))
        capfd.readouterr()
        numbers = signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has no SIGHUP
        before = {number: signal.getsignal(number) for number in numbers}
        with pytest.raises(SystemExit) as ended:
            main()
        for number, handler in before.items():
            signal.signal(number, handler)
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, out, err)

    return call


@pytest.fixture
def start(workplace: Path) -> Callable[..., "subprocess.Popen[bytes]"]:
    """Start the program as a separate process: start("train", ..., cwd=...) -> Popen."""

    def begin(
        *words: str, cwd: Path = workplace, env: dict[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-m", "minigpt", *words],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return begin
