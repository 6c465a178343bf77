"""A trace as lines for a terminal, step by step: text with style names, without escape codes.

One line per generated token: step, token, its probability, the weight on the sink, the earlier
tokens with the most weight, each with position, weight and a bar, the weight on all other
positions, and the entropy of the row. With two measures, each weight is shown by both. Below a
token whose sources were knocked out, a line shows the changes of its probability.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minigpt.format import percent
from minigpt.rings import ring
from minigpt.text.escape import JoinedTokens, visible
from minigpt.tracing.config import Measure, facts_of
from minigpt.tracing.events import (
    Candidate,
    Row,
    Source,
    Token,
    TraceFooter,
    TraceHeader,
    TraceStep,
)
from minigpt.tracing.spans import (
    SHARE_WIDTH,
    Line,
    bar,
    cell_len,
    fit,
    fit_end,
    fit_start,
    heat,
    one_line,
    upright_bar,
    wrapped,
)

KNOCKOUTS = {
    "key": "its key is hidden from that query, and the other weights grow to sum to 1",
    "value": "its value is set to 0 for that query, and its weight is kept",
}
"""Descriptions of the kinds of knockout."""
_STEP_WIDTH = 4
_BYTE_WIDTH = 4  # \xe2
_ENTROPY_WIDTH = 5
_LABEL_WIDTH = 9
_PROMPT_LINES = 6
"""Largest number of lines that list the tokens of the prompt."""
_NAME_WIDTH = 10
"""Largest width of a token in that list, in cells."""
_TOLERANCE = 1e-3
"""Error of a check up to which it is not mentioned: what float32 explains."""
_LARGEST_ERROR = 2e-2
"""Error of a check up to which it passed: what bfloat16 explains."""

_ENDINGS = {
    "length": "the token limit was reached",
    "stop": "a stop string was found",
    "end_of_text": "the model ended the text",
    "context": "the context window is full",
    None: "interrupted",
}


@dataclass(frozen=True)
class Form:
    """Widths of the parts of a line."""

    word: int
    """Width of a token, in cells."""
    bar: int
    """Width of a bar, in cells. 0 for no bars."""
    has_entropy: bool = False
    is_bare: bool = False
    """Whether the rest and the second measure of the sink are left out."""


_ROOMY = (Form(9, 3, has_entropy=True), Form(9, 3), Form(7, 3))
_ALL = (*_ROOMY, Form(5, 2), Form(4, 0), Form(4, 0, is_bare=True))


def make_layout(width: int, *, measures: tuple[Measure, ...], **sizes: Any) -> "TraceLayout":
    """Return the columns of a trace by these measures; arguments as of TraceLayout."""
    kind = TraceLayout
    if facts_of(measures[0]).is_signed:
        kind = ring("tracing.analysis.signed").SignedLayout
    return kind(width, measures=measures, **sizes)


class TraceLayout:
    """The columns of a trace for a given width and vocabulary."""

    share_width = SHARE_WIDTH
    """Width of a number of a row, in cells."""

    def __init__(
        self,
        width: int,
        *,
        vocab_size: int,
        n_positions: int,
        n_sources: int | None = None,
        measures: tuple[Measure, ...] = ("weight",),
    ) -> None:
        """Choose the widths of the columns.

        Args: width, of the terminal in cells, 40 or more; vocab_size, small for byte tokens, which
            need less room; n_positions, the largest number of positions; n_sources, sources per
            token, wrapped if they do not fit, or None for one full line; measures, of the trace.
        """
        self.width, self.measures = width, measures
        self.position_width = max(3, len(str(n_positions - 1)))
        is_bytes = vocab_size <= 300
        # The roomiest form that fits two sources, else the roomiest that fits one.
        forms = [(2, form) for form in _ROOMY] + [(1, form) for form in _ALL]
        for wanted, form in forms:
            self._take(form, is_bytes)
            n_fitting = (width - self.left_width - self.right_width) // self.source_width
            if n_fitting >= wanted:
                break
        n_fitting = max(1, n_fitting)
        self.n_sources = n_fitting if n_sources is None else n_sources
        self.per_line = max(1, min(n_fitting, self.n_sources))

    def _take(self, form: Form, is_bytes: bool) -> None:
        self.form = form
        self.source_token_width = min(form.word, _BYTE_WIDTH) if is_bytes else form.word
        self.token_width = max(len("token"), self.source_token_width)
        n_measures = len(self.measures)
        shares_width = n_measures * (self.share_width + 1) - 1
        self.sink_width = self.share_width if form.is_bare else shares_width
        self.left_width = _STEP_WIDTH + self.token_width + SHARE_WIDTH + self.sink_width + 5
        self.rest_width = 0 if form.is_bare else 1 + shares_width
        self.right_width = self.rest_width + (_ENTROPY_WIDTH if form.has_entropy else 0)
        if n_measures > 1:
            bars_width = n_measures if form.bar else 0
        else:
            bars_width = 1 + form.bar if form.bar else 0
        self.source_width = (
            self.position_width + self.source_token_width + shares_width + bars_width + 3
        )

    def heading(self) -> Line:
        """Return the column titles."""
        token = "token".ljust(self.token_width)
        sink = "sink".ljust(self.sink_width + 1)
        left = f"{'step':>{_STEP_WIDTH}} {token} prob {sink}"
        room = self.per_line * self.source_width
        at = f"{'at':>{self.position_width + 1}} "
        title = next((at + title for title in self._titles() if len(at + title) < room), "")
        sources = (title if self.n_sources else "").ljust(room)
        return [(left + sources + self._right_heading(), "dim")]

    def legend(self, header: TraceHeader) -> list[Line]:
        """Return lines that explain the columns that are shown."""
        parts = ["prob: probability of the token", self._sink_in_words(header)]
        parts += self._right_in_words()
        return wrapped("; ".join(parts), self.width, label="columns  ")

    def _sink_in_words(self, header: TraceHeader) -> str:
        what = f"{self._what()} position {header.sink}"
        if self.measures[0] == "weight":
            what += ", where heads look when nothing else matches"
        return f"sink: {what}"

    def _what(self) -> str:
        by = " and ".join(self.measures)
        return "attention on" if by == "weight" else f"share by {by} of"

    def _right_in_words(self) -> list[str]:
        words = ["rest: all positions not shown"] if self.rest_width else []
        if self.form.has_entropy:
            words.append("bits: entropy of the row (3: as if spread evenly over 8)")
        return words

    def _titles(self) -> list[str]:
        """Return titles of the columns of sources, the longest first."""
        by = " and ".join(self.measures)
        share = "share of the attention" if by == "weight" else f"share by {by}"
        initials = "/".join(measure[0] for measure in self.measures)
        if len(self.measures) == 1:
            initials = "token"
        return [f"the earlier token, {share}", f"token, {share}", f"by {by}", initials]

    def _right_heading(self) -> str:
        # "rest" is one cell wider than its column, and takes the blank before it.
        rest = "rest".ljust(self.rest_width) if self.rest_width else ""
        return rest + ("bits".rjust(_ENTROPY_WIDTH) if self.form.has_entropy else "")

    def step(self, step: TraceStep, names: Sequence[str] = ()) -> list[Line]:
        """Return the line of a generated token, and more if its sources or effects need them.

        Args: names, of all tokens by position; none to show each token by its bytes.
        """
        row = step.row
        sinks = [one.sink for one in step.rows]
        first: Line = [
            (f"{step.index + 1:>{_STEP_WIDTH}} ", "dim"),
            (
                fit(name_of(step.token, names), self.token_width),
                "plain" if step.is_given else "token",
            ),
            (f"  {percent(step.probability)}", "plain"),
            (f"  {self._shares(sinks[:1] if self.form.is_bare else sinks)}", "dim"),
        ]
        parts = [
            row.sources[i : i + self.per_line]
            for i in range(0, max(1, len(row.sources)), self.per_line)
        ]
        lines = [first] + [self._indent() for _ in parts[1:]]
        for line, sources in zip(lines, parts, strict=True):
            for source in sources:
                line.extend(self._source(source, step.rows, names))
        lines[-1].append((" " * ((self.per_line - len(parts[-1])) * self.source_width), "plain"))
        lines[-1].extend(self._right(step.rows, row.sources))
        if step.candidates:
            lines += self._candidates(step.candidates)
        if step.lens is not None:
            lines += ring("tracing.analysis.lines").lens_lines(step.lens, self)
        if step.effects:
            lines += ring("tracing.analysis.lines").effect_lines(step, self, names)
        return lines

    def _candidates(self, candidates: Sequence[Candidate]) -> list[Line]:
        """Return the most probable tokens in columns, below the token of a step."""
        width = self.token_width + SHARE_WIDTH + 2
        per_line = max(1, (self.width - self.left_width) // width)
        lines: list[Line] = []
        for first in range(0, len(candidates), per_line):
            label = "" if first else "candidates"
            lines.append([(fit(label.rjust(self.left_width), self.left_width), "dim")])
            for one in candidates[first : first + per_line]:
                token = fit(visible(one.data), self.token_width)
                lines[-1].append((f" {token} {percent(one.probability)}", heat(one.probability)))
        return lines

    def _shares(self, shares: Sequence[float]) -> str:
        return " ".join(percent(share) for share in shares)

    def _indent(self) -> Line:
        return [(" " * self.left_width, "plain")]

    def _source(self, source: Source, rows: Sequence[Row], names: Sequence[str]) -> Line:
        position = source.token.position
        shares = [source.weight, *(float(row.weights_S[position]) for row in rows[1:])]
        token = fit(name_of(source.token, names), self.source_token_width)
        spans: Line = [(f" {position:>{self.position_width}} ", "dim")]
        if len(shares) == 1:
            drawn = f" {bar(source.weight, self.form.bar)}" if self.form.bar else ""
            return [*spans, (f"{token} {percent(source.weight)}{drawn}", heat(source.weight))]
        spans.append((token, heat(source.weight)))
        for share in shares:
            drawn = upright_bar(share) if self.form.bar else ""
            spans.append((f" {percent(share)}{drawn}", heat(share)))
        return spans

    def _right(self, rows: Sequence[Row], sources: Sequence[Source]) -> Line:
        """Return the end of a line: the rest of each row, and the entropy of the first."""
        spans: Line = []
        if self.rest_width and rows[0].rest is not None:
            positions = [source.token.position for source in sources]
            rests = [rows[0].rest, *(rest_beside(row, positions) for row in rows[1:])]
            spans.append((f" {self._shares(rests)}", "dim"))
        else:
            spans.append((" " * self.rest_width, "plain"))
        if self.form.has_entropy:
            spans.append((f"{rows[0].entropy:{_ENTROPY_WIDTH}.1f}", "dim"))
        return spans


def name_of(token: Token, names: Sequence[str]) -> str:
    """Return what to show of a token: its name, or its bytes if there are no names."""
    return names[token.position] if names else visible(token.data)


def rest_beside(row: Row, positions: Sequence[int]) -> float:
    """Return the weight of a row that is neither on the sink nor on the given positions."""
    return max(0.0, row.total - row.sink - sum(float(row.weights_S[p]) for p in positions))


def header_lines(header: TraceHeader, width: int) -> list[Line]:
    """Return the lines above a trace: model, measure, options and the prompt's tokens."""
    room = width - _LABEL_WIDTH
    lines: list[Line] = [
        [("model    ", "dim"), (fit_start(one_line(header.model), room), "plain")],
        [("measure  ", "dim"), (fit_end(measured(header), room), "plain")],
    ]
    if header.intervention is not None:
        lines += wrapped(one_line(str(header.intervention)), width, label="changed  ")
    if header.sink_rule != "first":
        lines += wrapped(f"position {header.sink}, {header.sink_rule}", width, label="sink     ")
    if header.roles is not None or header.n_verified or header.against is not None:
        lines += ring("tracing.analysis.lines").header_lines(header, width)
    lines += _prompt_lines(header.prompt, width)
    if header.sampling.max_new_tokens:
        text = f"from {len(header.prompt)} on: generated tokens"
        lines.append([(" " * _LABEL_WIDTH, "plain"), (fit_end(text, room), "dim")])
    return lines


