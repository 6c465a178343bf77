"""Lines of a trace by a signed measure: numbers with a sign, in the unit of the measure.

A line has the number of the sink, the sources, the rest of the row, all that no position brought
("other": MLPs, embedding, biases, heads that were not chosen), and what these sum to.
"""

from collections.abc import Sequence

from minigpt.tracing.config import facts_of
from minigpt.tracing.events import Row, Source
from minigpt.tracing.lines import Form, TraceLayout, name_of
from minigpt.tracing.spans import SIGNED_WIDTH, Line, bar, fit, heat, signed

_SUM = "sum"


class SignedLayout(TraceLayout):
    """The columns of a trace by one signed measure."""

    share_width = SIGNED_WIDTH

    def _take(self, form: Form, is_bytes: bool) -> None:
        super()._take(form, is_bytes)
        self.has_whole = bool(facts_of(self.measures[0]).sums_to) and not form.is_bare
        self.right_width = self.rest_width * (3 if self.has_whole else 1)

    def _titles(self) -> list[str]:
        [measure] = self.measures
        unit = facts_of(measure).unit
        return [f"the earlier token, {measure} in {unit}", f"token, {unit}", unit]

    def _right_heading(self) -> str:
        names = ("rest", "other", _SUM) if self.has_whole else ("rest",)
        return "".join(f"{name:>{self.rest_width}}" for name in names if self.rest_width)

    def _shares(self, shares: Sequence[float]) -> str:
        return signed(shares[0])

    def _source(self, source: Source, rows: Sequence[Row], names: Sequence[str]) -> Line:
        position, size = source.token.position, _relative_size(source.weight, rows[0])
        token = fit(name_of(source.token, names), self.source_token_width)
        drawn = f" {bar(size, self.form.bar)}" if self.form.bar else ""
        return [
            (f" {position:>{self.position_width}} ", "dim"),
            (f"{token} {signed(source.weight)}{drawn}", heat(size)),
        ]

    def _right(self, rows: Sequence[Row], sources: Sequence[Source]) -> Line:
        [row] = rows
        numbers = [row.rest or 0.0]
        if self.has_whole and row.whole is not None:
            numbers += [row.whole - row.total, row.whole]
        spaced = (f" {signed(number)}" for number in numbers if self.rest_width)
        return [("".join(spaced), "dim")]


def _relative_size(number: float, row: Row) -> float:
    """Return the magnitude of a number relative to the largest of its row, in [0, 1]."""
    largest = abs(row.sink)
    if row.sources:  # in descending order, the sink left out
        largest = max(largest, abs(row.sources[0].weight))
    return min(abs(number) / largest, 1.0) if largest else 0.0
