"""Fixtures for a real browser that records all requests, messages and dialogs of a page."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from watched_pages import OpenPage

from minigpt.tracing.findings import Trace
from minigpt.tracing.views.page import to_html

# For the synthetic traces of those tests.
sys.path.append(str(Path(__file__).parents[1] / "tracing"))

_WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) =>
  window.violations.push(`${event.violatedDirective} ${event.blockedURI}`));
"""


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Start headless Chromium."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install playwright"
    )
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("needs a browser: chromium, chromium-browser or google-chrome")
    with playwright.sync_playwright() as driver:
        # --no-sandbox: root cannot use the sandbox, and the pages are our own.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Callable[..., OpenPage]]:
    """Return a function that opens a trace's page or HTML; fail on requests and reported errors."""
    opened_pages: list[tuple[Any, OpenPage, bool]] = []

    def open_page(trace: Trace | str, *, is_quiet: bool = True, **options: Any) -> OpenPage:
        file = tmp_path / f"page-{len(opened_pages)}.html"
        file.write_text(trace if isinstance(trace, str) else to_html(trace), encoding="utf-8")
        context = browser.new_context(**options)
        context.add_init_script(_WATCH)
        result = OpenPage(context.new_page(), file.as_uri())
        context.on("request", lambda request: result.requests.append(request.url))
        result.page.on("console", lambda message: result.messages.append(message.text))
        result.page.on("pageerror", lambda error: result.messages.append(str(error)))
        result.page.on("dialog", lambda dialog: (result.dialogs.append("!"), dialog.dismiss()))
        opened_pages.append((context, result, is_quiet))
        result.page.goto(result.url)
        result.page.locator("#token-title:not(:empty)").wait_for(state="attached")
        result.drawn()
        return result

    yield open_page
    for context, result, is_quiet in opened_pages:
        if is_quiet:
            assert [url for url in result.requests if not url.startswith("blob:")] == [result.url]
            assert result.messages == []
            assert result.dialogs == []
            assert result.page.evaluate("window.violations") == []
        context.close()
