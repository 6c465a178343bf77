"""Take the picture of the page from a real trace.

    pip install playwright
    python docs/page_picture.py MODEL "PROMPT" [OUT]

Writes docs/trace-page.png, or OUT. Needs Chromium.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from minigpt.commands.loading import load
from minigpt.commands.options import ModelSource
from minigpt.config import SamplingConfig
from minigpt.tracing.events import Trace, TraceFooter, TraceHeader, TraceStep
from minigpt.tracing.tracer import TraceConfig, trace
from minigpt.tracing.views.page import to_html

SIZE = {"width": 1220, "height": 1130}
N_TOKENS = 60
SHOWN = 18
SEED = 4


def traced(model: str, prompt: str) -> Trace:
    """Generate with all that a page can show."""
    ready = load(ModelSource(model=model, device="cpu", dtype="float32"), prompt)
    header, *steps, footer = trace(
        ready.model,
        ready.tokenizer,
        ready.prompt,
        SamplingConfig(max_new_tokens=N_TOKENS, seed=SEED),
        TraceConfig(measures=("weight", "norm"), has_heads=True, has_roles=True, n_verified=3),
        seed=SEED,
        model_name=Path(model).name,
    )
    assert isinstance(header, TraceHeader)
    assert isinstance(footer, TraceFooter)
    return Trace(header, tuple(step for step in steps if isinstance(step, TraceStep)), footer)


def take(page: str, position: int, out: Path) -> None:
    """Open a page, click a token, and take the picture."""
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
    result = traced(model, prompt)
    position = result.steps[min(SHOWN, len(result.steps) - 1)].token.position
    default = Path(__file__).parent / "trace-page.png"
    take(to_html(result), position, Path(out[0]) if out else default)


if __name__ == "__main__":
    main()
