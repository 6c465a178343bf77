"""Take the screenshot of the HTML page in docs/tracing.md from a real trace.

    pip install playwright
    python docs/page_picture.py MODEL "PROMPT" [OUT]

Writes docs/trace-page.png, or OUT. Needs Chromium.
"""

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from playwright.sync_api import sync_playwright

import minigpt
from minigpt.tracing.views.page import to_html

SIZE = {"width": 1220, "height": 1130}
N_TOKENS, SEED = 60, 4
SHOWN = 18  # index of the generated token that is clicked


def screenshot(page: str, position: int, out: Path) -> None:
    """Open a page, click a token and save a screenshot."""
    browsers = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, browsers)))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "trace.html"
        file.write_text(page, encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        tab = browser.new_page(viewport=SIZE)
        tab.goto(file.as_uri())
        tab.locator(f"#token-{position}").click()
        tab.locator(".pinned").wait_for()
        tab.screenshot(path=out)
        browser.close()


def main() -> None:
    model, prompt, *out = sys.argv[1:4]
    options = {"max_new_tokens": N_TOKENS, "seed": SEED, "n_verified": 3, "roles": True}
    trace = minigpt.trace(model, prompt, device="cpu", dtype="float32", measure="both", **options)
    trace = replace(trace, header=replace(trace.header, model=Path(model).name))
    position = trace.steps[min(SHOWN, len(trace.steps) - 1)].token.position
    default = Path(__file__).parent / "trace-page.png"
    screenshot(to_html(trace), position, Path(out[0]) if out else default)


if __name__ == "__main__":
    main()
