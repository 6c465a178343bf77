"""The page in a real browser: it shows the trace, runs only its own script and loads nothing.

pip install playwright; python -m pytest -m browser
"""

import math
import re
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from page_traces import HOSTILE, made_trace
from watched_pages import OpenPage

from minigpt.text.escape import visible
from minigpt.tracing.findings import HeadRows, Row, Trace
from minigpt.tracing.views.page import to_html
from minigpt.tracing.wrapping import one_line

pytestmark = pytest.mark.browser
Opened = Callable[..., OpenPage]

N_PROMPT = 6


def row_of(trace: Trace, position: int, measure: int = 0) -> Row:
    return trace.steps[position - len(trace.header.prompt)].rows[measure]


def heads_of(row: Row) -> HeadRows:
    assert row.heads is not None
    return row.heads


def whole_row(trace: Trace, position: int, measure: int = 0) -> list[float]:
    """The row of a generated token, with zeros from its position on."""
    shares = row_of(trace, position, measure).weights_S.tolist()
    return shares + [0.0] * (len(trace.tokens) - len(shares))


def head_row(trace: Trace, position: int, layer: int, head: int) -> list[float]:
    """The kept part of a head's row."""
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


def assert_shaded(page: OpenPage, shares: Sequence[float], *, tolerance: float = 0.004) -> None:
    """Shade and bar show the root of the share, which single heads store in 255 steps."""
    pinned = set(page.pinned())
    levels = page.levels()
    assert len(levels) == len(shares)
    for position, ((alpha, height), share) in enumerate(zip(levels, shares, strict=True)):
        level = math.sqrt(share)
        # The bar is laid out in 64ths of a pixel.
        assert height == pytest.approx(12 * level, abs=12 * tolerance + 0.04), position
        if position not in pinned:
            assert alpha == pytest.approx(0.95 * level, abs=tolerance + 0.004), position


def test_clicking_a_token_shades_what_it_attended_to(opened: Opened) -> None:
    trace = made_trace()
    page = opened(trace)
    for position in (6, 14, 10):
        page.click(position)
        assert page.pinned() == [position]
        assert_shaded(page, whole_row(trace, position))
        assert f"token {position} " in page.text("#token-title")


def test_the_second_measure_has_its_own_row(opened: Opened) -> None:
    trace = made_trace()
    page = opened(trace)
    page.click(10)
    page.choose("measure", "norm")
    assert_shaded(page, whole_row(trace, 10, measure=1))


@pytest.mark.parametrize("way", ["grid", "selects"])
def test_choosing_a_head_shades_by_its_row(way: str, opened: Opened) -> None:
    trace = made_trace()
    page = opened(trace)
    page.click(13)
    if way == "grid":
        page.page.locator("#grid [role=gridcell]").nth(2 * 4 + 1).click()
        page.drawn()
    else:
        page.choose("layer", "2")
        page.choose("head", "1")
    assert_shaded(page, head_row(trace, 13, 2, 1))
    listed = sum(head_row(trace, 13, 2, 1))
    match = re.search(r"head 2\.1: .*Listed: ([\d.]+) % of the row", page.text("#listed"))
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
    trace = made_trace()
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


def test_a_token_of_the_prompt_shows_who_attended_to_it(opened: Opened) -> None:
    trace = made_trace()
    page = opened(trace)
    page.click(3)
    expected = [0.0] * N_PROMPT + [float(step.row.weights_S[3]) for step in trace.steps]
    assert_shaded(page, expected)
    assert page.text("#token-title").startswith("Who attended to token 3")
    assert "have no row" in page.text("#token-facts")


def test_a_generated_token_shows_who_attended_to_it_when_asked(opened: Opened) -> None:
    trace = made_trace()
    page = opened(trace)
    page.click(9)
    page.choose("direction", "readers")
    later = [float(row_of(trace, position).weights_S[9]) for position in range(10, 15)]
    assert_shaded(page, [0.0] * 10 + later)
    page.page.locator("#grid [role=gridcell]").nth(5).click()
    page.drawn()
    later = [head_row(trace, position, 1, 1)[9] for position in range(10, 15)]
    assert_shaded(page, [0.0] * 10 + later)


def test_pointing_shades_until_a_token_is_pinned(opened: Opened) -> None:
    trace = made_trace()
    page = opened(trace)
    assert page.pinned() == []
    assert_shaded(page, whole_row(trace, 14))  # the last, to begin with

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


def test_the_keys_move_pin_and_unpin(opened: Opened) -> None:
    trace = made_trace()
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
    page = opened(made_trace(6, 60), viewport={"width": 420, "height": 900})
    page.click(30)
    boxes = {p: page.page.locator(f"#token-{p}").bounding_box() for p in range(66)}
    for key, sign in (("ArrowUp", -1), ("ArrowDown", 1)):
        before = boxes[page.current()]
        page.press(key)
        after = boxes[page.current()]
        assert sign * (after["y"] - before["y"]) == pytest.approx(before["height"] + 3, abs=1)
        assert abs(after["x"] - before["x"]) < before["width"] + after["width"]


