"""Lines of a trace for measures other than the attention weight.

With several measures in shares, each number of a line is shown for all of them.

For a signed measure, numbers have a sign and the unit of the measure: a line shows the sink, the
sources, the rest of the row, the contributions from no position ("other": MLPs, embedding, biases,
heads that were not chosen), and the sum of all these.
"""

from collections.abc import Sequence
from typing import Any

from minigpt.tracing.analysis_config import Measure, facts_of
from minigpt.tracing.config import DIGITS
from minigpt.tracing.events import ROUNDING, Row, Source
from minigpt.tracing.lines import ColumnWidths, TraceLayout
from minigpt.tracing.spans import SHARE_WIDTH, Line, bar, fit, heat, percent
from minigpt.tracing.wrapping import SIGNED_WIDTH, signed, upright_bar


def layout_class(measures: Sequence[Measure]) -> type[TraceLayout]:
    """Return the class of the layout for some measures."""
    return SignedLayout if facts_of(measures[0]).is_signed else SharesLayout


class SharesLayout(TraceLayout):
    """Column layout of a trace for one or more measures in shares."""

    def _set_widths(self, widths: ColumnWidths, is_bytes: bool) -> None:
        super()._set_widths(widths, is_bytes)
        if len(self.measures) == 1:
            return
        added = (len(self.measures) - 1) * (SHARE_WIDTH + 1)
        # A bar of one cell after each number, instead of one wide bar.
        self.source_width += added + (len(self.measures) - 1 - widths.bar if widths.bar else 0)
        if not widths.is_bare:
            self.sink_width += added
            self.left_width += added
            self.rest_width += added
            self.right_width += added

    def _titles(self) -> list[str]:
        by = " and ".join(self.measures)
        initials = "/".join(measure[0] for measure in self.measures)
        names = [f"token, share by {by}", f"token, {by}", f"token, {initials}", "token"]
        return [f"the earlier {names[0]}", *names]

    def _sink(self, rows: Sequence[Row]) -> str:
        return " ".join(percent(row.sink) for row in (rows[:1] if self.widths.is_bare else rows))

    def _source(self, source: Source, rows: Sequence[Row], names: Sequence[str]) -> Line:
        if len(rows) == 1:
            return super()._source(source, rows, names)
        position = source.token.position
        token = fit(self.name_of(source.token, names), self.source_token_width)
        spans = [(f" {position:>{self.position_width}} ", "dim"), (token, heat(source.weight))]
        for share in (source.weight, *(float(row.weights_S[position]) for row in rows[1:])):
            drawn = upright_bar(share) if self.widths.bar else ""
            spans.append((f" {percent(share)}{drawn}", heat(share)))
        return spans

    def _rest(self, rows: Sequence[Row], sources: Sequence[Source]) -> str:
        rests = [rows[0].rest or 0.0]
        positions = [source.token.position for source in sources]
        for row in rows[1:]:
            rest = row.total - row.sink - sum(float(row.weights_S[p]) for p in positions)
            rests.append(rest if rest > ROUNDING else 0.0)
        return " ".join(map(percent, rests))


class SignedLayout(TraceLayout):
    """Column layout of a trace for one signed measure."""

    share_width = SIGNED_WIDTH

    def _set_widths(self, widths: ColumnWidths, is_bytes: bool) -> None:
        super()._set_widths(widths, is_bytes)
        self.has_whole = bool(facts_of(self.measures[0]).sums_to) and not widths.is_bare
        self.right_width = self.rest_width * (3 if self.has_whole else 1)

    def _titles(self) -> list[str]:
        unit = facts_of(self.measures[0]).unit
        contribution = f"contribution in {unit}"
        names = [f"token, {contribution}", f"token, {unit}", "token"]
        return [f"the earlier {names[0]}", *names]

    def _right_heading(self) -> str:
        names = ("rest", "other", "sum") if self.has_whole else ("rest",)
        return "".join(f"{name:>{self.rest_width}}" for name in names if self.rest_width)

    def _sink(self, rows: Sequence[Row]) -> str:
        return signed(rows[0].sink)

    def _source(self, source: Source, rows: Sequence[Row], names: Sequence[str]) -> Line:
        position, size = source.token.position, _relative_size(source.weight, rows[0])
        token = fit(self.name_of(source.token, names), self.source_token_width)
        drawn = f" {bar(size, self.widths.bar)}" if self.widths.bar else ""
        return [
            (f" {position:>{self.position_width}} ", "dim"),
            (f"{token} {signed(source.weight)}{drawn}", heat(size)),
        ]

    def _right(self, rows: Sequence[Any], sources: Sequence[Source]) -> Line:
        [row] = rows
        numbers = [row.rest or 0.0]
        if self.has_whole and row.whole is not None:
            numbers += [row.whole - row.total, row.whole]
        spaced = (f" {signed(number)}" for number in numbers if self.rest_width)
        return [("".join(spaced), "dim")]


def _relative_size(number: float, row: Row) -> float:
    """Return the magnitude of a number relative to the largest in its row, in [0, 1]."""
    number, largest = round(number, DIGITS), abs(row.sink)
    if row.sources:  # in descending order, without the sink
        largest = max(largest, abs(row.sources[0].weight))
    largest = round(largest, DIGITS)
    return min(abs(number) / largest, 1.0) if largest else 0.0
