"""Traces of small models, and synthetic steps and headers for the views."""

import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from small_models import small_model

from minigpt.config import SamplingConfig
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.tracing.analysis_config import AnalysisConfig, facts_of
from minigpt.tracing.events import Source, Token
from minigpt.tracing.findings import Roles, Row, Trace, TraceFooter, TraceHeader, TraceStep
from minigpt.tracing.head_lists import select_heads
from minigpt.tracing.spans import Line
from minigpt.tracing.tracer import trace

WIDTHS = [40, 60, 80, 140]
"""Terminal widths."""
HOSTILE = [
    b"",
    b" ",
    b"\x00",
    b"\x1b[31mred\x1b[0m",
    b"\x1b]0;title\x07",
    b"\x9b31m",
    b"\r",
    b"\n\n\t",
    b"\x08\x08\x08",
    b"\x7f",
    b"\xff\xfe",
    "日本語の長い文字列".encode(),
    "日本".encode()[:-1],
    "🙂🙂🙂🙂🙂🙂".encode(),
    "👩‍👩‍👧‍👦".encode(),
    "e\u0301\u0301\u0301".encode(),
    "\u0301".encode(),
    "\u202eevil\u2066".encode(),
    "\u200b\u200d\ufeff\ufe0f".encode(),
    "\u2028\u2029\u0085\u00a0\u3000".encode(),
    "한국어".encode(),
    "\uff21\uff22".encode(),
    b"[bold red]markup[/]",
    b"a" * 99,
    "█▏…␣\\".encode(),
]
"""Tokens that could control a terminal, are invisible, or are wider than they look."""


def small_trace(
    prompt: str = "to be or not",
    *,
    layout: str = "llama-grouped",
    max_new_tokens: int = 9,
    seed: int = 4,
    context_length: int = 24,
    **config: Any,
) -> Trace:
    """Trace a random model with two layers of four heads and byte tokens."""
    header, *steps, footer = trace(
        small_model(layout, vocab_size=257, context_length=context_length),
        BytesTokenizer(),
        list(prompt.encode()),
        SamplingConfig(max_new_tokens=max_new_tokens, seed=seed),
        AnalysisConfig(**config),
        seed=seed,
        model_name="runs/small",
    )
    assert isinstance(header, TraceHeader)
    assert isinstance(footer, TraceFooter)
    return Trace(header, tuple(s for s in steps if isinstance(s, TraceStep)), footer)


def header_of(**changes: Any) -> TraceHeader:
    """Return a header of a model with one layer and one head."""
    facts: dict[str, Any] = {
        "model": "runs/small",
        "n_layer": 1,
        "n_head": 1,
        "n_kv_head": 1,
        "d_model": 8,
        "d_head": 8,
        "dtype": "float32",
        "kernel": "scaled_dot_product_attention",
        "score": "scaled_dot",
        "selection": select_heads(1, 1),
        "measures": ("weight",),
        "reduce": "mean",
        "sink": 0,
        "sink_rule": "first",
        "seed": 1,
        "sampling": SamplingConfig(),
        "prompt": (),
    }
    return TraceHeader(**(facts | changes))


def row_of(sources: Sequence[Source], n_positions: int, **changes: Any) -> Row:
    """Return a row with these sources; half of the attention goes to the sink."""
    weights_S = np.zeros(n_positions, np.float32)
    for source in sources:
        weights_S[source.token.position] = source.weight
    facts: dict[str, Any] = {
        "measure": "weight",
        "total": 1.0,
        "sink": 0.375,
        "own": 0.0,
        "prompt": 0.5,
        "generated": 0.5,
        "entropy": 1.0,
        "distance": 3.0,
        "sources": tuple(sources),
        "weights_S": weights_S,
    }
    facts |= changes
    return Row(is_signed=facts_of(facts["measure"]).is_signed, **facts)


def step_of(
    data: bytes, sources: Sequence[bytes], *, index: int = 0, position: int = 500, **changes: Any
) -> TraceStep:
    """Return a step whose sources, newest first, share half of its row."""
    shown = [
        Source(Token(position - 1 - i, 2, source), 0.5 / len(sources))
        for i, source in enumerate(sources)
    ]
    facts: dict[str, Any] = {
        "index": index,
        "token": Token(position, 1, data),
        "log_probability": -1.0,
        "rows": (row_of(shown, position),),
        "text": "",
        "finish": None,
    }
    return TraceStep(**(facts | changes))


def roles_of(**scores: Any) -> Roles:
    """Return the scores of a head without roles, except for the given ones."""
    facts: dict[str, Any] = dict.fromkeys(
        ("previous", "duplicate", "induction", "sink", "local"), 0.0
    )
    return Roles(**(facts | {"tag": ""} | scores))


def with_tokens(made: Trace, tokens: Sequence[bytes]) -> Trace:
    """Return the trace with its tokens replaced by these, repeated."""

    def token(place: int) -> Token:
        return Token(place, 0, tokens[place % len(tokens)])

    n_prompt = len(made.header.prompt)
    steps = tuple(replace(step, token=token(n_prompt + step.index)) for step in made.steps)
    header = replace(made.header, prompt=tuple(token(i) for i in range(n_prompt)))
    return replace(made, header=header, steps=steps)


def cells(text: str) -> int:
    """Return the width in cells; fail on combining and invisible characters."""
    for character in text:
        assert unicodedata.category(character)[0] not in "CM", repr(character)
        assert unicodedata.category(character) not in ("Zl", "Zp"), repr(character)
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def text_of(line: Line) -> str:
    return "".join(text for text, _ in line)
