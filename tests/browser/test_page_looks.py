"""The picture, the colours and the sizes of the page in a real browser."""

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from page_traces import random_trace
from watched_pages import OpenPage, assert_inert, assert_shaded, whole_row

from minigpt.text.escape import visible

pytestmark = pytest.mark.browser
Opened = Callable[..., OpenPage]


def test_the_downloaded_picture_shows_the_view(opened: Opened) -> None:
    trace = random_trace(texts=[" a<b", "&amp;", "\n"])
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
    """Return the relative luminance defined by WCAG 2."""
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
        page = opened(random_trace(), color_scheme=scheme)
        page.click(12)
        for selector in ("body", "#legend .sample:last-of-type", "#listed", "th", ".pinned"):
            ink, (*shade, alpha), paper = page.page.evaluate(COLOURS, selector)
            behind = [alpha * a + (1 - alpha) * b for a, b in zip(shade, paper, strict=True)]
            assert contrast(ink, behind) >= 4.5, (scheme, selector)  # WCAG 2, level AA
        papers.append(luminance(paper))
    assert papers[0] > 0.8
    assert papers[1] < 0.05


def maps(page: OpenPage, **media: str) -> list[str]:
    """Return the large map and those of the heads as URLs, after a change of media features."""
    page.page.emulate_media(**media)
    page.drawn()
    page.page.wait_for_timeout(200)  # small maps are drawn in slices
    urls = "() => Array.from(document.querySelectorAll('canvas'), (one) => one.toDataURL())"
    return list(page.page.evaluate(urls))


def test_maps_follow_a_change_of_theme_and_paper_is_light(opened: Opened) -> None:
    light = maps(opened(random_trace(), color_scheme="light"))
    page = opened(random_trace(), color_scheme="dark")
    dark = maps(page)
    assert not set(light) & set(dark)
    assert maps(page, color_scheme="light") == light
    assert maps(page, color_scheme="dark") == dark
    assert maps(page, media="print")[1:] == light[1:]  # the large map is as wide as the paper


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_forced_colours_keep_the_bars(opened: Opened, scheme: str) -> None:
    page = opened(random_trace(), color_scheme=scheme).page
    style = "getComputedStyle(document.querySelector('{}')).{}"
    bars = [
        style.format("#strip .bar", "backgroundColor"),
        style.format("#sources .share", "backgroundImage"),
    ]
    usual = [page.evaluate(bar) for bar in bars]
    page.emulate_media(color_scheme=scheme, forced_colors="active")
    assert [page.evaluate(bar) for bar in bars] == usual


@pytest.mark.parametrize(("n_generated", "n_head"), [(1000, 30), (200, 128)])
def test_a_printed_page_has_all_tokens_and_heads_with_their_shades(
    n_generated: int, n_head: int, opened: Opened
) -> None:
    page = opened(random_trace(24, n_generated, n_layer=3, n_head=n_head)).page
    cut = """() => ["#strip", "#grid-frame", "#grid td:nth-child(4)"].filter((name) => {
      const box = document.querySelector(name);
      const rounding = name.includes("td") ? 1 : 0;
      const across = box.scrollWidth - box.clientWidth;
      return across > rounding || box.scrollHeight - box.clientHeight > rounding;
    })"""
    page.set_viewport_size({"width": 700, "height": 900})  # A4 in CSS pixels, without margins
    assert page.evaluate(cut) == ["#strip", "#grid-frame"]
    page.emulate_media(media="print")
    assert page.evaluate(cut) == []
    adjusted = "(name) => getComputedStyle(document.querySelector(name)).printColorAdjust"
    for name in ("#strip .token", "#strip .bar", "#sources .share", "#grid .entropy"):
        assert page.evaluate(adjusted, name) == "exact", name


@pytest.mark.parametrize("width", [420, 1000, 1400])
def test_the_page_fits_its_window(width: int, opened: Opened) -> None:
    page = opened(
        random_trace(n_layer=12, n_head=12, texts=["x" * 300, "short"]),
        viewport={"width": width, "height": 800},
    )
    page.click(12)
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [390, 1280])
def test_long_tokens_do_not_push_columns_out_of_the_table(width: int, opened: Opened) -> None:
    page = opened(random_trace(texts=["token-" * 9]), viewport={"width": width, "height": 800})
    page.click(12)
    panel = page.page.locator("#panel")
    assert panel.evaluate("(panel) => panel.scrollWidth <= panel.clientWidth")


def test_the_page_of_a_thousand_tokens_is_small(opened: Opened) -> None:
    trace = random_trace(24, 1000, n_layer=12, n_head=12, n_sources=8)
    page = opened(trace)
    page.choose("reduction", "mean")
    elements = "document.getElementsByTagName('*').length"
    n_elements = []
    for position in (1023, 500, 1000, 3, 700):
        page.click(position)
        n_elements.append(page.page.evaluate(elements))
    # Each click replaces the contents of the previous one.
    assert max(n_elements) < 5 * 1024
    page.choose("reduction", "traced")
    page.click(1000)
    assert_shaded(page, whole_row(trace, 1000))
