"""The trace as JSON lines: a header, steps and a footer, written and read.

docs/trace-format.md describes it, and docs/trace.schema.json is its JSON Schema. Weights are
rounded to six digits, those of single heads to four; whole rows are exact, as base64 of float32.
Text that is no UTF-8 by itself (a token may be half a character) is shown with U+FFFD; ``bytes``
has it exactly, in base64.
"""

import base64
import binascii
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.checkpoint.disk import resource_errors
from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError, DataError
from minigpt.settings import build
from minigpt.tracing.events import (
    CONVENTION,
    CauseCheck,
    Effect,
    HeadRows,
    Roles,
    Row,
    Source,
    Token,
    Trace,
    TraceEvent,
    TraceFooter,
    TraceHeader,
    TraceStep,
)
from minigpt.tracing.selection import select_heads

SCHEMA = "minigpt-trace/1"
_DIGITS = 6
_HEAD_DIGITS = 4
_HEAD_FIELDS = {
    "sink": "sink_LH",
    "self": "own_LH",
    "prompt": "prompt_LH",
    "entropy_bits": "entropy_LH",
    "distance": "distance_LH",
    "positions": "positions_LHK",
    "weights": "weights_LHK",
}
_ROW_FIELDS = {
    "total": "total",
    "sink": "sink",
    "self": "own",
    "prompt": "prompt",
    "generated": "generated",
    "entropy_bits": "entropy",
    "distance": "distance",
}
_HEADER_TEXTS = ("model", "model_sha256", "dtype", "kernel", "reduce", "knockout")
_HEADER_COUNTS = ("n_layer", "n_head", "n_kv_head", "d_model", "d_head", "n_verified", "seed")
_ERRORS = ("row_sum_error", "product_error")


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
        "model_sha256": header.model_sha256,
        "n_layer": header.n_layer,
        "n_head": header.n_head,
        "n_kv_head": header.n_kv_head,
        "d_model": header.d_model,
        "d_head": header.d_head,
        "dtype": header.dtype,
        "kernel": header.kernel,
        "score": "scaled_dot",
        "heads": header.selection.as_text(),
        "reduce": header.reduce,
        "measures": list(header.measures),
        "convention": CONVENTION,
        "sink": {"position": header.sink, "rule": header.sink_rule},
        "n_verified": header.n_verified,
        "knockout": header.knockout,
        "roles": header.roles and [[asdict(head) for head in layer] for layer in header.roles],
        "seed": header.seed,
        "sampling": asdict(header.sampling),
        "prompt": [_token(token) for token in header.prompt],
    }


def _step(step: TraceStep) -> dict[str, Any]:
    log_probability = round(step.log_probability, _DIGITS)
    return {
        "type": "step",
        "step": step.index + 1,
        **_token(step.token),
        "log_probability": log_probability,
        "probability": round(math.exp(log_probability), _DIGITS),
        "rows": [_row(row) for row in step.rows],
        "effects": [
            {
                **_source(effect.source),
                "change": round(effect.change, _DIGITS),
                "control_of": effect.control_of,
            }
            for effect in step.effects
        ],
        "certain_text": step.text,
        "finish_reason": step.finish,
    }


def _source(source: Source) -> dict[str, Any]:
    return {**_token(source.token), "weight": round(source.weight, _DIGITS)}


def _row(row: Row) -> dict[str, Any]:
    # What is made of other numbers is made of those that are written: read and written again, a
    # trace has the same bytes.
    facts = {name: round(getattr(row, field), _DIGITS) for name, field in _ROW_FIELDS.items()}
    sources = [_source(source) for source in row.sources]
    listed = facts["sink"] + sum(source["weight"] for source in sources)
    return {
        "measure": row.measure,
        **facts,
        "sources": sources,
        "rest": round(max(0.0, facts["total"] - listed), _DIGITS) if row.sums_to_one else None,
        "weights": base64.b64encode(row.weights_S.astype("<f4").tobytes()).decode("ascii"),
        "heads": row.heads and _heads(row.heads),
    }


def _heads(heads: HeadRows) -> dict[str, Any]:
    return {
        name: getattr(heads, field).astype(np.float64).round(_HEAD_DIGITS).tolist()
        if name != "positions"
        else heads.positions_LHK.tolist()
        for name, field in _HEAD_FIELDS.items()
    }


def _footer(footer: TraceFooter) -> dict[str, Any]:
    return {
        "type": "footer",
        "n_tokens": footer.n_tokens,
        "finish_reason": footer.finish or "interrupted",
        "seconds": round(footer.seconds, _DIGITS),
        "worst_row_sum_error": footer.worst_row_sum_error,
        "worst_product_error": footer.worst_product_error,
        "cause": footer.cause and asdict(footer.cause),
    }


def read_traces(path: Path) -> list[Trace]:
    """Read the traces of a file: one, or one for each sample.

    A trace without a footer, whose writer was killed, gets one that says that it was interrupted.

    Raises: DataError naming the line for anything that is not as it is written here; ResourceError
        if the file may not be read.
    """
    try:
        with resource_errors(path), path.open(encoding="utf-8", errors="strict") as file:
            traces = list(_traces(path, file))
    except FileNotFoundError:
        raise DataError(
            f"there is no file {str(path)!r}. Name one that --out has written."
        ) from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise DataError(f"{str(path)!r} is no trace: {error}. Name a file of --out.") from None
    if not traces:
        raise DataError(f"{str(path)!r} is empty. Name a file that --out has written.")
    return traces


