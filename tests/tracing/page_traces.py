"""Synthetic traces for the page: any size, every feature, hostile texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from small_traces import header_of

from minigpt.tracing.analysis_config import Measure, facts_of
from minigpt.tracing.events import Source, Token
from minigpt.tracing.findings import (
    CauseCheck,
    Effect,
    HeadRows,
    Roles,
    Row,
    Trace,
    TraceFooter,
    TraceHeader,
    TraceStep,
)
from minigpt.tracing.head_lists import select_heads

BOTH: tuple[Measure, ...] = ("weight", "norm")

# Run as code, each would set window.pwned, open a dialog or load something.
HOSTILE = (
    "<script>window.pwned=1</script>",
    "</script><script>window.pwned=1</script>",
    "</ScRiPt ><script>window.pwned=1//",
    "<!--<script>",
    "--><script>window.pwned=1</script>",
    "<![CDATA[<script>window.pwned=1</script>]]>",
    "</title><script>window.pwned=1</script>",
    "</style><script>window.pwned=1</script>",
    "</textarea><script>window.pwned=1</script>",
    "</noscript><script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    "<img src=x onerror=alert(1)//",
    '"><img src=x onerror=window.pwned=1>',
    "'><img src=x onerror=window.pwned=1>",
    '" onmouseover="window.pwned=1" x="',
    "' onfocus='window.pwned=1' autofocus tabindex=0 '",
    "` onclick=window.pwned=1 `",
    "<svg onload=window.pwned=1>",
    "<svg><script>window.pwned=1</script></svg>",
    "<svg><animate onbegin=window.pwned=1 attributeName=x dur=1s>",
    "<svg><foreignObject><iframe srcdoc='<script>parent.pwned=1</script>'>",
    "<math><mtext><script>window.pwned=1</script>",
    "<iframe src=javascript:parent.pwned=1>",
    "<a href=javascript:window.pwned=1>click</a>",
    "javascript:window.pwned=1",
    "data:text/html,<script>window.pwned=1</script>",
    "<object data=data:text/html,<script>parent.pwned=1</script>>",
    "<embed src=https://example.invalid/x.swf>",
    "<link rel=stylesheet href=https://example.invalid/x.css>",
    "<meta http-equiv=refresh content='0;url=javascript:window.pwned=1'>",
    "<base href=https://example.invalid/>",
    "<form action=https://example.invalid/><button autofocus>",
    "<body onload=window.pwned=1>",
    "<details open ontoggle=window.pwned=1>",
    "<template><script>window.pwned=1</script></template>",
    "<style>@import 'https://example.invalid/x.css'</style>",
    "<div style='background:url(https://example.invalid/x.png)'>",
    "x:expression(window.pwned=1)",
    "&lt;script&gt;window.pwned=1&lt;/script&gt;",
    "&#60;img src=x onerror=window.pwned=1&#62;",
    "\\u003cscript\\u003ewindow.pwned=1\\u003c/script\\u003e",
    "$data ${window.pwned=1} {{constructor.constructor('window.pwned=1')()}}",
    "\u2028window.pwned=1\u2029",
    "\x00<script\x00>window.pwned=1</script>",
    "\u202e<tpircs>1=denwp.wodniw</tpircs>\u202c\u2066",
    "__proto__",
    "constructor",
    "\";window.pwned=1;//'",
)


def random_trace(
    n_prompt: int = 6,
    n_generated: int = 9,
    *,
    n_layer: int = 3,
    n_head: int = 4,
    n_sources: int = 5,
    measures: tuple[Measure, ...] = BOTH,
    texts: Sequence[str] = (),
    has_heads: bool = True,
    has_roles: bool = True,
    has_effects: bool = True,
    seed: int = 1,
    **header: Any,
) -> Trace:
    """Return a trace of random numbers; rows of heads and reduced rows are unrelated."""
    random = np.random.default_rng(seed)
    names = [text.encode() for text in texts] or [f" t{i}".encode() for i in range(1000)]
    tokens = [Token(i, i, names[i % len(names)]) for i in range(n_prompt + n_generated)]
    steps = []
    for index in range(n_generated):
        n_view = n_prompt + index
        rows = []
        for measure in measures:
            heads = _heads(random, (n_layer, n_head), n_view, n_sources) if has_heads else None
            rows.append(_row(random, measure, tokens[:n_view], n_sources, heads))
        effects = _effects(random, rows[0], tokens[:n_view]) if has_effects else ()
        steps.append(
            TraceStep(
                index=index,
                token=tokens[n_view],
                log_probability=-1 - index / 7,
                rows=tuple(rows),
                text=tokens[n_view].data.decode(),
                finish="length" if index == n_generated - 1 else None,
                effects=effects,
            )
        )
    return Trace(
        _header(tokens[:n_prompt], n_layer, n_head, measures, has_roles, header),
        tuple(steps),
        TraceFooter(
            n_tokens=n_generated,
            finish="length",
            seconds=1.0,
            worst_row_sum_error=1e-6,
            cause=CauseCheck(20, 18, 0.42, 0.06, 0.35) if has_effects else None,
        ),
    )


def _header(
    prompt: Sequence[Token],
    n_layer: int,
    n_head: int,
    measures: tuple[Measure, ...],
    has_roles: bool,
    changes: dict[str, Any],
) -> TraceHeader:
    tags = ("prev", "dup", "induc", "sink", "local", "")
    roles = tuple(
        tuple(
            Roles(0.5, 0.1, 0.2, 0.3, 0.4, tag=tags[(layer + head) % len(tags)])
            for head in range(n_head)
        )
        for layer in range(n_layer)
    )
    facts: dict[str, Any] = {
        "n_layer": n_layer,
        "n_head": n_head,
        "selection": select_heads(n_layer, n_head),
        "measures": measures,
        "prompt": tuple(prompt),
        "roles": roles if has_roles else None,
    }
    return header_of(**(facts | changes))


def _shares(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    shares = random.random(shape) ** 4
    return (shares / shares.sum(axis=-1, keepdims=True)).astype(np.float32)


def _row(
    random: np.random.Generator,
    measure: Measure,
    tokens: Sequence[Token],
    n_sources: int,
    heads: HeadRows | None,
) -> Row:
    weights_S = _shares(random, (len(tokens),))
    order = [i for i in np.argsort(-weights_S).tolist() if i != 0][:n_sources]
    return Row(
        measure=measure,
        is_signed=facts_of(measure).is_signed,
        total=1.0,
        sink=float(weights_S[0]),
        own=float(weights_S[-1]),
        prompt=0.75,
        generated=0.25,
        entropy=1.5,
        distance=2.5,
        sources=tuple(Source(tokens[i], float(weights_S[i])) for i in order),
        weights_S=weights_S,
        heads=heads,
    )


def _heads(
    random: np.random.Generator, shape: tuple[int, int], n_view: int, n_sources: int
) -> HeadRows:
    n_kept = min(n_sources, n_view - 1)
    weights = np.sort(_shares(random, (*shape, n_kept + 2)), axis=-1)[..., ::-1]
    starts = random.integers(0, max(1, n_view - 1), (*shape, 1))
    # Distinct positions from 1 on, in random order.
    positions = 1 + (starts + np.arange(n_kept) * 7919) % max(1, n_view - 1)
    if n_kept and (n_view - 1) % 7919 == 0:
        raise ValueError("7919 is to have no divisor in common with the number of positions")
    return HeadRows(
        sink=weights[..., 0],
        own=weights[..., -1],
        prompt=random.random(shape, np.float32),
        entropy=(random.random(shape) * np.log2(n_view)).astype(np.float32),
        distance=(random.random(shape) * (n_view - 1)).astype(np.float32),
        positions=positions.astype(np.int32),
        weights=weights[..., 1 : n_kept + 1],
    )


def _effects(random: np.random.Generator, row: Row, tokens: Sequence[Token]) -> tuple[Effect, ...]:
    sources = row.sources[:3]
    effects = [Effect(source, -float(random.random())) for source in sources]
    if len(tokens) > len(sources) + 1:
        others = [t for t in tokens[1:] if t.position not in {s.token.position for s in sources}]
        effects.append(Effect(Source(others[0], 0.01), float(random.normal() * 0.05), 0))
    return tuple(effects)
