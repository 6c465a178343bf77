"""Fixtures for the tests of model folders and run folders."""

import functools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_models import LAYOUTS, make_model
from run_steps import write_step
from transformers_models import KINDS, Pair

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.model_folder import read_model, write_model
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


@pytest.fixture(scope="session")
def transformers() -> Any:
    with warnings.catch_warnings():
        # Raised by its imports; warnings about our files are errors.
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers", reason="needs transformers as the oracle")


@pytest.fixture(scope="session")
def open_both(transformers: Any) -> Iterator[Callable[[str], Pair]]:
    """Return a function that saves a tiny random model with transformers and opens it in both."""
    transformers.logging.set_verbosity_error()

    with tempfile.TemporaryDirectory() as root:

        @functools.cache
        def open_kind(kind: str) -> Pair:
            settings = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2} | KINDS[kind]
            config = transformers.AutoConfig.for_model(**settings)
            theirs = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation="eager"
            )
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():  # no zero biases and no norms of one
                for parameter in theirs.parameters():
                    parameter.normal_(std=0.3, generator=generator)
            theirs.eval().save_pretrained(folder := Path(root) / kind)
            return Pair(folder, theirs, read_model(folder))

        yield open_kind


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, open_both: Callable[[str], Pair]) -> Pair:
    return open_both(request.param)