def test_tab_reaches_every_part_and_arrow_keys_move_in_the_grid(opened: Opened) -> None:
    trace = made_trace()
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
    page = opened(made_trace())
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
    trace = made_trace(20, 9)
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
        assert float(weight.removesuffix(" %")) == pytest.approx(
            100 * weights[position], abs=0.06 if weights[position] < 0.09 else 0.6
        )
        assert float(norm.strip("<").removesuffix(" %")) == pytest.approx(
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
    assert f"{100 * step.probability:.0f} %" in facts


def test_the_grid_has_the_entropy_and_role_of_each_head(opened: Opened) -> None:
    trace = made_trace()
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
        # A 255th of the root of log2 13, and a digit.
        assert float(shown) == pytest.approx(bits, abs=0.08)
        assert tag == role.tag
        assert f"induction {100 * role.induction:.0f} %" in cell.get_attribute("title")


def test_the_grid_of_a_prompt_token_has_means_over_all_generated_tokens(
    opened: Opened,
) -> None:
    trace = made_trace()
    page = opened(trace)
    page.click(2)
    mean = np.mean([heads_of(step.row).entropy for step in trace.steps], axis=0)
    shown = page.page.locator("#grid .entropy").all_inner_texts()
    np.testing.assert_allclose([float(text) for text in shown], mean.flatten(), atol=0.06)


def test_the_page_says_what_a_trace_lacks(opened: Opened) -> None:
    trace = made_trace(has_heads=False, has_roles=False, has_effects=False, measures=("weight",))
    page = opened(trace)
    page.click(12)
    assert_shaded(page, whole_row(trace, 12))
    for name in ("layer", "head", "reduction"):
        assert page.page.locator(f"#{name}").is_disabled()
    assert "has no rows of single heads" in page.text("#no-heads")
    assert not page.page.locator("#grid").is_visible()
    assert not page.page.locator("#measure").is_visible()
    assert page.text("#role-legend") == "This trace has no roles of heads."
    assert page.page.locator("#sources th").all_inner_texts() == ["at", "token", "weight"]
    assert "says nothing about cause" in page.text("footer")


def test_roles_without_rows_of_heads_are_shown_but_select_nothing(opened: Opened) -> None:
    trace = made_trace(has_heads=False)
    page = opened(trace)
    page.click(12)
    page.page.locator("#grid [role=gridcell]").first.click()
    page.drawn()
    assert_shaded(page, whole_row(trace, 12))


def test_a_trace_interrupted_before_its_first_token_opens(opened: Opened) -> None:
    trace = made_trace()
    page = opened(Trace(trace.header, (), replace(trace.footer, n_tokens=0, finish=None)))
    page.click(2)
    assert_shaded(page, [0.0] * N_PROMPT)
    assert opened(made_trace(1, 1)).current() == 1


def exercise(page: OpenPage) -> str:
    """Use every control; return the downloaded picture."""
    page.click(0)
    page.click(4)
    page.press("ArrowLeft", "?", "Escape")
    page.page.locator("#about summary").click()
    page.page.locator("#grid [role=gridcell]").first.click()
    page.choose("direction", "readers")
    page.choose("reduction", "max")
    with page.page.expect_download() as download:
        page.page.locator("#download").click()
    page.drawn()
    return Path(download.value.path()).read_text(encoding="utf-8")


def test_hostile_tokens_are_shown_and_never_run(opened: Opened) -> None:
    trace = made_trace(
        len(HOSTILE) // 2, len(HOSTILE) - len(HOSTILE) // 2, texts=HOSTILE, model=" ".join(HOSTILE)
    )
    page = opened(trace)
    assert_inert(exercise(page))
    shown = page.page.locator("#strip .text").all_text_contents()
    assert shown == [visible(text.encode()) for text in HOSTILE]
    page.choose("direction", "sources")
    for position, text in enumerate(shown):
        page.page.evaluate("(id) => document.getElementById(id).click()", f"token-{position}")
        page.drawn()
        assert text in page.page.locator("#token-title").text_content()
    assert_nothing_ran(page)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_shown_and_never_run(text: str, opened: Opened) -> None:
    names = {"model": text, "dtype": text, "kernel": text, "model_sha256": text}
    trace = made_trace(1, 1, texts=[text], **names)
    roles = tuple(
        tuple(replace(role, tag=text) for role in row) for row in trace.header.roles or ()
    )
    page = opened(Trace(replace(trace.header, roles=roles), trace.steps, trace.footer))
    page.page.locator("#about summary").click()
    page.page.locator("#grid [role=gridcell]").first.click()
    page.drawn()
    assert page.page.locator("#model").text_content() == one_line(text)
    assert one_line(text) in page.page.locator("#facts").text_content()
    assert page.page.locator("#grid .tag").first.text_content() == one_line(text)
    assert_nothing_ran(page)


def assert_nothing_ran(page: OpenPage) -> None:
    assert page.page.evaluate("window.pwned") is None
    assert page.page.url == page.url
    assert page.page.locator("script").count() == 2
    assert page.page.locator("img, iframe, svg, object, embed, form, a, link, base").count() == 0


def test_the_policy_stops_markup_that_escaping_missed(opened: Opened) -> None:
    """A page with an attack in it: harmless with the policy, and detected without it."""
    attack = "<img src=x: onerror=window.pwned=1><script>window.pwned=1</script>"
    page = to_html(made_trace()).replace("<main>", f"<main>{attack}")
    guarded = opened(page, is_quiet=False)
    assert guarded.page.evaluate("window.pwned") is None
    assert len(guarded.page.evaluate("window.violations")) >= 2
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert opened(bare, is_quiet=False).page.evaluate("window.pwned") == 1


def test_the_policy_refuses_html_from_text(opened: Opened) -> None:
    page = opened(made_trace(), is_quiet=False)
    with pytest.raises(Exception, match="TrustedHTML"):
        page.page.evaluate("() => { document.body.innerHTML = '<b>x</b>'; }")


def assert_inert(picture: str) -> None:
    """It is well-formed and has only shapes and texts."""
    root = ElementTree.fromstring(picture)
    for node in root.iter():
        assert node.tag.removeprefix("{http://www.w3.org/2000/svg}") in {
            "svg",
            "title",
            "rect",
            "text",
        }
        assert not any(name.startswith("on") or "href" in name for name in node.attrib)


def test_the_downloaded_picture_shows_the_view(opened: Opened) -> None:
    trace = made_trace(texts=[" a<b", "&amp;", "\n"])
    page = opened(trace)
    page.click(12)
    with page.page.expect_download() as download:
        page.page.locator("#download").click()
    assert download.value.suggested_filename == "attention.svg"
    picture = Path(download.value.path()).read_text(encoding="utf-8")
    assert_inert(picture)
    svg = "{http://www.w3.org/2000/svg}"
    root = ElementTree.fromstring(picture)
    texts = [node.text for node in root.iter(f"{svg}text")]
    assert texts[0].startswith("runs/small. token 12 ")
    assert texts[1:] == [visible(token.data) for token in trace.tokens]
    boxes = list(root.iter(f"{svg}rect"))[1::2]
    for position, share in enumerate(whole_row(trace, 12)):
        if position != 12:
            opacity = float(boxes[position].get("fill-opacity"))
            assert opacity == pytest.approx(0.95 * math.sqrt(share), abs=0.008)


def luminance(colour: Sequence[float]) -> float:
    """Relative luminance of WCAG 2."""
    parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


COLOURS = """(selector) => {
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const style = getComputedStyle(document.querySelector(selector));
  return [numbers(style.color), [...numbers(style.backgroundColor), 1].slice(0, 4),
          numbers(getComputedStyle(document.body).backgroundColor)];
}"""


def test_dark_and_light_themes_have_enough_contrast(opened: Opened) -> None:
    papers = []
    for scheme in ("light", "dark"):
        page = opened(made_trace(), color_scheme=scheme)
        page.click(12)
        for selector in ("body", "#legend .sample:last-of-type", "#listed", "th", ".pinned"):
            ink, (*shade, alpha), paper = page.page.evaluate(COLOURS, selector)
            behind = [alpha * a + (1 - alpha) * b for a, b in zip(shade, paper, strict=True)]
            assert contrast(ink, behind) >= 4.5, (scheme, selector)  # WCAG 2, level AA
        papers.append(luminance(paper))
    assert papers[0] > 0.8
    assert papers[1] < 0.05


@pytest.mark.parametrize("width", [420, 1000, 1400])
def test_the_page_fits_its_window(width: int, opened: Opened) -> None:
    page = opened(
        made_trace(n_layer=12, n_head=12, texts=["x" * 300, "short"]),
        viewport={"width": width, "height": 800},
    )
    page.click(12)
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_thousand_tokens_stay_responsive(opened: Opened) -> None:
    trace = made_trace(24, 1000, n_layer=12, n_head=12, n_sources=8)
    started = time.perf_counter()
    page = opened(trace)
    assert time.perf_counter() - started < 15
    page.choose("reduction", "mean")
    milliseconds = page.page.evaluate(
        """async () => {
          const times = [];
          for (const position of [1023, 500, 1000, 3, 700]) {
            const start = performance.now();
            document.getElementById(`token-${position}`).click();
            await new Promise((r) => requestAnimationFrame(() => setTimeout(r)));
            times.push(performance.now() - start);
          }
          return times;
        }"""
    )
    # Fast enough to feel immediate, with a margin for a busy machine.
    assert sorted(milliseconds)[2] < 500
    page.choose("reduction", "traced")
    page.click(1000)
    assert_shaded(page, whole_row(trace, 1000))
