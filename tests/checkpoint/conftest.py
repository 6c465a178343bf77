"""Fixtures for the tests of model folders and run folders."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from layout_models import LAYOUTS, make_model
from run_steps import write_step

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.model_folder import write_model
from minigpt.model.gpt import GPT
from minigpt.text.tokenizer import BytesTokenizer


@pytest.fixture(params=LAYOUTS)
def model(request: pytest.FixtureRequest) -> GPT:
    return make_model(259, request.param)


@pytest.fixture
def make() -> Callable[[int, str], GPT]:
    return make_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the model folder of an untied byte-level GPT-2."""
    write_model(tmp_path, make_model(257, "gpt2-untied"), BytesTokenizer())
    return tmp_path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """Return a run of two steps, the second one better. fsync is skipped to save time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    run = RunFolder(tmp_path / "runs" / "tales")
    with run.lock():
        write_step(run, 1, val_loss=2.0)
        write_step(run, 2, val_loss=1.5)
    return run
