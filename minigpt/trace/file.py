"""The trace as JSON: one object a line, a header, steps and a footer.

Weights are rounded to six digits; everything else is exact. Text that is no UTF-8 by itself (a
token may be half a character) is shown with U+FFFD; ``bytes`` has it exactly, in base64.
"""

import base64
import json
from dataclasses import asdict
from typing import Any

from minigpt.trace.tracer import (
    CONVENTION,
    Token,
    TraceEvent,
    TraceFooter,
    TraceHeader,
    TraceStep,
)

SCHEMA = "minigpt-trace/1"


def to_json_line(event: TraceEvent) -> str:
    """Return an event as one line of JSON, ASCII only, without the line break."""
    match event:
        case TraceHeader():
            value = _header(event)
        case TraceStep():
            value = _step(event)
        case TraceFooter():
            value = _footer(event)
    return json.dumps(value, allow_nan=False)


def _token(token: Token) -> dict[str, Any]:
    return {
        "position": token.position,
        "token": token.id,
        "text": token.data.decode("utf-8", errors="replace"),
        "bytes": base64.b64encode(token.data).decode("ascii"),
    }


def _header(header: TraceHeader) -> dict[str, Any]:
    return {
        "type": "header",
        "schema": SCHEMA,
        "model": header.model,
        "n_layer": header.n_layer,
        "n_head": header.n_head,
        "heads": header.selection.as_text(),
        "reduce": header.reduce,
        "measure": "weight",
        "convention": CONVENTION,
        "sink": "position 0",
        "seed": header.seed,
        "sampling": asdict(header.sampling),
        "prompt": [_token(token) for token in header.prompt],
    }


def _step(step: TraceStep) -> dict[str, Any]:
    return {
        "type": "step",
        "step": step.index + 1,
        **_token(step.token),
        "log_probability": round(step.log_probability, 6),
        "probability": round(step.probability, 6),
        "sink": round(step.sink, 6),
        "sources": [
            {**_token(source.token), "weight": round(source.weight, 6)} for source in step.sources
        ],
        "rest": None if step.rest is None else round(step.rest, 6),
        "finish_reason": step.finish,
    }


def _footer(footer: TraceFooter) -> dict[str, Any]:
    return {
        "type": "footer",
        "n_tokens": footer.n_tokens,
        "finish_reason": footer.finish or "interrupted",
        "seconds": round(footer.seconds, 6),
        "worst_row_sum_error": footer.worst_row_sum_error,
    }
