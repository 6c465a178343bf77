"""Take the screenshots of the HTML page in docs/tracing.md from a real trace.

    pip install playwright
    python docs/page_picture.py [MODEL ["PROMPT"]]

Writes docs/trace-page.png, and the same page in dark colours and 390 pixels wide, with -dark,
-phone and -phone-dark in the name. The default is the model that ships. Needs Chromium.
"""

import io
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

import minigpt
from minigpt.tracing.views.page import to_html

FOLDER = Path(__file__).parent
SIZES = {"": (1280, 1130), "-phone": (390, 1600)}
THEMES = ("", "-dark")
N_TOKENS, SEED = 60, 2
SHOWN = 7  # index of the generated token that is clicked
N_COLOURS = 256


def screenshot(browser: Browser, page: Path, position: int, size: str, theme: str) -> Image.Image:
    """Open a page, click a token and return a screenshot."""
    width, height = SIZES[size]
    tab = browser.new_page(
        viewport={"width": width, "height": height}, color_scheme="dark" if theme else "light"
    )
    tab.goto(page.as_uri())
    tab.locator(f"#token-{position}").click()
    tab.locator(".pinned").wait_for()
    tab.wait_for_timeout(1000)  # the small maps are drawn one after the other
    tab.evaluate("scrollTo(0, 0)")
    picture = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
    tab.close()
    return picture.quantize(N_COLOURS, method=Image.Quantize.MAXCOVERAGE)


def main() -> None:
    model, prompt, *_ = [*sys.argv[1:], *("storyteller", "Once upon a time")[len(sys.argv) - 1 :]]
    trace = minigpt.trace(
        model,
        prompt,
        device="cpu",
        dtype="float32",
        measure="both",
        max_new_tokens=N_TOKENS,
        seed=SEED,
        n_verified=3,
        roles=True,
        lens=True,
        candidates=3,
    )
    trace = replace(trace, header=replace(trace.header, model=Path(model).name))
    position = trace.steps[min(SHOWN, len(trace.steps) - 1)].token.position
    browsers = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, browsers)))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = Path(folder) / "trace.html"
        page.write_text(to_html(trace), encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for size in SIZES:
            for theme in THEMES:
                out = FOLDER / f"trace-page{size}{theme}.png"
                screenshot(browser, page, position, size, theme).save(out, optimize=True)
        browser.close()


if __name__ == "__main__":
    main()
