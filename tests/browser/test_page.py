"""The page in a real browser: contents and controls.

pip install playwright; python -m pytest -m browser
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from page_traces import random_trace
from watched_pages import OpenPage, assert_shaded, row_of, whole_row

from minigpt.tracing.findings import HeadRows, Row, Trace

pytestmark = pytest.mark.browser
Opened = Callable[..., OpenPage]

N_PROMPT = 6


def heads_of(row: Row) -> HeadRows:
    assert row.heads is not None
    return row.heads


def head_row(trace: Trace, position: int, layer: int, head: int) -> list[float]:
    """Return the stored part of a head's row."""
    heads = heads_of(row_of(trace, position))
    shares = [0.0] * len(trace.tokens)
    shares[trace.header.sink] += float(heads.sink[layer, head])
    kept = zip(
        heads.positions[layer, head].tolist(),
        heads.weights[layer, head].tolist(),
        strict=True,
    )
    for source, weight in kept:
        shares[source] += weight
    return shares


def test_clicking_a_token_shades_what_it_attended_to(opened: Opened) -> None:
    trace = random_trace()
    page = opened(trace)
    for position in (6, 14, 10):
        page.click(position)
        assert page.pinned() == [position]
        assert_shaded(page, whole_row(trace, position))
        assert f"token {position} " in page.text("#token-title")


def test_the_second_measure_shades_by_its_own_row(opened: Opened) -> None:
    trace = random_trace()
    page = opened(trace)
    page.click(10)
    page.choose("measure", "norm")
    assert_shaded(page, whole_row(trace, 10, measure=1))


@pytest.mark.parametrize("control", ["grid", "selects"])
def test_choosing_a_head_shades_by_its_row(control: str, opened: Opened) -> None:
    trace = random_trace()
    page = opened(trace)
    page.click(13)
    if control == "grid":
        page.page.locator("#grid [role=gridcell]").nth(2 * 4 + 1).click()
        page.drawn()
    else:
        page.choose("layer", "2")
        page.choose("head", "1")
    assert_shaded(page, head_row(trace, 13, 2, 1))
    listed = sum(head_row(trace, 13, 2, 1))
    match = re.search(r"head 2\.1: .*Listed: ([\d.]+)% of the row", page.text("#listed"))
    assert match
    assert float(match[1]) == pytest.approx(100 * listed, abs=1.2)
    assert page.page.locator("#layer").input_value() == "2"
    assert page.page.locator("#grid .chosen").count() == 1
    assert "at most" not in page.text("#listed")
    page.page.locator("#grid [role=gridcell].chosen").click()  # deselects it
    page.drawn()
    assert_shaded(page, whole_row(trace, 13))


@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize(("layer", "head"), [("1", ""), ("", "2"), ("", "")])
def test_several_heads_are_reduced_by_mean_or_max(
    layer: str, head: str, reduction: str, opened: Opened
) -> None:
    trace = random_trace()
    page = opened(trace)
    page.click(12)
    page.choose("reduction", reduction)
    page.choose("layer", layer)
    page.choose("head", head)
    rows = [
        head_row(trace, 12, a, b)
        for a in range(3)
        for b in range(4)
        if layer in ("", str(a)) and head in ("", str(b))
    ]
    expected = np.max(rows, axis=0) if reduction == "max" else np.mean(rows, axis=0)
    assert_shaded(page, expected.tolist(), tolerance=0.01)
    page.choose("reduction", "traced")
    assert_shaded(page, whole_row(trace, 12))
    assert "All positions are shaded" in page.text("#listed")


def test_the_numbers_of_several_heads_are_not_named_as_those_of_the_traced_row(
    opened: Opened,
) -> None:
    page = opened(random_trace())
    page.click(12)
    for measure, words in (
        ("weight", "mean of all heads"),
        ("norm", "mean of the shares in all heads"),
    ):
        page.choose("measure", measure)
        page.choose("reduction", "traced")
        assert re.search(r"; entropy [\d.]+ bits", page.text("#listed"))
        page.choose("reduction", "mean")
        assert page.text("#listed").startswith(f"{measure}, {words}: ")
        assert re.search(r"; mean entropy of the heads [\d.]+ bits", page.text("#listed"))
        page.choose("layer", "1")
        page.choose("head", "2")
        assert re.search(r"; entropy [\d.]+ bits", page.text("#listed"))
        page.choose("layer", "")
        page.choose("head", "")


