"""Runs that are killed or stopped at random moments and resumed."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from calls import TINY
from small_runs import differing

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.manifest import verify
from minigpt.checkpoint.model_folder import read_model

TRAIN = [*TINY, "--set", "training.save_every=2", "--set", "training.max_steps=60"]


def start(program: dict[str, str], folder: Path, *words: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "minigpt", "train", *words],
        cwd=folder,
        env=program | {"MINIGPT_CACHE_DIR": str(folder / "cache")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def checked(run: RunFolder) -> dict[str, Any]:
    """Return the weights of a finished run."""
    latest = run.latest()
    assert latest is not None
    assert latest.step == 60
    verify(latest.folder, hashes=True)
    return dict(read_model(latest.folder).model.state_dict())


@pytest.mark.torture
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(
    number: int, program: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "corpus.txt").write_text("The king said: once upon a time.\n" * 90)
    straight = start(program, tmp_path, "corpus.txt", "--name", "straight", *TRAIN)
    assert straight.communicate()[1] is not None
    assert straight.returncode == 0
    rng = random.Random(9 + number)
    run = RunFolder(tmp_path / "checkpoints" / "killed")
    newest, n_kills = 0, 0
    process = start(program, tmp_path, "corpus.txt", "--name", "killed", *TRAIN)
    for _ in range(60):
        # The start of Python is not interesting, only the moments after it.
        while process.poll() is None and not run.steps():
            time.sleep(0.01)
        try:
            # Immediately the first time, because a fast machine soon finishes the run.
            process.wait(rng.uniform(0.5, 3.5) if n_kills else rng.uniform(0.0, 0.1))
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            n_kills += 1
        error = process.communicate(timeout=60)[1].decode()
        assert "bug in minigpt" not in error
        if number != signal.SIGKILL:
            assert "Traceback" not in error
            # While Python starts, the default signal action ends it.
            assert process.returncode in (0, 128 + number, -number), error
        latest = run.latest()
        assert (latest.step if latest else 0) >= newest, "a checkpoint was lost"
        newest = latest.step if latest else 0
        if process.returncode == 0 and newest == 60:
            break
        words = ["--resume"] if latest else ["corpus.txt", *TRAIN]
        process = start(program, tmp_path, "--name", "killed", *words)
    process.communicate(timeout=100)
    assert n_kills > 0
    killed, other = checked(run), checked(RunFolder(tmp_path / "checkpoints" / "straight"))
    assert differing(killed, other) == []
