"""Untrusted traces: --replay and --diff show them or name the damaged line and field."""

import json
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_values import VALUES, changed, places, values
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_traces import small_trace

from minigpt.commands.attention_trace.recorded import replay, show_diff
from minigpt.commands.attention_trace.targets import Targets
from minigpt.errors import DataError, MinigptError
from minigpt.rings import ring
from minigpt.tracing.analysis.dense import writing_rows
from minigpt.tracing.analysis.reader import read_traces
from minigpt.tracing.analysis_config import AnalysisConfig
from minigpt.tracing.file import to_json_line
from minigpt.tracing.views import ViewOptions

TRACE = small_trace(
    max_new_tokens=3, measure="both", has_heads=True, n_verified=1, roles=True, n_sources=2
)
LINES: list[Any] = [
    json.loads(to_json_line(event)) for event in (TRACE.header, *TRACE.steps, TRACE.footer)
]
PLACES = [(i, place) for i, line in enumerate(LINES) for place in places(line)]
FEW = [(i, place) for i, place in PLACES if i in (0, 1, len(LINES) - 1)][::3]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def try_out(path: Path) -> str:
    """Read, show and compare a trace; return the error message if it is refused."""
    try:
        read_traces(path)
    except DataError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert "not valid in a trace" in message
        assert len(message) < 600, message[:80]
        return message
    for refusing in (
        lambda: replay(path, Targets(view="lines"), AnalysisConfig()),
        lambda: show_diff(path, path, as_json=False),
    ):
        with suppress(MinigptError):
            refusing()
    return ""


def test_the_unchanged_trace_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert try_out(write(tmp_path / "t.jsonl", LINES)) == ""
    assert len(PLACES) > 400


@pytest.mark.parametrize(
    ("line", "place", "value", "says"),
    [
        (0, ("n_head",), 10**9, "n_layer * n_head is 2 * 1000000000"),
        (0, ("n_layer",), 10**9, "n_layer * n_head is 1000000000 * 4"),
        (0, ("n_layer",), 10**400, "n_layer is not an integer in [0, 2147483648)"),
        (0, ("d_model",), 2**31, "d_model is not an integer"),
        (0, ("sampling",), 5, "sampling must be an object: it is 5"),
        (0, ("sampling", "temperature"), 10**400, "sampling.temperature is too large"),
        (0, ("sampling", "max_new_tokens"), 10**400, "max_new_tokens must be in [0, 2**63)"),
        (0, ("sink", "position"), 2**31, "sink.position is not an integer"),
        (0, ("sink",), [], "sink must be an object: it is []"),
        (0, ("measures",), "weight", "measures must be a list: it is 'weight'"),
        (0, ("heads",), None, "heads is not str: it is None"),
        (0, ("roles",), 5, "roles must be a list: it is 5"),
        (0, ("seed",), 2**63, "seed is not an integer in [0, 9223372036854775808)"),
        (0, ("prompt", 0, "bytes"), 5, "bytes is not str: it is 5"),
        (0, ("prompt", 0, "token"), 10**400, "token is not an integer in [0, 2147483648)"),
        (1, ("step",), -1, "step is -1 instead of 1"),
        (1, ("position",), 2**31, "position 2147483648 is where 12 should be"),
        (1, ("log_probability",), 1e308, "log_probability is not a number from"),
        (1, ("log_probability",), 10**400, "log_probability is not a number from"),
        (1, ("rows",), 5, "rows must be a list: it is 5"),
        (1, ("rows", 0, "weights"), 5, "weights is not str"),
        (1, ("rows", 0, "sources", 0, "position"), 2**31, "position is not an integer"),
        (1, ("rows", 0, "heads", "positions"), [[[2**31]]], "heads.positions must be lists"),
        (1, ("rows", 0, "heads", "sink"), [[10**400]], "heads.sink must be lists of numbers"),
        (1, ("candidates",), [5], "candidates must be an object: it is 5"),
        (1, ("candidates",), [{"token": -1}], "token is not an integer"),
        (1, ("lens",), 5, "lens must be an object: it is 5"),
        (1, ("lens",), {"layer": None, "top": [], "log_probabilities": []}, "lens must have"),
        (1, ("given",), 1, "given is not bool: it is 1"),
        (1, ("effects", 0, "control_of"), -1, "control_of is not an integer"),
        (-1, ("seconds",), float("nan"), "seconds is not a number from 0 to 3e+38: it is nan"),
        (-1, ("seconds",), -1.0, "seconds is not a number from 0 to 3e+38: it is -1.0"),
        (-1, ("cause",), 5, "cause must be an object: it is 5"),
        (-1, ("finish_reason",), "boredom", "finish_reason is not one of"),
    ],
)
def test_a_hostile_field_is_refused_by_name(
    line: int, place: tuple[Any, ...], value: Any, says: str, tmp_path: Path
) -> None:
    lines = [*LINES]
    lines[line] = changed(lines[line], place, value)
    message = try_out(write(tmp_path / "t.jsonl", lines))
    assert says in message
    assert f"line {line % len(lines) + 1} of" in message


