"""A trace as one self-contained HTML page that loads nothing from the network or from files.

The page is assembled from the files of this folder. All text from a model or a prompt is escaped
here, and the page only sets it as text, never as HTML. Arrays are packed into bytes.

Shapes: L layers, H query heads, S positions in view, K sources kept per row.
"""

import base64
import hashlib
import html
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.text.escape import printable, token_name
from minigpt.text.joined import JoinedTokens
from minigpt.tracing.analysis_config import facts_of
from minigpt.tracing.file import ROW_NUMBERS, WORKING_ARRAYS
from minigpt.tracing.findings import (
    Candidate,
    Roles,
    Row,
    Trace,
    TraceStep,
    shown_probability,
)
from minigpt.tracing.summary import footer_lines, measured
from minigpt.tracing.views import DEFAULTS, ViewOptions
from minigpt.tracing.views.page.facts import facts_about, knocked_out
from minigpt.tracing.wrapping import one_line

# Concatenated in this order into one script.
_SCRIPTS = (
    *("data.js", "rows.js", "strip.js", "copy.js", "map.js", "grid.js", "table.js"),
    *("choices.js", "working.js", "picture.js", "page.js"),
)
_DIGITS = 6  # as in a trace file
_NOT_KNOCKED_OUT = "<code>--n-verified 2</code> shows what happens without a source."
_KNOCKED_OUT = "The column “without it” shows what happens without a source."
_EFFECTS = "knockout"  # the exact effects of all positions, shown as another measure
_PLAIN = re.compile(rb"[ -~]*")  # bytes that are not also shown in hexadecimal
_NOISE = 1e-4  # a negative number smaller than this is rounding
_SMALLER = ("has a smaller number", "got less attention")
_HEAD_FACTS = ("sink", "own", "prompt", "entropy", "distance")
_SIGNED_FACTS = ("sink", "own", "prompt")  # in the unit of the measure
_ROLES = {
    "previous": "attends to the previous token;",
    "duplicate": "to an earlier occurrence of the same token;",
    "induction": "to the token after an earlier occurrence;",
    "sink": "to the first position;",
    "local": "to the last few tokens.",
}


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
        title=html.escape(f"Attention trace of {one_line(trace.header.model)}"),
        style=style,
        script=script,
        caveat=html.escape(facts_of(trace.header.measures[0]).caveat),
        knockouts=_KNOCKED_OUT if trace.header.n_verified else _NOT_KNOCKED_OUT,
        data=embedded_json(_page_data(trace)),
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


def _page_data(trace: Trace) -> dict[str, Any]:
    header, tokens = trace.header, trace.tokens
    scales = _scales(trace)
    heads = [row.heads for step in trace.steps for row in step.rows]
    n_kept = [-1 if rows is None else rows.positions.shape[2] for rows in heads]
    n_sources = max(n_kept) if n_kept and min(n_kept) >= 0 else None
    # Not wrapped: the browser does that.
    ending = footer_lines(trace.footer, header, 10_000, n_rows=len(trace.steps))
    closing = ["".join(text for text, _ in line) for line in ending if line]
    if trace.footer.cause is None:
        closing.append("Nothing was knocked out in this trace: it says nothing about causes.")
    return {
        "model": one_line(header.model),
        "facts": [(name, one_line(text)) for name, text in facts_about(trace)],
        "names": trace.joined.names,
        # A token that continues a character has no text of its own.
        "texts": [
            text or ("" if token.data else token_name(b""))
            for text, token in zip(trace.joined.texts, tokens, strict=True)
        ],
        "plain": JoinedTokens((token.data for token in tokens), escape=_plain).texts,
        "bytes": {t.position: t.data.hex(" ") for t in tokens if not _PLAIN.fullmatch(t.data)},
        "ids": [token.id for token in tokens],
        "lineEnds": [token.position for token in tokens if token.data.endswith(b"\n")],
        "nPrompt": len(header.prompt),
        # Position of the first token that has a row.
        "firstRow": trace.steps[0].token.position if trace.steps else len(header.prompt),
        "nLayer": header.n_layer,
        "nHead": header.n_head,
        "measures": list(header.measures),
        "choices": [*header.measures, *([_EFFECTS] if _EFFECTS in scales else [])],
        "traced": {measure: measured(header, [measure]) for measure in header.measures}
        | {_EFFECTS: "decrease of ln p without each position"},
        "changed": "" if header.intervention is None else one_line(str(header.intervention)),
        "sink": header.sink,
        "roles": header.roles and [[_role(role) for role in layer] for layer in header.roles],
        "roleMeanings": list(_ROLES.items()),
        "steps": [_step(step) for step in trace.steps],
        "nSources": n_sources,
        "knockout": f"Without it: {knocked_out(header)}. In brackets: the factor by which the "
        "token's probability changes."
        + f" Its control is a position nearby that {_SMALLER[header.measures[0] == 'weight']}."
        * (header.n_verified != "all"),
        "closing": closing,
        "scales": scales,
        "units": {measure: facts_of(measure).unit for measure in header.measures},
        "workings": [
            {name: getattr(one, name) for name in ("layer", "head", "scale", "window")}
            for one in trace.footer.workings
        ],
        "dHead": header.d_head,
        "packed": _pack(_arrays(trace, n_sources, scales) | _working_arrays(trace)),
    }


