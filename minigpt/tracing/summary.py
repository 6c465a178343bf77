"""Lines above and below a trace: model, prompt, column legend, checks, and how it ended."""

from collections.abc import Sequence

from minigpt.format import count
from minigpt.rings import ring
from minigpt.text.escape import token_name
from minigpt.text.joined import JoinedTokens
from minigpt.tracing.analysis_config import Measure, facts_of
from minigpt.tracing.events import Token
from minigpt.tracing.findings import TraceFooter, TraceHeader
from minigpt.tracing.head_lists import HeadSelection
from minigpt.tracing.lines import TraceLayout
from minigpt.tracing.spans import Line, cell_len, encodable, fit
from minigpt.tracing.wrapping import fit_end, fit_start, one_line_label, wrapped

_LABEL_WIDTH = 9
_PROMPT_LINES = 6
"""Maximum number of lines that list the tokens of the prompt."""
_NAME_WIDTH = 10
"""Maximum width of a token in that list, in cells."""
_TOLERANCE = 1e-3
"""Largest error of a check that is not mentioned: rounding of float32."""
_LARGEST_ERROR = 2e-2
"""Largest error with which a check passes: rounding of bfloat16."""

_ENDINGS = {
    "length": "the token limit was reached",
    "stop": "a stop string was found",
    "end_of_text": "the model ended the text",
    "context": "the context window is full",
    None: "interrupted",
}


def header_lines(header: TraceHeader, width: int, encoding: str = "utf-8") -> list[Line]:
    """Return the lines above a trace: model, measure, options and the prompt's tokens."""
    room = width - _LABEL_WIDTH
    lines: list[Line] = [
        [("model    ", "dim"), (fit_start(one_line_label(header.model), room), "plain")],
        [("measure  ", "dim"), (fit_end(measured(header), room), "plain")],
    ]
    if header.intervention is not None:
        lines += wrapped(one_line_label(str(header.intervention)), width, label="changed  ")
    if header.sink_rule != "first":
        lines += wrapped(f"position {header.sink}, {header.sink_rule}", width, label="sink     ")
    if header.roles is not None or header.n_verified or header.against is not None:
        lines += ring("tracing.analysis.lines").header_lines(header, width)
    lines += _prompt_lines(header.prompt, width, encoding)
    if header.sampling.max_new_tokens:
        text = f"from {len(header.prompt)} on: generated tokens"
        lines.append([(" " * _LABEL_WIDTH, "plain"), (fit_end(text, room), "dim")])
    return lines


def legend(layout: TraceLayout, header: TraceHeader) -> list[Line]:
    """Return lines that explain the visible columns of a layout."""
    measures = header.measures
    by, facts = " and ".join(measures), facts_of(measures[0])
    what = f"share of position {header.sink} by {by}"
    if facts.is_signed:
        what = f"contribution of position {header.sink}, in {facts.unit}"
    elif by == "weight":
        what = f"attention on position {header.sink}"
    sink = f"sink: {what}"
    if measures[0] == "weight":
        sink += ", where heads look when nothing else matches"
    parts = ["prob: probability of the token", sink]
    if layout.rest_width:
        parts.append("rest: all positions not shown")
    if facts.is_signed:
        if facts.sums_to and not layout.widths.is_bare:
            logit = "logit" if header.against is None else "difference of logits"
            heads = ", other heads" if facts.has_heads and not header.selection.is_all else ""
            parts.append(f"other: {facts.other_parts}{heads}; sum: the {logit}")
    elif layout.widths.has_entropy:
        parts.append("bits: entropy of the row (3: as if spread evenly over 8)")
    return wrapped("; ".join(parts), layout.width, label="columns  ")