def _traces(path: Path, lines: Iterable[str]) -> Iterator[Trace]:
    reader: _Reader | None = None
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            kind = value["type"]
            if kind == "header":
                if reader is not None:
                    yield reader.trace(None)
                reader = _Reader(value)
            elif reader is None:
                raise ValueError("the first line must be a header")
            elif kind == "step":
                reader.add(value)
            elif kind == "footer":
                yield reader.trace(value)
                reader = None
            else:
                raise ValueError(f"there is no type {kind!r}")
        except (ValueError, TypeError, KeyError, IndexError, RecursionError, ConfigError) as error:
            # What is cut off in the middle of its last line was being written.
            if reader is not None and not line.endswith("\n"):
                break
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)[:200]
            raise DataError(
                f"line {number} of {str(path)!r} is not of a trace ({SCHEMA}): {reason}. Write it "
                "again with --out."
            ) from None
    if reader is not None:
        yield reader.trace(None)


class _Reader:
    """One trace, as its lines come."""

    def __init__(self, value: dict[str, Any]) -> None:
        if value["schema"] != SCHEMA:
            raise ValueError(f"its schema is {value['schema']!r}")
        facts: dict[str, Any] = {name: value[name] for name in _HEADER_TEXTS}
        facts |= {name: _count(value[name]) for name in _HEADER_COUNTS}
        self.tokens = [_read_token(token, i) for i, token in enumerate(value["prompt"])]
        self.n_prompt = len(self.tokens)
        sink = _count(value["sink"]["position"])
        if not 0 <= sink < max(1, self.n_prompt):
            raise ValueError("the sink is no position of the prompt")
        roles = value["roles"]
        self.header = TraceHeader(
            **facts,
            selection=select_heads(facts["n_layer"], facts["n_head"], heads=value["heads"]),
            measures=tuple(value["measures"]),
            sink=sink,
            sink_rule=value["sink"]["rule"],
            sampling=build(SamplingConfig, value["sampling"]),
            prompt=tuple(self.tokens),
            roles=roles and tuple(tuple(Roles(**head) for head in layer) for layer in roles),
        )
        self.steps: list[TraceStep] = []

    def add(self, value: dict[str, Any]) -> None:
        rows = tuple(self._row(row) for row in value["rows"])
        if tuple(row.measure for row in rows) != self.header.measures:
            raise ValueError("its measures are not the header's")
        effects = tuple(
            Effect(self._source(effect), _number(effect["change"]), effect["control_of"])
            for effect in value["effects"]
        )
        self.tokens.append(_read_token(value, len(self.tokens)))
        self.steps.append(
            TraceStep(
                index=len(self.steps),
                token=self.tokens[-1],
                log_probability=_number(value["log_probability"]),
                rows=rows,
                text=value["certain_text"],
                finish=value["finish_reason"],
                effects=effects,
            )
        )

    def trace(self, footer: dict[str, Any] | None) -> Trace:
        facts: dict[str, Any] = {"n_tokens": len(self.steps), "finish": None, "seconds": 0.0}
        facts["worst_row_sum_error"] = None
        if footer is not None:
            reason = footer["finish_reason"]
            facts = {name: footer[name] for name in ("n_tokens", "seconds")}
            facts["finish"] = None if reason == "interrupted" else reason
            facts |= {f"worst_{name}": footer[f"worst_{name}"] for name in _ERRORS}
            facts["cause"] = footer["cause"] and CauseCheck(**footer["cause"])
        return Trace(self.header, tuple(self.steps), TraceFooter(**facts))

    def _source(self, value: dict[str, Any]) -> Source:
        position = _count(value["position"])
        return Source(self.tokens[position], _number(value["weight"]))

    def _row(self, value: dict[str, Any]) -> Row:
        weights_S = np.frombuffer(base64.b64decode(value["weights"], validate=True), "<f4")
        if len(weights_S) != len(self.tokens) or not np.isfinite(weights_S).all():
            raise ValueError(f"its row has not a number for each of {len(self.tokens)} tokens")
        heads = value["heads"]
        return Row(
            measure=value["measure"],
            **{field: _number(value[name]) for name, field in _ROW_FIELDS.items()},
            sources=tuple(self._source(source) for source in value["sources"]),
            weights_S=weights_S.astype(np.float32),
            heads=heads and self._heads(heads),
        )

    def _heads(self, value: dict[str, Any]) -> HeadRows:
        shape = (self.header.n_layer, self.header.n_head)
        arrays: dict[str, NDArray[Any]] = {}
        for name, field in _HEAD_FIELDS.items():
            array = np.array(value[name], np.int32 if name == "positions" else np.float32)
            n_axes = 3 if field.endswith("K") else 2
            if array.shape[:2] != shape or array.ndim != n_axes or not np.isfinite(array).all():
                raise ValueError(f"the {name} of its heads have another shape")
            arrays[field] = array
        positions = arrays["positions_LHK"]
        if positions.shape != arrays["weights_LHK"].shape:
            raise ValueError("its heads have not a weight for each position")
        if positions.size and not 0 <= positions.min() <= positions.max() < len(self.tokens):
            raise ValueError("its heads look at a position that is not there")
        return HeadRows(**arrays)


def _read_token(value: dict[str, Any], position: int) -> Token:
    if value["position"] != position:
        raise ValueError(f"position {value['position']!r} stands where {position} should")
    try:
        data = base64.b64decode(value["bytes"], validate=True)
    except binascii.Error as error:
        raise ValueError(f"the bytes of a token are no base64: {error}") from None
    return Token(position, _count(value["token"]), data)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:40]!r} is no count")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{str(value)[:40]!r} is no number")
    return float(value)
