"""Reading of the trace files that ``tracing/file.py`` writes.

Reading is strict, because trace files are untrusted: a wrong type, a missing field or a wrong shape
is an error that names the line.
"""

import base64
import binascii
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError, DataError, cut, require_choice
from minigpt.fields import parts_of
from minigpt.files import open_regular, resource_errors
from minigpt.generation.decoder import FinishReason
from minigpt.rings import ring
from minigpt.settings import build
from minigpt.tracing import analysis_config, events, findings
from minigpt.tracing.analysis_config import MEASURES, facts_of
from minigpt.tracing.file import HEAD_ARRAYS, INTERRUPTED, SCHEMA, TABLES, WORKING_ARRAYS
from minigpt.tracing.head_lists import HeadSelection, select_heads

T = TypeVar("T")
_MOST_HEADS = 2**16
"""Maximum number of heads of a model; Llama 3 405B has a quarter of that."""
_LARGEST_NUMBER = 3e38
"""Largest magnitude of a number: that of float32."""
_ROUNDING = 1e-3
"""Largest logarithm of a probability: 0, plus rounding."""
_NEW = {"against", "intervention", "is_given", "candidates", "kept", "lens", "whole"}
"""Fields that are missing from files of earlier versions."""


def read_traces(path: Path) -> list[findings.Trace]:
    """Read the traces of a file: one per sample.

    A trace without a footer (its writer was killed) is read as interrupted.

    Raises: DataError naming the first invalid line; ResourceError if reading the file is not
        permitted.
    """
    try:
        with resource_errors(path), io.TextIOWrapper(open_regular(path), "utf-8") as file:
            traces = list(_traces(path, file))
    except FileNotFoundError:
        raise DataError(f"there is no file {str(path)!r}. Name a file written by --out.") from None
    except UnicodeDecodeError:
        raise DataError(
            f"{str(path)!r} is not a trace: it is not UTF-8 text. Name a file of --out, which is "
            "not compressed."
        ) from None
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{str(path)!r} is not a trace: {reason}. Name a file of --out.") from None
    if not traces:
        raise DataError(f"{str(path)!r} is empty. Name a file written by --out.")
    return traces


def _traces(path: Path, lines: Iterable[str]) -> Iterator[findings.Trace]:
    reader: _Reader | None = None
    for number, line in enumerate(lines, start=1):
        try:
            value = _object(json.loads(line), "it")
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
                raise ValueError(f"there is no type {cut(kind)}")
        except (ValueError, KeyError, RecursionError, ConfigError) as error:
            # A last line without a line break was still being written.
            if reader is not None and not line.endswith("\n"):
                break
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            reason = "it is not JSON" if isinstance(error, json.JSONDecodeError) else reason
            reason = reason if len(reason) <= 200 else f"{reason[:200]}..."
            # Without a header, it may be any other file.
            remedy = "Write the file again with --out" if reader else "Name a file written by --out"
            raise DataError(
                f"line {number} of {str(path)!r} is not valid in a trace ({SCHEMA}): {reason}. "
                f"{remedy}."
            ) from None
    if reader is not None:
        yield reader.trace(None)


