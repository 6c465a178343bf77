"""Reading trace files: JSON lines, as ``tracing/file.py`` writes them, into traces.

Reading is strict, because a file may come from anyone: a wrong type, a missing field or a wrong
shape is an error that names the line.
"""

import base64
import binascii
import json
import math
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError, DataError, require_choice
from minigpt.files import resource_errors
from minigpt.generation.decoder import FinishReason
from minigpt.settings import build
from minigpt.tracing import events
from minigpt.tracing.config import MEASURES
from minigpt.tracing.file import HEAD_FIELDS, INTERRUPTED, ROW_FIELDS, SCHEMA
from minigpt.tracing.selection import select_heads

T = TypeVar("T")
_type_hints = cache(get_type_hints)


def read_traces(path: Path) -> list[events.Trace]:
    """Read the traces of a file: one, or one for each sample.

    A trace without a footer, because its writer was killed, counts as interrupted.

    Raises: DataError naming the first line that is not valid; ResourceError if reading the file is
        not permitted.
    """
    try:
        with resource_errors(path), path.open(encoding="utf-8", errors="strict") as file:
            traces = list(_traces(path, file))
    except FileNotFoundError:
        raise DataError(f"there is no file {str(path)!r}. Name a file written by --out.") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise DataError(f"{str(path)!r} is not a trace: {error}. Name a file of --out.") from None
    if not traces:
        raise DataError(f"{str(path)!r} is empty. Name a file written by --out.")
    return traces


def _traces(path: Path, lines: Iterable[str]) -> Iterator[events.Trace]:
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
            # A last line without a line break was still being written.
            if reader is not None and not line.endswith("\n"):
                break
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)[:200]
            raise DataError(
                f"line {number} of {str(path)!r} is not valid in a trace ({SCHEMA}): {reason}. "
                "Write the file again with --out."
            ) from None
    if reader is not None:
        yield reader.trace(None)


