"""A page in a browser: what tests do with it, and what it shows."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class OpenPage:
    """A page in the browser, and its requests, messages and dialogs."""

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
        """The alpha of the shade and the height of the bar in px, for each token."""
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