class _Reader:
    """Reads one trace line by line."""

    def __init__(self, value: dict[str, Any]) -> None:
        if value["schema"] != SCHEMA:
            raise ValueError(f"its schema is {cut(value['schema'])}")
        self.tokens = [_token(token, i) for i, token in enumerate(_objects(value, "prompt"))]
        self.steps: list[findings.TraceStep] = []
        shape = n_layer, n_head = [_checked(value[n], int, n) for n in ("n_layer", "n_head")]
        if n_layer * n_head > _MOST_HEADS:
            raise ValueError(f"n_layer * n_head is {n_layer} * {n_head}, above {_MOST_HEADS}")
        place = _object(value["sink"], "sink")
        changed = value.get("intervention")
        if changed is not None:
            kind = ring("intervention_config").InterventionConfig
            changed = build(kind, _object(changed, "intervention"), "intervention.")

        def selection(name: str) -> HeadSelection:
            return select_heads(n_layer, n_head, heads=_checked(value[name], str, name))

        self.header = header = _read(
            findings.TraceHeader,
            value,
            selection=selection("heads"),
            sink=_checked(place["position"], int, "sink.position"),
            sink_rule=_checked(place["rule"], str, "sink.rule"),
            sampling=build(SamplingConfig, _object(value["sampling"], "sampling"), "sampling."),
            prompt=tuple(self.tokens),
            intervention=changed,
            verified_heads=None
            if value.get("verified_heads") is None
            else selection("verified_heads"),
        )
        if header.sink >= max(1, len(self.tokens)):
            raise ValueError(f"sink.position {header.sink} is not in the prompt")
        for name in header.measures:
            require_choice("measure", name, MEASURES)
        if not header.measures:
            raise ValueError("measures is empty")
        roles = header.roles
        if roles is not None and [len(roles), *{len(layer) for layer in roles}] != shape:
            raise ValueError("roles must have an object for each head")

    def add(self, value: dict[str, Any]) -> None:
        """Add a step."""
        if value["step"] != len(self.steps) + 1:
            raise ValueError(f"step is {cut(value['step'])} instead of {len(self.steps) + 1}")
        n_prompt = len(self.header.prompt)
        if self.steps:
            position = self.steps[-1].token.position + 1
        else:  # 1 if the trace has steps for the prompt's tokens
            position = 1 if value["position"] == 1 else n_prompt
        token = _token(value, position)
        if position < n_prompt and token != self.header.prompt[position]:
            raise ValueError(f"its token at position {position} is not the prompt's")
        objects = _objects(value, "rows")
        if tuple(row["measure"] for row in objects) != self.header.measures:
            raise ValueError("its measures are not the header's")
        rows = tuple(self._row(row, position) for row in objects)
        effects = tuple(
            _read(findings.Effect, effect, source=self._source(effect, position))
            for effect in _objects(value, "effects")
        )
        step = _read(
            findings.TraceStep,
            value,
            index=len(self.steps),
            token=token,
            rows=rows,
            effects=effects,
            changes_S=_changes(value.get("changes"), position),
        )
        if step.lens is not None:
            _check_lens(step.lens, self.header.n_layer)
        self.steps.append(step)
        if position == len(self.tokens):
            self.tokens.append(token)

    def trace(self, footer: dict[str, Any] | None) -> findings.Trace:
        """Return the complete trace, interrupted if the footer is None."""
        end = findings.TraceFooter(len(self.tokens) - len(self.header.prompt), None, 0.0, None)
        if footer is not None:
            reason = footer["finish_reason"]
            if reason != INTERRUPTED:
                self._check_complete(_checked(footer["n_tokens"], int, "n_tokens"))
            end = _read(
                findings.TraceFooter,
                footer,
                finish=None
                if reason == INTERRUPTED
                else _checked(reason, FinishReason, "finish_reason"),
                workings=tuple(map(self._working, _objects({"workings": []} | footer, "workings"))),
            )
        return findings.Trace(self.header, tuple(self.steps), end)

    def _check_complete(self, n_tokens: int) -> None:
        """Refuse the footer of a trace that lost its last steps."""
        n_expected = n_tokens
        has_prompt_rows = self.steps and self.steps[0].token.position < len(self.header.prompt)
        if has_prompt_rows or self.header.sampling.max_new_tokens == 0:
            n_expected += len(self.header.prompt) - 1
        if len(self.steps) != n_expected:
            raise ValueError(f"{len(self.steps)} of {n_expected} steps come before its footer")

    def _working(self, value: dict[str, Any]) -> findings.HeadWorking:
        n_tokens, d_head = len(self.tokens), self.header.d_head
        arrays: dict[str, Any] = {}
        for name, field in WORKING_ARRAYS.items():
            numbers = _array(value, name)
            # The last token may be past the end of the context.
            sizes = (n_tokens * d_head, (n_tokens - 1) * d_head)
            if numbers.size not in sizes or not np.isfinite(numbers).all():
                raise ValueError(f"workings.{name} must be {n_tokens} x {d_head} numbers")
            arrays[field] = numbers.reshape(-1, d_head)
        if len({len(array) for array in arrays.values()}) > 1:
            raise ValueError("workings must have as many keys and values as queries")
        working = _read(findings.HeadWorking, value, **arrays)
        if working.layer >= self.header.n_layer or working.head >= self.header.n_head:
            raise ValueError(f"workings has head {working.layer}.{working.head}: it does not exist")
        return working

    def _source(self, value: dict[str, Any], n_view: int) -> events.Source:
        position = _checked(value["position"], int, "position")
        if position >= n_view:
            raise ValueError(f"position {position} is not one of {n_view} tokens")
        return _read(events.Source, value, token=self.tokens[position])

    def _row(self, value: dict[str, Any], n_view: int) -> findings.Row:
        weights_S = _array(value, "weights")
        if len(weights_S) != n_view or not np.isfinite(weights_S).all():
            raise ValueError(f"weights must be a number for each of {n_view} tokens")
        heads = value["heads"]
        parts = _object(value.get("parts", {}), "parts")
        return _read(
            findings.Row,
            value,
            is_signed=facts_of(value["measure"]).is_signed,
            parts={name[:80]: _checked(parts[name], float, "parts") for name in parts},
            sources=tuple(self._source(source, n_view) for source in _objects(value, "sources")),
            weights_S=weights_S,
            heads=None if heads is None else self._heads(_object(heads, "heads"), n_view),
        )

    def _heads(self, value: dict[str, Any], n_view: int) -> findings.HeadRows:
        shape = (self.header.n_layer, self.header.n_head)
        arrays: dict[str, NDArray[Any]] = {}
        for name, field in HEAD_ARRAYS.items():
            try:
                with np.errstate(over="ignore"):  # inf is refused below
                    array = np.array(value[name], np.int32 if name == "positions" else np.float32)
            except (ValueError, TypeError, OverflowError):
                raise ValueError(f"heads.{name} must be lists of numbers") from None
            n_axes = 3 if field in ("positions", "weights") else 2
            if array.shape[:2] != shape or array.ndim != n_axes or not np.isfinite(array).all():
                raise ValueError(f"heads.{name} has the wrong shape, or NaN")
            arrays[field] = array
        positions = arrays["positions"]
        if positions.shape != arrays["weights"].shape:
            raise ValueError("heads.positions and heads.weights must have the same shape")
        if positions.size and not 0 <= positions.min() <= positions.max() < n_view:
            raise ValueError("heads.positions has a position that does not exist")
        return findings.HeadRows(**arrays)


