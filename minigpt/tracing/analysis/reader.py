"""JSON lines -> traces: nothing is taken that is not as ``file.py`` writes it."""

import base64
import binascii
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError, DataError
from minigpt.files import resource_errors
from minigpt.generation.decoder import FinishReason
from minigpt.settings import build
from minigpt.tracing.events import (
    CauseCheck,
    Effect,
    HeadRows,
    Knockout,
    Measure,
    Reduce,
    Roles,
    Row,
    Source,
    Token,
    Trace,
    TraceFooter,
    TraceHeader,
    TraceStep,
)
from minigpt.tracing.file import HEAD_FIELDS, INTERRUPTED, ROW_FIELDS, SCHEMA
from minigpt.tracing.selection import select_heads
from minigpt.tracing.words import SCORES

_HEADER_TEXTS = ("model", "dtype", "kernel", "score", "reduce", "knockout")
_HEADER_COUNTS = ("n_layer", "n_head", "n_kv_head", "d_model", "d_head", "n_verified", "seed")
_ERRORS = ("row_sum_error", "product_error")


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
        facts: dict[str, Any] = {name: _text(value[name]) for name in _HEADER_TEXTS}
        facts |= {name: _count(value[name]) for name in _HEADER_COUNTS}
        self.tokens = [_read_token(token, i) for i, token in enumerate(value["prompt"])]
        self.n_prompt = len(self.tokens)
        _word(value["reduce"], get_args(Reduce))
        _word(value["knockout"], get_args(Knockout))
        sink = _count(value["sink"]["position"])
        if not 0 <= sink < max(1, self.n_prompt):
            raise ValueError("the sink is no position of the prompt")
        digest = value["model_sha256"]
        self.header = TraceHeader(
            **facts,
            selection=select_heads(facts["n_layer"], facts["n_head"], heads=value["heads"]),
            measures=tuple(_word(measure, get_args(Measure)) for measure in value["measures"]),
            sink=sink,
            sink_rule=_text(value["sink"]["rule"]),
            sampling=build(SamplingConfig, value["sampling"]),
            prompt=tuple(self.tokens),
            model_sha256=None if digest is None else _text(digest),
            roles=_read_roles(value["roles"], (facts["n_layer"], facts["n_head"])),
        )
        self.steps: list[TraceStep] = []

    def add(self, value: dict[str, Any]) -> None:
        rows = tuple(self._row(row) for row in value["rows"])
        if tuple(row.measure for row in rows) != self.header.measures:
            raise ValueError("its measures are not the header's")
        effects = tuple(self._effect(effect) for effect in value["effects"])
        self.tokens.append(_read_token(value, len(self.tokens)))
        self.steps.append(
            TraceStep(
                index=len(self.steps),
                token=self.tokens[-1],
                log_probability=_number(value["log_probability"]),
                rows=rows,
                text=_text(value["certain_text"]),
                finish=_word(value["finish_reason"], (None, *get_args(FinishReason))),
                effects=effects,
            )
        )

    def trace(self, footer: dict[str, Any] | None) -> Trace:
        facts: dict[str, Any] = {"n_tokens": len(self.steps), "finish": None, "seconds": 0.0}
        facts["worst_row_sum_error"] = None
        if footer is not None:
            reason = footer["finish_reason"]
            facts = {"n_tokens": _count(footer["n_tokens"]), "seconds": _number(footer["seconds"])}
            known = (*get_args(FinishReason), INTERRUPTED)
            facts["finish"] = None if _word(reason, known) == INTERRUPTED else reason
            for name in _ERRORS:
                error = footer[f"worst_{name}"]
                facts[f"worst_{name}"] = None if error is None else _number(error)
            facts["cause"] = footer["cause"] and _read_cause(footer["cause"])
        return Trace(self.header, tuple(self.steps), TraceFooter(**facts))

    def _effect(self, value: dict[str, Any]) -> Effect:
        control_of = value["control_of"]
        return Effect(
            self._source(value),
            _number(value["change"]),
            None if control_of is None else _count(control_of),
        )

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
            **{field: _number(value[name]) for name, field in ROW_FIELDS.items()},
            sources=tuple(self._source(source) for source in value["sources"]),
            weights_S=weights_S.astype(np.float32),
            heads=heads and self._heads(heads),
        )

    def _heads(self, value: dict[str, Any]) -> HeadRows:
        shape = (self.header.n_layer, self.header.n_head)
        arrays: dict[str, NDArray[Any]] = {}
        for name, field in HEAD_FIELDS.items():
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


def _read_roles(value: Any, shape: tuple[int, int]) -> tuple[tuple[Roles, ...], ...] | None:
    if value is None:
        return None
    if (len(value), *{len(layer) for layer in value}) != shape:
        raise ValueError("there are not roles for each head")
    return tuple(
        tuple(
            Roles(**{name: _number(head[name]) for name in SCORES}, tag=_text(head["tag"]))
            for head in layer
        )
        for layer in value
    )


def _read_cause(value: dict[str, Any]) -> CauseCheck:
    correlation = value["rank_correlation"]
    return CauseCheck(
        n_sources=_count(value["n_sources"]),
        n_controls=_count(value["n_controls"]),
        mean_effect=_number(value["mean_effect"]),
        mean_control_effect=_number(value["mean_control_effect"]),
        rank_correlation=None if correlation is None else _number(correlation),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]!r} is no text")
    return value


def _word(value: Any, known: tuple[Any, ...]) -> Any:
    if value not in known:
        raise ValueError(f"{str(value)[:40]!r} is none of {', '.join(map(str, known))}")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:40]!r} is no count")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{str(value)[:40]!r} is no number")
    return float(value)
