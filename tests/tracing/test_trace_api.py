"""The Python API of tracing."""

import html
import re
from pathlib import Path
from typing import Any

import pytest
from small_models import small_model

import minigpt
from minigpt.checkpoint.model_folder import write_model
from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError, DataError
from minigpt.text.tokenizer import BytesTokenizer
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


def test_minigpt_trace_returns_what_the_tracer_yields(folder: Path) -> None:
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
        # The weights lie elsewhere in memory, and so a product may sum in another order.
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


def test_a_notebook_shows_the_page_in_a_frame(folder: Path) -> None:
    shown = minigpt.trace(str(folder), '<b>"&', max_new_tokens=3, seed=1)
    assert isinstance(shown, Trace)
    frame = shown._repr_html_()
    found = re.fullmatch(r'<iframe srcdoc="([^"]*)" sandbox="allow-scripts [^>]*></iframe>', frame)
    assert found is not None
    assert html.unescape(found[1]) == to_html(shown)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"measure": "score"}, ConfigError, "unknown measure 'score'"),
        ({"heads": "9.9"}, ConfigError, "--heads 9.9 is out of range"),
        ({"num_samples": 2}, ConfigError, "a trace is of one sample"),
        ({"colour": 1}, ConfigError, "colour"),
        ({"n_sources": -1}, ConfigError, "n_sources must be at least 0"),
        ({"n_sources": 1.5}, ConfigError, "n_sources must be of type int"),
        ({"layers": 1}, ConfigError, "layers must be of type str"),
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


def test_a_model_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="Pass tokenizer, too"):
        minigpt.trace(small_model(), PROMPT)
