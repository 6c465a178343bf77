"""A trace as one HTML page that needs nothing else: no network, no other file.

The parts of the page lie in page/. What is said there in words is worded here, and every text of a
model or a prompt is made visible here; the page only ever sets it as text. Numbers of which there
is one for each position or head are packed into bytes.

Shapes: L layers, H query heads, S positions in view, K sources that are kept of a row.
"""

import base64
import hashlib
import html
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.config import SamplingConfig
from minigpt.text.escape import visible
from minigpt.tracing.events import (
    CONVENTION,
    HeadRows,
    Roles,
    Row,
    Trace,
    TraceFooter,
    TraceHeader,
    TraceStep,
)
from minigpt.tracing.lines import footer_lines
from minigpt.tracing.spans import one_line
from minigpt.tracing.words import KNOCKED_OUT, measured

# In this order they are one script.
_SCRIPTS = ("data.js", "rows.js", "strip.js", "grid.js", "table.js", "picture.js", "page.js")
_DIGITS = 5
_ROW_FACTS = ("total", "sink", "own", "prompt", "generated", "entropy", "distance")
_MEASURES = {
    "weight": "the softmax weight of a source",
    "norm": "the length of what the heads add to the stream on account of a source, weight x "
    "||v W_O|| (Kobayashi et al. 2020), as a share of the row",
}
_REDUCTIONS = {
    "mean": "at each position, the mean of the heads",
    "max": "at each position, the largest of the heads: a row does not sum to 1",
    "rollout": "attention followed down through the layers (Abnar & Zuidema 2020)",
}
_ROLES = {
    "previous": "looks at the token before;",
    "duplicate": "at the same token earlier;",
    "induction": "at what came after the same token earlier;",
    "sink": "at the first position;",
    "local": "at the few tokens before.",
}


def to_html(trace: Trace) -> str:
    """Return a page that shows a trace, in a browser, without a network.

    Its policy lets its own script and style run and nothing else, and nothing be fetched.
    """
    style = _part("page.css")
    script = "\n".join(_part(name) for name in _SCRIPTS)
    return Template(_part("page.html")).substitute(
        policy=_policy(script, style),
        title=html.escape(f"Attention trace of {one_line(trace.header.model)}"),
        style=style,
        script=script,
        data=embedded_json(_page_data(trace)),
    )


def embedded_json(value: Any) -> str:
    """Return JSON that may stand in a script element: no character of it can end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII, U+2028 escaped
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def pack(arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Return arrays of unsigned integers as text: their first bytes, their second bytes, ...

    So that the zeros of small numbers lie together and deflate to nothing.
    """
    planes = [
        np.ascontiguousarray(array).view(np.uint8).reshape(-1, array.itemsize).T.tobytes()
        for array in arrays.values()
    ]
    return {
        "arrays": [[name, array.itemsize, array.size] for name, array in arrays.items()],
        "deflated": base64.b64encode(zlib.compress(b"".join(planes))).decode("ascii"),
    }