def _changes(value: Any, n_view: int) -> NDArray[np.float32] | None:
    if value is None:
        return None
    changes = np.array(_checked(value, tuple[float, ...], "changes"), np.float32)
    if len(changes) != n_view:
        raise ValueError(f"changes must be a number for each of {n_view} tokens")
    return changes


def _check_lens(lens: findings.Lens, n_layer: int) -> None:
    if not all(lens.top) or {len(lens.top), len(lens.log_probabilities)} != {n_layer}:
        raise ValueError(f"lens must have {n_layer} layers")
    if lens.layer is not None and lens.layer >= n_layer:
        raise ValueError(f"lens.layer is {lens.layer} of {n_layer} layers")


def _token(value: dict[str, Any], position: int) -> events.Token:
    if value["position"] != position:
        raise ValueError(f"position {cut(value['position'])} is where {position} should be")
    return _read(events.Token, value, position=position)


def _array(value: dict[str, Any], name: str) -> NDArray[np.float32]:
    return np.frombuffer(_checked(value[name], bytes, name), "<f4").astype(np.float32)


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object: it is {cut(value)}")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list: it is {cut(value)}")
    return value


def _objects(value: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [_object(item, name) for item in _list(value[name], name)]


@cache
def _type_hints(cls: type) -> dict[str, Any]:
    others = {"InterventionConfig": Any, "HeadSelection": Any}  # built separately
    return get_type_hints(cls, vars(events) | vars(findings) | vars(analysis_config) | others)


def _read(cls: type[T], value: dict[str, Any], prefix: str = "", **given: Any) -> T:
    """Build a record from an object, except for the fields that are ``given``."""
    hints: dict[str, Any] = _type_hints(cls)  # type: ignore[arg-type]
    for key, field in TABLES.get(cls, {name: name for name in hints}).items():
        if not isinstance(field, str) or field in given or key == "*":
            continue
        if key in value or field not in _NEW:
            given[field] = _checked(value[key], hints[field], prefix + key)
    return cls(**given)


def _checked(value: Any, hint: Any, name: str) -> Any:
    """Convert a JSON value to an annotated type.

    Integers must be at least 0 and below 2**31, or 2**63 for a seed; floats must be finite as
    float32; bytes are base64.

    Raises: ValueError naming the field; KeyError for a missing field of a record.
    """
    words, kind, may_be_none = parts_of(hint)
    if value in words or (value is None and may_be_none):
        return value
    if get_origin(kind) is tuple:
        return tuple(_checked(one, get_args(kind)[0], name) for one in _list(value, name))
    if isinstance(kind, type) and is_dataclass(kind):
        return _read(kind, _object(value, name), f"{name}.")
    if kind is bytes:
        try:
            return base64.b64decode(_checked(value, str, name), validate=True)
        except binascii.Error as error:
            raise ValueError(f"{name} is not base64: {error}") from None
    if kind in (int, float):
        return _number(value, kind, name)
    if kind is None or not isinstance(value, kind):
        expected = f"one of {', '.join(words)}" if kind is None else kind.__name__
        raise ValueError(f"{name} is not {expected}: it is {cut(value)}")
    return value


def _number(value: Any, kind: type[int | float], name: str) -> float:
    """Check a JSON number. Args and raises: as for ``_checked``."""
    if kind is float:
        low = 0 if name == "seconds" else -_LARGEST_NUMBER
        high = _ROUNDING if "log_prob" in name else _LARGEST_NUMBER
        is_valid = type(value) in (int, float) and low <= value <= high  # NaN is not
        expected = f"a number from {low:g} to {high:g}"
    else:
        end = 2**63 if name == "seed" else 2**31
        is_valid, expected = type(value) is int and 0 <= value < end, f"an integer in [0, {end})"
    if not is_valid:
        raise ValueError(f"{name} is not {expected}: it is {cut(value)}")
    return kind(value)