def test_the_table_names_the_sink_and_the_position_of_the_query(opened: Opened) -> None:
    trace = random_trace()
    page = opened(trace)
    page.click(N_PROMPT)
    kinds = page.page.evaluate(
        """() => Object.fromEntries(Array.from(document.querySelectorAll("#sources .kind"),
          (kind) => [kind.closest("tr").dataset.position, kind.textContent]))"""
    )
    assert kinds == {str(trace.header.sink): "sink", str(N_PROMPT - 1): "query"}


def test_a_prompt_token_shows_the_tokens_that_attended_to_it(opened: Opened) -> None:
    trace = random_trace()
    page = opened(trace)
    page.click(3)
    expected = [0.0] * N_PROMPT + [float(step.row.weights_S[3]) for step in trace.steps]
    assert_shaded(page, expected)
    assert page.text("#token-title").startswith("Tokens that attended to token 3")
    assert "have no row" in page.text("#token-facts")


def test_a_generated_token_shows_the_tokens_that_attended_to_it_on_request(opened: Opened) -> None:
    trace = random_trace()
    page = opened(trace)
    page.click(9)
    page.choose("direction", "readers")
    later = [float(row_of(trace, position).weights_S[9]) for position in range(10, 15)]
    assert_shaded(page, [0.0] * 10 + later)
    page.page.locator("#grid [role=gridcell]").nth(5).click()
    page.drawn()
    later = [head_row(trace, position, 1, 1)[9] for position in range(10, 15)]
    assert_shaded(page, [0.0] * 10 + later)


def test_hovering_changes_the_shading_until_a_token_is_pinned(opened: Opened) -> None:
    trace = random_trace()
    page = opened(trace)
    assert page.pinned() == []
    assert_shaded(page, whole_row(trace, 14))  # the last token is selected initially

    def point(position: int) -> None:
        page.page.locator(f"#token-{position}").hover()
        page.drawn()

    point(8)
    assert_shaded(page, whole_row(trace, 8))
    page.click(11)
    point(8)
    assert_shaded(page, whole_row(trace, 11))
    page.press("Escape")
    assert page.pinned() == []
    point(9)
    assert_shaded(page, whole_row(trace, 9))


def test_keys_move_the_selection_pin_and_unpin(opened: Opened) -> None:
    trace = random_trace()
    page = opened(trace)
    page.click(10)
    for key, expected in (
        ("ArrowLeft", 9),
        ("ArrowRight", 10),
        ("End", 14),
        ("ArrowRight", 14),
        ("Home", 0),
        ("ArrowLeft", 0),
    ):
        page.press(key)
        assert page.pinned() == [page.current()] == [expected]
    page.press("End", "ArrowLeft")
    assert_shaded(page, whole_row(trace, 13))
    assert page.page.evaluate("document.activeElement.id") == "token-13"
    page.press("Escape")
    assert page.pinned() == []
    page.press("Enter")
    assert page.pinned() == [13]


def test_arrow_keys_move_to_the_lines_above_and_below(opened: Opened) -> None:
    page = opened(random_trace(6, 60), viewport={"width": 420, "height": 900})
    page.click(30)
    boxes = {p: page.page.locator(f"#token-{p}").bounding_box() for p in range(66)}
    for key, sign in (("ArrowUp", -1), ("ArrowDown", 1)):
        before = boxes[page.current()]
        page.press(key)
        after = boxes[page.current()]
        assert sign * (after["y"] - before["y"]) == pytest.approx(before["height"] + 3, abs=1)
        assert abs(after["x"] - before["x"]) < before["width"] + after["width"]


def test_tab_reaches_every_part_and_arrow_keys_move_in_the_grid(opened: Opened) -> None:
    trace = random_trace()
    page = opened(trace)
    page.page.locator("#about summary").focus()
    seen = []
    for _ in range(12):
        page.press("Tab")
        seen.append(
            page.page.evaluate(
                "document.activeElement.id || document.activeElement.getAttribute('role')"
            )
        )
    wanted = ["direction", "measure", "layer", "head", "reduction", "copy", "download"]
    assert seen[:8] == [*wanted, "help-button"]
    assert "token-14" in seen
    assert "gridcell" in seen
    while seen[-1] != "gridcell":
        page.press("Shift+Tab")
        seen.append(page.page.evaluate("document.activeElement.getAttribute('role')"))
    page.press("ArrowDown", "ArrowRight", "Enter")
    assert_shaded(page, head_row(trace, 14, 1, 1))
    outline = page.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_a_question_mark_shows_and_hides_the_help(opened: Opened) -> None:
    page = opened(random_trace())
    help_text = page.page.locator("#help")
    assert not help_text.is_visible()
    page.press("?")
    assert help_text.is_visible()
    assert "unpins" in help_text.inner_text()
    page.press("?")
    assert not help_text.is_visible()


