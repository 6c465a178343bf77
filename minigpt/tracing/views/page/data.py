"""The data of a trace that its page shows, as JSON; data.js and rows.js read it.

Numbers are rounded as in a trace file, so that a replay gives the same page.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from minigpt.text.escape import printable, token_name
from minigpt.text.joined import JoinedTokens
from minigpt.tracing.analysis_config import facts_of
from minigpt.tracing.config import DIGITS
from minigpt.tracing.file import ROW_NUMBERS
from minigpt.tracing.findings import (
    Candidate,
    Effect,
    Lens,
    Roles,
    Row,
    Trace,
    TraceStep,
    shown_probability,
)
from minigpt.tracing.summary import footer_lines, measured
from minigpt.tracing.views.page.arrays import EFFECTS, count_sources, find_scales, pack
from minigpt.tracing.views.page.facts import facts_about, knocked_out
from minigpt.tracing.wrapping import one_line_label

_PLAIN = re.compile(rb"[ -~]*")  # bytes that are not also shown in hexadecimal
_ROLES = {
    "previous": "attends to the previous token;",
    "duplicate": "to an earlier occurrence of the same token;",
    "induction": "to the token after an earlier occurrence;",
    "sink": "to the first position;",
    "local": "to the last few tokens.",
}


def page_data(trace: Trace) -> dict[str, Any]:
    """Return all that the page shows of a trace, as values for JSON."""
    header = trace.header
    scales, n_sources = find_scales(trace), count_sources(trace)
    effects = [EFFECTS] if EFFECTS in scales else []
    roles = header.roles
    return {
        "model": one_line_label(header.model),
        "facts": [(name, one_line_label(text)) for name, text in facts_about(trace)],
        "changed": "" if header.intervention is None else one_line_label(str(header.intervention)),
        "closing": _closing(trace),
        "nLayer": header.n_layer,
        "nHead": header.n_head,
        "dHead": header.d_head,
        "sink": header.sink,
        **_tokens(trace),
        # Position of the first token that has a row.
        "firstRow": trace.steps[0].token.position if trace.steps else len(header.prompt),
        "measures": header.measures,
        "choices": [*header.measures, *effects],
        "units": {measure: facts_of(measure).unit for measure in header.measures},
        "traced": {measure: measured(header, [measure]) for measure in header.measures}
        | {EFFECTS: "decrease of ln p without each position"},
        "knockout": _knockout(trace),
        "roles": roles and [[_role(role) for role in layer] for layer in roles],
        "roleMeanings": list(_ROLES.items()),
        "workings": [
            {name: getattr(one, name) for name in ("layer", "head", "scale", "window")}
            for one in trace.footer.workings
        ],
        "steps": [_step(step) for step in trace.steps],
        "nSources": n_sources,
        "scales": scales,
        "packed": pack(trace, n_sources, scales),
    }


def _tokens(trace: Trace) -> dict[str, Any]:
    tokens, joined = trace.tokens, trace.joined
    return {
        "nPrompt": len(trace.header.prompt),
        "names": joined.names,
        # A token that continues a character has no text of its own.
        "texts": [
            text or ("" if token.data else token_name(b""))
            for text, token in zip(joined.texts, tokens, strict=True)
        ],
        "plain": JoinedTokens((token.data for token in tokens), escape=_plain).texts,
        "bytes": {t.position: t.data.hex(" ") for t in tokens if not _PLAIN.fullmatch(t.data)},
        "lineEnds": [token.position for token in tokens if token.data.endswith(b"\n")],
    }


def _plain(data: bytes) -> str:
    """Return the text of a token for the clipboard, without escape codes for a terminal."""
    return printable(data.decode("utf-8", errors="replace"))


def _closing(trace: Trace) -> list[str]:
    """Return the sentences below a trace in the terminal, not wrapped: the browser does that."""
    lines = footer_lines(trace.footer, trace.header, 10_000, n_rows=len(trace.steps))
    closing = ["".join(text for text, _ in line) for line in lines if line]
    if trace.footer.cause is None:
        closing.append("Nothing was knocked out in this trace: it says nothing about causes.")
    return closing


def _knockout(trace: Trace) -> str:
    """Explain the column of effects."""
    header = trace.header
    text = (
        f"Without it: {knocked_out(header)}. In brackets: the factor by which the token's "
        "probability changes."
    )
    if header.n_verified != "all":
        smaller = "got less attention" if header.measures[0] == "weight" else "has a smaller number"
        text += f" Its control is a position nearby that {smaller}."
    return text


def _role(role: Roles) -> dict[str, Any]:
    scores = asdict(role)
    tag = scores.pop("tag")
    return {
        "tag": one_line_label(tag),
        "kind": next((name for name in _ROLES if tag and name.startswith(tag)), None),
        "scores": {name: round(value, 3) for name, value in scores.items()},
    }


def _step(step: TraceStep) -> dict[str, Any]:
    chosen = step.token.id
    return {
        "logProbability": round(step.log_probability, DIGITS),
        "isGiven": step.is_given,
        "rows": [_row(row) for row in step.rows],
        # If all positions were knocked out, their effects are among the packed arrays.
        "effects": _effects(step.effects) if step.changes_S is None else [],
        "kept": step.kept and round(step.kept.change, DIGITS),
        "candidates": [_candidate(one, chosen) for one in step.candidates],
        "lens": step.lens and _lens(step.lens, chosen),
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        **{name: round(float(getattr(row, name)), DIGITS) for name in ROW_NUMBERS},
        "whole": None if row.whole is None else round(row.whole, DIGITS),
        "parts": [(name, round(value, DIGITS)) for name, value in row.parts.items()],
    }


def _effects(effects: Sequence[Effect]) -> list[dict[str, Any]]:
    """Return the effect of each source with that of its control."""
    controls = {effect.control_of: effect for effect in effects}
    sources = [effect for effect in effects if effect.control_of is None]
    return [
        {
            "position": effect.source.token.position,
            "change": round(effect.change, DIGITS),
            "control": (control := controls.get(i)) and control.source.token.position,
            "controlChange": control and round(control.change, DIGITS),
        }
        for i, effect in enumerate(sources)
    ]


def _lens(lens: Lens, chosen: int) -> dict[str, Any]:
    return {
        "layer": lens.layer,
        "probabilities": [*map(shown_probability, lens.log_probabilities)],
        "top": [[_candidate(one, chosen) for one in layer] for layer in lens.top],
    }


def _candidate(candidate: Candidate, chosen: int) -> dict[str, Any]:
    return {
        "name": token_name(candidate.data),
        "probability": shown_probability(candidate.log_probability),
        "isChosen": candidate.id == chosen,
    }