@pytest.mark.integration
def test_a_header_that_claims_any_size_uses_little_memory(tmp_path: Path) -> None:
    for name in ("n_layer", "n_head", "n_kv_head", "d_model", "d_head", "n_verified"):
        header = changed(changed(LINES[0], ("roles",), None), ("heads",), "*.*")
        for size in (2**16, 10**6, 10**9, 2**31 - 1):
            path = write(tmp_path / "t.jsonl", [changed(header, (name,), size), LINES[-1]])
            tracemalloc.start()
            try_out(path)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 2**26, (name, size, peak)


def check(tmp_path: Path, line: int, place: tuple[Any, ...], value: Any) -> None:
    lines = [*LINES]
    lines[line] = changed(lines[line], place, value)
    try_out(write(tmp_path / "t.jsonl", lines))


@pytest.mark.integration
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.sampled_from(PLACES), values)
@example(
    (3, ("effects", 0, "control_of")), 0
)  # the prediction from the sources alone, without any source
def test_any_changed_trace_is_shown_or_refused_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: Any, value: Any
) -> None:
    check(tmp_path, *where, value)
    capsys.readouterr()


@pytest.mark.integration
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda t: t.encode("utf-8", "replace")))
def test_any_bytes_after_a_header_are_shown_or_refused_with_their_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(json.dumps(LINES[0]).encode() + b"\n" + data)
    with suppress(DataError):
        read_traces(path)
    path.write_bytes(data)
    with pytest.raises(DataError):
        read_traces(path)


@pytest.mark.torture
@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:12])
def test_every_value_in_every_field_of_a_trace_is_shown_or_refused(
    value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line, place in FEW:
        check(tmp_path, line, place, value)
        capsys.readouterr()


@pytest.mark.torture
@pytest.mark.parametrize("view", ["heads", "matrix", "page", "text"])
def test_every_view_shows_every_trace_that_is_accepted(view: str, tmp_path: Path) -> None:
    show: Callable[..., Any] = ring(f"tracing.views.{view}").show
    n_shown = 0
    for line, place in FEW:
        for value in VALUES:
            lines = [*LINES]
            lines[line] = changed(lines[line], place, value)
            try:
                [*traces] = read_traces(write(tmp_path / "t.jsonl", lines))
            except DataError:
                continue
            for trace in traces:
                n_shown += 1
                show(trace, ViewOptions())
    assert n_shown > 100


def hostile_dense() -> st.SearchStrategy[bytes]:
    """Return a strategy of files that replace one written by --dense."""
    numbers = st.integers(-(2**31), 2**31) | st.just(10**400)
    facts = st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "I32", "F64", "BF16", "F8_E5M2", "BOOL", "", None]),
            "shape": st.lists(numbers, max_size=4),
            "data_offsets": st.lists(numbers, max_size=3),
        },
    )
    headers = st.dictionaries(st.sampled_from(["rows", "offsets", "\x1b[2J", "a"]), facts)
    bodies = st.binary(max_size=64)

    def file(header: Any, body: bytes) -> bytes:
        data = json.dumps(header).encode()
        return len(data).to_bytes(8, "little") + data + body

    return st.binary(max_size=99) | st.builds(file, headers, bodies)


@pytest.fixture
def dense(tmp_path: Path) -> tuple[Path, Path]:
    """Return a trace and the file of its dense rows."""
    path = write(tmp_path / "t.jsonl", LINES)
    [trace] = read_traces(path)
    with writing_rows(tmp_path / "d", n_layer=2, n_head=4, metadata={}) as add:
        for step in trace.steps:
            add(torch.full((2, 4, len(step.row.weights_S)), 1 / len(step.row.weights_S)))
    return path, tmp_path / "d"


@pytest.mark.integration
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(hostile_dense())
def test_any_other_file_in_place_of_dense_rows_is_refused(
    dense: tuple[Path, Path], data: bytes
) -> None:
    path, rows = dense
    rows.write_bytes(data)
    with pytest.raises(DataError, match=r"another trace|is not a file of --dense") as caught:
        replay(path, Targets(view="lines", dense=rows), AnalysisConfig())
    assert len(str(caught.value)) < 500
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("value", [-1.0, 1.5, 1e38, float("nan"), float("inf")])
def test_dense_weights_outside_the_range_of_a_softmax_are_refused(
    value: float, dense: tuple[Path, Path]
) -> None:
    path, rows = dense
    replay(path, Targets(view="lines", dense=rows), AnalysisConfig())
    data = bytearray(rows.read_bytes())
    data[4096:4100] = np.float32(value).tobytes()
    rows.write_bytes(data)
    with pytest.raises(DataError, match="below 0, above 1, NaN or inf"):
        replay(path, Targets(view="lines", dense=rows), AnalysisConfig())


def test_a_dense_file_of_another_size_is_refused_before_it_is_read(
    dense: tuple[Path, Path],
) -> None:
    path, rows = dense
    n_bytes = 2**40
    facts = {"rows": {"dtype": "F32", "shape": [2**35, 2, 4], "data_offsets": [0, n_bytes]}}
    facts["offsets"] = {"dtype": "I32", "shape": [4], "data_offsets": [n_bytes, n_bytes + 16]}
    header = json.dumps(facts).encode()
    with rows.open("wb") as file:  # a sparse file
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + n_bytes + 16)
    with pytest.raises(DataError, match="another trace"):
        replay(path, Targets(view="lines", dense=rows), AnalysisConfig())
