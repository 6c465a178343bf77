"""Runs that are killed at random moments, and resumed."""

import random
import subprocess
import sys
import time
from pathlib import Path

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


@pytest.mark.torture
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(
    program: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "corpus.txt").write_text("The king said: once upon a time.\n" * 90)
    straight = start(program, tmp_path, "corpus.txt", "--name", "straight", *TRAIN)
    assert straight.communicate()[1] is not None
    assert straight.returncode == 0
    rng = random.Random(9)
    run = RunFolder(tmp_path / "checkpoints" / "killed")
    newest, n_kills = 0, 0
    process = start(program, tmp_path, "corpus.txt", "--name", "killed", *TRAIN)
    for _ in range(60):
        # The time that Python takes to start is not of interest; the moments after it are.
        while process.poll() is None and not run.steps():
            time.sleep(0.01)
        try:
            process.wait(rng.uniform(0.5, 3.5))
        except subprocess.TimeoutExpired:
            process.kill()
            n_kills += 1
        error = process.communicate(timeout=60)[1].decode()
        assert "bug of minigpt" not in error
        latest = run.latest()
        assert (latest.step if latest else 0) >= newest, "no checkpoint is lost"
        newest = latest.step if latest else 0
        if process.returncode == 0:
            break
        words = (
            ["--resume", "--name", "killed"]
            if latest
            else ["corpus.txt", "--name", "killed", *TRAIN]
        )
        process = start(program, tmp_path, "--name", "killed", *words)
    process.communicate(timeout=100)
    assert n_kills > 0
    models = []
    for name in ("straight", "killed"):
        latest = RunFolder(tmp_path / "checkpoints" / name).latest()
        assert latest is not None
        assert latest.step == 60
        verify(latest.folder, hashes=True)
        models.append(dict(read_model(latest.folder).model.state_dict()))
    assert differing(*models) == []