def footer_lines(footer: TraceFooter, width: int = 80, *, is_all: bool = False) -> list[Line]:
    """Return the lines below a trace: why it ended, and the results of its checks.

    Args: is_all, whether every position in view was knocked out.
    """
    ending = f"{footer.n_tokens} tokens; {_ENDINGS[footer.finish]}{_checks(footer)}."
    cause = "Attention shows where a head looked, not why a token was generated."
    if footer.cause is not None:
        cause = ring("tracing.analysis.lines").cause_in_words(footer.cause, is_all=is_all)
    return [[], *wrapped(ending, width), *wrapped(cause, width)]


def _checks(footer: TraceFooter) -> str:
    """Describe the results of the checks: what they say, and the error of one that failed."""
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


def _prompt_lines(prompt: Sequence[Token], width: int) -> list[Line]:
    """List the tokens of the prompt with their positions in columns, the middle left out."""
    names = JoinedTokens(token.data for token in prompt).names
    room = max(width - _LABEL_WIDTH, 1)
    number_width = len(str(len(names) - 1))
    name_width = min(
        _NAME_WIDTH, max(map(cell_len, names), default=1), max(room - number_width - 1, 1)
    )
    per_line = max(1, (room + 2) // (number_width + name_width + 3))
    starts = list(range(0, len(names), per_line))
    n_after = (_PROMPT_LINES - 1) // 2
    n_before = _PROMPT_LINES - 1 - n_after
    lines: list[Line] = [] if names else [[]]
    for row, start in enumerate(starts):
        if len(starts) > _PROMPT_LINES and n_before <= row < len(starts) - n_after:
            if row == n_before:
                n_hidden = starts[len(starts) - n_after] - start
                lines.append([(fit_end(f"... {n_hidden} more tokens ...", room), "dim")])
            continue
        lines.append([])
        for position in range(start, min(start + per_line, len(names))):
            gap = "  " if position > start else ""
            lines[-1] += [
                (f"{gap}{position:>{number_width}} ", "dim"),
                (fit(names[position], name_width), "token"),
            ]
        text, style = lines[-1][-1]
        lines[-1][-1] = (text.rstrip(), style)
    labels = ["prompt", *[""] * (len(lines) - 1)]
    return [
        [(label.ljust(_LABEL_WIDTH), "dim"), *line]
        for label, line in zip(labels, lines, strict=True)
    ]


def measured(header: TraceHeader, measures: Sequence[Measure] | None = None) -> str:
    """Describe the rows, as in ``weight, mean of all 8 heads (2 layers x 4)``."""
    names = " and ".join(header.measures if measures is None else measures)
    selection, facts = header.selection, facts_of(header.measures[0])
    if not facts.has_heads:
        return f"{names} in {facts.unit}, through the whole model"
    if facts.is_signed:
        names += f" in {facts.unit}"
    how = (
        "sum"
        if facts.is_signed
        else "rollout of the mean"
        if header.reduce == "rollout"
        else header.reduce
    )
    if selection.n_chosen == 1 and header.reduce != "rollout":
        return f"{names} of head {selection.as_text()}"
    if selection.is_all:
        layers = f"{header.n_layer} layer{'s' if header.n_layer > 1 else ''}"
        return f"{names}, {how} of all {selection.n_chosen} heads ({layers} x {header.n_head})"
    return f"{names}, {how} of {selection.n_chosen} heads ({selection.as_text()})"
