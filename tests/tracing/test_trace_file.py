"""Writing and reading traces as JSON lines."""

import base64
import json
import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_traces import random_trace
from small_traces import header_of, small_trace, step_of

from minigpt.config import SamplingConfig
from minigpt.errors import DataError
from minigpt.tracing.analysis.reader import read_traces
from minigpt.tracing.events import Token
from minigpt.tracing.file import SCHEMA, to_json_line
from minigpt.tracing.findings import CONVENTION, Trace, TraceEvent

HOSTILE = [
    b"",
    b"\x00",
    b"\x1b[31mred\x07",
    b"\r\n\t",
    b'"}\n{"type":"footer"}',
    b"\\",
    b"\xff\xfe",
    "日本".encode()[:-1],
    "\u2028\u2029\u0085".encode(),
    "\u202eevil".encode(),
    b"</script><script>",
    "👩‍👧".encode(),
    bytes(range(256)),
]
TOKENS = [Token(i, 1000 + i, data) for i, data in enumerate(HOSTILE)]


def events_of(trace: Trace) -> list[TraceEvent]:
    return [trace.header, *trace.steps, trace.footer]


def lines_of(trace: Trace) -> list[Any]:
    return [parsed(to_json_line(event)) for event in events_of(trace)]


def parsed(line: str) -> dict[str, Any]:
    """Parse strictly: one line, ASCII, no NaN."""
    assert line.isascii()
    assert line.isprintable()
    assert len(line.splitlines()) == 1

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    value = json.loads(line, parse_constant=refuse)
    assert isinstance(value, dict)
    return value


def test_a_trace_is_a_header_steps_and_a_footer() -> None:
    trace = small_trace("aé", n_sources=3, heads="0.*,1.3", measure="both")
    header, *steps, footer = lines_of(trace)
    assert header["schema"] == SCHEMA
    assert header["convention"] == CONVENTION
    assert (header["heads"], header["measures"]) == ("0.*,1.3", ["weight", "norm"])
    assert header["sink"] == {"position": 0, "rule": "first"}
    assert header["prompt"] == [
        {"position": 0, "token": 97, "text": "a", "bytes": "YQ=="},
        {"position": 1, "token": 0xC3, "text": "\ufffd", "bytes": "ww=="},
        {"position": 2, "token": 0xA9, "text": "\ufffd", "bytes": "qQ=="},
    ]
    assert len(steps) == 9
    for number, (step, event) in enumerate(zip(steps, trace.steps, strict=True)):
        assert (step["type"], step["step"], step["position"]) == ("step", number + 1, number + 3)
        assert step["finish_reason"] == ("length" if number == 8 else None)
        assert math.exp(step["log_probability"]) == pytest.approx(step["probability"], abs=2e-6)
        for row, ours in zip(step["rows"], event.rows, strict=True):
            weights = [source["weight"] for source in row["sources"]]
            assert weights == [round(source.weight, 6) for source in ours.sources]
            # Numbers are written with six digits.
            assert row["sink"] + sum(weights) + row["rest"] == pytest.approx(1, abs=5e-6)
            whole = np.frombuffer(base64.b64decode(row["weights"]), "<f4")
            assert whole.tolist() == ours.weights_S.tolist()
    assert (footer["type"], footer["n_tokens"]) == ("footer", 9)
    assert footer["finish_reason"] == "length"
    assert footer["worst_product_error"] < 1e-5


def test_the_bytes_of_any_token_are_stored_exactly() -> None:
    value = parsed(to_json_line(step_of(b"x", HOSTILE)))
    for data, source in zip(HOSTILE, value["rows"][0]["sources"], strict=True):
        assert base64.b64decode(source["bytes"], validate=True) == data
        assert source["text"] == data.decode("utf-8", "replace")


def test_the_rest_of_a_maximum_is_null() -> None:
    trace = small_trace(reduce="max", max_new_tokens=2)
    _, step, _, footer = lines_of(trace)
    assert step["rows"][0]["rest"] is None
    assert footer["worst_row_sum_error"] is None


def test_a_hostile_prompt_and_name_stay_on_one_line() -> None:
    header = header_of(
        model="a\nb\u2028\x1b",
        seed=2**63 - 1,
        sampling=SamplingConfig(stop=("\x1b\n",)),
        prompt=tuple(TOKENS),
    )
    value = parsed(to_json_line(header))
    assert value["model"] == "a\nb\u2028\x1b"
    assert value["seed"] == 2**63 - 1


def written(path: Path, *traces: Trace) -> Path:
    path.write_text("".join(f"{to_json_line(event)}\n" for t in traces for event in events_of(t)))
    return path


def assert_close(value: Any, expected: Any) -> None:
    """Check equality, with a tolerance for numbers computed from rounded ones."""
    if isinstance(expected, dict):
        assert value.keys() == expected.keys()
        for key in expected:
            assert_close(value[key], expected[key])
    elif isinstance(expected, list):
        for part, expected_part in zip(value, expected, strict=True):
            assert_close(part, expected_part)
    elif isinstance(expected, float):
        assert value == pytest.approx(expected, abs=5e-6)
    else:
        assert value == expected


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"reduce": "max", "measure": "norm"},
        {"measure": "both", "has_heads": True, "n_sources": 3},
        {"reduce": "rollout", "sink": 2},
    ],
    ids=str,
)
def test_a_written_trace_is_read_back_unchanged(config: dict[str, Any], tmp_path: Path) -> None:
    first, second = small_trace(**config), small_trace(seed=5, **config)
    read = read_traces(written(tmp_path / "t.jsonl", first, second))
    assert [trace.header for trace in read] == [first.header, second.header]
    for trace, original in zip(read, (first, second), strict=True):
        assert trace.text == original.text
        assert trace.tokens == original.tokens
        for step, expected in zip(lines_of(trace)[1:-1], lines_of(original)[1:-1], strict=True):
            assert_close(step, expected)
        assert trace.footer.finish == original.footer.finish


