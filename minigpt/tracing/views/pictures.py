"""A trace as a picture for a page: its map, or its text as a strip of shaded boxes.

Sizes are in inches, laid out by hand: in a font of one width a token's is known beforehand. Tokens
are untrusted: no formula and no TeX is read in them, and what the font lacks is written as escapes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.cells import cell_len

from minigpt.figures import our_style, require_matplotlib, write_figure
from minigpt.text.escape import visible
from minigpt.tracing.events import Measure, Row, Token, Trace, TraceHeader
from minigpt.tracing.spans import fit_end, fit_start, one_line, percent
from minigpt.tracing.views.choosing import as_matrix, chosen_rows, chosen_step, largest_but_sink
from minigpt.tracing.words import measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png", ".pdf")
"""The formats of a picture."""
_DPI = 200
_FONT = ["DejaVu Sans Mono", "monospace"]
_COLOURS = "magma_r"  # perceptually uniform, and light where little is: of little ink on paper
_EM = 0.602  # width of a character of the font, of its size
_LARGE, _MEDIUM, _SMALL = 8.0, 6.5, 5.5  # points
_SCALE_NAMES = {"weight": "attention weight", "norm": "share of the value-weighted norm"}

_LABEL_CELLS = 14
_CELL = 0.16
_MAP_SIZE = 9.0
_LEAST_MAP_SIZE = 2.5
_PITCH = 0.11  # of labels that do not touch
_MOST_VECTOR_CELLS = 10_000

_STRIP_WIDTH = 7.0
_MARGIN = 0.12
_BOX_HEIGHT = 0.36
_LINE_HEIGHT = 0.42
_LEAST_BOX_WIDTH = 0.27


def check_picture(path: Path) -> None:
    """Check that a picture can be written under this name, before anything long begins.

    Raises: ConfigError if its name does not end in one of SUFFIXES, for a folder that is not there,
        or if matplotlib is not installed.
    """
    require_matplotlib(path, SUFFIXES)


def draw_matrix(trace: Trace, path: Path, *, measure: Measure | None = None) -> None:
    """Write the map of generated tokens and the positions that they looked at.

    Args: path, whose ending says the format; measure, None for the trace's first.
    Raises: ConfigError as ``check_picture`` does, if nothing was generated, or for a measure that
        the trace lacks; ResourceError if it cannot be written.
    """
    check_picture(path)
    with our_style():
        write_figure(
            path, matrix_figure(trace, measure=measure, has_any_glyph=_is_svg(path)), dpi=_DPI
        )


def draw_strip(
    trace: Trace, path: Path, *, position: int | None = None, measure: Measure | None = None
) -> None:
    """Write the text as boxes, shaded by what one generated token attended to.

    Args: path, whose ending says the format; position, of the token, None for the last one;
        measure, None for the trace's first.
    Raises: ConfigError as ``check_picture`` does, for a position that has no row, or for a measure
        that the trace lacks; ResourceError if it cannot be written.
    """
    check_picture(path)
    with our_style():
        figure = strip_figure(
            trace, position=position, measure=measure, has_any_glyph=_is_svg(path)
        )
        write_figure(path, figure, dpi=_DPI)


def _is_svg(path: Path) -> bool:
    """Tell whether a picture's text stays text, for which its reader has fonts."""
    return path.suffix.lower() == ".svg"


