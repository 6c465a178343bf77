"""Lines of a trace against the published JSON Schema."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from small_traces import small_trace

from minigpt.tracing.file import SCHEMA, to_json_line
from minigpt.tracing.findings import CauseCheck, Effect, Roles, Trace, TraceFooter

PATH = Path(__file__).resolve().parents[2] / "docs" / "trace.schema.json"
VALIDATOR = Draft202012Validator(json.loads(PATH.read_text()))


def lines_of(trace: Trace) -> list[Any]:
    return [json.loads(to_json_line(e)) for e in (trace.header, *trace.steps, trace.footer)]


def test_the_schema_is_valid_and_names_the_version_of_the_writer() -> None:
    Draft202012Validator.check_schema(VALIDATOR.schema)
    assert VALIDATOR.schema["$id"] == SCHEMA


def test_the_page_of_the_trace_file_names_every_field() -> None:
    page = PATH.with_name("trace-format.md").read_text(encoding="utf-8")
    assert [name for name in fields(VALIDATOR.schema) if f"`{name}`" not in page] == []


def fields(schema: Any) -> set[str]:
    """Return the names of all properties of a JSON Schema."""
    if not isinstance(schema, dict):
        return set().union(*map(fields, schema)) if isinstance(schema, list) else set()
    return {*schema.get("properties", ())}.union(*map(fields, schema.values()))


@pytest.mark.integration
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"reduce": "max", "measure": "norm", "n_sources": 0},
        {"measure": "both", "has_heads": True},
        {"reduce": "rollout", "sink": "auto", "heads": "0.1,1.*"},
        {"n_verified": 2, "roles": True, "context_length": 64},
        {"candidates": 2, "prompt_rows": True, "lens": True},
        {"measure": "logit", "against": "no", "has_heads": True, "heads": "0.1"},
        {"measure": "gradient"},
        {"measure": "integrated", "n_steps": 3},
    ],
    ids=str,
)
def test_every_line_of_a_trace_matches_the_schema(config: dict[str, Any]) -> None:
    for line in lines_of(small_trace("aé\x1b", **config)):
        VALIDATOR.validate(line)


def test_effects_roles_and_checks_match_the_schema() -> None:
    trace = small_trace(max_new_tokens=1)
    (step,) = trace.steps
    source = step.row.sources[0]
    effects = (Effect(source, -0.5), Effect(source, 0.25, control_of=0))
    object.__setattr__(step, "effects", effects)
    object.__setattr__(trace.header, "roles", ((Roles(0, 0, 1, 0, 0, "induc"),),))
    footer = TraceFooter(1, None, 0.5, None, None, CauseCheck(1, 1, 0.5, 0.25, None))
    lines = lines_of(Trace(trace.header, trace.steps, footer))
    for line in lines:
        VALIDATOR.validate(line)
    assert lines[1]["effects"][1]["control_of"] == 0


@pytest.mark.parametrize(
    ("line", "name"),
    [(0, "schema"), (0, "sink"), (1, "rows"), (1, "position"), (2, "finish_reason")],
)
def test_a_line_with_a_missing_or_unknown_field_violates_the_schema(line: int, name: str) -> None:
    value = lines_of(small_trace(max_new_tokens=1))[line]
    assert VALIDATOR.is_valid(value)
    assert not VALIDATOR.is_valid(value | {"surprise": 1})
    less = copy.deepcopy(value)
    del less[name]
    assert not VALIDATOR.is_valid(less)
