"""Reading trace files: JSON lines, as ``tracing/file.py`` writes them, into traces.

Reading is strict, because a file may come from anyone: a wrong type, a missing field or a wrong
shape is an error that names the line.
"""

import base64
import binascii
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError, DataError, cut, require_choice
from minigpt.files import open_regular, resource_errors
from minigpt.generation.decoder import FinishReason
from minigpt.rings import ring
from minigpt.settings import build
from minigpt.tracing import analysis_config, events, findings
from minigpt.tracing.analysis_config import MEASURES, facts_of
from minigpt.tracing.file import HEAD_FIELDS, INTERRUPTED, ROW_FIELDS, SCHEMA, WORKING_ARRAYS
from minigpt.tracing.head_lists import select_heads

T = TypeVar("T")
_MOST_HEADS = 2**16
"""Most heads of a model in a trace; those of Llama 3 405B are a quarter of that."""
_LARGEST_NUMBER = 3e38
"""Largest magnitude of a number, that of float32."""
_ROUNDING = 1e-3
"""Largest logarithm of a probability, which is 0 but for rounding."""


def read_traces(path: Path) -> list[findings.Trace]:
    """Read the traces of a file: one, or one for each sample.

    A trace without a footer, because its writer was killed, counts as interrupted.

    Raises: DataError naming the first line that is not valid; ResourceError if reading the file is
        not permitted.
    """
    try:
        with resource_errors(path), io.TextIOWrapper(open_regular(path), "utf-8") as file:
            traces = list(_traces(path, file))
    except FileNotFoundError:
        raise DataError(f"there is no file {str(path)!r}. Name a file written by --out.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
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
            reason = reason if len(reason) <= 200 else f"{reason[:200]}..."
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
            raise ValueError(f"its schema is {cut(value['schema'])}")
        self.tokens = [_token(token, i) for i, token in enumerate(_objects(value, "prompt"))]
        self.steps: list[findings.TraceStep] = []
        n_layer, n_head = (_checked(value[name], int, name) for name in ("n_layer", "n_head"))
        if n_layer * n_head > _MOST_HEADS:
            raise ValueError(f"n_layer * n_head is {n_layer} * {n_head}, above {_MOST_HEADS}")
        place = _object(value["sink"], "sink")
        sink = _checked(place["position"], int, "sink.position")
        if sink >= max(1, len(self.tokens)):
            raise ValueError(f"sink.position {sink} is not in the prompt")
        measures = tuple(_checked(m, str, "measures") for m in _list(value, "measures"))
        for name in measures:
            require_choice("measure", name, MEASURES)
        if not measures:
            raise ValueError("measures is empty")
        roles = value["roles"]
        if roles is not None:
            roles = tuple(
                tuple(_read(findings.Roles, _object(head, "roles")) for head in layer)
                for layer in _lists(value, "roles")
            )
            if (len(roles), *{len(layer) for layer in roles}) != (n_layer, n_head):
                raise ValueError("roles must have an object for each head")
        verified, all_ = value.get("verified_heads"), value["n_verified"] == "all"
        intervention = value.get("intervention")
        self.header = _read(
            findings.TraceHeader,
            value,
            selection=select_heads(n_layer, n_head, heads=_checked(value["heads"], str, "heads")),
            measures=measures,
            sink=sink,
            sink_rule=_checked(place["rule"], str, "sink.rule"),
            against=self._alternative(value.get("against")),
            sampling=build(SamplingConfig, _object(value["sampling"], "sampling"), "sampling."),
            prompt=tuple(self.tokens),
            intervention=None
            if intervention is None
            else build(
                ring("intervention_config").InterventionConfig,
                _object(intervention, "intervention"),
                "intervention.",
            ),
            roles=roles,
            n_verified="all" if all_ else _checked(value["n_verified"], int, "n_verified"),
            verified_heads=None
            if verified is None
            else select_heads(n_layer, n_head, heads=_checked(verified, str, "verified_heads")),
        )

    def _alternative(self, value: Any) -> findings.Alternative | None:
        if value is None:
            return None
        value = _object(value, "against")
        text = _checked(value["given"], str, "against.given")
        token = _checked(value["token"], int, "against.token")
        n_tokens = _checked(value["n_tokens"], int, "against.n_tokens")
        return findings.Alternative(text, token, _bytes(value, "bytes"), n_tokens)

    def add(self, value: dict[str, Any]) -> None:
        """Add a step."""
        if value["step"] != len(self.steps) + 1:
            raise ValueError(f"step is {cut(value['step'])} instead of {len(self.steps) + 1}")
        n_prompt = len(self.header.prompt)
        if self.steps:
            position = self.steps[-1].token.position + 1
        else:  # 1 if the trace has the steps of the prompt's own tokens
            position = 1 if value["position"] == 1 else n_prompt
        token = _token(value, position)
        if position < n_prompt and token != self.header.prompt[position]:
            raise ValueError(f"its token at position {position} is not that of the prompt")
        objects = _objects(value, "rows")
        if tuple(row["measure"] for row in objects) != self.header.measures:
            raise ValueError("its measures are not those of the header")
        rows = tuple(self._row(row, position) for row in objects)
        effects = tuple(
            _read(findings.Effect, effect, source=self._source(effect, position))
            for effect in _objects(value, "effects")
        )
        kept = value.get("kept")
        if position == len(self.tokens):
            self.tokens.append(token)
        self.steps.append(
            _read(
                findings.TraceStep,
                value | {"text": value["certain_text"], "finish": value["finish_reason"]},
                index=len(self.steps),
                token=token,
                rows=rows,
                effects=effects,
                candidates=_candidates(value),
                lens=self._lens(value.get("lens")),
                is_given=_checked(value.get("given", False), bool, "given"),
                changes_S=self._changes(value, rows),
                kept=None if kept is None else _read(findings.Kept, _object(kept, "kept")),
            )
        )

    def _changes(
        self, value: dict[str, Any], rows: Sequence[events.Row]
    ) -> NDArray[np.float32] | None:
        if value.get("changes") is None:
            return None
        changes = [_checked(change, float, "changes") for change in _list(value, "changes")]
        if len(changes) != len(rows[0].weights_S):
            raise ValueError(
                f"changes must be a number for each of {len(rows[0].weights_S)} tokens"
            )
        return np.array(changes, np.float32)

    def _lens(self, value: Any) -> findings.Lens | None:
        if value is None:
            return None
        value = _object(value, "lens")
        layer = _checked(value["layer"], int | None, "lens.layer")
        top = tuple(_candidates({"lens.top": one}, "lens.top") for one in _lists(value, "top"))
        numbers = tuple(
            _checked(number, float, "log_probability")
            for number in _list(value, "log_probabilities")
        )
        if not all(top) or len(top) != self.header.n_layer or len(numbers) != len(top):
            raise ValueError(f"lens must have {self.header.n_layer} layers")
        if layer is not None and layer >= len(top):
            raise ValueError(f"lens.layer is {layer} of {len(top)} layers")
        return findings.Lens(layer, numbers, top)

    def trace(self, footer: dict[str, Any] | None) -> findings.Trace:
        """Return the whole trace; a footer of None means that it was interrupted."""
        end = findings.TraceFooter(len(self.tokens) - len(self.header.prompt), None, 0.0, None)
        if footer is not None:
            reason = footer["finish_reason"]
            is_cut = reason == INTERRUPTED
            finish = None if is_cut else _checked(reason, FinishReason, "finish_reason")
            cause = footer["cause"]
            if cause is not None:
                cause = _read(findings.CauseCheck, _object(cause, "cause"))
            workings = tuple(map(self._working, _objects({"workings": []} | footer, "workings")))
            end = _read(findings.TraceFooter, footer, finish=finish, cause=cause, workings=workings)
        return findings.Trace(self.header, tuple(self.steps), end)

    def _working(self, value: dict[str, Any]) -> findings.HeadWorking:
        n_tokens, d_head = len(self.tokens), self.header.d_head
        arrays = {}
        for name, field in WORKING_ARRAYS.items():
            numbers = np.frombuffer(_bytes(value, name), "<f4")
            # The last token may be past the end of the context.
            sizes = (n_tokens * d_head, (n_tokens - 1) * d_head)
            if numbers.size not in sizes or not np.isfinite(numbers).all():
                raise ValueError(f"workings.{name} must be {n_tokens} x {d_head} numbers")
            arrays[field] = numbers.reshape(-1, d_head).astype(np.float32)
        if len({len(array) for array in arrays.values()}) > 1:
            raise ValueError("workings must have as many keys and values as queries")
        working = _read(findings.HeadWorking, value, **arrays)
        if working.layer >= self.header.n_layer or working.head >= self.header.n_head:
            raise ValueError(f"workings has head {working.layer}.{working.head}, which is not one")
        return working

    def _source(self, value: dict[str, Any], n_view: int) -> events.Source:
        position = _checked(value["position"], int, "position")
        if position >= n_view:
            raise ValueError(f"position {position} is not one of {n_view} tokens")
        return _read(events.Source, value, token=self.tokens[position])

    def _row(self, value: dict[str, Any], n_view: int) -> events.Row:
        weights_S = np.frombuffer(_bytes(value, "weights"), "<f4")
        if len(weights_S) != n_view or not np.isfinite(weights_S).all():
            raise ValueError(f"weights must be a number for each of {n_view} tokens")
        heads = value["heads"]
        parts = _object(value.get("parts", {}), "parts")
        return _read(
            events.Row,
            {field: value[name] for name, field in ROW_FIELDS.items()}
            | {"whole": value.get("whole")},
            measure=value["measure"],
            is_signed=facts_of(value["measure"]).is_signed,
            parts={name[:80]: _checked(parts[name], float, "parts") for name in parts},
            sources=tuple(self._source(source, n_view) for source in _objects(value, "sources")),
            weights_S=weights_S.astype(np.float32),
            heads=None if heads is None else self._heads(_object(heads, "heads"), n_view),
        )

    def _heads(self, value: dict[str, Any], n_view: int) -> findings.HeadRows:
        shape = (self.header.n_layer, self.header.n_head)
        arrays: dict[str, NDArray[Any]] = {}
        for name, field in HEAD_FIELDS.items():
            try:
                with np.errstate(over="ignore"):  # inf is refused below
                    array = np.array(value[name], np.int32 if name == "positions" else np.float32)
            except (ValueError, TypeError, OverflowError):
                raise ValueError(f"heads.{name} must be lists of numbers") from None
            n_axes = 3 if field in ("positions", "weights") else 2
            if array.shape[:2] != shape or array.ndim != n_axes or not np.isfinite(array).all():
                raise ValueError(f"heads.{name} has another shape, or NaN")
            arrays[field] = array
        positions = arrays["positions"]
        if positions.shape != arrays["weights"].shape:
            raise ValueError("heads.positions must each have a weight")
        if positions.size and not 0 <= positions.min() <= positions.max() < n_view:
            raise ValueError("heads.positions has one that does not exist")
        return findings.HeadRows(**arrays)


def _token(value: dict[str, Any], position: int) -> events.Token:
    if value["position"] != position:
        raise ValueError(f"position {cut(value['position'])} is where {position} should be")
    return events.Token(position, _checked(value["token"], int, "token"), _bytes(value, "bytes"))


def _candidates(value: dict[str, Any], name: str = "candidates") -> tuple[findings.Candidate, ...]:
    """Return a list of candidates; files before they existed have none."""
    return tuple(
        findings.Candidate(
            _checked(one["token"], int, "token"),
            _bytes(one, "bytes"),
            _checked(one["log_probability"], float, "log_probability"),
        )
        for one in (_objects(value, name) if name in value else ())
    )


def _bytes(value: dict[str, Any], name: str) -> bytes:
    try:
        return base64.b64decode(_checked(value[name], str, name), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name} is not base64: {error}") from None


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object: it is {cut(value)}")
    return value


def _list(value: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(value[name], list):
        raise ValueError(f"{name} must be a list: it is {cut(value[name])}")
    return cast(list[Any], value[name])


def _lists(value: dict[str, Any], name: str) -> list[list[Any]]:
    return [_list({name: item}, name) for item in _list(value, name)]


def _objects(value: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [_object(item, name) for item in _list(value, name)]


@cache
def _type_hints(cls: type) -> dict[str, Any]:
    others = {"InterventionConfig": Any, "HeadSelection": Any}  # built by their own names
    return get_type_hints(cls, vars(events) | vars(findings) | vars(analysis_config) | others)


def _read(cls: type[T], value: dict[str, Any], **given: Any) -> T:
    """Build a dataclass from an object with a key for each field but the ``given`` ones."""
    hints = _type_hints(cls).items()  # type: ignore[arg-type]
    read = {name: _checked(value[name], hint, name) for name, hint in hints if name not in given}
    return cls(**read, **given)


def _checked(value: Any, hint: Any, name: str) -> Any:
    """Return a JSON value if it has the type of an annotation.

    Integers must be at least 0, and seeds below 2**63, all else below 2**31; floats must be finite
    as float32; unions are of one type and None.

    Raises: ValueError naming the field.
    """
    if get_origin(hint) in (Union, UnionType):
        if value is None:
            return None
        hint = get_args(hint)[0]
    expected = getattr(hint, "__name__", str(hint))
    if get_origin(hint) is Literal:
        is_valid, expected = value in get_args(hint), f"one of {', '.join(get_args(hint))}"
    elif hint is float:
        low = 0 if name == "seconds" else -_LARGEST_NUMBER
        high = _ROUNDING if name == "log_probability" else _LARGEST_NUMBER
        is_valid = type(value) in (int, float) and low <= value <= high  # NaN is not
        expected = f"a number from {low:g} to {high:g}"
    elif hint is int:
        end = 2**63 if name == "seed" else 2**31
        is_valid, expected = type(value) is int and 0 <= value < end, f"an integer in [0, {end})"
    else:
        is_valid = isinstance(value, hint)
    if not is_valid:
        raise ValueError(f"{name} is not {expected}: it is {cut(value)}")
    return float(value) if hint is float else value
