"""A run as a terminal shows it while it trains: a chart of its losses, its numbers, a bar."""

import math
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from minigpt.commands.output import aligned
from minigpt.commands.plot.chart import Point, Series, draw_chart
from minigpt.commands.status_line import FREE_CELLS, StatusLine
from minigpt.training.reports.curves import LossCurves

TRAIN_LOSS, VAL_LOSS = "train loss", "val loss"
_MARK, _ASCII_MARK = "●", "*"
_TRAIN_STYLE, _VAL_STYLE = "#4c9bc6", "#e0561f"
_CHART_LINES = 8
_WIDEST = 100
# Where there is less room than this, one line says it all, and the rest of the screen is free.
_NARROWEST, _LOWEST = 76, 20
_MOST_POINTS = 200


class ThinnedCurve:
    """A curve that stays cheap to draw: of many points there are only means of neighbours."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self._latest: list[Point] = []
        self._n_each = 1

    def add(self, x: float, y: float) -> None:
        """Add a point; it is seen when as many have come as each point stands for.

        One that is no finite number has no place.
        """
        if not math.isfinite(y):
            return
        self._latest.append((x, y))
        if len(self._latest) < self._n_each:
            return
        self.points.append(_mean(self._latest))
        self._latest = []
        if len(self.points) == _MOST_POINTS:
            # A list of its own: another thread may be drawing the old one.
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [_mean(pair) for pair in pairs]
            self._n_each *= 2


def _mean(points: Sequence[Point]) -> Point:
    xs, ys = zip(*points, strict=True)
    return sum(xs) / len(xs), sum(ys) / len(ys)


class TrainingPanel:
    """What rich draws again and again; without numbers, or on a small terminal, the line alone."""

    def __init__(self, line: StatusLine) -> None:
        """Args: line, drawn at the bottom, or alone."""
        self.line = line
        self.train = ThinnedCurve()
        self.val = ThinnedCurve()
        self._numbers: Mapping[str, str] = {}
        self._bar_facts: Sequence[str] = ()
        self._chart: tuple[object, list[Text]] | None = None

    def go_on_with(self, curves: LossCurves) -> None:
        """Take in what was before the run was resumed."""
        for thinned, points in ((self.train, curves.train), (self.val, curves.val)):
            for point in points:
                thinned.add(point.steps, point.loss)

    def update(self, numbers: Mapping[str, str], bar_facts: Sequence[str]) -> None:
        """Show a table of these numbers under their names, and these facts beside the bar.

        The names ``TRAIN_LOSS`` and ``VAL_LOSS`` have the looks of their curves.
        """
        self._numbers, self._bar_facts = numbers, bar_facts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw for the size of this moment."""
        width, is_ascii = min(options.max_width - FREE_CELLS, _WIDEST), options.ascii_only
        if not self._numbers or width < _NARROWEST or options.size.height < _LOWEST:
            yield self.line
            return
        yield from self._curves(width, is_ascii=is_ascii)
        yield from self._table(width, is_ascii=is_ascii)
        yield self.line.draw(width, is_ascii=is_ascii, facts=self._bar_facts)

    def _curves(self, width: int, *, is_ascii: bool) -> list[Text]:
        train, val = self.train.points, self.val.points
        # rich draws four times a second: curves that have not moved are not worked out again.
        key = train[-1:], val[-1:], width, is_ascii
        if self._chart is None or self._chart[0] != key:
            mark = _ASCII_MARK if is_ascii else _MARK
            series = [Series(train, _TRAIN_STYLE), Series(val, f"bold {_VAL_STYLE}", mark)]
            chart = draw_chart(series, width, _CHART_LINES, x_unit="steps", is_ascii=is_ascii)
            self._chart = key, chart
        return self._chart[1]

    def _table(self, width: int, *, is_ascii: bool) -> Iterator[Text]:
        mark = _ASCII_MARK if is_ascii else _MARK
        heads = {
            TRAIN_LOSS: (TRAIN_LOSS, _TRAIN_STYLE),
            VAL_LOSS: (f"{mark} {VAL_LOSS}", _VAL_STYLE),
        }
        rows = [
            [Text(*heads.get(name, (name, "dim"))) for name in self._numbers],
            [Text(number) for number in self._numbers.values()],
        ]
        return aligned(rows, ["right"] * len(self._numbers), width)
