"""The trace as JSON lines: a header, steps and a footer.

See docs/trace-format.md; docs/trace.schema.json is the JSON Schema. Weights are rounded to six
digits, those of single heads to four; whole rows are exact, as base64 of float32. In ``text``,
invalid UTF-8 (a token may be half a character) is replaced by U+FFFD; ``bytes`` is exact.
"""

import base64
import json
import math
from dataclasses import asdict, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.tracing.analysis_config import facts_of
from minigpt.tracing.events import Row, Source, Token
from minigpt.tracing.findings import (
    CONVENTION,
    Alternative,
    Candidate,
    HeadRows,
    HeadWorking,
    Lens,
    TraceEvent,
    TraceFooter,
    TraceHeader,
    TraceStep,
)
from minigpt.tracing.head_lists import HeadSelection

SCHEMA = "minigpt-trace/1"
INTERRUPTED = "interrupted"
"""The finish_reason of a trace that was interrupted."""
_KEYS = {"own": "self", "entropy": "entropy_bits"}
HEAD_FIELDS = {_KEYS.get(f.name, f.name): f.name for f in fields(HeadRows)}
"""Keys in the file, and the fields of HeadRows."""
ROW_FIELDS = {
    _KEYS.get(name, name): name
    for name in ("total", "sink", "own", "prompt", "generated", "entropy", "distance")
}
"""Keys in the file, and the fields of Row that are numbers."""
WORKING_ARRAYS = {"queries": "queries_TD", "keys": "keys_TD", "values": "values_TD"}
"""Keys in the file, and the fields of HeadWorking that are arrays."""
_MODEL_FIELDS = ("n_layer", "n_head", "n_kv_head", "d_model", "d_head", "dtype", "kernel", "score")
_DIGITS = 6
_HEAD_DIGITS = 4


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
    return {"position": token.position, **_text(token)}


def _text(token: Token | Candidate) -> dict[str, Any]:
    return {
        "token": token.id,
        "text": token.data.decode("utf-8", errors="replace"),
        "bytes": base64.b64encode(token.data).decode("ascii"),
    }


def _chance(log_probability: float) -> dict[str, float]:
    rounded = round(log_probability, _DIGITS)
    return {"log_probability": rounded, "probability": round(math.exp(rounded), _DIGITS)}


def _header(header: TraceHeader) -> dict[str, Any]:
    selection: HeadSelection = header.selection
    return {
        "type": "header",
        "schema": SCHEMA,
        "model": header.model,
        "model_sha256": header.model_sha256,
        **{name: getattr(header, name) for name in _MODEL_FIELDS},
        "heads": selection.as_text(),
        "reduce": header.reduce,
        "measures": list(header.measures),
        "units": [facts_of(measure).unit for measure in header.measures],
        "convention": CONVENTION,
        "sink": {"position": header.sink, "rule": header.sink_rule},
        "n_verified": header.n_verified,
        "knockout": header.knockout,
        "against": header.against and _alternative(header.against),
        "verified_heads": header.verified_heads and header.verified_heads.as_text(),
        "roles": header.roles and [[asdict(head) for head in layer] for layer in header.roles],
        "intervention": header.intervention and asdict(header.intervention),
        "seed": header.seed,
        "sampling": asdict(header.sampling),
        "prompt": [_token(token) for token in header.prompt],
    }


def _alternative(against: Alternative) -> dict[str, Any]:
    return {
        "given": against.text,
        "token": against.id,
        "bytes": base64.b64encode(against.data).decode("ascii"),
        "n_tokens": against.n_tokens,
    }


def _step(step: TraceStep) -> dict[str, Any]:
    return {
        "type": "step",
        "step": step.index + 1,
        **_token(step.token),
        "given": step.is_given,
        **_chance(step.log_probability),
        "rows": [_row(row) for row in step.rows],
        "effects": [
            {
                **_source(effect.source),
                "change": round(effect.change, _DIGITS),
                "control_of": effect.control_of,
            }
            for effect in step.effects
        ],
        "candidates": [{**_text(one), **_chance(one.log_probability)} for one in step.candidates],
        "changes": None if step.changes_S is None else _rounded(step.changes_S, _DIGITS),
        "kept": step.kept
        and {name: round(value, _DIGITS) for name, value in asdict(step.kept).items()},
        "lens": step.lens and _lens(step.lens),
        "certain_text": step.text,
        "finish_reason": step.finish,
    }


def _lens(lens: Lens) -> dict[str, Any]:
    chances = [_chance(value) for value in lens.log_probabilities]
    return {
        "layer": lens.layer,
        "log_probabilities": [chance["log_probability"] for chance in chances],
        "probabilities": [chance["probability"] for chance in chances],
        "top": [
            [{**_text(one), **_chance(one.log_probability)} for one in layer] for layer in lens.top
        ],
    }


def _source(source: Source) -> dict[str, Any]:
    return {**_token(source.token), "weight": round(source.weight, _DIGITS)}


def _row(row: Row) -> dict[str, Any]:
    # Derived numbers are derived from the rounded ones, so that a trace that is read and written
    # again has the same bytes.
    facts = {name: round(getattr(row, field), _DIGITS) for name, field in ROW_FIELDS.items()}
    sources = [_source(source) for source in row.sources]
    rest = facts["total"] - facts["sink"] - sum(source["weight"] for source in sources)
    if not row.is_signed:
        rest = max(0.0, rest)
    return {
        "measure": row.measure,
        **facts,
        "sources": sources,
        "rest": round(rest, _DIGITS) if row.sums_to_one or row.is_signed else None,
        "whole": None if row.whole is None else round(row.whole, _DIGITS),
        "parts": {name: round(part, _DIGITS) for name, part in row.parts.items()},
        "weights": _base64(row.weights_S),
        "heads": row.heads and _heads(row.heads),
    }


def _heads(heads: HeadRows) -> dict[str, Any]:
    arrays = {name: getattr(heads, field) for name, field in HEAD_FIELDS.items()}
    return {
        name: array.tolist() if name == "positions" else _rounded(array, _HEAD_DIGITS)
        for name, array in arrays.items()
    }


def _rounded(array: NDArray[np.float32], n_digits: int) -> list[Any]:
    return array.astype(np.float64).round(n_digits).tolist()


def _footer(footer: TraceFooter) -> dict[str, Any]:
    return {
        "type": "footer",
        "n_tokens": footer.n_tokens,
        "finish_reason": footer.finish or INTERRUPTED,
        "seconds": round(footer.seconds, _DIGITS),
        "worst_row_sum_error": footer.worst_row_sum_error,
        "worst_product_error": footer.worst_product_error,
        "cause": footer.cause and asdict(footer.cause),
        "workings": [_working(working) for working in footer.workings],
    }


def _working(working: HeadWorking) -> dict[str, Any]:
    facts = {name: getattr(working, name) for name in ("layer", "head", "scale", "window")}
    arrays = {name: getattr(working, field) for name, field in WORKING_ARRAYS.items()}
    return facts | {name: _base64(array) for name, array in arrays.items()}


def _base64(array: NDArray[np.float32]) -> str:
    return base64.b64encode(array.astype("<f4").tobytes()).decode("ascii")
