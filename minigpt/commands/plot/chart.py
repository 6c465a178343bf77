"""A text chart: curves as braille dots, single points as marks.

No charting library is used, because the same lines go to a pipe and into a display that rich
redraws, at a given width and in rich's styles.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from rich.text import Text

Point = tuple[float, float]
_DOTS_WIDE, _DOTS_HIGH = 2, 4
# Bit of each dot in a braille character, by row (top to bottom) and column of its cell.
_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BRAILLE = 0x2800
_ROWS_PER_TICK, _CELLS_PER_TICK = 2, 12
_AXES = "dim"


@dataclass(frozen=True)
class Series:
    """Points in ascending x, with one style."""

    points: Sequence[Point]
    style: str
    mark: str = ""
    """Character drawn at each point; empty joins the points with a line."""


@dataclass(frozen=True)
class _Scale:
    """A linear map from the range ``low`` to ``high`` to dots 0 to ``last``."""

    low: float
    high: float
    last: int

    def dot(self, value: float) -> int:
        share = (value - self.low) / (self.high - self.low)
        # Clipped far outside the chart, so that lines to such points stay short.
        return round(min(max(share, -2.0), 3.0) * self.last)


def y_limits(curves: Iterable[Sequence[Point]]) -> tuple[float, float]:
    """Return the y range of a chart of these curves, with at least one point among them.

    The first twentieth of each curve is ignored: the initial loss is so high that the rest of the
    curve would look flat.
    """
    ys = [y for points in curves for _, y in points[len(points) // 20 :]]
    return _widened(min(ys), max(ys))


def draw_chart(
    series: Sequence[Series], width: int, height: int, *, x_unit: str, is_ascii: bool = False
) -> list[Text]:
    """Return a chart of at most ``width`` cells in ``height`` lines, axes included.

    The x axis starts at 0. Without points, there are no lines.
    """
    xs = [x for one in series for x, _ in one.points]
    if not xs:
        return []
    n_rows = max(height - 2, 1)
    y_scale = _Scale(*y_limits(one.points for one in series), n_rows * _DOTS_HIGH - 1)
    y_labels = {
        n_rows - 1 - y_scale.dot(value) // _DOTS_HIGH: label
        for value, label in _ticks(y_scale, max(n_rows // _ROWS_PER_TICK, 1))
    }
    n_label = max(map(len, y_labels.values()), default=0)
    n_columns = max(width - n_label - 2, 1)
    x_scale = _Scale(*_widened(0.0, max(xs)), n_columns * _DOTS_WIDE - 1)
    cells = _cells(series, x_scale, y_scale, is_ascii=is_ascii)
    tick, side, corner, bar = "+|+-" if is_ascii else "┤│└─"
    lines = []
    for row in range(n_rows):
        label = y_labels.get(row, "")
        axis = (f"{label:>{n_label}} {tick if label else side}", _AXES)
        columns = [cells.get((row, column), (" ", "")) for column in range(n_columns)]
        spans = groupby(columns, key=lambda cell: cell[1])
        pieces = [("".join(cell[0] for cell in same), style) for style, same in spans]
        line = Text.assemble(axis, *pieces, no_wrap=True)
        line.rstrip()
        lines.append(line)
    for below in (f" {corner}{bar * n_columns}", f"  {_x_labels(x_scale, n_columns, x_unit)}"):
        lines.append(Text.assemble((" " * n_label + below, _AXES), no_wrap=True))
    for line in lines:
        line.truncate(width)
    return lines


def _cells(
    series: Sequence[Series], x_scale: _Scale, y_scale: _Scale, *, is_ascii: bool
) -> dict[tuple[int, int], tuple[str, str]]:
    """Return the character and style of each filled cell, by row and column."""
    bits: dict[tuple[int, int], int] = defaultdict(int)
    cells: dict[tuple[int, int], tuple[str, str]] = {}
    for one in sorted(series, key=lambda one: bool(one.mark)):  # marks over lines
        dots = [(x_scale.dot(x), y_scale.dot(y)) for x, y in one.points]
        for x, y in dots if one.mark else _line(dots):
            if not (0 <= x <= x_scale.last and 0 <= y <= y_scale.last):
                continue
            row, row_in_cell = divmod(y_scale.last - y, _DOTS_HIGH)
            place = row, x // _DOTS_WIDE
            if one.mark:
                cells[place] = one.mark, one.style
                continue
            bits[place] |= _BITS[row_in_cell][x % _DOTS_WIDE]
            cells[place] = "." if is_ascii else chr(_BRAILLE + bits[place]), one.style
    return cells


def _line(dots: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield every dot of the straight lines between dots."""
    yield from dots[:1]
    for (x, y), (next_x, next_y) in pairwise(dots):
        n = max(abs(next_x - x), abs(next_y - y))
        for i in range(1, n + 1):
            yield x + round((next_x - x) * i / n), y + round((next_y - y) * i / n)


def _widened(low: float, high: float) -> tuple[float, float]:
    """Return the limits, moved apart if they are equal."""
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    margin = max(abs(low), 1.0) / 2
    return low - margin, high + margin


def _ticks(scale: _Scale, n: int) -> list[tuple[float, str]]:
    """Return about ``n`` round numbers of a scale, at least two, with their labels."""
    power = 10.0 ** math.floor(math.log10((scale.high - scale.low) / n))
    multiples = range(0)
    for step in (factor * power for factor in (10, 5, 2, 1, 0.5)):
        multiples = range(math.ceil(scale.low / step), math.floor(scale.high / step) + 1)
        if len(multiples) >= max(n / 2, 2):
            break
    n_decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(i * step, _label(i * step, n_decimals)) for i in multiples]


def _label(number: float, n_decimals: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 10 * size and not number % (size / 10):
            return f"{number / size:g}{letter}"
    return f"{number:.{n_decimals}f}"


def _x_labels(scale: _Scale, n_columns: int, unit: str) -> str:
    """Return the line below the x axis: each number under its position, then the unit."""
    line = ""
    room = n_columns - len(unit) - 1
    for value, label in _ticks(scale, max(n_columns // _CELLS_PER_TICK, 6)):
        start = max(scale.dot(value) // _DOTS_WIDE - len(label) // 2, 0)
        if start + len(label) <= room and (not line or start > len(line)):
            line = line.ljust(start) + label
    return f"{line.ljust(room)} {unit}"
