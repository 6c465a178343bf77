"""The trace as JSON lines: a header, steps and a footer.

See docs/trace-format.md; docs/trace.schema.json is the JSON Schema. Weights are rounded to six
digits, or to four for single heads; full rows are exact, as base64-encoded float32. In ``text``,
invalid UTF-8 (a token may be half a character) is replaced by U+FFFD; ``bytes`` is exact.
"""

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from types import NoneType
from typing import Any

import numpy as np

from minigpt.tracing.analysis_config import facts_of
from minigpt.tracing.config import DIGITS
from minigpt.tracing.events import Source, Token
from minigpt.tracing.findings import (
    CONVENTION,
    HEAD_DIGITS,
    Alternative,
    Candidate,
    Effect,
    HeadRows,
    HeadWorking,
    Kept,
    Lens,
    Row,
    TraceEvent,
    TraceFooter,
    TraceHeader,
    TraceStep,
    shown_probability,
)
from minigpt.tracing.head_lists import HeadSelection

SCHEMA = "minigpt-trace/1"
INTERRUPTED = "interrupted"
"""The finish_reason of a trace that was interrupted."""
_EXACT = {"scale", "worst_row_sum_error", "worst_product_error"}
"""Fields that are not rounded."""
WORKING_ARRAYS = {"queries": "queries_TD", "keys": "keys_TD", "values": "values_TD"}
"""Keys in the file of the array fields of HeadWorking."""
ROW_NUMBERS = ("total", "sink", "own", "prompt", "generated", "entropy", "distance")
"""Numeric fields of Row."""


def _named(*names: str) -> dict[str, str]:
    keys = {"own": "self", "entropy": "entropy_bits"}
    return {keys.get(name, name): name for name in names}


HEAD_ARRAYS = _named(*(f.name for f in fields(HeadRows)))
"""Keys in the file of the fields of HeadRows."""


def _rest(row: Row) -> float | None:
    # Computed from rounded numbers, so that reading a trace and writing it again gives the same
    # bytes.
    sources = sum(round(source.weight, DIGITS) for source in row.sources)
    rest = round(round(row.total, DIGITS) - round(row.sink, DIGITS) - sources, DIGITS)
    if row.is_signed:
        return rest
    return max(0.0, rest) if row.sums_to_one else None


def _rounded(name: str, digits: int) -> Callable[[Any], Any]:
    def write(record: Any) -> Any:
        array = getattr(record, name)
        return None if array is None else array.astype(np.float64).round(digits).tolist()

    return write


def _packed(name: str) -> Callable[[Any], str]:
    return lambda record: _base64(getattr(record, name).astype("<f4").tobytes())


_TEXT: Any = {
    "token": "id",
    "text": lambda token: token.data.decode("utf-8", errors="replace"),
    "bytes": "data",
}
_CHANCE: Any = {
    "log_probability": "log_probability",
    "probability": lambda record: shown_probability(record.log_probability),
}
TABLES: Mapping[type, Mapping[str, str | Callable[[Any], Any]]] = {
    TraceHeader: {
        "type": lambda header: "header",
        "schema": lambda header: SCHEMA,
        **_named("model", "model_sha256", "n_layer", "n_head", "n_kv_head", "d_model", "d_head"),
        **_named("dtype", "kernel", "score"),
        "heads": "selection",
        **_named("reduce", "measures"),
        "units": lambda header: [facts_of(measure).unit for measure in header.measures],
        "convention": lambda header: CONVENTION,
        "sink": lambda header: {"position": header.sink, "rule": header.sink_rule},
        **_named("n_verified", "knockout", "against", "verified_heads", "roles", "intervention"),
        **_named("seed", "sampling", "prompt"),
    },
    Alternative: {"given": "text", "token": "id", "bytes": "data", "n_tokens": "n_tokens"},
    Token: _named("position") | _TEXT,
    TraceStep: {
        "type": lambda step: "step",
        "step": lambda step: step.index + 1,
        "*": "token",
        "given": "is_given",
        **_CHANCE,
        **_named("rows", "effects", "candidates"),
        "changes": _rounded("changes_S", DIGITS),
        **_named("kept", "lens"),
        "certain_text": "text",
        "finish_reason": "finish",
    },
    Row: {
        **_named("measure", *ROW_NUMBERS, "sources"),
        "rest": _rest,
        **_named("whole", "parts"),
        "weights": _packed("weights_S"),
        "heads": "heads",
    },
    Source: {"*": "token"} | _named("weight"),
    HeadRows: {key: _rounded(name, HEAD_DIGITS) for key, name in HEAD_ARRAYS.items()}
    | {"positions": lambda heads: heads.positions.tolist()},
    Effect: {"*": "source"} | _named("change", "control_of"),
    Candidate: _TEXT | _CHANCE,
    Kept: _named("change", "logit_change"),
    Lens: {
        **_named("layer", "log_probabilities"),
        "probabilities": lambda lens: [*map(shown_probability, lens.log_probabilities)],
        "top": "top",
    },
    TraceFooter: {
        "type": lambda footer: "footer",
        "n_tokens": "n_tokens",
        "finish_reason": lambda footer: footer.finish or INTERRUPTED,
        **_named("seconds", "worst_row_sum_error", "worst_product_error", "cause", "workings"),
    },
    HeadWorking: {
        **_named("layer", "head", "scale", "window"),
        **{key: _packed(name) for key, name in WORKING_ARRAYS.items()},
    },
}
"""Keys of each record in the file, in order, each with the name of its field, or a function that
computes its value from the record. ``*`` merges all keys of the record in a field. Records that are
not listed are written field by field, with exact numbers."""


def to_json_line(event: TraceEvent) -> str:
    """Return an event as one line of ASCII-only JSON, without the line break."""
    return json.dumps(_object(event), allow_nan=False)


def _object(record: Any) -> dict[str, Any]:
    table = TABLES.get(type(record))
    if table is None:
        return asdict(record)
    value: dict[str, Any] = {}
    for key, source in table.items():
        if not isinstance(source, str):
            value[key] = source(record)
        elif key == "*":
            value |= _object(getattr(record, source))
        elif source in _EXACT:
            value[key] = getattr(record, source)
        else:
            value[key] = _plain(getattr(record, source))
    return value


def _plain(value: Any) -> Any:
    """Convert a value to JSON types, with floats rounded."""
    kind = type(value)
    if kind is float:
        return round(value, DIGITS)
    if kind in (int, str, bool, NoneType):
        return value
    if kind is tuple:
        return [_plain(one) for one in value]
    if kind is bytes:
        return _base64(value)
    if kind is dict:
        return {key: _plain(one) for key, one in value.items()}
    return value.as_text() if kind is HeadSelection else _object(value)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
