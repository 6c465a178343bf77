"""The dense file contains every row of every head, and exists only when complete."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save
from safetensors.torch import load_file
from small_models import random_tokens, small_model

from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError, DataError, ResourceError
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.tracing.analysis.dense import with_rows_of, writing_rows
from minigpt.tracing.analysis.tally import rank_correlation
from minigpt.tracing.analysis_config import AnalysisConfig
from minigpt.tracing.findings import Trace, TraceFooter, TraceHeader, TraceStep
from minigpt.tracing.recorder import RowRecorder
from minigpt.tracing.tracer import trace


def test_every_row_of_a_trace_is_stored(tmp_path: Path) -> None:
    model = small_model("llama-grouped", vocab_size=257)
    path = tmp_path / "rows.safetensors"
    prompt = list(b"to be")
    metadata = {"model": "runs/x"}
    with writing_rows(path, n_layer=2, n_head=4, metadata=metadata) as dense:
        events = list(
            trace(
                model,
                BytesTokenizer(),
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


def traced_with_rows(path: Path, **config: Any) -> Trace:
    """Return a trace whose dense rows are written to ``path``."""
    model = small_model("llama-grouped", vocab_size=257, context_length=32)
    with writing_rows(path, n_layer=2, n_head=4, metadata={}) as add:
        header, *steps, footer = trace(
            model,
            BytesTokenizer(),
            list(b"to be or not"),
            SamplingConfig(max_new_tokens=7, seed=2),
            AnalysisConfig(has_heads=True, **config),
            seed=2,
            dense=add,
        )
    assert isinstance(header, TraceHeader)
    assert isinstance(footer, TraceFooter)
    return Trace(header, tuple(s for s in steps if isinstance(s, TraceStep)), footer)


@pytest.mark.parametrize(
    "config", [{}, {"heads": "1.2"}, {"layers": "0", "reduce": "max"}, {"heads": "0.1,1.*"}]
)
def test_rows_of_a_file_are_those_of_a_trace_with_other_options(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    traced_first = traced_with_rows(tmp_path / "rows", heads="0.0", measure="both")
    expected = traced_with_rows(tmp_path / "other", **config)
    found = with_rows_of(traced_first, tmp_path / "rows", AnalysisConfig(**config), n_kept=8)
    assert found.header.selection == expected.header.selection
    assert found.header.measures == ("weight",)
    errors = [one.footer.worst_row_sum_error for one in (found, expected)]
    assert errors == pytest.approx(
        [None, None] if config.get("reduce") == "max" else [0, 0], abs=1e-6
    )
    for one, other in zip(found.steps, expected.steps, strict=True):
        np.testing.assert_allclose(one.row.weights_S, other.row.weights_S, rtol=0, atol=1e-7)
        assert one.row.sources[0].token == other.row.sources[0].token
        assert one.row.entropy == pytest.approx(other.row.entropy, abs=1e-5)
        assert one.row.heads is not None
        assert other.row.heads is not None
        np.testing.assert_allclose(one.row.heads.weights, other.row.heads.weights, atol=1e-7)


@pytest.mark.parametrize("n_verified", [2, "all"])
def test_knockouts_are_paired_with_the_weights_of_the_new_rows(
    tmp_path: Path, n_verified: Any
) -> None:
    made = traced_with_rows(tmp_path / "rows", measure="logit", against="a", n_verified=n_verified)
    found = with_rows_of(made, tmp_path / "rows", AnalysisConfig(heads="1.2"), n_kept=8)
    assert found.header.against is None  # attention weights do not depend on the alternative token
    pairs = []
    for one, other in zip(made.steps, found.steps, strict=True):
        assert [e.change for e in one.effects] == [e.change for e in other.effects]
        for effect in other.effects:
            assert effect.source.weight == other.row.weights_S[effect.source.token.position]
        if other.changes_S is not None:
            pairs += list(zip(other.row.weights_S, abs(other.changes_S), strict=True))
        else:
            pairs += [(effect.source.weight, abs(effect.change)) for effect in other.effects]
    assert found.footer.cause is not None
    expected = rank_correlation(*zip(*pairs, strict=True))
    assert found.footer.cause.rank_correlation == pytest.approx(expected, abs=1e-12)


def test_complete_rows_of_heads_can_be_stored(tmp_path: Path) -> None:
    made = traced_with_rows(tmp_path / "rows")
    found = with_rows_of(made, tmp_path / "rows", AnalysisConfig(), n_kept=100)
    for step in found.steps:
        assert step.row.heads is not None
        sums = step.row.heads.weights.sum(axis=2) + step.row.heads.sink
        np.testing.assert_allclose(sums, 1, atol=1e-5)


def test_a_file_that_does_not_belong_to_the_trace_is_refused(tmp_path: Path) -> None:
    made = traced_with_rows(tmp_path / "rows")
    shorter = replace(made, steps=made.steps[:-1])
    with pytest.raises(DataError, match="another trace"):
        with_rows_of(shorter, tmp_path / "rows", AnalysisConfig(), n_kept=8)
    with pytest.raises(ConfigError, match="Use mean or max"):
        with_rows_of(made, tmp_path / "rows", AnalysisConfig(reduce="rollout"), n_kept=8)
    good = load_arrays(tmp_path / "rows")
    for name, damage in {
        "empty": b"",
        "text": b"{}",
        "other": save({"rows": good["rows"]}),
        "float64": save(good | {"rows": good["rows"].astype(np.float64)}),
        "nan": save(good | {"rows": good["rows"] * np.float32("nan")}),
        "negative": save(good | {"rows": -good["rows"]}),
        "offsets": save(good | {"offsets": good["offsets"] + 1}),
        "none": save(good | {"offsets": good["offsets"][:0]}),
    }.items():
        (tmp_path / name).write_bytes(damage)
        with pytest.raises(DataError, match=r"--dense|Trace again"):
            with_rows_of(made, tmp_path / name, AnalysisConfig(), n_kept=8)
    with pytest.raises(DataError, match="is not a file of --dense"):
        with_rows_of(made, tmp_path / "missing", AnalysisConfig(), n_kept=8)
