"""The dense file holds every row of every head, and exists only when it is complete."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_models import random_tokens, small_model

from minigpt.config import SamplingConfig
from minigpt.errors import ResourceError
from minigpt.text.tokenizer import bytes_tokenizer
from minigpt.tracing.analysis.dense import writing_rows
from minigpt.tracing.recorder import RowRecorder
from minigpt.tracing.tracer import trace


def test_every_row_of_a_trace_comes_back(tmp_path: Path) -> None:
    model = small_model("llama-grouped", vocab_size=257)
    path = tmp_path / "rows.safetensors"
    prompt = list(b"to be")
    metadata = {"model": "runs/x"}
    with writing_rows(path, n_layer=2, n_head=4, metadata=metadata) as dense:
        events = list(
            trace(
                model,
                bytes_tokenizer(),
                prompt,
                SamplingConfig(max_new_tokens=7),
                seed=3,
                dense=dense,
            )
        )
        assert not path.exists()
    tensors = load_file(path)
    rows, offsets = tensors["rows"], tensors["offsets"].tolist()
    assert rows.shape == (sum(range(5, 12)), 2, 4)
    assert offsets == [0, 5, 11, 18, 26, 35, 45, 56]
    tokens = [*prompt, *(event.token.id for event in events[1:-1])]  # type: ignore[union-attr]
    recorder = RowRecorder(model)
    for i, (start, end) in enumerate(pairwise(offsets)):
        with torch.no_grad():
            model(torch.tensor([tokens[: 5 + i]]), recorder=recorder)
        expected = recorder.weights_LHS.permute(2, 0, 1)
        torch.testing.assert_close(rows[start:end], expected, rtol=1e-4, atol=1e-6)
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
    assert list(tmp_path.iterdir()) == [path]


def test_a_trace_without_steps_gives_an_empty_file(tmp_path: Path) -> None:
    with writing_rows(tmp_path / "rows", n_layer=1, n_head=1, metadata={}):
        pass
    tensors = load_file(tmp_path / "rows")
    assert tensors["rows"].shape == (0, 1, 1)
    assert tensors["offsets"].tolist() == [0]


def test_an_interrupted_file_is_removed(tmp_path: Path) -> None:
    def interrupted() -> None:
        with writing_rows(tmp_path / "rows", n_layer=1, n_head=1, metadata={}) as add:
            add(random_tokens(1, 1, 3).float())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    rows = writing_rows(tmp_path / "file" / "rows", n_layer=1, n_head=1, metadata={})
    with pytest.raises(ResourceError, match="Choose another name or folder"), rows:
        pass