class _Reader:
    """One trace, read line by line."""

    def __init__(self, value: dict[str, Any]) -> None:
        if value["schema"] != SCHEMA:
            raise ValueError(f"its schema is {value['schema']!r}")
        self.tokens = [_token(token, i) for i, token in enumerate(value["prompt"])]
        self.steps: list[events.TraceStep] = []
        n_layer, n_head = (_checked(value[name], int) for name in ("n_layer", "n_head"))
        sink = _checked(value["sink"]["position"], int)
        if sink >= max(1, len(self.tokens)):
            raise ValueError("the sink is not a position of the prompt")
        for name in value["measures"]:
            require_choice("measure", name, MEASURES)
        roles = value["roles"]
        if roles is not None:
            if (len(roles), *{len(layer) for layer in roles}) != (n_layer, n_head):
                raise ValueError("there must be roles for each head")
            roles = tuple(tuple(_read(events.Roles, head) for head in layer) for layer in roles)
        self.header = _read(
            events.TraceHeader,
            value,
            selection=select_heads(n_layer, n_head, heads=value["heads"]),
            measures=tuple(value["measures"]),
            sink=sink,
            sink_rule=_checked(value["sink"]["rule"], str),
            sampling=build(SamplingConfig, value["sampling"]),
            prompt=tuple(self.tokens),
            roles=roles,
        )

    def add(self, value: dict[str, Any]) -> None:
        """Add a step."""
        rows = tuple(self._row(row) for row in value["rows"])
        if tuple(row.measure for row in rows) != self.header.measures:
            raise ValueError("its measures are not those of the header")
        effects = tuple(
            _read(events.Effect, effect, source=self._source(effect)) for effect in value["effects"]
        )
        self.tokens.append(_token(value, len(self.tokens)))
        self.steps.append(
            _read(
                events.TraceStep,
                value | {"text": value["certain_text"], "finish": value["finish_reason"]},
                index=len(self.steps),
                token=self.tokens[-1],
                rows=rows,
                effects=effects,
            )
        )

    def trace(self, footer: dict[str, Any] | None) -> events.Trace:
        """Return the whole trace; a footer of None means that it was interrupted."""
        end = events.TraceFooter(len(self.steps), None, 0.0, None)
        if footer is not None:
            reason = footer["finish_reason"]
            finish = None if reason == INTERRUPTED else _checked(reason, FinishReason)
            cause = footer["cause"] and _read(events.CauseCheck, footer["cause"])
            end = _read(events.TraceFooter, footer, finish=finish, cause=cause)
        return events.Trace(self.header, tuple(self.steps), end)

    def _source(self, value: dict[str, Any]) -> events.Source:
        return _read(events.Source, value, token=self.tokens[_checked(value["position"], int)])

    def _row(self, value: dict[str, Any]) -> events.Row:
        weights_S = np.frombuffer(base64.b64decode(value["weights"], validate=True), "<f4")
        if len(weights_S) != len(self.tokens) or not np.isfinite(weights_S).all():
            raise ValueError(f"a row must have a number for each of {len(self.tokens)} tokens")
        heads = value["heads"]
        return _read(
            events.Row,
            {field: value[name] for name, field in ROW_FIELDS.items()},
            measure=value["measure"],
            sources=tuple(self._source(source) for source in value["sources"]),
            weights_S=weights_S.astype(np.float32),
            heads=heads and self._heads(heads),
        )

    def _heads(self, value: dict[str, Any]) -> events.HeadRows:
        shape = (self.header.n_layer, self.header.n_head)
        arrays: dict[str, NDArray[Any]] = {}
        for name, field in HEAD_FIELDS.items():
            array = np.array(value[name], np.int32 if name == "positions" else np.float32)
            n_axes = 3 if field in ("positions", "weights") else 2
            if array.shape[:2] != shape or array.ndim != n_axes or not np.isfinite(array).all():
                raise ValueError(f"the {name} of its heads have another shape")
            arrays[field] = array
        positions = arrays["positions"]
        if positions.shape != arrays["weights"].shape:
            raise ValueError("each position of its heads must have a weight")
        if positions.size and not 0 <= positions.min() <= positions.max() < len(self.tokens):
            raise ValueError("its heads attend to a position that does not exist")
        return events.HeadRows(**arrays)


def _token(value: dict[str, Any], position: int) -> events.Token:
    if value["position"] != position:
        raise ValueError(f"position {value['position']!r} is where {position} should be")
    try:
        data = base64.b64decode(value["bytes"], validate=True)
    except binascii.Error as error:
        raise ValueError(f"the bytes of a token are not base64: {error}") from None
    return events.Token(position, _checked(value["token"], int), data)


def _read(cls: type[T], value: dict[str, Any], **given: Any) -> T:
    """Build a dataclass from an object with a key for each field but the ``given`` ones."""
    hints = _type_hints(cls).items()  # type: ignore[arg-type]
    read = {name: _checked(value[name], hint) for name, hint in hints if name not in given}
    return cls(**read, **given)


def _checked(value: Any, hint: Any) -> Any:
    """Return a JSON value if it has the type of an annotation.

    Integers must be at least 0, floats finite; unions are of one type and None.
    """
    if get_origin(hint) in (Union, UnionType):
        if value is None:
            return None
        hint = get_args(hint)[0]
    name = getattr(hint, "__name__", str(hint))
    if get_origin(hint) is Literal:
        is_valid, name = value in get_args(hint), f"one of {', '.join(get_args(hint))}"
    elif hint is float:
        is_valid = type(value) in (int, float) and math.isfinite(value)
    elif hint is int:
        is_valid = type(value) is int and value >= 0
    else:
        is_valid = isinstance(value, hint)
    if not is_valid:
        raise ValueError(f"{str(value)[:40]!r} is not {name}")
    return float(value) if hint is float else value
