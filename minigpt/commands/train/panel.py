"""The live panel of a training run on a terminal: loss curves, numbers and a progress bar."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from minigpt.commands.display.progress import FREE_CELLS, StatusLine
from minigpt.commands.plot.chart import Point, Series, draw_chart
from minigpt.commands.tables import aligned
from minigpt.format import short
from minigpt.training.events import EvalEvent, StepEvent
from minigpt.training.reports.curves import read_curves

TRAIN_LOSS, VAL_LOSS = "train loss", "val loss"
_MARK, _ASCII_MARK = "●", "*"
_TRAIN_STYLE, _VAL_STYLE = "#4c9bc6", "#e0561f"
_CHART_LINES = 8
_WIDEST = 100
# On smaller terminals, only the status line is drawn.
_NARROWEST, _LOWEST = 76, 20
_MOST_POINTS = 200


class ThinnedCurve:
    """A curve of at most a few hundred points, each the mean of consecutive measurements."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self._latest: list[Point] = []
        self._n_each = 1

    def add(self, x: float, y: float) -> None:
        """Add a measurement, unless it is NaN or inf."""
        if not math.isfinite(y):
            return
        self._latest.append((x, y))
        if len(self._latest) < self._n_each:
            return
        self.points.append(_mean(self._latest))
        self._latest = []
        if len(self.points) == _MOST_POINTS:
            # A new list, because another thread may be drawing the old one.
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [_mean(pair) for pair in pairs]
            self._n_each *= 2


def _mean(points: Sequence[Point]) -> Point:
    xs, ys = zip(*points, strict=True)
    return sum(xs) / len(xs), sum(ys) / len(ys)


class TrainingPanel:
    """Loss curves, a table of numbers and the status line, drawn by rich as events arrive."""

    def __init__(self, line: StatusLine) -> None:
        """Args: line, drawn at the bottom, or alone before the first step and if space is short."""
        self.line = line
        self.train = ThinnedCurve()
        self.val = ThinnedCurve()
        self._validation = {VAL_LOSS: "-", "bits/byte": "-"}
        self._numbers: dict[str, str] = {}
        self._bar_details: Sequence[str] = ()
        self._chart: tuple[object, list[Text]] | None = None

    def resume(self, run: Path) -> None:
        """Add the losses that a resumed run logged earlier."""
        curves = read_curves(run)
        for thinned, points in ((self.train, curves.train), (self.val, curves.val)):
            for point in points:
                thinned.add(point.steps, point.loss)

    def show_step(self, event: StepEvent, bar_details: Sequence[str]) -> None:
        """Add a step. Args: bar_details, texts next to the progress bar."""
        self.train.add(event.step, event.train_loss)
        self._bar_details = bar_details
        self._numbers = {
            TRAIN_LOSS: f"{event.train_loss:.3f}",
            **self._validation,
            "lr": f"{event.lr:.1e}",
            "grad norm": f"{event.grad_norm:.2f}",
            "tokens/s": short(event.tokens_per_s),
        }
        if event.mfu is not None:
            self._numbers["MFU"] = f"{event.mfu:.0%}"

    def show_evaluation(self, event: EvalEvent) -> None:
        """Add a validation loss."""
        self._validation[VAL_LOSS] = f"{event.val_loss:.3f}"
        self._validation["bits/byte"] = f"{event.bits_per_byte:.3f}"
        if self._numbers:  # the table agrees with the chart and the line above
            self._numbers |= self._validation
        self.val.add(event.step, event.val_loss)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw for the current size of the terminal."""
        width, is_ascii = min(options.max_width - FREE_CELLS, _WIDEST), options.ascii_only
        if not self._numbers or width < _NARROWEST or options.size.height < _LOWEST:
            yield self.line
            return
        yield from self._curves(width, is_ascii=is_ascii)
        yield from self._table(width, is_ascii=is_ascii)
        yield self.line.draw(width, is_ascii=is_ascii, details=self._bar_details)

    def _curves(self, width: int, *, is_ascii: bool) -> list[Text]:
        train, val = self.train.points, self.val.points
        # rich draws four times a second: unchanged curves are not drawn again.
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
