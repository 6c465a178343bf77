"""How long OpenMP's threads stay awake: by the command, and by what else the machine does."""

import os
from pathlib import Path

import pytest

from minigpt.commands import openmp as spinning

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
def test_threads_stay_awake_where_they_keep_nobody_waiting(
    command: str, load: str | None, count: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if load is not None:
        (tmp_path / "loadavg").write_text(load)
    monkeypatch.setattr(spinning, "_LOAD", tmp_path / "loadavg")
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that it is restored
    monkeypatch.delenv("GOMP_SPINCOUNT")
    spinning.set_spin_count([*command.split(), "train"])
    assert os.environ["GOMP_SPINCOUNT"] == count


def test_what_the_environment_says_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    spinning.set_spin_count(["generate"])
    assert os.environ["GOMP_SPINCOUNT"] == "7"
