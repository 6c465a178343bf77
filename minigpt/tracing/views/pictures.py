"""A trace as a figure for a paper: its map, or its text as a strip of shaded boxes.

Lengths are in inches and computed here: the font is monospaced, so the width of a text is known.
Tokens are untrusted: they are never parsed as math or TeX. Characters that are missing from the
font are drawn with other installed fonts, or escaped if no font has them, except in SVG, which the
viewer renders with its own fonts.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any
from unicodedata import bidirectional

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, findfont, findSystemFonts, fontManager, get_font
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from minigpt.figures import to_bytes
from minigpt.tracing.analysis_config import facts_of
from minigpt.tracing.events import Token
from minigpt.tracing.findings import Row, Trace
from minigpt.tracing.spans import cell_len, percent
from minigpt.tracing.summary import measured
from minigpt.tracing.views import DEFAULTS, ViewOptions, require_steps
from minigpt.tracing.views.matrix import as_matrix, scale_end
from minigpt.tracing.wrapping import fit_end, fit_start, one_line_label, signed

_DPI = 200
_FONT = "DejaVu Sans Mono"
_COLOURS = "magma_r"  # perceptually uniform, and light for small shares: little ink on paper
_SIGNED_COLOURS = "PuOr"  # orange below 0, purple above: safe for any colour blindness
_EM = 0.602  # width of a character, as a share of the font size
_LARGE, _MEDIUM, _SMALL = 8.0, 6.5, 5.5  # points
_SCALE_NAMES = {"weight": "attention weight", "norm": "share of the value-weighted norm"}
_MARGIN = 0.12

_LABEL_CELLS = 14
_CELL = 0.16
_MAP_SIZE = 9.0
_MIN_MAP_SIZE = 2.5
_TICK = 2  # length in points, and distance of its label
_LABEL_PITCH = 0.11  # minimum distance between labels that do not touch
_MAX_VECTOR_CELLS = 10_000

_STRIP_WIDTH = 7.0
_BOX_HEIGHT = 0.36
_LINE_HEIGHT = 0.42
_MIN_BOX_WIDTH = 0.27
_HEAD, _FOOT = 0.5, 0.65  # above and below the boxes
_MIN_SHARE = 0.005


def show(trace: Trace, options: ViewOptions = DEFAULTS) -> bytes:
    """Return the picture ``options.picture`` as a file in the format ``options.format``.

    Raises: ConfigError if the trace has no steps, or no row for ``options.position``.
    """
    figure_of = strip_figure if options.picture == "strip" else matrix_figure
    return to_bytes(lambda: figure_of(trace, options), options.format, dpi=_DPI)


def matrix_figure(trace: Trace, options: ViewOptions = DEFAULTS) -> Figure:
    """Return a heat map: a row per step, a column per position attended to."""
    require_steps(trace)
    rows = [step.row for step in trace.steps]
    matrix = as_matrix(rows)
    n_rows, n_columns = matrix.shape
    cell = min(_CELL, _MAP_SIZE / max(n_rows, n_columns))
    width, height = (max(_MIN_MAP_SIZE, n * cell) for n in (n_columns, n_rows))
    fonts, missing = _fonts(trace)
    names = [f"{_label(name, missing, options)} {i}" for i, name in enumerate(trace.joined.names)]
    row_names, column_names = names[-n_rows:], names[:n_columns]
    left = max(_text_width(name, _MEDIUM) for name in row_names) + 0.4
    below = max(_text_width(name, _MEDIUM) for name in column_names) + 0.4
    figure = Figure(figsize=(left + width + 1.0, below + height + 0.6))
    axes = _axes(figure, left, below, width, height)
    scale = scale_end(matrix, trace.header.sink)
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(matrix),
        cmap=_SIGNED_COLOURS if rows[0].is_signed else _COLOURS,
        vmin=-scale if rows[0].is_signed else 0,
        vmax=scale,
        rasterized=matrix.size > _MAX_VECTOR_CELLS,
        edgecolors="face",  # no hairlines between cells
        linewidth=0.1,
    )
    axes.invert_yaxis()
    _name_cells(axes.xaxis, column_names, width / n_columns, fonts, rotation=90)
    _name_cells(axes.yaxis, row_names, height / n_rows, fonts, rotation=0)
    column = "earlier position" if rows[0].is_signed else "position attended to"
    axes.set_xlabel(column, fontsize=_LARGE)
    axes.set_ylabel("token" if trace.has_prompt_rows else "generated token", fontsize=_LARGE)
    axes.spines[["top", "right"]].set_visible(False)
    bar = _axes(figure, left + width + 0.15, below, 0.12, min(height, 2.5))
    _add_scale(bar, mesh, rows, scale, orientation="vertical")
    _add_title(figure, trace, rows[0], options)
    return figure


def strip_figure(trace: Trace, options: ViewOptions = DEFAULTS) -> Figure:
    """Return the text as boxes, shaded by the attention of one token.

    The data coordinates of the first axes are inches from the upper left corner.
    """
    step = options.step(trace)
    chosen, sink, row = step.token.position, trace.header.sink, step.row
    scale = scale_end(row.weights_S, sink)
    fonts, missing = _fonts(trace)
    names = [
        # A token that only continues a character has no text: show its continuation mark.
        _label(text or name[:1], missing, options)
        for text, name in zip(trace.joined.texts, trace.joined.names, strict=True)
    ]
    places = _wrap(trace.tokens, names)
    height = _HEAD + (places[-1][1] + 1) * _LINE_HEIGHT + _FOOT
    figure = Figure(figsize=(_STRIP_WIDTH, height))
    axes = _axes(figure, 0, 0, _STRIP_WIDTH, height)
    axes.set(xlim=(0, _STRIP_WIDTH), ylim=(height, 0))
    axes.set_axis_off()
    low, name_of_colours = (-scale, _SIGNED_COLOURS) if row.is_signed else (0, _COLOURS)
    colours = ScalarMappable(Normalize(low, scale), colormaps[name_of_colours])
    for token, name, (x, line, width) in zip(trace.tokens, names, places, strict=True):
        y = _HEAD + line * _LINE_HEIGHT
        position = token.position
        number = float(row.weights_S[position]) if position < chosen else None
        ground, ink = ("white", "black") if number is None else _ground_and_ink(number, colours)
        if position > chosen:
            ink = "#888888"
        _add_box(axes, x, y, width, ground, is_chosen=position == chosen, is_sink=position == sink)
        if position >= len(trace.header.prompt):
            axes.plot((x + 0.03, x + width - 0.03), (y + 0.22, y + 0.22), color=ink, linewidth=0.6)
        weight = "bold" if position == chosen else "normal"
        style: dict[str, Any] = {"color": ink, "fontfamily": fonts, "fontweight": weight}
        style |= {"ha": "center", "va": "center", "parse_math": False, "zorder": 3}
        axes.text(x + width / 2, y + 0.12, name, fontsize=_LARGE, **style)
        if number is not None and abs(number) >= _MIN_SHARE:
            text = signed(number) if row.is_signed else percent(number).removesuffix("%") + "%"
            axes.text(x + width / 2, y + 0.28, text.strip(), fontsize=_SMALL, **style)
    bar = _axes(figure, _MARGIN, 0.42, 2, 0.1)
    _add_scale(bar, colours, [row], scale, orientation="horizontal")
    _add_title(figure, trace, row, options)
    sink_text = signed(row.sink).strip() if row.is_signed else f"{row.sink:.1%}"
    key = (
        f"thick: position {chosen}, whose row this is; dashed: the sink, position {sink}, "
        f"{sink_text}\nunderlined: generated"
    )
    axes.text(2 + 4 * _MARGIN, height - 0.32, key, fontsize=_MEDIUM, parse_math=False)
    return figure


def _ground_and_ink(number: float, colours: ScalarMappable) -> tuple[NDArray[np.float64], str]:
    """Return the colour of a number, and a colour of text that is legible on it."""
    ground = colours.to_rgba(np.array([number]))[0]
    luminance = 0.2126 * ground[0] + 0.7152 * ground[1] + 0.0722 * ground[2]
    return ground, "black" if luminance > 0.4 else "white"


def _add_box(
    axes: Axes, x: float, y: float, width: float, ground: Any, *, is_chosen: bool, is_sink: bool
) -> None:
    """Add a token's box with its upper left corner at (x, y): thick if chosen, dashed if sink."""
    box = Rectangle(
        (x, y),
        width,
        _BOX_HEIGHT,
        facecolor=ground,
        edgecolor="black" if is_chosen or is_sink else "#bbbbbb",
        linewidth=1.5 if is_chosen else 0.8 if is_sink else 0.4,
        linestyle="--" if is_sink else "-",
        zorder=2 if is_chosen or is_sink else 1,
    )
    axes.add_patch(box)


