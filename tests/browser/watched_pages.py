"""An open page of the browser: its controls and contents."""

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from minigpt.tracing.findings import Row, Trace


@dataclass
class OpenPage:
    """An open page with its recorded requests, messages and dialogs."""

    page: Any
    url: str
    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def drawn(self) -> None:
        """Wait until pending changes are drawn."""
        self.page.evaluate("new Promise((r) => requestAnimationFrame(() => setTimeout(r)))")

    def click(self, position: int) -> None:
        self.page.locator(f"#token-{position}").click()
        self.drawn()

    def choose(self, name: str, value: str) -> None:
        self.page.locator(f"#{name}").select_option(value)
        self.drawn()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)
        self.drawn()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def levels(self) -> list[tuple[float, float]]:
        """Return the alpha of the shade and the height of the bar in px, for each token."""
        return [
            (alpha, height)
            for alpha, height in self.page.evaluate(
                """() => Array.from(document.querySelectorAll("#strip .token"), (cell) => [
                  Number(getComputedStyle(cell).backgroundColor.match(/[\\d.]+/g)[3] ?? 1),
                  cell.lastChild.getBoundingClientRect().height])"""
            )
        ]

    def current(self) -> int:
        return int(self.page.locator(".token.current").get_attribute("id").removeprefix("token-"))

    def pinned(self) -> list[int]:
        cells = self.page.locator("#strip .token.pinned").all()
        return [int(cell.get_attribute("id").removeprefix("token-")) for cell in cells]


def row_of(trace: Trace, position: int, measure: int = 0) -> Row:
    return trace.steps[position - len(trace.header.prompt)].rows[measure]


def whole_row(trace: Trace, position: int, measure: int = 0) -> list[float]:
    """Return the row of a generated token, with zeros from its position on."""
    shares = row_of(trace, position, measure).weights_S.tolist()
    return shares + [0.0] * (len(trace.tokens) - len(shares))


def assert_shaded(page: OpenPage, shares: Sequence[float], *, tolerance: float = 0.004) -> None:
    """Check that shade and bar show the root of the share, stored in 255 steps for single heads."""
    pinned = set(page.pinned())
    levels = page.levels()
    assert len(levels) == len(shares)
    for position, ((alpha, height), share) in enumerate(zip(levels, shares, strict=True)):
        level = math.sqrt(share)
        # The bar is laid out in 64ths of a pixel.
        assert height == pytest.approx(12 * level, abs=12 * tolerance + 0.04), position
        if position not in pinned:
            assert alpha == pytest.approx(0.95 * level, abs=tolerance + 0.004), position


def assert_inert(picture: str) -> None:
    """Check that the picture is well-formed and has only shapes and texts."""
    root = ElementTree.fromstring(picture)
    for node in root.iter():
        assert node.tag.removeprefix("{http://www.w3.org/2000/svg}") in {
            "svg",
            "title",
            "rect",
            "text",
        }
        assert not any(name.startswith("on") or "href" in name for name in node.attrib)
