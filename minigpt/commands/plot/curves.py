"""Loss curves as people read them: a chart of text with a table under it, or a picture."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.text import Text

from minigpt.checkpoint.resolve import ROOT
from minigpt.commands.output import aligned, one_line, show
from minigpt.commands.plot.chart import Point, Series, draw_chart
from minigpt.console import make_console
from minigpt.errors import CheckpointError, ConfigError
from minigpt.training.reports.curves import LossCurves, LossPoint

# Middle luminance, so that each reads on dark and on light backgrounds.
_COLOURS = ("#4c9bc6", "#e0561f", "#2aa198", "#b05cc6", "#cb8b16", "#6a9a3a", "#8a8f98")
_MARKS, _ASCII_MARKS = "●■▲◆○□△◇", "*#+xo%@&"
_CHART_LINES, _FEWEST_LINES = 20, 6
_UNKNOWN = "-"
_TITLE = "nats/token: a line for training batches, marks for the validation text"
_HEAD = ("run", "steps", "training", "validation", "bits/byte", "at step")


@dataclass(frozen=True)
class Curve:
    """The losses of one run against what is on the x axis, and how they are drawn."""

    name: str
    """Empty if another curve of the same colour has it."""
    train: Sequence[Point]
    val: Sequence[Point]
    colour: str
    number: int


def curves_to_draw(runs: Sequence[LossCurves], axis: str) -> list[Curve]:
    """Return the runs' losses against steps, tokens or seconds.

    Raises: CheckpointError if there is no loss yet; ConfigError if a run does not tell how many
        tokens a step takes.
    """
    if not any(run.train or run.val for run in runs):
        names = ", ".join(repr(run.folder.name) for run in runs)
        raise CheckpointError(f"no loss is known yet of {names}. Wait for the first steps.")
    return [
        Curve(
            name=_name(run),
            train=_points(run, run.train, axis),
            val=_points(run, run.val, axis),
            colour=_COLOURS[number % len(_COLOURS)],
            number=number,
        )
        for number, run in enumerate(runs)
    ]


def validation_curves(groups: Mapping[str, Sequence[LossCurves]], axis: str) -> list[Curve]:
    """Return the validation losses of runs, in a colour a group, with a line through the dots.

    Raises: ConfigError as ``curves_to_draw`` does.
    """
    curves = []
    for number, (name, runs) in enumerate(groups.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        for place, run in enumerate(runs):
            points = _points(run, run.val, axis)
            curves.append(Curve("" if place else name, points, points, colour, number))
    return curves


def _name(run: LossCurves) -> str:
    """Return a run's name, or where it lies if that is not in the folder of runs."""
    return one_line(run.folder.name if run.folder.parent == ROOT else str(run.folder))


def _points(run: LossCurves, losses: Sequence[LossPoint], axis: str) -> list[Point]:
    points = [(getattr(loss, axis), loss.loss) for loss in losses]
    if any(x is None for x, _ in points):
        raise ConfigError(
            f"{str(run.folder)!r} has no config.toml that tells how many tokens a step takes. "
            "Use --x steps or --x seconds."
        )
    return points


def record(run: LossCurves) -> dict[str, Any]:
    """Return all points of a run, for JSON."""
    train = [asdict(point) for point in run.train]
    for point in train:
        del point["bits_per_byte"]  # what only a validation pass counts
    val = [asdict(point) for point in run.val]
    return {"run": run.folder, "tokenizer": run.tokenizer, "train": train, "val": val}


def show_chart(runs: Sequence[LossCurves], axis: str) -> None:
    """Write a chart of the runs to stdout, and what each of its marks stands for.

    Raises: as ``curves_to_draw`` does.
    """
    console = make_console(is_stderr=False)
    curves, is_ascii = curves_to_draw(runs, axis), console.options.ascii_only
    legend = list(_legend(curves, runs, console.width, is_ascii=is_ascii))
    series = []
    for curve in curves:
        series.append(Series(curve.train, curve.colour))
        series.append(Series(curve.val, *_mark(curve, is_ascii=is_ascii)))
    # All of it, the prompt below it included, is seen at once.
    room = console.height - len(legend) - 3 if console.is_terminal else _CHART_LINES
    height = min(max(room, _FEWEST_LINES), _CHART_LINES)
    chart = draw_chart(series, console.width, height, x_unit=axis, is_ascii=is_ascii)
    show([Text(_TITLE, "dim"), *chart, Text(), *legend])


def _mark(curve: Curve, *, is_ascii: bool) -> tuple[str, str]:
    """Return the style and the mark of a run, so that it is known without colours too."""
    marks = _ASCII_MARKS if is_ascii else _MARKS
    return f"bold {curve.colour}", marks[curve.number % len(marks)]


def _legend(
    curves: Sequence[Curve], runs: Sequence[LossCurves], width: int, *, is_ascii: bool
) -> Iterator[Text]:
    """Yield a table: the last training loss, and the best validation loss and where it was."""
    rows = [[Text(f"  {word}" if word == "run" else word, "dim") for word in _HEAD]]
    for curve, run in zip(curves, runs, strict=True):
        style, mark = _mark(curve, is_ascii=is_ascii)
        name = Text.assemble((mark, style), f" {curve.name}")
        rows.append([name, *map(Text, _summary(run))])
    yield from aligned(rows, ["left"] + ["right"] * (len(_HEAD) - 1), width)


def _summary(run: LossCurves) -> Iterator[str]:
    last = run.train[-1] if run.train else None
    best = min(run.val, key=lambda point: point.loss, default=None)
    bits = best.bits_per_byte if best else None
    yield f"{last.steps:,}" if last else _UNKNOWN
    yield f"{last.loss:.4f}" if last else _UNKNOWN
    yield f"{best.loss:.4f}" if best else _UNKNOWN
    yield _UNKNOWN if bits is None else f"{bits:.4f}"
    yield f"{best.steps:,}" if best else _UNKNOWN
