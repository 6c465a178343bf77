"""A trace as lines for a terminal, step by step: text with style names, without escape codes.

Each generated token has one line: step, token, its probability, the weight on the sink, the sources
with the most weight (each with position, weight and bar), the weight on the rest, and the entropy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minigpt.rings import ring
from minigpt.text.escape import token_name
from minigpt.tracing.config import DIGITS
from minigpt.tracing.events import Row, Source, Token
from minigpt.tracing.findings import TraceStep, shown_probability
from minigpt.tracing.spans import SHARE_WIDTH, Line, bar, encodable, fit, heat, percent

_STEP_WIDTH = 4
_BYTE_WIDTH = 4  # \xe2
_ENTROPY_WIDTH = 5


@dataclass(frozen=True)
class ColumnWidths:
    """Widths of the columns of a line."""

    token: int
    """Width of a token, in cells."""
    bar: int
    """Width of a bar, in cells. 0 for no bars."""
    has_entropy: bool = False
    is_bare: bool = False
    """Whether the column for the rest is omitted."""


_WIDE = (ColumnWidths(9, 3, has_entropy=True), ColumnWidths(9, 3), ColumnWidths(7, 3))
_ALL = (*_WIDE, ColumnWidths(5, 2), ColumnWidths(4, 0), ColumnWidths(4, 0, is_bare=True))


def make_layout(width: int, *, measures: tuple[str, ...], **sizes: Any) -> "TraceLayout":
    """Return the layout of a trace for some measures. Args: sizes, as for TraceLayout."""
    kind = TraceLayout
    if measures != ("weight",):
        kind = ring("tracing.analysis.layouts").layout_class(measures)
    return kind(width, measures=measures, **sizes)


class TraceLayout:
    """Column layout of a trace for a given terminal width and vocabulary."""

    share_width = SHARE_WIDTH
    """Width of a row's numbers, in cells."""

    def __init__(
        self,
        width: int,
        *,
        measures: tuple[str, ...] = ("weight",),
        vocab_size: int,
        n_positions: int,
        n_sources: int | None = None,
        encoding: str = "utf-8",
    ) -> None:
        """Choose the widths of the columns.

        Args: width, of the terminal in cells, 40 or more; measures, of each row, in order;
            vocab_size, small for byte tokens; n_positions, the maximum number of positions;
            n_sources, the number of sources per token, wrapped if they do not fit, or None for as
            many as fit in one line; encoding, of the terminal.
        """
        self.width, self.measures, self.encoding = width, measures, encoding
        self.position_width = max(3, len(str(n_positions - 1)))
        is_bytes = vocab_size <= 300
        # The widest columns that fit two sources, else the widest that fit one.
        choices = [(2, widths) for widths in _WIDE] + [(1, widths) for widths in _ALL]
        for n_needed, widths in choices:
            self._set_widths(widths, is_bytes)
            n_fitting = (width - self.left_width - self.right_width) // self.source_width
            if n_fitting >= n_needed:
                break
        n_fitting = max(1, n_fitting)
        self.n_sources = n_fitting if n_sources is None else n_sources
        self.per_line = max(1, min(n_fitting, self.n_sources))

    def _set_widths(self, widths: ColumnWidths, is_bytes: bool) -> None:
        self.widths = widths
        self.source_token_width = min(widths.token, _BYTE_WIDTH) if is_bytes else widths.token
        self.token_width = max(len("token"), self.source_token_width)
        self.sink_width = self.share_width
        self.left_width = _STEP_WIDTH + self.token_width + SHARE_WIDTH + self.sink_width + 5
        self.rest_width = 0 if widths.is_bare else 1 + self.share_width
        self.right_width = self.rest_width + (_ENTROPY_WIDTH if widths.has_entropy else 0)
        bar_width = 1 + widths.bar if widths.bar else 0
        self.source_width = (
            self.position_width + self.source_token_width + self.share_width + bar_width + 3
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

    def _titles(self) -> list[str]:
        """Return alternative titles for the source columns, longest first."""
        share = "share of the attention"
        return [f"the earlier token, {share}", f"token, {share}", "token, share", "token"]

    def _right_heading(self) -> str:
        # "rest" is one cell wider than its column, so it also fills the space before it.
        rest = "rest".ljust(self.rest_width) if self.rest_width else ""
        return rest + ("bits".rjust(_ENTROPY_WIDTH) if self.widths.has_entropy else "")

    def step(self, step: TraceStep, names: Sequence[str] = ()) -> list[Line]:
        """Return the lines of a step: one, or more if its sources wrap or an analysis adds some.

        Args: names, of all tokens by position. Empty to show tokens as bytes.
        """
        row = step.row
        name = fit(self.name_of(step.token, names), self.token_width)
        first: Line = [
            (f"{step.index + 1:>{_STEP_WIDTH}} ", "dim"),
            (name, "plain" if step.is_given else "token"),
            (f"  {percent(shown_probability(step.log_probability))}", "plain"),
            (f"  {self._sink(step.rows)}", "dim"),
        ]
        begins = range(0, max(1, len(row.sources)), self.per_line)
        parts = [row.sources[i : i + self.per_line] for i in begins]
        lines = [first] + [self._indent() for _ in parts[1:]]
        for line, sources in zip(lines, parts, strict=True):
            for source in sources:
                line.extend(self._source(source, step.rows, names))
        lines[-1].append((" " * ((self.per_line - len(parts[-1])) * self.source_width), "plain"))
        lines[-1].extend(self._right(step.rows, row.sources))
        if step.has_lines_below:
            lines += ring("tracing.analysis.lines").lines_below(step, self, names)
        return lines

    def _indent(self) -> Line:
        return [(" " * self.left_width, "plain")]

    def _sink(self, rows: Sequence[Row]) -> str:
        return percent(rows[0].sink)

    def _source(self, source: Source, rows: Sequence[Row], names: Sequence[str]) -> Line:
        token = fit(self.name_of(source.token, names), self.source_token_width)
        drawn = f" {bar(source.weight, self.widths.bar)}" if self.widths.bar else ""
        return [
            (f" {source.token.position:>{self.position_width}} ", "dim"),
            (f"{token} {percent(source.weight)}{drawn}", heat(source.weight)),
        ]

    def _right(self, rows: Sequence[Row], sources: Sequence[Source]) -> Line:
        """Return the right end of a line: the rest of each row, and the first row's entropy."""
        spans: Line = [(" " * self.rest_width, "plain")]
        if self.rest_width and rows[0].rest is not None:
            spans = [(f" {self._rest(rows, sources)}", "dim")]
        if self.widths.has_entropy:
            spans.append((f"{round(rows[0].entropy, DIGITS):{_ENTROPY_WIDTH}.1f}", "dim"))
        return spans

    def _rest(self, rows: Sequence[Row], sources: Sequence[Source]) -> str:
        return percent(rows[0].rest or 0.0)

    def name_of(self, token: Token, names: Sequence[str]) -> str:
        """Return the name to show for a token, or its bytes if there are no names."""
        name = names[token.position] if names else token_name(token.data)
        return encodable(name, self.encoding)
