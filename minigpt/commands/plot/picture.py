"""Loss curves -> a picture, PNG or SVG, by matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from minigpt import figures
from minigpt.commands.plot.chart import Point, y_limits
from minigpt.commands.plot.curves import Curve

_FORMATS = (".png", ".svg")
_INCHES = (8.0, 4.5)


def require_matplotlib(path: Path) -> None:
    """Check that a picture can be written under this name, before anything long begins.

    Raises: ConfigError if it is no name of a picture, or matplotlib is not installed.
    """
    figures.require_matplotlib(path, _FORMATS, what="--out")


def write_picture(
    path: Path,
    curves: Sequence[Curve],
    *,
    x_unit: str,
    y_label: str = "nats/token (line: training, dots: validation)",
) -> None:
    """Draw each run's training losses as a thin line and its validation losses as dots.

    Args: path, of ``require_matplotlib``; curves, with at least one point in all. Those without a
        name are not in the legend.
    Raises: ResourceError.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, layout="constrained")
    axes = figure.add_subplot(xlabel=x_unit, ylabel=y_label)
    named = []
    for curve in curves:
        axes.plot(*_columns(curve.train), color=curve.colour, linewidth=0.8, alpha=0.6)
        dots = axes.plot(*_columns(curve.val), "o", color=curve.colour, markersize=4)
        named += [(curve.name, dots[0])] if curve.name else []
    low, high = y_limits(points for curve in curves for points in (curve.train, curve.val))
    margin = (high - low) / 25
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    # The names are put in afterwards: matplotlib would drop _name, and read $name$ as a formula.
    legend = axes.legend([dots for _, dots in named], ["run"] * len(named), frameon=False)
    for text, (name, _) in zip(legend.get_texts(), named, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
    figures.write_figure(path, figure)


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
