"""The page shows the calculation of an attention weight, candidates and layer predictions."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from page_traces import HOSTILE, random_trace
from small_models import small_model
from watched_pages import OpenPage

from minigpt.config import SamplingConfig
from minigpt.text.escape import visible
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.tracing.analysis_config import AnalysisConfig
from minigpt.tracing.findings import Candidate, Lens, Trace, TraceStep
from minigpt.tracing.tracer import trace

pytestmark = pytest.mark.browser
Opened = Callable[..., OpenPage]


def number(text: str) -> float:
    return float(text.replace("\N{MINUS SIGN}", "-"))


def explained() -> tuple[Trace, list[torch.Tensor]]:
    """Return a trace with two explained heads, and the weights of all heads at each step."""
    dense: list[torch.Tensor] = []
    header, *steps, footer = trace(
        small_model("llama-grouped", vocab_size=257, context_length=32),
        BytesTokenizer(),
        list(b"to be or not"),
        SamplingConfig(max_new_tokens=6, seed=2),
        AnalysisConfig(explain="0.1,1.2", has_heads=True),
        seed=2,
        dense=lambda weights_LHS: dense.append(weights_LHS.clone()),
    )
    return Trace(header, tuple(s for s in steps if isinstance(s, TraceStep)), footer), dense


def test_the_shown_query_key_products_give_the_attention_weight(opened: Opened) -> None:
    made, dense = explained()
    page = opened(made)
    page.page.locator("#working summary").click()
    for step, layer, head, source in ((0, 0, 1, 3), (5, 1, 2, 0), (3, 1, 2, 14)):
        page.click(12 + step)
        page.page.locator("#grid [role=gridcell]").nth(layer * 4 + head).click()
        page.choose("working-source", str(source))
        expected = float(dense[step][layer, head, source])
        rows = page.page.locator("#working-terms tr").all()
        terms = np.array([[number(t) for t in r.locator("td").all_inner_texts()] for r in rows])
        query, key, product, value, weighted, output = terms.T
        scores = page.page.locator("#working-scores td.number").all_inner_texts()
        dot, score, power, total, weight = map(number, scores)
        # Each number is shown with four digits.
        np.testing.assert_allclose(product, query * key, rtol=2e-3, atol=1e-6)
        assert dot == pytest.approx(float(query @ key), abs=2e-3)
        assert score == pytest.approx(dot / math.sqrt(len(query)), abs=1e-3)
        assert weight == pytest.approx(power / total, rel=2e-3)
        assert weight == pytest.approx(expected, rel=2e-3)
        np.testing.assert_allclose(weighted, weight * value, rtol=3e-3, atol=1e-6)
        working = next(w for w in made.footer.workings if (w.layer, w.head) == (layer, head))
        row = dense[step][layer, head].numpy()
        np.testing.assert_allclose(output, row @ working.values_TD[: len(row)], atol=1e-3)
        page.page.locator("#grid [role=gridcell]").nth(layer * 4 + head).click()  # deselects it


def test_a_source_is_selected_by_its_table_row(opened: Opened) -> None:
    made, _ = explained()
    page = opened(made)
    page.click(16)
    row = page.page.locator("#sources tbody tr").nth(3)
    row.click()
    page.drawn()
    at = row.locator("td").first.inner_text()
    assert page.page.locator("#working-source").input_value() == at


def test_without_an_explained_head_no_calculation_is_shown(opened: Opened) -> None:
    page = opened(random_trace())
    assert not page.page.locator("#working-section").is_visible()
    made, _ = explained()
    page = opened(made)
    page.click(3)
    assert page.text("#working-note") == "This token has no row."


def with_choices(made: Trace, texts: list[str]) -> Trace:
    """Return the trace with candidates and a lens at its third step."""

    def candidate(i: int) -> Candidate:
        return Candidate(i, texts[i % len(texts)].encode(), math.log(0.5 / (i + 1)))

    step = made.steps[2]
    candidates = [candidate(i) for i in range(len(texts))]
    candidates[1] = replace(candidates[1], id=step.token.id)
    top = tuple((candidate(i), candidate(i + 1)) for i in range(3))
    lens = Lens(1, tuple(map(math.log, (0.01, 0.3, 0.5))), top)
    object.__setattr__(step, "candidates", tuple(candidates))
    object.__setattr__(step, "lens", lens)
    return made


def test_a_token_shows_its_candidates_and_the_predictions_after_each_layer(opened: Opened) -> None:
    page = opened(with_choices(random_trace(), [" king", " queen", "\n"]))
    page.click(8)
    rows = page.page.locator("#candidates tr").all()
    assert [row.locator("td").all_inner_texts() for row in rows] == [
        ["␣king", "50%", ""],
        ["␣queen", "25%", "this token"],
        ["\\n", "17%", ""],
    ]
    lens = [row.locator("th, td").all_inner_texts() for row in page.page.locator("#lens tr").all()]
    assert [row[:2] for row in lens] == [["2", "50%"], ["1", "30%"], ["0", "1.0%"]]
    assert "from layer 1 on" in page.text("#lens-note")
    page.click(9)
    for name in ("candidates", "lens"):
        assert not page.page.locator(f"#{name}-section").is_visible()


def test_hostile_candidates_are_shown_as_text(opened: Opened) -> None:
    page = opened(with_choices(random_trace(), list(HOSTILE)))
    page.click(8)
    shown = page.page.locator("#candidates .text").all_text_contents()
    assert shown == [visible(text.encode()) for text in HOSTILE]
    assert page.page.evaluate("window.pwned") is None
    assert page.page.locator("script").count() == 2
