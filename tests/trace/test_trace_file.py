"""The trace as JSON lines: every field, exact bytes, nothing that breaks a line."""

import base64
import json
import math

import pytest
from small_models import small_model

from minigpt.config import SamplingConfig
from minigpt.text.tokenizer import bytes_tokenizer
from minigpt.trace.file import SCHEMA, to_json_line
from minigpt.trace.selection import select_heads
from minigpt.trace.tracer import (
    CONVENTION,
    Source,
    Token,
    TraceFooter,
    TraceHeader,
    TraceStep,
    trace,
)

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


def step_with(tokens: list[Token], **changes: object) -> TraceStep:
    facts = {
        "index": 3,
        "token": tokens[0],
        "log_probability": -0.5,
        "sink": 0.25,
        "sources": tuple(Source(token, 0.5 / len(tokens)) for token in tokens),
        "rest": 0.25,
        "text": "",
        "finish": None,
    }
    return TraceStep(**(facts | changes))  # type: ignore[arg-type]


def parsed(line: str) -> dict[str, object]:
    """Parse strictly: one line, ASCII, no NaN."""
    assert line.isascii()
    assert line.isprintable()
    assert len(line.splitlines()) == 1

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    value = json.loads(line, parse_constant=refuse)
    assert isinstance(value, dict)
    return value


def test_a_whole_trace_is_a_header_steps_and_a_footer() -> None:
    model = small_model("llama-grouped", vocab_size=257)
    sampling = SamplingConfig(max_new_tokens=9, stop=("\u2028",), seed=4)
    events = list(
        trace(
            model,
            bytes_tokenizer(),
            list("aé".encode()),
            sampling,
            selection=select_heads(2, 4, heads="0.*,1.3"),
            seed=4,
            n_sources=3,
            model_name="runs/\x1b[31m",
        )
    )
    header, *steps, footer = [parsed(to_json_line(event)) for event in events]
    assert header == {
        "type": "header",
        "schema": SCHEMA,
        "model": "runs/\x1b[31m",
        "n_layer": 2,
        "n_head": 4,
        "heads": "0.*,1.3",
        "reduce": "mean",
        "measure": "weight",
        "convention": CONVENTION,
        "sink": "position 0",
        "seed": 4,
        "sampling": {
            "max_new_tokens": 9,
            "temperature": 0.8,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "ignore_eos": False,
            "seed": 4,
            "stop": ["\u2028"],
            "num_samples": 1,
            "logprobs": 0,
            "overflow": "stop",
        },
        "prompt": [
            {"position": 0, "token": 97, "text": "a", "bytes": "YQ=="},
            {"position": 1, "token": 0xC3, "text": "\ufffd", "bytes": "ww=="},
            {"position": 2, "token": 0xA9, "text": "\ufffd", "bytes": "qQ=="},
        ],
    }
    assert len(steps) == 9
    for number, (step, event) in enumerate(zip(steps, events[1:-1], strict=True)):
        assert isinstance(event, TraceStep)
        assert list(step) == [
            "type",
            "step",
            "position",
            "token",
            "text",
            "bytes",
            "log_probability",
            "probability",
            "sink",
            "sources",
            "rest",
            "finish_reason",
        ]
        assert (step["type"], step["step"], step["position"]) == ("step", number + 1, number + 3)
        assert step["token"] == event.token.id
        assert step["finish_reason"] == ("length" if number == 8 else None)
        assert math.exp(step["log_probability"]) == pytest.approx(step["probability"], abs=2e-6)
        weights = [source["weight"] for source in step["sources"]]
        assert weights == [round(source.weight, 6) for source in event.sources]
        # Six digits each.
        assert step["sink"] + sum(weights) + step["rest"] == pytest.approx(1, abs=5e-6)
    assert set(footer) == {"type", "n_tokens", "finish_reason", "seconds", "worst_row_sum_error"}
    assert (footer["type"], footer["n_tokens"]) == ("footer", 9)
    assert footer["finish_reason"] == "length"


def test_the_bytes_of_any_token_come_back_exactly() -> None:
    value = parsed(to_json_line(step_with(TOKENS)))
    sources = value["sources"]
    assert isinstance(sources, list)
    for token, source in zip(TOKENS, sources, strict=True):
        assert base64.b64decode(source["bytes"], validate=True) == token.data
        assert source["text"] == token.data.decode("utf-8", "replace")
        assert (source["position"], source["token"]) == (token.position, token.id)


def test_a_maximum_has_null_for_its_rest() -> None:
    assert parsed(to_json_line(step_with(TOKENS, rest=None)))["rest"] is None
    footer = TraceFooter(n_tokens=0, finish=None, seconds=0.1, worst_row_sum_error=None)
    assert parsed(to_json_line(footer)) == {
        "type": "footer",
        "n_tokens": 0,
        "finish_reason": "interrupted",
        "seconds": 0.1,
        "worst_row_sum_error": None,
    }


def test_a_hostile_prompt_and_name_stay_on_one_line() -> None:
    header = TraceHeader(
        model="a\nb\u2028\x1b",
        n_layer=1,
        n_head=1,
        selection=select_heads(1, 1),
        reduce="max",
        seed=2**63 - 1,
        sampling=SamplingConfig(stop=("\x1b\n",)),
        prompt=tuple(TOKENS),
    )
    value = parsed(to_json_line(header))
    assert value["model"] == "a\nb\u2028\x1b"
    assert value["seed"] == 2**63 - 1