def _axes(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Add axes at inches from the lower left corner of the figure."""
    whole_width, whole_height = figure.get_size_inches()
    box = (x / whole_width, y / whole_height, width / whole_width, height / whole_height)
    return figure.add_axes(box)


def _name_cells(
    axis: Any, names: Sequence[str], pitch: float, fonts: Sequence[str], *, rotation: int
) -> None:
    """Label every column or row, or every nth if the labels would touch."""
    places = range(0, len(names), max(1, int(np.ceil(_LABEL_PITCH / pitch))))
    style: dict[str, Any] = {"fontsize": _MEDIUM, "fontfamily": fonts, "parse_math": False}
    is_row = rotation == 0
    across = axis.axes.get_yaxis_transform() if is_row else axis.axes.get_xaxis_transform()
    labels = []
    for place in places:
        name, _, number = names[place].rpartition(" ")
        runs_left = any(bidirectional(c) in ("R", "AL") for c in name)
        labels.append(number if runs_left else names[place])
        if runs_left:  # in one text, the number would move to the other side of the name
            offset = -2 * _TICK - 72 * _text_width(f" {number}", _MEDIUM)
            axis.axes.annotate(
                name,
                (0, place + 0.5) if is_row else (place + 0.5, 0),
                (offset, 0) if is_row else (0, offset),
                xycoords=across,
                textcoords="offset points",
                ha="right" if is_row else "center",
                va="center" if is_row else "top",
                rotation=rotation,
                **style,
            )
    axis.set_ticks([place + 0.5 for place in places], labels, rotation=rotation, **style)
    axis.set_tick_params(length=_TICK, pad=_TICK)


def _add_scale(
    axes: Axes, colours: ScalarMappable, rows: Sequence[Row], scale: float, *, orientation: str
) -> None:
    is_exceeded = max(float(np.abs(row.weights_S).max()) for row in rows) > scale
    extend = "neither"
    if is_exceeded:
        extend = "both" if rows[0].is_signed else "max"
    bar = axes.figure.colorbar(colours, cax=axes, orientation=orientation, extend=extend)
    measure = rows[0].measure
    name = _SCALE_NAMES.get(measure, f"{measure}, in {facts_of(measure).unit}")
    bar.set_label(name, fontsize=_MEDIUM)
    bar.ax.tick_params(labelsize=_MEDIUM, length=2, pad=2)


def _add_title(figure: Figure, trace: Trace, row: Row, options: ViewOptions) -> None:
    width, height = figure.get_size_inches()
    fonts, missing = _fonts(trace)
    room = int((width - 2 * _MARGIN) * 72 / (_LARGE * _EM))
    seed = f"; seed {trace.header.seed}"
    name, rows = (
        _shown(text, missing, options)
        for text in (one_line_label(trace.header.model), measured(trace.header, (row.measure,)))
    )
    # Never truncate the seed: it would read as a different one.
    lines = (fit_start(name, room), fit_end(rows, max(room - len(seed), 1)) + seed)
    for i, line in enumerate(lines):
        figure.text(
            _MARGIN / width,
            1 - (_MARGIN + 0.15 * i) / height,
            line,
            fontsize=_LARGE,
            fontfamily=fonts,
            fontweight="normal" if i else "bold",
            verticalalignment="top",
            parse_math=False,
        )


def _wrap(tokens: Sequence[Token], names: Sequence[str]) -> list[tuple[float, int, float]]:
    """Return each box's distance from the left, its line and its width."""
    places: list[tuple[float, int, float]] = []
    x, line = _MARGIN, 0
    for token, name in zip(tokens, names, strict=True):
        width = max(_MIN_BOX_WIDTH, _text_width(name, _LARGE) + 0.06)
        if x + width > _STRIP_WIDTH - _MARGIN and x > _MARGIN:
            x, line = _MARGIN, line + 1
        places.append((x, line, width))
        x += width
        if token.data.endswith(b"\n"):
            x = _STRIP_WIDTH
    return places


def missing_characters(trace: Trace) -> str:
    """Return the characters of a trace that no installed font has; PNG and PDF escape them."""
    return _fonts(trace)[1]


def _fonts(trace: Trace) -> tuple[list[str], str]:
    titles = one_line_label(trace.header.model), measured(trace.header)
    families, missing = fonts_for("".join(sorted({*"".join((*titles, *trace.joined.texts))})))
    return [*families, "monospace"], missing


@lru_cache(maxsize=8)
def fonts_for(text: str) -> tuple[tuple[str, ...], str]:
    """Choose installed font families that together cover a text.

    Returns: their names, starting with the default one; and the characters that no font has.
    """
    families, missing = [_FONT], set(text) - _characters(findfont(_FONT))
    for entry in _installed_fonts():
        if not missing:
            break
        if "Resort" in entry.name:  # matplotlib's Last Resort font has a box for every character
            continue
        if found := missing & _characters(entry.fname):
            families.append(entry.name)
            missing -= found
    return tuple(families), "".join(sorted(missing))


def _installed_fonts() -> Iterator[FontEntry]:
    """Yield the fonts in matplotlib's cache, then those installed after it was written."""
    cached = sorted(fontManager.ttflist, key=_preference)
    yield from cached
    for path in set(findSystemFonts()) - {entry.fname for entry in cached}:
        with suppress(OSError, RuntimeError, ValueError):  # broken, or a bitmap font
            fontManager.addfont(path)
    yield from sorted(fontManager.ttflist[len(cached) :], key=_preference)


def _preference(entry: FontEntry) -> tuple[bool, bool, bool, str]:
    """Sort key of fonts: regular before bold and italic; monospaced, then sans-serif, then rest."""
    is_regular = entry.style == "normal" and entry.weight in (400, "normal", "regular")
    return not is_regular, "Mono" not in entry.name, "Sans" not in entry.name, entry.name


@lru_cache(maxsize=1024)
def _characters(path: str) -> frozenset[str]:
    """Return the characters of a font; none for bitmap fonts, which matplotlib cannot draw."""
    try:
        font = get_font(path)
    except (OSError, RuntimeError, ValueError):
        return frozenset()
    return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()


def _label(text: str, missing: str, options: ViewOptions) -> str:
    return fit_end(_shown(text, missing, options), _LABEL_CELLS)


def _shown(text: str, missing: str, options: ViewOptions) -> str:
    """Escape the characters that no installed font has a glyph for, except in SVG."""
    if options.format == "svg":
        return text
    return "".join(ascii(c)[1:-1] if c in missing else c for c in text)


def _text_width(text: str, points: float) -> float:
    """Return the width of a text, in inches."""
    return cell_len(text) * points * _EM / 72
