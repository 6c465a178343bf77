"""Loss curves of runs: as a text chart with a table, as a picture, or as JSON."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from rich.text import Text

from minigpt.checkpoint.resolve import ROOT
from minigpt.commands.plot.chart import Point, Series, draw_chart, y_limits
from minigpt.commands.tables import aligned, fitting, show
from minigpt.console import make_console
from minigpt.errors import CheckpointError, ConfigError
from minigpt.figures import write_figure
from minigpt.text.escape import one_line
from minigpt.training.reports.curves import LossCurves, LossPoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Medium luminance, so that each is legible on dark and light backgrounds.
_COLOURS = ("#4c9bc6", "#e0561f", "#2aa198", "#b05cc6", "#cb8b16", "#6a9a3a", "#8a8f98")
_MARKS, _ASCII_MARKS = "●■▲◆○□△◇", "*#+xo%@&"
_CHART_LINES, _FEWEST_LINES = 20, 6
PICTURES = (".png", ".svg")
"""Suffixes of the pictures of curves."""
_PICTURE_INCHES = (8.0, 4.5)
_UNKNOWN = "-"
_TITLE = "nats/token: a line for training batches, marks for the validation text"
_HEAD = ("run", "steps", "training", "validation", "bits/byte", "at step")


@dataclass(frozen=True)
class PlottedRun:
    """Losses of one run against the x axis, with its colour and mark."""

    name: str
    """Name in the legend; empty if an earlier run has the same entry."""
    train: Sequence[Point]
    val: Sequence[Point]
    number: int
    """Index of the colour and mark."""

    @property
    def colour(self) -> str:
        """The run's colour, in hex."""
        return _COLOURS[self.number % len(_COLOURS)]


def plotted_runs(runs: Sequence[LossCurves], axis: str) -> list[PlottedRun]:
    """Return the losses of runs against steps, tokens or seconds.

    Raises: CheckpointError if no run has a loss yet; ConfigError if the tokens per step of a run
        are unknown.
    """
    if not any(run.train or run.val for run in runs):
        names = ", ".join(repr(run.folder.name) for run in runs)
        raise CheckpointError(f"{names} has no losses yet. Wait for the first steps.")
    return [
        PlottedRun(
            # A run outside checkpoints/ is named by its path.
            one_line(run.folder.name if run.folder.parent == ROOT else str(run.folder)),
            _points(run, run.train, axis),
            _points(run, run.val, axis),
            number,
        )
        for number, run in enumerate(runs)
    ]


def validation_curves(groups: Mapping[str, Sequence[LossCurves]], axis: str) -> list[PlottedRun]:
    """Return the validation losses of groups of runs, with a line through them.

    The runs of a group share a colour and a legend entry.
    """
    plotted = []
    for number, (name, runs) in enumerate(groups.items()):
        for place, run in enumerate(runs):
            points = _points(run, run.val, axis)
            plotted.append(PlottedRun("" if place else name, points, points, number))
    return plotted


def _points(run: LossCurves, losses: Sequence[LossPoint], axis: str) -> list[Point]:
    points = [(getattr(loss, axis), loss.loss) for loss in losses]
    if any(x is None for x, _ in points):
        raise ConfigError(
            f"{str(run.folder)!r} has no valid config.toml, so its tokens per step are unknown. "
            "Use --x steps or --x seconds."
        )
    return points


def record(run: LossCurves) -> dict[str, Any]:
    """Return all points of a run, for JSON."""
    train, val = ([asdict(point) for point in points] for points in (run.train, run.val))
    for point in train:
        del point["bits_per_byte"]  # only validation has it
    return {"run": run.folder, "tokenizer": run.tokenizer, "train": train, "val": val}


def show_chart(runs: Sequence[LossCurves], axis: str) -> None:
    """Write a chart of the runs and a table to stdout."""
    console = make_console(is_stderr=False)
    is_ascii = console.options.ascii_only
    marks = _ASCII_MARKS if is_ascii else _MARKS
    rows = [[Text(f"  {word}" if word == "run" else word, "dim") for word in _HEAD]]
    series = []
    for one, run in zip(plotted_runs(runs, axis), runs, strict=True):
        # Marks differ without colours too.
        style, mark = f"bold {one.colour}", marks[one.number % len(marks)]
        series += [Series(one.train, one.colour), Series(one.val, style, mark)]
        rows.append([Text.assemble((mark, style), f" {one.name}"), *map(Text, _summary(run))])
    shown = fitting(rows, console.width, ("training", "bits/byte"))
    table = list(aligned(shown, ["left"] + ["right"] * (len(shown[0]) - 1), console.width))
    title = [Text(line, "dim") for line in wrap(_TITLE, console.width)]
    # Chart, table and the next prompt fit on the screen.
    room = console.height - len(table) - len(title) - 2 if console.is_terminal else _CHART_LINES
    height = min(max(room, _FEWEST_LINES), _CHART_LINES)
    chart = draw_chart(series, console.width, height, x_unit=axis, is_ascii=is_ascii)
    show([*title, *chart, Text(), *table])


def _summary(run: LossCurves) -> Iterator[str]:
    """Yield a row of the table: a run's steps, last training loss and best validation loss."""
    # The last evaluation may follow a step whose loss was not logged.
    ends = [points[-1].steps for points in (run.train, run.val) if points]
    last = run.train[-1] if run.train else None
    best = min(run.val, key=lambda point: point.loss, default=None)
    yield f"{max(ends):,}" if ends else _UNKNOWN
    yield f"{last.loss:.4f}" if last else _UNKNOWN
    yield f"{best.loss:.4f}" if best else _UNKNOWN
    yield f"{best.bits_per_byte:.4f}" if best and best.bits_per_byte is not None else _UNKNOWN
    yield f"{best.steps:,}" if best else _UNKNOWN


def write_picture(
    path: Path,
    plotted: Sequence[PlottedRun],
    *,
    x_unit: str,
    y_label: str = "nats/token (line: training, dots: validation)",
) -> None:
    """Write a picture of runs: training losses as thin lines, validation losses as dots.

    Args: plotted, with at least one point in all; runs without a name are not in the legend.
    Raises: ResourceError if the file cannot be written.
    """
    write_figure(path, lambda: _figure(plotted, x_unit, y_label))


def _figure(plotted: Sequence[PlottedRun], x_unit: str, y_label: str) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=_PICTURE_INCHES, layout="constrained")
    axes = figure.add_subplot(xlabel=x_unit, ylabel=y_label)
    named = []
    for one in plotted:
        train, val = (
            list(zip(*points, strict=True)) or [(), ()] for points in (one.train, one.val)
        )
        axes.plot(*train, color=one.colour, linewidth=0.8, alpha=0.6)
        dots = axes.plot(*val, "o", color=one.colour, markersize=4)
        named += [(one.name, dots[0])] if one.name else []
    low, high = y_limits(points for one in plotted for points in (one.train, one.val))
    margin = (high - low) / 25
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    # Names are set afterwards: matplotlib drops _name, and reads $name$ as a formula.
    legend = axes.legend([dots for _, dots in named], ["run"] * len(named), frameon=False)
    for text, (name, _) in zip(legend.get_texts(), named, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
    return figure
