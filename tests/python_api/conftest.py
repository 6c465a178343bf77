"""A text to train on from Python."""

from pathlib import Path

import pytest


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a text file in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIGPT_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "book.txt"
    path.write_text("The king said: once upon a time.\n" * 90)
    return path
