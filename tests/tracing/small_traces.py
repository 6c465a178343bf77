"""Traces of small models, and steps and headers made up for what shows them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from small_models import small_model

from minigpt.config import SamplingConfig
from minigpt.text.tokenizer import bytes_tokenizer
from minigpt.tracing.events import Row, Source, Token, Trace, TraceFooter, TraceHeader, TraceStep
from minigpt.tracing.selection import select_heads
from minigpt.tracing.tracer import TraceConfig, trace


def small_trace(
    prompt: str = "to be or not",
    *,
    layout: str = "llama-grouped",
    max_new_tokens: int = 9,
    seed: int = 4,
    context_length: int = 24,
    **config: Any,
) -> Trace:
    """The trace of a model of random weights: two layers of four heads, bytes for tokens."""
    header, *steps, footer = trace(
        small_model(layout, vocab_size=257, context_length=context_length),
        bytes_tokenizer(),
        list(prompt.encode()),
        SamplingConfig(max_new_tokens=max_new_tokens, seed=seed),
        TraceConfig(**config),
        seed=seed,
        model_name="runs/small",
    )
    assert isinstance(header, TraceHeader)
    assert isinstance(footer, TraceFooter)
    return Trace(header, tuple(s for s in steps if isinstance(s, TraceStep)), footer)


def header_of(**changes: Any) -> TraceHeader:
    """A header of one layer of one head."""
    facts: dict[str, Any] = {
        "model": "runs/small",
        "n_layer": 1,
        "n_head": 1,
        "n_kv_head": 1,
        "d_model": 8,
        "d_head": 8,
        "dtype": "float32",
        "kernel": "scaled_dot_product_attention",
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
    """A row of which half went to the sink, or to these sources as they say."""
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
    return Row(**(facts | changes))


def step_of(
    data: bytes, sources: Sequence[bytes], *, index: int = 0, position: int = 500, **changes: Any
) -> TraceStep:
    """A step whose sources, the newest first, share half of its row."""
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