def cells_of(page: OpenPage) -> list[list[str]]:
    rows = page.page.locator("#sources tbody tr").all()
    return [row.locator("td").all_inner_texts() for row in rows]


def test_the_table_has_weights_norms_and_knockout_effects(opened: Opened) -> None:
    trace = random_trace(20, 9)
    page = opened(trace)
    page.click(26)
    weights, norms = (row_of(trace, 26, measure).weights_S for measure in (0, 1))
    cells = {int(row[0]): row[1:] for row in cells_of(page)}
    positions = list(cells)
    order = np.argsort(-weights).tolist()
    assert positions[:12] == order[:12]
    step = trace.steps[6]
    sources = [effect for effect in step.effects if effect.control_of is None]
    assert {effect.source.token.position for effect in sources} <= set(positions)
    for position, (_, weight, norm, *_) in cells.items():
        assert float(weight.removesuffix("%")) == pytest.approx(
            100 * weights[position], abs=0.06 if weights[position] < 0.09 else 0.6
        )
        assert float(norm.strip("<").removesuffix("%")) == pytest.approx(
            100 * norms[position], abs=0.1 if norms[position] < 0.09 else 0.6
        )
    for i, effect in enumerate(sources):
        change, control = cells[effect.source.token.position][3:]
        assert change.startswith(f"\N{MINUS SIGN}{abs(effect.change):.2f} (p ")
        assert float(re.search(r"[\d.]+(?=\)$)", change)[0]) == pytest.approx(
            math.exp(effect.change), rel=0.1
        )
        matched = [e for e in step.effects if e.control_of == i]
        if matched:
            assert (
                f"{abs(matched[0].change):.2f} (at {matched[0].source.token.position})" in control
            )
        else:
            assert control == "none"
    facts = page.text("#token-facts")
    assert f"{100 * step.probability:.0f}%" in facts


def test_the_grid_has_the_entropy_and_role_of_each_head(opened: Opened) -> None:
    trace = random_trace()
    page = opened(trace)
    page.click(13)
    heads = heads_of(row_of(trace, 13))
    assert trace.header.roles is not None
    cells = page.page.locator("#grid [role=gridcell]").all()
    for cell, bits, role in zip(
        cells,
        heads.entropy.flatten().tolist(),
        [role for layer in trace.header.roles for role in layer],
        strict=True,
    ):
        shown, tag = cell.locator("span").all_inner_texts()
        # 1/255 of the root of log2 13, and rounding of the last digit.
        assert float(shown) == pytest.approx(bits, abs=0.08)
        assert tag == role.tag
        assert f"induction {100 * role.induction:.0f}%" in cell.get_attribute("title")


def test_the_grid_of_a_prompt_token_has_means_over_all_generated_tokens(
    opened: Opened,
) -> None:
    trace = random_trace()
    page = opened(trace)
    page.click(2)
    mean = np.mean([heads_of(step.row).entropy for step in trace.steps], axis=0)
    shown = page.page.locator("#grid .entropy").all_inner_texts()
    np.testing.assert_allclose([float(text) for text in shown], mean.flatten(), atol=0.06)


def test_the_page_reports_what_is_missing_in_a_trace(opened: Opened) -> None:
    trace = random_trace(has_heads=False, has_roles=False, has_effects=False, measures=("weight",))
    page = opened(trace)
    page.click(12)
    assert_shaded(page, whole_row(trace, 12))
    for name in ("layer", "head", "reduction"):
        assert page.page.locator(f"#{name}").is_disabled()
    assert "has no rows of single heads" in page.text("#no-heads")
    assert not page.page.locator("#grid").is_visible()
    assert not page.page.locator("#measure").is_visible()
    assert page.text("#role-legend") == "This trace has no head roles."
    assert page.page.locator("#sources th").all_inner_texts() == ["at", "token", "weight"]
    assert "says nothing about cause" in page.text("footer")


def test_roles_without_rows_of_heads_are_shown_but_not_selectable(opened: Opened) -> None:
    trace = random_trace(has_heads=False)
    page = opened(trace)
    page.click(12)
    page.page.locator("#grid [role=gridcell]").first.click()
    page.drawn()
    assert_shaded(page, whole_row(trace, 12))


def test_a_trace_interrupted_before_its_first_token_opens(opened: Opened) -> None:
    trace = random_trace()
    page = opened(Trace(trace.header, (), replace(trace.footer, n_tokens=0, finish=None)))
    page.click(2)
    assert_shaded(page, [0.0] * N_PROMPT)
    assert opened(random_trace(1, 1)).current() == 1
