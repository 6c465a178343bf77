"""The text chart: dots at the right positions, and any terminal size."""

import math
import re

import pytest
from rich.console import Console

from minigpt.commands.plot.chart import Point, Series, draw_chart, y_limits

CURVE = [(10.0 * i, 2 + 4 * math.exp(-i / 8)) for i in range(1, 41)]


def plain(series: list[Series], width: int, height: int, **options: bool) -> list[str]:
    return [line.plain for line in draw_chart(series, width, height, x_unit="steps", **options)]


def dots_of(lines: list[str]) -> set[tuple[int, int]]:
    """Return the dots of a chart's braille characters as (x, y) from the lower left corner."""
    left = lines[-2].index("└") + 1
    rows = lines[:-2]
    dots = set()
    for row, line in enumerate(rows):
        for column, character in enumerate(line[left:]):
            bits = ord(character) - 0x2800
            if not 0 < bits < 256:
                continue
            # Unicode numbers the dots of a cell 1 2 3 7 down its left and 4 5 6 8 down its right.
            for number, (x, y) in enumerate(
                [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3)]
            ):
                if bits >> number & 1:
                    dots.add((2 * column + x, 4 * len(rows) - 1 - (4 * row + y)))
    return dots


def test_every_point_has_a_dot_and_lines_join_them() -> None:
    points = [(0.0, 0.0), (50.0, 100.0), (100.0, 25.0)]
    lines = plain([Series(points, "")], 46, 12)
    dots = dots_of(lines)
    last_x, last_y = 2 * len(lines[-2].partition("└")[2]) - 1, 4 * 10 - 1
    for x, y in points:
        assert (round(x / 100 * last_x), round(y / 100 * last_y)) in dots
    assert {x for x, _ in dots} == set(range(last_x + 1))
    for x in range(last_x):  # no gap: a dot of the next column is adjacent to one of this column
        near = [abs(y - z) for i, y in dots if i == x for j, z in dots if j == x + 1]
        assert min(near) <= 1
    rising = [y for x, y in sorted(dots) if x < last_x / 2]
    assert rising == sorted(rising)


@pytest.mark.parametrize("is_ascii", [False, True])
def test_a_chart_fits_any_width_and_height(is_ascii: bool) -> None:
    series = [Series(CURVE, "cyan"), Series(CURVE[9::10], "bold", "*")]
    for width in range(1, 150, 7):
        for height in range(3, 30, 5):
            lines = plain(series, width, height, is_ascii=is_ascii)
            assert len(lines) == height
            assert all(len(line) <= width for line in lines)
            assert not is_ascii or all(line.isascii() for line in lines)


def test_axis_labels_are_at_their_values() -> None:
    lines = plain([Series([(0.0, 1.0), (400.0, 3.0)], "")], 86, 13)
    n_rows, left = 11, lines[-2].index("└") + 1
    ticks = {
        row: float(m[1]) for row, line in enumerate(lines) if (m := re.match(r" *(\S+) ┤", line))
    }
    assert len(ticks) >= 3
    for row, value in ticks.items():
        assert (value - 1) / 2 == pytest.approx((n_rows - 0.5 - row) / n_rows, abs=0.5 / n_rows)
    labels = [(m.start() - left + len(m[0]) / 2, int(m[0])) for m in re.finditer(r"\d+", lines[-1])]
    assert len(labels) >= 4
    n_columns = len(lines[-2]) - left
    for place, value in labels[1:]:
        assert value / 400 == pytest.approx(place / n_columns, abs=1.5 / n_columns)
    assert lines[-1].endswith(" steps")


@pytest.mark.parametrize("low", [0.0, 0.013, 1.9, 2.21, 7.9])
@pytest.mark.parametrize("height", [0.011, 0.4, 0.69, 1.0, 3.3, 4_000.0])
def test_each_axis_has_at_least_two_distinct_labels(low: float, height: float) -> None:
    points = [(0.0, low), (height, low + height)]
    lines = plain([Series(points, "")], 60, 8)
    numbers = [float(m[1]) for line in lines if (m := re.match(r" *(\S+) ┤", line))]
    assert len(numbers) >= 2
    assert len(set(numbers)) == len(numbers), "labels must have enough decimals to differ"
    assert all(low - 1e-9 <= number <= low + height for number in numbers)
    assert len(re.findall(r"\d\S*", lines[-1])) >= 2


def test_marks_are_drawn_over_lines_in_their_own_style() -> None:
    lines = draw_chart(
        [Series(CURVE[19:20], "red", "●"), Series(CURVE, "blue")], 60, 10, x_unit="steps"
    )
    (line,) = [line for line in lines if "●" in line.plain]
    place = line.plain.index("●")
    style = line.get_style_at_offset(Console(), place)
    assert (str(style.color.name if style.color else None), style.dim) == ("red", None)


def test_a_chart_cuts_off_a_steep_start_at_the_top() -> None:
    steep: list[Point] = [(1.0, 1e30), *((float(x), 2.0 + x % 2) for x in range(2, 41))]
    assert y_limits([steep]) == (2.0, 3.0)
    assert plain([Series(steep, "")], 60, 10)[:8] != plain([Series(steep[2:], "")], 60, 10)[:8]
    few = [(1.0, 5.0), (2.0, 1.0)]
    assert y_limits([few]) == (1.0, 5.0), "every point of a short curve must be visible"


@pytest.mark.parametrize("points", [[(0.0, 2.5)], [(5.0, 0.0), (6.0, 0.0)], [(0.0, -1e9)]])
def test_single_points_and_flat_curves_are_drawn(points: list[Point]) -> None:
    assert sum("●" in line for line in plain([Series(points, "", "●")], 40, 8)) == 1


def test_a_chart_without_points_is_empty() -> None:
    assert draw_chart([Series([], "")], 80, 10, x_unit="steps") == []
