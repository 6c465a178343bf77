"""Status lines: layout, numbers and redrawing."""

import io
import re

import pytest
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from minigpt.commands.display.progress import FREE_CELLS, LiveLines, StatusLine
from minigpt.commands.train.display import TrainingDisplay
from minigpt.commands.train.display import _clock as clock
from minigpt.format import count, duration, short
from minigpt.text.corpus import PrepareProgress

FACTS = [
    "20000/20000",
    "loss 10.234",
    "val 10.345",
    "lr 1.0e-02",
    "1.23M tok/s",
    "MFU 41%",
    "9:59 left",
]


def line_of(facts: list[str], share: float = 0.5) -> StatusLine:
    line = StatusLine()
    line.label, line.share, line.details = "train", share, facts
    return line


@pytest.mark.parametrize("facts", [FACTS, FACTS[:4], FACTS[:1], []])
def test_a_status_line_is_never_wider_than_the_terminal(facts: list[str]) -> None:
    for width in range(1, 200):
        text = line_of(facts).draw(width).plain
        assert len(text) <= width
        assert "\n" not in text


def test_all_fields_of_a_status_line_fit_80_columns() -> None:
    text = line_of(FACTS).draw(77).plain
    assert all(fact in text for fact in FACTS)


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (57, "20000/20000 loss 10.234 val 10.345 lr 1.0e-02 9:59 left"),
        (45, "20000/20000 loss 10.234 val 10.345 9:59 left"),
        (30, "20000/20000 9:59 left"),
        (11, "20000/20000"),
    ],
)
def test_a_narrow_status_line_leaves_details_out_instead_of_cutting_the_time_left(
    width: int, shown: str
) -> None:
    assert line_of(FACTS).draw(width).plain.strip() == shown


@pytest.mark.parametrize(("share", "n_full"), [(-1, 0), (0, 0), (0.25, 10), (1, 40), (7, 40)])
def test_the_bar_shows_the_completed_fraction(share: float, n_full: int) -> None:
    text = line_of(["a fact"], share).draw(120, is_ascii=True).plain
    assert text == f"train {'#' * n_full}{'-' * (40 - n_full)}  a fact"
    text = line_of(["a fact"], share).draw(120).plain
    assert text == f"train {'━' * n_full}{'─' * (40 - n_full)}  a fact", (
        "the bar must be visible without colours"
    )


def test_numbers_have_three_digits_and_durations_are_short() -> None:
    numbers = [0.5, 987, 999.9, 12_345, 999_940, 999_960, 1_050_000, 124_000_000, 1_500_000_000]
    expected = ["0.5", "987", "1k", "12.3k", "1M", "1M", "1.05M", "124M", "1.5B"]
    assert [short(number) for number in numbers] == expected
    assert [clock(s) for s in (0.4, 42, 185, 7800)] == ["0:00", "0:42", "3:05", "2:10:00"]
    times = ["42 s", "3 min 05 s", "2 h 10 min"]
    assert [duration(s) for s in (42, 185, 7800)] == times
    numbers = (1, 1.0, 0.2, 14.73814, 12345678.0, 4096)
    assert [count(n, "epoch").split()[0] for n in numbers] == [
        *("1", "1", "0.2", "14.7"),
        *("12,345,678", "4,096"),
    ]


def test_a_download_shows_its_progress() -> None:
    display = TrainingDisplay()
    display.preparing(PrepareProgress("download", 300_000, 1_200_000))
    text = display.line.draw(80, is_ascii=True).plain
    assert text == f"downloading {'#' * 10}{'-' * 30}  0.3 of 1.2 MB"


class Terminal(io.StringIO):
    """A terminal that rewraps long lines when its width changes, as most do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.rows = [""]
        self.goes_on = [False]
        """Whether each row continues the one above it."""
        self.at = 0

    def write(self, text: str) -> int:
        for piece in re.findall(r"\x1b\[[?\d;]*[a-zA-Z]|.|\n", text):
            if piece == "\n":
                self._down()
            elif piece == "\x1b[1A":
                self.at = max(self.at - 1, 0)
            elif piece == "\x1b[2K":
                self.rows[self.at], self.goes_on[self.at] = "", False
            elif piece.isprintable():
                if len(self.rows[self.at]) == self.width:
                    self._down()
                    self.goes_on[self.at] = True
                self.rows[self.at] += piece
        return len(text)

    def _down(self) -> None:
        self.at += 1
        if self.at == len(self.rows):
            self.rows.append("")
            self.goes_on.append(False)

    def resize(self, width: int) -> None:
        self.width = width
        lines: list[str] = []
        for row, goes_on in zip(self.rows[: self.at + 1], self.goes_on, strict=False):
            if goes_on:
                lines[-1] += row
            else:
                lines.append(row)
        self.rows, self.goes_on, self.at = [""], [False], 0
        self.write("\n".join(lines))

    def shown(self) -> list[str]:
        return "\n".join(self.rows).rstrip().split("\n")


class Full:
    """A renderable of a given number of lines as wide as the terminal."""

    n = 3

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for _ in range(self.n):
            yield Text("x" * (options.max_width - FREE_CELLS))


def test_lines_are_redrawn_in_place_in_a_terminal_that_shrinks_and_grows() -> None:
    terminal, full = Terminal(100), Full()
    console = Console(file=terminal, width=100, height=40, force_terminal=True, soft_wrap=True)
    live = LiveLines(full, console)
    live.auto_refresh = False
    console.print("before")
    live.start()
    expected = ["before"]
    for width in (100, 60, 61, 20, 120, 47, 48, 24, 100):
        terminal.resize(width)
        console.width = width
        live.refresh()
        assert terminal.shown() == [*expected, *["x" * (width - FREE_CELLS)] * full.n]
    for width, full.n in ((30, 1), (10, 4), (80, 2)):
        terminal.resize(width)
        console.width = width
        console.print("word")  # printed above the lines
        expected.append("word")
        assert terminal.shown() == [*expected, *["x" * (width - FREE_CELLS)] * full.n]
    terminal.resize(25)
    console.width = 25
    live.stop()
    assert terminal.shown() == expected
