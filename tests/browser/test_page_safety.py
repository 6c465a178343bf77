"""The page shows hostile text as text: it runs only its own script and loads nothing."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from page_traces import HOSTILE, random_trace
from watched_pages import OpenPage, assert_inert

from minigpt.text.escape import visible
from minigpt.tracing.findings import Trace
from minigpt.tracing.views.page import to_html
from minigpt.tracing.wrapping import one_line_label

pytestmark = pytest.mark.browser
Opened = Callable[..., OpenPage]


def exercise(page: OpenPage) -> str:
    """Use every control of the page; return the downloaded picture."""
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
    trace = random_trace(
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
    trace = random_trace(1, 1, texts=[text], **names)
    roles = tuple(
        tuple(replace(role, tag=text) for role in row) for row in trace.header.roles or ()
    )
    page = opened(Trace(replace(trace.header, roles=roles), trace.steps, trace.footer))
    page.page.locator("#about summary").click()
    page.page.locator("#grid [role=gridcell]").first.click()
    page.drawn()
    assert page.page.locator("#model").text_content() == one_line_label(text)
    assert one_line_label(text) in page.page.locator("#facts").text_content()
    assert page.page.locator("#grid .tag").first.text_content() == one_line_label(text)
    assert_nothing_ran(page)


def assert_nothing_ran(page: OpenPage) -> None:
    assert page.page.evaluate("window.pwned") is None
    assert page.page.url == page.url
    assert page.page.locator("script").count() == 2
    assert page.page.locator("img, iframe, svg, object, embed, form, a, link, base").count() == 0


def test_the_content_security_policy_blocks_unescaped_markup(opened: Opened) -> None:
    """An injected attack must be harmless with the policy, and work without it."""
    attack = "<img src=x: onerror=window.pwned=1><script>window.pwned=1</script>"
    page = to_html(random_trace()).replace("<main>", f"<main>{attack}")
    guarded = opened(page, is_quiet=False)
    assert guarded.page.evaluate("window.pwned") is None
    assert len(guarded.page.evaluate("window.violations")) >= 2
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert opened(bare, is_quiet=False).page.evaluate("window.pwned") == 1


def test_the_trusted_types_policy_refuses_html_from_text(opened: Opened) -> None:
    page = opened(random_trace(), is_quiet=False)
    with pytest.raises(Exception, match="TrustedHTML"):
        page.page.evaluate("() => { document.body.innerHTML = '<b>x</b>'; }")