def footer_lines(
    footer: TraceFooter, header: TraceHeader, width: int = 80, *, n_rows: int | None = None
) -> list[Line]:
    """Return the lines below a trace: why it ended, and the results of its checks.

    Args: n_rows, the number of steps. None if only generated tokens have steps.
    """
    n_given = 0 if n_rows is None else n_rows - footer.n_tokens
    noun = "generated token" if n_given else "token"
    counts = [count(footer.n_tokens, noun)] if header.sampling.max_new_tokens else []
    if n_given:
        counts.insert(0, f"{count(n_given, 'token')} of the prompt")
    if header.sampling.max_new_tokens or footer.finish is None:
        counts.append(_ENDINGS[footer.finish])
    ending = f"{'; '.join(counts)}{_checks(footer)}."
    cause = facts_of(header.measures[0]).caveat
    if footer.cause is not None:
        is_all = header.n_verified == "all"
        lines = ring("tracing.analysis.lines")
        cause = lines.cause_in_words(footer.cause, header.measures[0], is_all=is_all)
    return [[], *wrapped(ending, width), *(wrapped(cause, width) if cause else [])]


def _checks(footer: TraceFooter) -> str:
    """Describe the checks that passed and failed, with errors that are not negligible."""
    checks = [
        ("every row sums to 100%", footer.worst_row_sum_error),
        ("rows times values give the heads' outputs", footer.worst_product_error),
    ]
    passed, failed = [], ""
    for what, error in checks:
        if error is None:
            continue
        if not error <= _LARGEST_ERROR:
            failed += f"; check failed: {what} only within {error:.0e}"
        else:
            passed.append(what if error <= _TOLERANCE else f"{what} within {error:.0e}")
    return (f"; checks passed: {' and '.join(passed)}" if passed else "") + failed


def _prompt_lines(prompt: Sequence[Token], width: int, encoding: str) -> list[Line]:
    """List the tokens of the prompt with their positions in columns, omitting the middle."""
    names = JoinedTokens(token.data for token in prompt).names
    names = [encodable(name, encoding) for name in names]
    room = max(width - _LABEL_WIDTH, 1)
    number_width = len(str(len(names) - 1))
    name_width = min(
        _NAME_WIDTH, max(map(cell_len, names), default=1), max(room - number_width - 1, 1)
    )
    per_line = max(1, (room + 2) // (number_width + name_width + 3))

    def line(start: int) -> Line:
        """Return the line that begins with the token at a position."""
        spans: Line = []
        for position in range(start, min(start + per_line, len(names))):
            gap = "  " if position > start else ""
            spans += [
                (f"{gap}{position:>{number_width}} ", "dim"),
                (fit(names[position], name_width), "token"),
            ]
        text, style = spans[-1]
        return [*spans[:-1], (text.rstrip(), style)]

    starts = range(0, len(names), per_line)
    if len(starts) <= _PROMPT_LINES:
        lines = [line(start) for start in starts] or [[]]
    else:
        n_after = (_PROMPT_LINES - 1) // 2
        n_before = _PROMPT_LINES - 1 - n_after
        before, after = starts[:n_before], starts[-n_after:]
        n_hidden = after[0] - starts[n_before]
        hidden = (fit_end(f"... {n_hidden} more tokens ...", room), "dim")
        lines = [*map(line, before), [hidden], *map(line, after)]
    labels = ["prompt", *[""] * (len(lines) - 1)]
    return [
        [(label.ljust(_LABEL_WIDTH), "dim"), *line]
        for label, line in zip(labels, lines, strict=True)
    ]


def measured(header: TraceHeader, measures: Sequence[Measure] | None = None) -> str:
    """Describe the rows, as in ``weight, mean of all 8 heads (2 layers x 4)``."""
    names = " and ".join(header.measures if measures is None else measures)
    if header.against is not None:
        names += f" against {token_name(header.against.data)}"
    selection: HeadSelection = header.selection
    facts = facts_of(header.measures[0])
    if not facts.has_heads:
        return f"{names} in {facts.unit}, through the whole model"
    if facts.is_signed:
        names, how = f"{names} in {facts.unit}", "sum"
    else:
        how = "rollout of the mean" if header.reduce == "rollout" else header.reduce
    if selection.n_chosen == 1 and header.reduce != "rollout":
        return f"{names} of head {selection.as_text()}"
    if selection.is_all:
        layers = f"{header.n_layer} layer{'s' if header.n_layer > 1 else ''}"
        return f"{names}, {how} of all {selection.n_chosen} heads ({layers} x {header.n_head})"
    return f"{names}, {how} of {selection.n_chosen} heads ({selection.as_text()})"
