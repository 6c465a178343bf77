"""A trace as one self-contained HTML page that loads nothing from the network or from files.

The page is assembled from the files of this folder. All text from a model or a prompt is escaped
here, and the page only sets it as text, never as HTML.
"""

import base64
import hashlib
import html
import json
from importlib.resources import files
from string import Template
from typing import Any

from minigpt.tracing.analysis_config import facts_of
from minigpt.tracing.findings import Trace
from minigpt.tracing.views import DEFAULTS, ViewOptions
from minigpt.tracing.views.page.data import page_data
from minigpt.tracing.wrapping import one_line_label

# Concatenated in this order into one script.
_SCRIPTS = (
    *("data.js", "rows.js", "strip.js", "copy.js", "map.js", "grid.js", "table.js"),
    *("choices.js", "working.js", "picture.js", "words.js", "page.js"),
)
_NOT_KNOCKED_OUT = "<code>--n-verified 2</code> shows what happens without a source."
_KNOCKED_OUT = "The column “without it” shows what happens without a source."


def show(trace: Trace, options: ViewOptions = DEFAULTS) -> bytes:
    """Return the page of the whole trace as an HTML file; options are ignored."""
    return to_html(trace).encode()


def to_html(trace: Trace) -> str:
    """Return a page that shows a trace in a browser, offline.

    Its content security policy allows only its own script and style, and forbids all requests.
    """
    style = _part("page.css")
    script = "\n".join(_part(name) for name in _SCRIPTS)
    policy = (
        "default-src 'none'",
        f"script-src {_hash(script)}",
        f"style-src {_hash(style)}",
        "base-uri 'none'",
        "form-action 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return Template(_part("page.html")).substitute(
        policy="; ".join(policy),
        title=html.escape(f"Attention trace of {one_line_label(trace.header.model)}"),
        style=style,
        script=script,
        caveat=html.escape(facts_of(trace.header.measures[0]).caveat),
        knockouts=_KNOCKED_OUT if trace.header.n_verified else _NOT_KNOCKED_OUT,
        data=embedded_json(page_data(trace)),
    )


def embedded_json(value: Any) -> str:
    """Return JSON with ``<``, ``>`` and ``&`` escaped, so that it cannot end its script element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII, U+2028 escaped
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _part(name: str) -> str:
    return (files(__name__) / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