def _plain(data: bytes) -> str:
    """Return the text of a token for the clipboard, without escape codes for a terminal."""
    return printable(data.decode("utf-8", errors="replace"))


def _role(role: Roles) -> dict[str, Any]:
    scores = asdict(role)
    tag = scores.pop("tag")
    return {
        "tag": one_line(tag),
        "kind": next((name for name in _ROLES if tag and name.startswith(tag)), None),
        "scores": {name: round(value, 3) for name, value in scores.items()},
    }


def _step(step: TraceStep) -> dict[str, Any]:
    lens, controls = step.lens, {effect.control_of: effect for effect in step.effects}
    sources = [effect for effect in step.effects if effect.control_of is None]
    effects = [
        {
            "position": effect.source.token.position,
            "change": round(effect.change, _DIGITS),
            "control": (control := controls.get(i)) and control.source.token.position,
            "controlChange": control and round(control.change, _DIGITS),
        }
        for i, effect in enumerate(sources if step.changes_S is None else [])
    ]
    rows = [
        {
            **{name: round(float(getattr(row, name)), _DIGITS) for name in ROW_NUMBERS},
            "whole": None if row.whole is None else round(row.whole, _DIGITS),
            "parts": [(name, round(value, _DIGITS)) for name, value in row.parts.items()],
        }
        for row in step.rows
    ]
    return {
        "logProbability": round(step.log_probability, _DIGITS),
        "isGiven": step.is_given,
        "rows": rows,
        "effects": effects,
        "kept": step.kept and round(step.kept.change, _DIGITS),
        "candidates": [_candidate(one, step.token.id) for one in step.candidates],
        "lens": lens
        and {
            "layer": lens.layer,
            "probabilities": [*map(shown_probability, lens.log_probabilities)],
            "top": [[_candidate(one, step.token.id) for one in layer] for layer in lens.top],
        },
    }


def _candidate(candidate: Candidate, chosen: int) -> dict[str, Any]:
    return {
        "name": token_name(candidate.data),
        "probability": shown_probability(candidate.log_probability),
        "isChosen": candidate.id == chosen,
    }


def _arrays(
    trace: Trace, n_sources: int | None, scales: dict[str, float | None]
) -> dict[str, NDArray[Any]]:
    """Return each measure's full rows, and summaries of all heads' rows, as codes."""
    arrays: dict[str, NDArray[Any]] = {}
    for i, measure in enumerate(trace.header.measures):
        rows = [step.rows[i] for step in trace.steps]
        whole = np.concatenate([np.empty(0, np.float32), *(row.weights_S for row in rows)])
        arrays[f"{measure}.rows"] = _codes(whole, "<u2", scales[measure])
        if n_sources is not None:
            heads = _head_arrays(rows, n_sources, scales[measure])
            arrays |= {f"{measure}.{name}": array for name, array in heads.items()}
    if (scale := scales.get(_EFFECTS)) is not None:
        arrays[f"{_EFFECTS}.rows"] = _codes(-_changes(trace), "<u2", scale)
    return arrays


def _changes(trace: Trace) -> NDArray[np.float32]:
    """Return the changes of ln p of all steps, concatenated; empty if a step has none."""
    found = [step.changes_S for step in trace.steps if step.changes_S is not None]
    return np.concatenate(
        found if len(found) == len(trace.steps) > 0 else [np.empty(0, np.float32)]
    )