def share_codes(shares: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Return numbers from 0 to 1 as unsigned integers, finest where the numbers are small.

    A code c of at most m stands for (c / m)^2.
    """
    largest = np.iinfo(dtype).max
    roots = np.sqrt(np.clip(shares, 0.0, 1.0, dtype=np.float64))
    return np.rint(roots * largest).astype(dtype)


def _part(name: str) -> str:
    return (files("minigpt.tracing") / "page" / name).read_text(encoding="utf-8")


def _policy(script: str, style: str) -> str:
    def sha256(text: str) -> str:
        digest = hashlib.sha256(text.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"

    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {sha256(script)}",
            f"style-src {sha256(style)}",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _page_data(trace: Trace) -> dict[str, Any]:
    header = trace.header
    tokens = trace.tokens
    return {
        "model": one_line(header.model),
        "facts": _facts(header, trace.footer),
        "tokens": [visible(token.data) or "∅" for token in tokens],
        "ids": [token.id for token in tokens],
        "lineEnds": [token.position for token in tokens if token.data.endswith(b"\n")],
        "nPrompt": len(header.prompt),
        "nLayer": header.n_layer,
        "nHead": header.n_head,
        "measures": list(header.measures),
        "traced": {measure: measured(header, [measure]) for measure in header.measures},
        "sink": header.sink,
        "roles": header.roles and [[_role(role) for role in layer] for layer in header.roles],
        "roleMeanings": list(_ROLES.items()),
        "steps": [_step(step) for step in trace.steps],
        "nSources": _n_head_sources(trace),
        "knockout": _knockout_text(header),
        "closing": _closing(trace.footer),
        "packed": pack(_arrays(trace)),
    }


def _facts(header: TraceHeader, footer: TraceFooter) -> list[tuple[str, str]]:
    kv_heads = "" if header.n_kv_head == header.n_head else f" ({header.n_kv_head} key/value heads)"
    facts = [
        ("model", header.model),
        (
            "size",
            f"{header.n_layer} layers x {header.n_head} heads{kv_heads}, {header.d_model} wide",
        ),
        ("rows", measured(header)),
        *((measure, _MEASURES[measure]) for measure in header.measures),
        (header.reduce, _REDUCTIONS[header.reduce]),
        ("sink", f"position {header.sink}, {header.sink_rule}"),
        ("tokens", f"{len(header.prompt)} of the prompt, {footer.n_tokens} generated"),
        ("seed", str(header.seed)),
        ("sampling", _sampling_text(header.sampling)),
        ("dtype", header.dtype),
        ("kernel", header.kernel),
        ("convention", CONVENTION),
    ]
    if header.model_sha256 is not None:
        facts.append(("sha256", header.model_sha256))
    return [(name, one_line(text)) for name, text in facts]


def _sampling_text(sampling: SamplingConfig) -> str:
    """Return the temperature, and what is not as it is by itself."""
    usual = asdict(SamplingConfig(seed=sampling.seed))
    return ", ".join(
        f"{name} {value}"
        for name, value in asdict(sampling).items()
        if name == "temperature" or value != usual[name]
    )


def _role(role: Roles) -> dict[str, Any]:
    scores = asdict(role)
    tag = scores.pop("tag")
    return {
        "tag": one_line(tag),
        "kind": next((name for name in _ROLES if tag and name.startswith(tag)), None),
        "scores": {name: round(value, 3) for name, value in scores.items()},
    }


def _step(step: TraceStep) -> dict[str, Any]:
    controls = {effect.control_of: effect for effect in step.effects}
    sources = [effect for effect in step.effects if effect.control_of is None]
    return {
        "logProbability": round(step.log_probability, _DIGITS),
        "rows": [
            {name: round(float(getattr(row, name)), _DIGITS) for name in _ROW_FACTS}
            for row in step.rows
        ],
        "effects": [
            {
                "position": effect.source.token.position,
                "change": round(effect.change, _DIGITS),
                "control": controls[i].source.token.position if i in controls else None,
                "controlChange": round(controls[i].change, _DIGITS) if i in controls else None,
            }
            for i, effect in enumerate(sources)
        ],
    }


def _knockout_text(header: TraceHeader) -> str:
    return (
        f"Without it: {KNOCKED_OUT[header.knockout]}. In brackets, what the token's probability is "
        "multiplied by. Its control is a position nearby that got less attention."
    )


def _closing(footer: TraceFooter) -> list[str]:
    """Say how it ended, and what its checks found."""
    whole = 10_000  # the page breaks lines itself
    sentences = ["".join(text for text, _ in line) for line in footer_lines(footer, whole) if line]
    if footer.cause is None:
        sentences.append("Nothing was knocked out in this trace: it says nothing about cause.")
    return sentences


def _arrays(trace: Trace) -> dict[str, NDArray[Any]]:
    """Return what is packed: each measure's whole rows, and each head's rows in brief."""
    arrays: dict[str, NDArray[Any]] = {}
    n_sources = _n_head_sources(trace)
    for i, measure in enumerate(trace.header.measures):
        rows = [step.rows[i] for step in trace.steps]
        whole = np.concatenate([np.empty(0, np.float32), *(row.weights_S for row in rows)])
        arrays[f"{measure}.rows"] = share_codes(whole, "<u2")
        if n_sources is not None:
            heads = _head_arrays(rows, n_sources)
            arrays |= {f"{measure}.{name}": array for name, array in heads.items()}
    return arrays


def _n_head_sources(trace: Trace) -> int | None:
    """Return how many sources are kept of a head's row; None if there are no heads' rows."""
    heads = [row.heads for step in trace.steps for row in step.rows]
    kept = [rows.positions_LHK.shape[2] for rows in heads if rows is not None]
    return max(kept) if kept and len(kept) == len(heads) else None


def _head_arrays(rows: Sequence[Row], n_sources: int) -> dict[str, NDArray[Any]]:
    heads = [row.heads for row in rows if row.heads is not None]
    # Entropy and distance as parts of the most that they can be at their step.
    n_views = np.array([len(row.weights_S) for row in rows])[:, None, None]
    most_bits = np.maximum(np.log2(n_views), 1e-9)
    farthest = np.maximum(n_views - 1, 1)
    return {
        "positions": _padded((rows.positions_LHK for rows in heads), n_sources).astype("<u4"),
        "weights": share_codes(_padded((rows.weights_LHK for rows in heads), n_sources), "u1"),
        "sink": share_codes(_stacked(heads, "sink_LH"), "u1"),
        "own": share_codes(_stacked(heads, "own_LH"), "u1"),
        "prompt": share_codes(_stacked(heads, "prompt_LH"), "u1"),
        "entropy": share_codes(_stacked(heads, "entropy_LH") / most_bits, "u1"),
        "distance": share_codes(_stacked(heads, "distance_LH") / farthest, "u1"),
    }


def _stacked(heads: Sequence[HeadRows], name: str) -> NDArray[Any]:
    return np.stack([getattr(rows, name) for rows in heads])


def _padded(arrays_LHK: Iterable[NDArray[Any]], n_sources: int) -> NDArray[Any]:
    """Stack arrays whose last axis is shorter where fewer positions were in view."""
    return np.stack(
        [np.pad(array, ((0, 0), (0, 0), (0, n_sources - array.shape[2]))) for array in arrays_LHK]
    )
