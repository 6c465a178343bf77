"""The page of a trace with knockouts of all positions, of predictions from the sources alone,
and of changed models."""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
from page_traces import random_trace
from small_models import small_model
from small_traces import small_trace
from watched_pages import OpenPage

import minigpt
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.tracing.findings import Trace

pytestmark = pytest.mark.browser
Opened = Callable[..., OpenPage]


def cell_changes(page: OpenPage) -> dict[int, float]:
    """Read the change of ln p of each position that the table lists."""
    cells = page.page.locator("#sources tbody tr").all()
    found = {}
    for row in cells:
        text = row.locator(".effect").inner_text().partition(" ")[0]
        found[int(row.get_attribute("data-position"))] = float(text.replace("\N{MINUS SIGN}", "-"))
    return found


@pytest.fixture(scope="module")
def verified() -> Trace:
    return small_trace(n_verified="all", has_heads=True)


def test_the_table_shows_the_exact_effect_of_every_listed_position(
    verified: Trace, opened: Opened
) -> None:
    page = opened(verified)
    for step in (verified.steps[0], verified.steps[-1]):
        page.click(step.token.position)
        assert step.changes_S is not None
        found = cell_changes(page)
        assert len(found) == 12  # the number of rows of the table
        for position, change in found.items():
            assert change == pytest.approx(step.changes_S[position], abs=0.0051)
        assert "control" not in page.text("#sources thead")
        assert "Its control" not in page.text("#knockout")


def test_exact_effects_can_shade_the_text_like_a_measure(verified: Trace, opened: Opened) -> None:
    page = opened(verified)
    largest = max(
        float(np.abs(s.changes_S).max()) for s in verified.steps if s.changes_S is not None
    )
    step = verified.steps[-2]
    assert step.changes_S is not None
    page.click(step.token.position)
    page.choose("measure", "knockout")
    kinds = page.page.evaluate(
        """() => Array.from(document.querySelectorAll("#strip .token"), (cell) =>
          [cell.classList.contains("plus"), cell.classList.contains("minus")])"""
    )
    heights = [height for _, height in page.levels()]
    for position, change in enumerate(step.changes_S.tolist()):
        assert heights[position] == pytest.approx(12 * math.sqrt(abs(change) / largest), abs=0.1)
        if abs(change) > 1e-4:  # without a position, a token that it promoted becomes less likely
            assert kinds[position] == [change < 0, change > 0]
    assert "decrease of ln p without each position" in page.text("#listed")
    order = list(cell_changes(page))
    expected = np.argsort(-np.abs(step.changes_S), kind="stable")[:12].tolist()
    assert order[:4] == expected[:4]
    page.page.locator("#grid [role=gridcell]").nth(1).click()  # heads have rows only of weights
    page.drawn()
    assert page.page.locator("#measure").input_value() == "weight"
    assert "weight of head 0.1" in page.text("#listed")


def test_exact_effects_of_a_prompt_token_are_those_on_later_tokens(
    verified: Trace, opened: Opened
) -> None:
    page = opened(verified)
    page.choose("measure", "knockout")
    page.click(3)
    largest = max(
        float(np.abs(s.changes_S).max()) for s in verified.steps if s.changes_S is not None
    )
    heights = [height for _, height in page.levels()]
    for step in verified.steps:
        assert step.changes_S is not None
        change = abs(float(step.changes_S[3]))
        expected = 12 * math.sqrt(change / largest)
        assert heights[step.token.position] == pytest.approx(expected, abs=0.1)


def test_the_page_reports_the_prediction_from_the_sources_alone(opened: Opened) -> None:
    trace = small_trace(n_verified=2, has_heads=True)
    page = opened(trace)
    for step in trace.steps[1:4]:
        page.click(step.token.position)
        assert step.kept is not None
        match = re.search(r"the sink alone: ln p (\S+) \(p . (\S+)\)", page.text("#knockout"))
        assert match
        assert float(match[1].replace("\N{MINUS SIGN}", "-")) == pytest.approx(
            step.kept.change, abs=0.0051
        )
        assert float(match[2]) == pytest.approx(math.exp(step.kept.change), rel=0.06)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ablate": "0.1,1.*"}, "The model was changed: heads 0.1,1.* set to 0."),
        (
            {"patch_from": "<b>by me n", "patch": "1.0", "patch_position": 2},
            "head 1.0 patched at position 2 from '<b>by me n'.",
        ),
    ],
    ids=str,
)
def test_the_page_of_a_changed_model_names_its_interventions(
    options: dict[str, object], says: str, opened: Opened
) -> None:
    trace = minigpt.trace(
        small_model("llama-grouped", vocab_size=257),
        "to be or n",
        tokenizer=BytesTokenizer(),
        max_new_tokens=3,
        seed=1,
        **options,
    )
    assert isinstance(trace, Trace)
    page = opened(trace)
    assert says in page.text("#changed")
    facts = page.page.locator("#facts").text_content()
    assert says.removeprefix("The model was changed: ").removesuffix(".") in facts


def test_the_page_of_an_unchanged_model_names_no_interventions(opened: Opened) -> None:
    assert not opened(random_trace()).page.locator("#changed").is_visible()