def _scales(trace: Trace) -> dict[str, float | None]:
    """Return the largest magnitude in each measure, or None for a measure in shares."""
    scales: dict[str, float | None] = {}
    for i, measure in enumerate(trace.header.measures):
        parts = [step.rows[i].weights_S for step in trace.steps]
        heads = [heads and heads.shown() for heads in (step.rows[i].heads for step in trace.steps)]
        facts = ("weights", *_SIGNED_FACTS)
        parts += [getattr(h, name) for h in heads if h is not None for name in facts]
        numbers = np.concatenate([np.zeros(1, np.float32), *(part.ravel() for part in parts)])
        numbers = _as_in_a_file(numbers)
        is_signed = facts_of(measure).is_signed or numbers.min() < -_NOISE
        scales[measure] = max(1e-9, float(np.abs(numbers).max())) if is_signed else None
    if (changes := _changes(trace)).size:
        scales[_EFFECTS] = max(1e-9, float(np.abs(_as_in_a_file(changes)).max()))
    return scales


def _working_arrays(trace: Trace) -> dict[str, NDArray[Any]]:
    """Return the queries, keys and values of explained heads, as the bits of float32 numbers."""
    return {
        f"working{i}.{name}": np.ascontiguousarray(getattr(working, field), "<f4").view("<u4")
        for i, working in enumerate(trace.footer.workings)
        for name, field in WORKING_ARRAYS.items()
    }


def _head_arrays(
    rows: Sequence[Row], n_sources: int, scale: float | None
) -> dict[str, NDArray[Any]]:
    heads = [row.heads.shown() for row in rows if row.heads is not None]

    def padded(name: str) -> NDArray[Any]:
        """Stack the arrays of all steps, padded because early steps have fewer than K sources."""
        arrays_LHK = [getattr(head_rows, name) for head_rows in heads]
        widths = [((0, 0), (0, 0), (0, n_sources - array.shape[2])) for array in arrays_LHK]
        return np.stack(list(map(np.pad, arrays_LHK, widths)))

    # Entropy and distance as shares of the largest possible value at each step.
    n_views = np.array([len(row.weights_S) for row in rows])[:, None, None]
    largest = {
        "entropy": np.maximum(np.log2(n_views), 1e-9),
        "distance": np.maximum(n_views - 1, 1),
    }
    arrays = {
        "positions": padded("positions").astype("<u2" if n_views.max() < 2**16 else "<u4"),
        "weights": _codes(padded("weights"), "u1", scale),
    }
    for name in _HEAD_FACTS:
        values = np.stack([getattr(head_rows, name) for head_rows in heads])
        values = values / largest.get(name, 1)
        arrays[name] = _codes(values, "u1", scale if name in _SIGNED_FACTS else None)
    return arrays


def _codes(values: NDArray[Any], dtype: str, scale: float | None) -> NDArray[Any]:
    """Encode numbers as unsigned integers: shares, or signed numbers if there is a scale."""
    values = _as_in_a_file(values)
    return share_codes(values, dtype) if scale is None else signed_codes(values / scale, dtype)


def _as_in_a_file(values: NDArray[Any]) -> NDArray[Any]:
    """Round numbers as in a trace file, so that a replay gives the same page."""
    return np.round(values.astype(np.float64), _DIGITS)


def signed_codes(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Encode numbers from -1 to 1 as unsigned integers, with finer steps for small numbers.

    With m the middle of the dtype's integers, a code c means (c - m) |c - m| / (m - 1)^2.
    """
    middle = (np.iinfo(dtype).max + 1) // 2
    clipped = np.clip(values, -1.0, 1.0, dtype=np.float64)
    roots = np.sign(clipped) * np.sqrt(np.abs(clipped))
    return (middle + np.rint(roots * (middle - 1))).astype(dtype)


def share_codes(shares: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Encode numbers from 0 to 1 as unsigned integers, with finer steps for small numbers.

    A code c means (c / m)^2, where m is the largest integer of the dtype.
    """
    largest = np.iinfo(dtype).max
    roots = np.sqrt(np.clip(shares, 0.0, 1.0, dtype=np.float64))
    return np.rint(roots * largest).astype(dtype)


def _pack(arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Encode unsigned integer arrays as text: all first bytes of an array, all second bytes, ...

    This places the zero bytes of small numbers next to each other, which compresses well.
    """
    planes = [
        np.ascontiguousarray(array).view(np.uint8).reshape(-1, array.itemsize).T.tobytes()
        for array in arrays.values()
    ]
    return {
        "arrays": [[name, array.itemsize, array.size] for name, array in arrays.items()],
        "deflated": base64.b64encode(zlib.compress(b"".join(planes))).decode("ascii"),
    }
