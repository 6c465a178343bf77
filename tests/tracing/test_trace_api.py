"""The Python API of tracing."""

import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kept_attention import full_weights
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from small_models import small_model

import minigpt
from minigpt.checkpoint.model_folder import write_model
from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError, DataError
from minigpt.model.language_model import LanguageModel
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.tracing.analysis.reader import read_traces
from minigpt.tracing.analysis_config import AnalysisConfig
from minigpt.tracing.findings import Trace
from minigpt.tracing.tracer import trace
from minigpt.tracing.views.page import to_html

PROMPT = "to be or"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, small_model("llama-grouped", vocab_size=257), BytesTokenizer())
    return folder


def weights_of(model: LanguageModel, ids: list[int]) -> NDArray[np.float32]:
    """Attention weights of a full forward pass, (L, H, T, S)."""
    with torch.no_grad():
        return full_weights(model, torch.tensor([ids]))[:, 0].numpy()


def test_minigpt_trace_collects_the_events_of_the_tracer(folder: Path) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 6, "seed": 3}
    ours = minigpt.trace(str(folder), PROMPT, measure="both", heads="0.1", n_verified=1, **options)
    header, *steps, _ = trace(
        small_model("llama-grouped", vocab_size=257),
        BytesTokenizer(),
        list(PROMPT.encode()),
        SamplingConfig(**options),
        AnalysisConfig(measure="both", heads="0.1", n_verified=1, has_heads=True),
        seed=3,
        model_name=str(folder),
    )
    assert ours.header == header
    assert [s.token for s in ours.steps] == [s.token for s in steps]  # type: ignore[union-attr]
    assert [s.row.measure for s in ours.steps] == ["weight"] * 6
    for our, step in zip(ours.steps, steps, strict=True):
        # Other memory alignment of the weights may change the order of sums.
        assert [e.change for e in our.effects] == pytest.approx(
            [e.change for e in step.effects],  # type: ignore[union-attr]
            abs=1e-5,
        )
    assert ours.steps[0].row.heads is not None
    assert len(ours.tokens) == len(PROMPT) + 6


def test_a_loaded_model_is_traced_from_text_or_ids() -> None:
    model, tokenizer = small_model("gpt2", vocab_size=257), BytesTokenizer()
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 4, "seed": 1}
    by_text = minigpt.trace(model, PROMPT, **options)
    by_ids = minigpt.trace(model, list(PROMPT.encode()), **options)
    assert by_text.tokens == by_ids.tokens
    assert minigpt.trace(model, PROMPT, has_heads=False, **options).steps[0].row.heads is None


def test_a_notebook_shows_the_page_in_an_iframe(folder: Path) -> None:
    shown = minigpt.trace(str(folder), '<b>"&', max_new_tokens=3, seed=1)
    assert isinstance(shown, Trace)
    frame = shown._repr_html_()
    found = re.fullmatch(r'<iframe srcdoc="([^"]*)" sandbox="allow-scripts [^>]*></iframe>', frame)
    assert found is not None
    assert html.unescape(found[1]) == to_html(shown)


def test_dense_weights_are_those_of_a_full_forward() -> None:
    model, tokenizer = small_model("llama-grouped", vocab_size=257), BytesTokenizer()
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 5, "seed": 1}
    dense = minigpt.trace(model, PROMPT, dense=True, **options)
    expected = weights_of(model, [token.id for token in dense.tokens[:-1]])
    first = len(PROMPT) - 1  # position of the first query
    assert_allclose(dense.weights_LHTS, expected[:, :, first:], rtol=1e-4, atol=1e-6)
    mean_TS = dense.weights_LHTS.mean(axis=(0, 1))
    for step, row_S in zip(dense.steps, mean_TS, strict=True):
        assert_allclose(step.row.weights_S, row_S[: step.token.position], rtol=1e-4, atol=1e-6)
    alone = minigpt.trace(model, PROMPT, **options)
    assert [step.token for step in alone.steps] == [step.token for step in dense.steps]
    assert alone.dense == ()
    with pytest.raises(ConfigError, match="Trace with dense=True"):
        _ = alone.weights_LHTS