def matrix_figure(
    trace: Trace, *, measure: Measure | None = None, has_any_glyph: bool = False
) -> "Figure":
    """Return the map as a figure.

    Args: has_any_glyph, whether characters that our font lacks may stay.
    Raises: ConfigError as ``draw_matrix`` does.
    """
    from matplotlib.figure import Figure

    rows = chosen_rows(trace, measure)
    matrix = as_matrix(rows)
    n_rows, n_columns = matrix.shape
    cell = min(_CELL, _MAP_SIZE / max(n_rows, n_columns))
    width, height = (max(_LEAST_MAP_SIZE, n * cell) for n in (n_columns, n_rows))
    row_names = _names([step.token for step in trace.steps], has_any_glyph)
    column_names = _names(trace.tokens[:n_columns], has_any_glyph)
    left = _text_width(max(row_names, key=cell_len), _MEDIUM) + 0.4
    below = _text_width(max(column_names, key=cell_len), _MEDIUM) + 0.4
    whole_width, whole_height = left + width + 1.0, below + height + 0.6
    figure = Figure(figsize=(whole_width, whole_height))

    def place(x: float, y: float, w: float, h: float) -> "Axes":
        box = (x / whole_width, y / whole_height, w / whole_width, h / whole_height)
        return figure.add_axes(box)

    axes = place(left, below, width, height)
    scale = largest_but_sink(matrix, trace.header.sink)
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(matrix),
        cmap=_COLOURS,
        vmin=0,
        vmax=scale,
        rasterized=matrix.size > _MOST_VECTOR_CELLS,
        edgecolors="face",  # no hairlines between cells
        linewidth=0.1,
    )
    axes.invert_yaxis()
    _label(axes.xaxis, column_names, width / n_columns, rotation=90)
    _label(axes.yaxis, row_names, height / n_rows, rotation=0)
    axes.set_xlabel("position that was looked at", fontsize=_LARGE)
    axes.set_ylabel("generated token", fontsize=_LARGE)
    axes.spines[["top", "right"]].set_visible(False)
    bar = place(left + width + 0.15, below, 0.12, min(height, 2.5))
    _add_scale(figure, mesh, bar, rows, scale, "vertical")
    _add_title(figure, trace, rows[0], whole_width, whole_height)
    return figure


def _label(axis: Any, names: Sequence[str], pitch: float, *, rotation: int) -> None:
    """Name every column or row, or so few that their names do not touch."""
    places = range(0, len(names), max(1, int(np.ceil(_PITCH / pitch))))
    axis.set_ticks(
        [place + 0.5 for place in places],
        [names[place] for place in places],
        rotation=rotation,
        fontsize=_MEDIUM,
        fontfamily=_FONT,
        parse_math=False,
    )
    axis.set_tick_params(length=2, pad=2)


def _add_scale(
    figure: "Figure",
    colours: "ScalarMappable",
    axes: "Axes",
    rows: Sequence[Row],
    scale: float,
    orientation: str,
) -> None:
    is_exceeded = max(float(row.weights_S.max()) for row in rows) > scale
    bar = figure.colorbar(
        colours, cax=axes, orientation=orientation, extend="max" if is_exceeded else "neither"
    )
    bar.set_label(_SCALE_NAMES[rows[0].measure], fontsize=_MEDIUM)
    bar.ax.tick_params(labelsize=_MEDIUM, length=2, pad=2)


def _add_title(figure: "Figure", trace: Trace, row: Row, width: float, height: float) -> None:
    room = int((width - 2 * _MARGIN) * 72 / (_LARGE * _EM))
    lines = (
        _writable(fit_start(one_line(trace.header.model), room)),
        fit_end(f"{measured(trace.header, (row.measure,))}; seed {trace.header.seed}", room),
    )
    for i, line in enumerate(lines):
        figure.text(
            _MARGIN / width,
            1 - (_MARGIN + 0.15 * i) / height,
            line,
            fontsize=_LARGE,
            fontfamily=_FONT,
            fontweight="normal" if i else "bold",
            verticalalignment="top",
            parse_math=False,
        )


