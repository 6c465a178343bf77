"""How long OpenMP threads spin, by command and by the load of the machine."""

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
def test_threads_spin_long_only_for_decoding_on_an_idle_machine(
    command: str, load: str | None, count: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if load is not None:
        (tmp_path / "loadavg").write_text(load)
    monkeypatch.setattr(spinning, "_LOAD", tmp_path / "loadavg")
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that it is restored
    monkeypatch.delenv("GOMP_SPINCOUNT")
    spinning.set_spin_count([*command.split(), "train"])
    assert os.environ["GOMP_SPINCOUNT"] == count


def test_the_environment_takes_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    spinning.set_spin_count(["generate"])
    assert os.environ["GOMP_SPINCOUNT"] == "7"
