"""The maps, signed colours and copied text of the page, in a real browser."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from page_traces import HOSTILE, random_trace
from small_traces import small_trace, with_tokens
from watched_pages import OpenPage

from minigpt.text.escape import printable
from minigpt.tracing.findings import Row, Trace

pytestmark = pytest.mark.browser
Opened = Callable[..., OpenPage]

PIXEL = """([x, y]) => {
  const canvas = document.getElementById("map");
  const ratio = canvas.width / canvas.clientWidth;
  const one = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  one.drawImage(canvas, x * ratio, y * ratio, 1, 1, 0, 0, 1, 1);
  return Array.from(one.getImageData(0, 0, 1, 1).data);
}"""


def cell_place(page: OpenPage, step: int, column: int) -> tuple[float, float]:
    """Return the centre of a cell in the canvas, whose size depends on the number of columns."""
    x, y = page.page.evaluate(
        """async ([step, column]) => {
          const shown = await readTrace();
          const width = document.getElementById("map-frame").clientWidth;
          const { left, cell } = layoutMap(shown, width, shown.steps.length);
          return [left + (column + 0.5) * cell, TOP + (step + 0.5) * cell];
        }""",
        [step, column],
    )
    return x, y


def colour(page: OpenPage, step: int, column: int) -> tuple[int, ...]:
    return tuple(page.page.evaluate(PIXEL, list(cell_place(page, step, column))))


def point(page: OpenPage, step: int, column: int) -> str:
    x, y = cell_place(page, step, column)
    page.page.locator("#map").hover(position={"x": x, "y": y})
    page.drawn()
    return page.text("#map-readout")


def signed_trace(n_prompt: int = 6, n_generated: int = 9) -> Trace:
    """Return a trace whose second measure has numbers of both signs and its own unit."""
    trace = random_trace(n_prompt, n_generated)
    random = np.random.default_rng(5)

    def signed(row: Row) -> Row:
        assert row.heads is not None
        weights_S = random.normal(0, 2, len(row.weights_S)).astype(np.float32)
        shape = row.heads.weights.shape
        heads = replace(row.heads, weights=random.normal(0, 1, shape).astype(np.float32))
        return replace(row, weights_S=weights_S, heads=heads)

    steps = tuple(replace(s, rows=(s.rows[0], signed(s.rows[1]))) for s in trace.steps)
    return replace(trace, steps=steps)


def test_the_map_has_a_line_for_each_generated_token(opened: Opened) -> None:
    trace = random_trace()
    page = opened(trace)
    for step, column in ((0, 0), (3, 5), (8, 13), (8, 0)):
        share = 100 * float(trace.steps[step].row.weights_S[column])
        readout = point(page, step, column)
        assert readout.startswith(
            f"token {6 + step} “␣t{6 + step}” to token {column} “␣t{column}”:"
        )
        shown = float(readout.split(": ")[1].strip("%<"))
        assert shown == pytest.approx(share, abs=0.06 if share < 9.9 else 0.51)
    page.page.mouse.move(0, 0)
    # Stronger attention has more colour, and its blue differs from the background's.
    row = trace.steps[8].row.weights_S
    blues = [colour(page, 8, column)[2] for column in np.argsort(-row)[:6].tolist()]
    assert blues == sorted(blues)
    # Tokens that did not exist yet are transparent.
    assert colour(page, 2, 12)[3] == 0


def test_clicking_the_map_selects_its_line(opened: Opened) -> None:
    page = opened(random_trace())
    x, y = cell_place(page, 4, 2)
    page.page.locator("#map").click(position={"x": x, "y": y})
    page.drawn()
    assert page.pinned() == [10]


def test_the_map_shows_the_selected_head(opened: Opened) -> None:
    trace = random_trace()
    page = opened(trace)
    page.page.locator("#grid [role=gridcell]").nth(2 * 4 + 1).click()
    page.drawn()
    heads = trace.steps[7].row.heads
    assert heads is not None
    column, weight = int(heads.positions[2, 1, 0]), float(heads.weights[2, 1, 0])
    shown = point(page, 7, column).split(": ")[1].strip("%<")
    assert float(shown) == pytest.approx(100 * weight, abs=1.5)
    assert "head 2.1" in page.text("#map-note")
    assert "5 strongest" in page.text("#map-note")


def test_each_head_has_a_thumbnail_map(opened: Opened) -> None:
    trace = random_trace()
    page = opened(trace)
    page.page.wait_for_function(
        "Array.from(document.querySelectorAll('#grid canvas')).every((c) => c.width > 1)"
    )
    heads = trace.steps[8].row.heads
    assert heads is not None
    for layer, head in ((0, 0), (2, 3)):
        pixels = page.page.evaluate(
            """(i) => {
              const canvas = document.querySelectorAll("#grid canvas")[i];
              const { width, height } = canvas;
              return Array.from(canvas.getContext("2d").getImageData(0, height - 1, width, 1).data);
            }""",
            layer * 4 + head,
        )
        blue = np.array(pixels).reshape(-1, 4)[:, 2]
        assert len(blue) == 14
        strongest = int(heads.positions[layer, head, 0])
        assert blue[strongest] == min(np.delete(blue, 0)), (
            "the strongest position but the sink must be the least blue"
        )


def test_a_signed_measure_has_two_colours_and_a_neutral_zero(opened: Opened) -> None:
    trace = signed_trace()
    page = opened(trace)
    page.click(14)
    page.choose("measure", "norm")
    row = trace.steps[8].rows[1].weights_S
    scale = max(float(np.abs(s.rows[1].weights_S).max()) for s in trace.steps)
    for position, value in enumerate(row.tolist()):
        cell = page.page.locator(f"#token-{position}")
        classes = (cell.get_attribute("class") or "").split()
        assert ("plus" in classes, "minus" in classes) == (value > 0, value < 0)
        height = cell.locator(".bar").bounding_box()["height"]
        assert height == pytest.approx(12 * abs(value / scale) ** 0.5, abs=0.1)
        sign = "+" if value > 0 else "\N{MINUS SIGN}"
        assert cell.get_attribute("title").startswith(f"{sign}{abs(value):.2f}"[:4])
    red, _, blue, _ = colour(page, 8, int(row[1:13].argmax()) + 1)
    assert blue > red
    red, _, blue, _ = colour(page, 8, int(row[1:13].argmin()) + 1)
    assert red > blue
    legend = page.text("#legend")
    assert f"\N{MINUS SIGN}{scale:.2f}" in legend
    assert f"+{scale:.2f}" in legend
    assert "0.00" in legend
    first = page.page.locator("#sources tbody tr").first.locator("td").all_inner_texts()
    assert int(first[0]) == int(np.abs(row).argmax()), "the table must begin with the largest value"
    page.choose("measure", "weight")
    assert page.page.locator("#strip .plus, #strip .minus").count() == 0


def copied(page: OpenPage) -> str:
    """Return the clipboard text of a copy event."""
    return page.page.evaluate(
        """() => {
          const data = new DataTransfer();
          const options = { clipboardData: data, bubbles: true, cancelable: true };
          const event = new ClipboardEvent("copy", options);
          document.activeElement.dispatchEvent(event);
          return data.getData("text/plain");
        }"""
    )


def test_signed_numbers_are_summed_over_heads_and_labelled_as_sums(opened: Opened) -> None:
    page = opened(random_trace(measures=("logit",)))
    page.click(13)
    rows = page.page.locator("#reduction option").all_inner_texts()
    assert rows == ["as traced", "sum of the heads"]
    page.choose("layer", "1")
    listed = page.text("#listed")
    assert "logit, sum of the heads of layer 1:" in listed
    assert "Listed: the sink and the 5 strongest sources of each head" in listed
    assert "%" not in listed, "logits are not shares of a row"


def test_complete_rows_of_heads_are_not_labelled_as_a_part(opened: Opened) -> None:
    page = opened(random_trace(6, 9, n_sources=13))
    page.click(13)
    page.choose("head", "1")
    assert "All positions are shaded" in page.text("#listed")
    assert "Only the sink" not in page.text("#map-note")


def test_copying_the_strip_gives_the_text(opened: Opened) -> None:
    texts = ["Once", " upon", "\n", "今日", "\t", "</script>", "\u202e", "\x00", "\x1b[31m"]
    trace = random_trace(4, 5, texts=texts)
    page = opened(trace)
    page.click(6)
    plain = [printable(text) for text in texts]
    assert copied(page) == "".join(plain)  # without a selection, everything is copied
    page.page.evaluate(
        """() => {
          const part = (i) => document.querySelector(`#token-${i} .text`).firstChild;
          document.getSelection().setBaseAndExtent(part(1), 0, part(4), 1);
        }"""
    )
    assert copied(page) == "".join(plain[1:5])
    page.page.evaluate("document.getSelection().selectAllChildren(document.getElementById('how'))")
    assert copied(page) == "", "outside the strip, copying must not be intercepted"


def test_a_character_of_several_tokens_is_shown_once_with_bytes_on_demand(opened: Opened) -> None:
    data = "今日は🙂".encode()
    made = small_trace("x" * 13, max_new_tokens=13, context_length=30, has_heads=True)
    page = opened(with_tokens(made, [bytes([byte]) for byte in data]))
    assert page.page.locator("#strip .text").all_text_contents() == [
        *["今", "", "", "日", "", "", "は", "", "", "🙂", "", "", ""] * 2
    ]
    page.click(24)
    assert "“⋯🙂”" in page.text("#token-title")
    assert page.page.locator("#token-4").get_attribute("title").endswith("bytes 97")
    assert "\\x" not in page.page.locator("main").inner_text()
    assert copied(page) == "今日は🙂今日は🙂"


def test_the_introduction_of_the_page_can_be_collapsed(opened: Opened) -> None:
    page = opened(random_trace())
    items = page.page.locator("#how li")
    assert items.count() == 4
    assert items.first.is_visible()
    page.page.locator("#how summary").click()
    assert not items.first.is_visible()


def test_hostile_tokens_in_the_map_are_shown_as_text(opened: Opened) -> None:
    page = opened(random_trace(4, len(HOSTILE), texts=HOSTILE))
    for step in range(0, len(HOSTILE), 5):
        assert f"token {4 + step} “" in point(page, step, 1)
    assert page.page.evaluate("window.pwned") is None
    assert page.page.locator("script").count() == 2


def test_a_map_of_a_thousand_tokens_reads_every_line(opened: Opened) -> None:
    trace = random_trace(24, 1000, n_layer=2, n_head=2, n_sources=8)
    page = opened(trace, viewport={"width": 1280, "height": 900})
    step = 900
    column = int(trace.steps[step].row.weights_S.argmax())
    x, y = cell_place(page, step, column)
    page.page.locator("#map").click(position={"x": x, "y": y})
    page.drawn()
    # Some tokens share a pixel.
    assert abs(page.pinned()[0] - (24 + step)) <= 2
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 1280