def test_dense_weights_of_a_prompt_are_its_lower_triangle() -> None:
    model, tokenizer = small_model("gpt2", vocab_size=257), BytesTokenizer()
    prompts = [PROMPT, PROMPT[:3]]
    options: dict[str, Any] = {"tokenizer": tokenizer, "dense": True, "heads": "1.0"}
    traces = minigpt.trace(model, prompts, max_new_tokens=0, **options)
    for dense, prompt in zip(traces, prompts, strict=True):
        n = len(prompt) - 1  # the last token predicts none of them
        expected = weights_of(model, list(prompt.encode()))[:, :, :n, :n]
        assert_allclose(dense.weights_LHTS, expected, rtol=1e-4, atol=1e-6)


def test_a_trace_can_be_saved_and_read_again(tmp_path: Path) -> None:
    model, tokenizer = small_model("gpt2", vocab_size=257), BytesTokenizer()
    ours = minigpt.trace(model, PROMPT, tokenizer=tokenizer, max_new_tokens=3, seed=1)
    path = tmp_path / "trace.jsonl"
    path.write_text(ours.to_jsonl())
    [read] = read_traces(path)
    assert read.to_jsonl() == ours.to_jsonl()
    assert read.text == ours.text


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_heads_are_given_as_lists_or_arrays(kind: Any) -> None:
    options = {"heads": kind([[0, 1], [1, 2]]), "layers": kind([0])}
    model, tokenizer = small_model("gpt2", vocab_size=257), BytesTokenizer()
    trace = minigpt.trace(model, PROMPT, tokenizer=tokenizer, max_new_tokens=1, **options)
    assert trace.header.selection.as_text() == "0.1"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"measure": "score"}, ConfigError, "unknown measure 'score'"),
        ({"heads": "9.9"}, ConfigError, "--heads 9.9 is out of range"),
        ({"num_samples": 2}, ConfigError, "num_samples must be 1 in a trace: it is 2"),
        ({"colour": 1}, ConfigError, "colour"),
        ({"n_sources": -1}, ConfigError, "n_sources must be at least 0"),
        ({"n_sources": 1.5}, ConfigError, "n_sources must be of type int: it is 1.5"),
        ({"n_verified": "each"}, ConfigError, "n_verified must be of type int or all: it is"),
        ({"layers": 1}, ConfigError, "layers must be of type str"),
        ({"measure": np.eye(2)}, ConfigError, r"it is array\(\[\[1\., 0\.\], \[0\., 1\.\]\]\)"),
        ({"overflow": "slide"}, ConfigError, "overflow slide"),
        ({"prompt": "x" * 99}, DataError, "the prompt has 99 tokens"),
    ],
    ids=str,
)
def test_invalid_options_are_refused(
    folder: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        minigpt.trace(str(folder), **({"prompt": PROMPT} | options))


@pytest.mark.parametrize("option", [{"verify_heads": "0.1"}, {"knockout": "value"}])
def test_settings_of_knockouts_without_knockouts_are_refused(
    option: dict[str, str], folder: Path
) -> None:
    with pytest.raises(ConfigError, match="has no effect without --n-verified"):
        minigpt.trace(str(folder), PROMPT, **option)


def test_a_model_whose_dropout_is_active_is_refused() -> None:
    model = small_model("llama-grouped", vocab_size=257, dropout=0.1).train()
    for function in (minigpt.generate, minigpt.trace):
        with pytest.raises(ConfigError, match=r"dropout of 0\.1 .* Call model\.eval\(\) first"):
            function(model, PROMPT, tokenizer=BytesTokenizer(), max_new_tokens=2)
    assert minigpt.trace(model.eval(), PROMPT, tokenizer=BytesTokenizer(), max_new_tokens=2).steps


def test_a_model_in_float64_is_refused() -> None:
    model = small_model("llama-grouped", vocab_size=257).double()
    with pytest.raises(ConfigError, match=r"in float64 .* Call model\.float\(\) first"):
        minigpt.trace(model, PROMPT, tokenizer=BytesTokenizer())


def test_a_model_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="Pass tokenizer as well"):
        minigpt.trace(small_model(), PROMPT)