def strip_figure(
    trace: Trace,
    *,
    position: int | None = None,
    measure: Measure | None = None,
    has_any_glyph: bool = False,
) -> "Figure":
    """Return the text as boxes, as a figure whose data are in inches from the upper left corner.

    Args: has_any_glyph, whether characters that our font lacks may stay.
    Raises: ConfigError as ``draw_strip`` does.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    step = chosen_step(trace, position)
    row = chosen_rows(trace, measure)[step.index]
    scale = largest_but_sink(row.weights_S[None], trace.header.sink)
    names = [_shown(token, has_any_glyph) for token in trace.tokens]
    boxes = _wrap(trace.tokens, names)
    top, foot = 0.5, 0.65
    height = top + (boxes[-1][1] + 1) * _LINE_HEIGHT + foot
    figure = Figure(figsize=(_STRIP_WIDTH, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, _STRIP_WIDTH), ylim=(height, 0))
    axes.set_axis_off()
    colours = ScalarMappable(Normalize(0, scale), colormaps[_COLOURS])
    for token, name, (x, line, width) in zip(trace.tokens, names, boxes, strict=True):
        place = (x, top + line * _LINE_HEIGHT, width)
        _draw_box(axes, token, name, place, row, step.token.position, trace.header, colours)
    bar = figure.add_axes((_MARGIN / _STRIP_WIDTH, 0.42 / height, 2 / _STRIP_WIDTH, 0.1 / height))
    _add_scale(figure, colours, bar, [row], scale, "horizontal")
    _add_title(figure, trace, row, _STRIP_WIDTH, height)
    key = (
        f"thick: position {step.token.position}, whose row this is; dashed: the sink, position "
        f"{trace.header.sink}, {row.sink:.1%}\nunderlined: generated"
    )
    axes.text(2 + 4 * _MARGIN, height - 0.32, key, fontsize=_MEDIUM, parse_math=False)
    return figure


def _draw_box(
    axes: "Axes",
    token: Token,
    name: str,
    place: tuple[float, float, float],
    row: Row,
    chosen: int,
    header: TraceHeader,
    colours: "ScalarMappable",
) -> None:
    from matplotlib.patches import Rectangle

    x, y, width = place
    is_seen = token.position < chosen
    share = float(row.weights_S[token.position]) if is_seen else 0.0
    ground = colours.to_rgba(np.array([share]))[0] if is_seen else np.ones(4)
    luminance = 0.2126 * ground[0] + 0.7152 * ground[1] + 0.0722 * ground[2]
    ink = "#888888" if token.position > chosen else "black" if luminance > 0.4 else "white"
    is_chosen, is_sink = token.position == chosen, token.position == header.sink
    is_generated = token.position >= len(header.prompt)
    axes.add_patch(
        Rectangle(
            (x, y),
            width,
            _BOX_HEIGHT,
            facecolor=ground,
            edgecolor="black" if is_chosen or is_sink else "#bbbbbb",
            linewidth=1.5 if is_chosen else 0.8 if is_sink else 0.4,
            linestyle="--" if is_sink else "-",
            zorder=2 if is_chosen or is_sink else 1,
        )
    )
    if is_generated:
        axes.plot((x + 0.03, x + width - 0.03), (y + 0.22, y + 0.22), color=ink, linewidth=0.6)
    texts = [(name, 0.12, _LARGE)]
    if share >= 0.005:
        texts.append((percent(share).strip().removesuffix("%") + "%", 0.28, _SMALL))
    for text, down, size in texts:
        axes.text(
            x + width / 2,
            y + down,
            text,
            fontsize=size,
            fontfamily=_FONT,
            fontweight="bold" if is_chosen else "normal",
            color=ink,
            horizontalalignment="center",
            verticalalignment="center",
            parse_math=False,
            zorder=3,
        )


def _wrap(tokens: Sequence[Token], names: Sequence[str]) -> list[tuple[float, int, float]]:
    """Return each token's place: inches from the left, line, and width; a new line breaks."""
    places: list[tuple[float, int, float]] = []
    x, line = _MARGIN, 0
    for token, name in zip(tokens, names, strict=True):
        width = max(_LEAST_BOX_WIDTH, _text_width(name, _LARGE) + 0.06)
        if x + width > _STRIP_WIDTH - _MARGIN and x > _MARGIN:
            x, line = _MARGIN, line + 1
        places.append((x, line, width))
        x += width
        if token.data.endswith(b"\n"):
            x = _STRIP_WIDTH
    return places


def _names(tokens: Sequence[Token], has_any_glyph: bool) -> list[str]:
    """Return tokens with their positions, for an axis."""
    return [f"{_shown(token, has_any_glyph)} {token.position}" for token in tokens]


def _shown(token: Token, has_any_glyph: bool) -> str:
    text = visible(token.data)
    return fit_end(text if has_any_glyph else _writable(text), _LABEL_CELLS)


def _writable(text: str) -> str:
    """Write what our font has no glyph for as an escape."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont(_FONT[0])).get_charmap()
    return "".join(c if ord(c) in known else ascii(c)[1:-1] for c in text)


def _text_width(text: str, points: float) -> float:
    """Return the width of a text in inches."""
    return cell_len(text) * points * _EM / 72