@pytest.mark.integration
@given(
    n_prompt=st.integers(1, 5),
    n_generated=st.integers(0, 4),
    n_sources=st.integers(0, 6),
    texts=st.lists(st.text(), max_size=4),
    measures=st.sampled_from([("weight",), ("norm",), ("weight", "norm")]),
    has_heads=st.booleans(),
    has_effects=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    model=st.text(),
    sink_rule=st.sampled_from(["first", "given", "detected"]),
)
@settings(max_examples=50, deadline=None)
def test_rewriting_a_trace_file_gives_the_same_bytes(**facts: Any) -> None:
    made = random_trace(**facts)
    with TemporaryDirectory() as folder:
        path = written(Path(folder) / "t.jsonl", made)
        data = path.read_bytes()
        (read,) = read_traces(path)
        assert written(path, read).read_bytes() == data
    assert (read.header, read.tokens) == (made.header, made.tokens)


def test_a_truncated_trace_is_read_up_to_the_last_complete_line(tmp_path: Path) -> None:
    trace = small_trace()
    path = written(tmp_path / "t.jsonl", trace)
    lines = path.read_text().splitlines(keepends=True)
    for end in (1, 4, len(lines) - 1):
        for tail in ("", lines[end][:40]):
            path.write_text("".join(lines[:end]) + tail)
            (read,) = read_traces(path)
            assert len(read.steps) == end - 1
            assert read.footer.finish is None
            assert read.footer.n_tokens == end - 1


def damages() -> dict[str, Callable[[list[Any]], Any]]:
    def setting(line: int, *path: str | int, to: Any) -> Callable[[list[Any]], Any]:
        def damage(lines: list[Any]) -> None:
            place = lines[line]
            for part in path[:-1]:
                place = place[part]
            place[path[-1]] = to

        return damage

    return {
        "missing header": lambda lines: lines.pop(0),
        "another schema": setting(0, "schema", to="minigpt-trace/99"),
        "unknown type": setting(2, "type", to="stop"),
        "a list": lambda lines: lines.__setitem__(1, []),
        "sink outside the prompt": setting(0, "sink", "position", to=99),
        "head out of range": setting(0, "heads", to="7.*"),
        "layer count of the wrong type": setting(0, "n_layer", to="2"),
        "token at the wrong position": setting(2, "position", to=99),
        "invalid base64": setting(2, "bytes", to="*"),
        "source in the future": setting(2, "rows", 0, "sources", 0, "position", to=99),
        "row too short": setting(2, "rows", 0, "weights", to="AAAAAA=="),
        "number of the wrong type": setting(2, "log_probability", to="-1"),
        "unknown measure": setting(0, "measures", to=["score"]),
        "unknown reduction": setting(0, "reduce", to="median"),
        "name of the wrong type": setting(0, "model", to=["x"]),
        "roles of too few heads": setting(0, "roles", to=[[]]),
        "text of the wrong type": setting(2, "certain_text", to=None),
        "unknown finish reason": setting(2, "finish_reason", to="<b>"),
        "empty effect": setting(2, "effects", to=[{}]),
        "missing row": setting(2, "rows", to=[]),
        "a step lost in the middle": lambda lines: lines.pop(3),
        "the last steps lost": lambda lines: lines.__delitem__(slice(-3, -1)),
        "missing field": lambda lines: lines[2].pop("certain_text"),
        "heads of the wrong shape": setting(2, "rows", 0, "heads", "sink", to=[[0.5]]),
        "heads that attend to the future": setting(
            2, "rows", 0, "heads", "positions", to=[[[99] * 3] * 4] * 2
        ),
    }


@pytest.mark.parametrize("damage", damages().values(), ids=damages().keys())
def test_a_damaged_trace_is_a_data_error_that_names_the_line(
    damage: Callable[[list[Any]], Any], tmp_path: Path
) -> None:
    lines = lines_of(small_trace(has_heads=True, n_sources=3))
    damage(lines)
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.raises(DataError, match=r"^line \d+ of .*t\.jsonl.* is not valid in a trace"):
        read_traces(path)


@pytest.mark.parametrize("options", [{"prompt_rows": True}, {"max_new_tokens": 0}])
def test_a_trace_that_lost_its_last_rows_of_the_prompt_is_a_data_error(
    options: dict[str, Any], tmp_path: Path
) -> None:
    path = written(tmp_path / "t.jsonl", small_trace(**options))
    lines = path.read_text().splitlines(keepends=True)
    n_steps = len(lines) - 2
    assert len(read_traces(path)[0].steps) == n_steps
    path.write_text("".join([*lines[:-2], lines[-1]]))
    with pytest.raises(DataError, match=f"{n_steps - 1} of {n_steps} steps come before its"):
        read_traces(path)


def test_a_file_that_is_not_a_trace_is_a_data_error(tmp_path: Path) -> None:
    for name, data in (("empty", b""), ("binary", b"\xff\xfe"), ("text", b"hello\n")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=name):
            read_traces(tmp_path / name)
    with pytest.raises(DataError, match=r"it is not JSON\. Name a file written by --out\."):
        read_traces(tmp_path / "text")
    for name in ("none", "."):
        with pytest.raises(DataError):
            read_traces(tmp_path / name)
