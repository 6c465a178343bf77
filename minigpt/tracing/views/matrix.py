"""A trace as a map: one row per token, one column per position that it attended to.

If there are more tokens than lines, each line shows two tokens as half blocks. Without colours, a
cell is a character whose density grows with the share, and each row ends in ``|``.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from minigpt.tracing.findings import Row, Trace
from minigpt.tracing.spans import Line, cell_len, encodable, fit
from minigpt.tracing.summary import measured
from minigpt.tracing.views import DEFAULTS, ViewOptions, require_steps
from minigpt.tracing.wrapping import wrapped

# Colours of viridis, which is perceptually uniform and readable in greyscale (van der Walt and
# Smith 2015, BSD); colours between two of them are interpolated.
_ANCHORS = bytes.fromhex(
    "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c "
    "1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725"
)
N_COLOURS = 64
_PLACES = np.linspace(0, len(_ANCHORS) // 3 - 1, N_COLOURS)
_CHANNELS = [np.interp(_PLACES, range(len(_ANCHORS) // 3), list(_ANCHORS[i::3])) for i in range(3)]
_COLOURS = [f"#{bytes(rgb).hex()}" for rgb in np.rint(_CHANNELS).astype(np.uint8).T.tolist()]
# Blue and orange are distinguishable with any colour blindness.
_POSITIVE, _NEUTRAL, _NEGATIVE = map(bytes.fromhex, ("2166ac", "f7f7f7", "b35806"))
DENSITY = " .:-=+*#%@"
"""Characters in order of density."""

_TOKEN_WIDTH = 9
_NAME_LINES = 6
_MIN_HEIGHT_WITH_NAMES = 30
_CELL_WIDTH = 2  # nearly square in most fonts
_SCALE_WIDTH = 20
_MIN_LINES = 3


def show(trace: Trace, options: ViewOptions = DEFAULTS) -> list[Line]:
    """Return the map of the reduced rows, cropped to the newest tokens that fit.

    Styles are colours such as ``#fde725 on #440154`` if the terminal supports them.

    Raises: ConfigError if the trace has no steps.
    """
    require_steps(trace)
    width, height = options.width, options.height
    rows = [step.row for step in trace.steps]
    is_signed = rows[0].is_signed
    paint = None
    if options.has_colour:
        paint = signed_colour if is_signed else colour
    matrix = as_matrix(rows)
    n_rows, n_positions = matrix.shape
    all_names = [encodable(name, options.encoding) for name in trace.joined.names]
    row_names = all_names[-n_rows:]
    number_width = len(str(trace.steps[-1].token.position))
    token_width = min(_TOKEN_WIDTH, max(map(cell_len, row_names)))
    indent = " " * (number_width + token_width + 2)
    room = max(width - len(indent) - (0 if paint else 1), 1)
    n_pooled = -(-n_positions // room)
    cell_width = max(1, min(_CELL_WIDTH, room // n_positions))
    columns = _pool(matrix, n_pooled)
    scale = scale_end(columns, trace.header.sink // n_pooled)

    what = measured(trace.header, (rows[0].measure,))
    title = wrapped(f"{what[:1].upper()}{what[1:]}.", width)  # capitalize() would change a token
    names: list[str] = []
    if n_pooled == 1 and (height is None or height >= _MIN_HEIGHT_WITH_NAMES):
        names = _column_names(all_names[:n_positions], cell_width)
    n_lines = n_rows
    if height is not None:
        n_lines = _lines_left(trace, width, height - len(title) - len(names), n_pooled)
    is_halved = paint is not None and n_lines < n_rows
    per_line = 2 if is_halved else 1
    n_shown = min(n_rows, n_lines * per_line)

    lines: list[Line] = [*title, *([(indent + line, "dim")] for line in names)]
    cells = columns[-n_shown:] / scale
    for i in range(0, n_shown, per_line):
        position = trace.steps[i - n_shown].token.position
        name = fit(row_names[i - n_shown], token_width)
        if paint and is_halved:
            spans = _halves(cells[i : i + 2], paint)
        else:
            spans = _full(cells[i], cell_width, paint, is_signed)
        lines.append([(f"{position:>{number_width}} {name} ", "token"), *spans])
    is_exceeded = float(np.nanmax(np.abs(columns))) > scale
    return [
        *lines,
        [(indent + _ticks(columns.shape[1], n_pooled, cell_width), "dim")],
        [],
        _legend(scale, is_exceeded, paint, is_signed),
        *wrapped(_caption(trace, n_shown, n_pooled, is_halved=is_halved), width),
    ]


def _lines_left(trace: Trace, width: int, height: int, n_pooled: int) -> int:
    """Return the number of lines above the ticks, legend and caption of a map of this height."""
    caption = wrapped(_caption(trace, len(trace.steps), n_pooled, is_halved=True), width)
    return max(_MIN_LINES, height - len(caption) - 3)


def as_matrix(rows: Sequence[Row]) -> NDArray[np.float32]:
    """Stack full rows into a matrix (rows, positions), with NaN for positions not yet in view."""
    matrix = np.full((len(rows), len(rows[-1].weights_S)), np.nan, np.float32)
    for i, row in enumerate(rows):
        matrix[i, : len(row.weights_S)] = row.weights_S
    return matrix


def scale_end(rows: NDArray[np.float32], sink: int) -> float:
    """Return the maximum of a colour scale: the largest magnitude outside the sink's column."""
    others = np.concatenate((rows[..., :sink], rows[..., sink + 1 :]), axis=-1)
    largest = float(np.nanmax(np.abs(others), initial=0.0))
    return largest if largest > 0 else 1.0


def colour(share: float) -> str:
    """Return one of N_COLOURS colours for a number from 0 (dark purple) to 1 (yellow)."""
    return _COLOURS[round(min(max(share, 0.0), 1.0) * (N_COLOURS - 1))]


def signed_colour(level: float) -> str:
    """Return a colour for a number from -1 (orange) through 0 (nearly white) to 1 (blue)."""
    end = _POSITIVE if level > 0 else _NEGATIVE
    part = min(abs(level), 1.0)
    rgb = [round(zero + part * (one - zero)) for zero, one in zip(_NEUTRAL, end, strict=True)]
    return f"#{bytes(rgb).hex()}"


def signed_density(level: float) -> str:
    """Return two characters for a number from -1 to 1: a minus or a space, then the density."""
    return f"{'-' if level < 0 else ' '}{density(abs(level))}"


def density(share: float) -> str:
    """Return a character for a number from 0 (a space) to 1 (``@``)."""
    return DENSITY[round(min(max(share, 0.0), 1.0) * (len(DENSITY) - 1))]


def _pool(matrix: NDArray[np.float32], n_pooled: int) -> NDArray[np.float32]:
    """Return the mean of each group of neighbouring columns, ignoring NaN."""
    padding = -matrix.shape[1] % n_pooled
    padded = np.pad(matrix, ((0, 0), (0, padding)), constant_values=np.nan)
    groups = np.ma.masked_invalid(padded.reshape(len(matrix), -1, n_pooled))
    return groups.mean(axis=2).filled(np.nan)


def _full(
    row: NDArray[np.float32], cell_width: int, paint: Callable[[float], str] | None, is_signed: bool
) -> Line:
    """Return the cells of one row as a line."""
    levels = row[~np.isnan(row)].tolist()
    if paint is not None:
        return [("█" * cell_width, paint(level)) for level in levels]
    if is_signed and cell_width > 1:
        return [("".join(map(signed_density, levels)) + "|", "plain")]
    return [("".join(density(abs(level)) * cell_width for level in levels) + "|", "plain")]


def _halves(pair: NDArray[np.float32], paint: Callable[[float], str]) -> Line:
    """Return two rows as one line of half blocks; the lower, newer row has one more position."""
    upper, *rest = ([paint(x) for x in row[~np.isnan(row)].tolist()] for row in pair)
    if not rest:
        return [("▀", above) for above in upper]
    spans = [("▀", f"{above} on {below}") for above, below in zip(upper, rest[0], strict=False)]
    return spans + [("▄", below) for below in rest[0][len(upper) :]]


def _column_names(texts: Sequence[str], cell_width: int) -> list[str]:
    """Return lines with the tokens' texts written vertically above their columns."""
    names = []
    for text in texts:
        characters = [c if cell_len(c) <= cell_width else "·" for c in text]
        if len(characters) > _NAME_LINES:
            characters = [*characters[: _NAME_LINES - 1], "…"]
        names.append(characters)
    depth = max(len(name) for name in names)
    padded = [[" "] * (depth - len(name)) + name for name in names]
    return ["".join(fit(name[i], cell_width) for name in padded).rstrip() for i in range(depth)]


def _ticks(n_columns: int, n_pooled: int, cell_width: int) -> str:
    """Label every fifth column with its position, if all digits fit."""
    line = ""
    for column in range(0, n_columns, 5):
        place, label = column * cell_width, str(column * n_pooled)
        if not line or (len(line) + 2 <= place and place + len(label) <= n_columns * cell_width):
            line = line.ljust(place) + label
    return line


def _legend(
    scale: float, is_exceeded: bool, paint: Callable[[float], str] | None, is_signed: bool
) -> Line:
    shares = [i / (_SCALE_WIDTH - 1) for i in range(_SCALE_WIDTH)]
    if is_signed:
        ends = f"{-scale:+.3g} ", f" {scale:+.3g}{' or beyond' if is_exceeded else ''}"
        if paint is None:
            return [(f"{ends[0]}-{DENSITY[-1]}", "dim"), (f"   0   {DENSITY[-1]}{ends[1]}", "dim")]
        colours: Line = [("█", paint(2 * share - 1)) for share in shares]
        return [(ends[0], "dim"), *colours, (ends[1], "dim")]
    spans: Line = [("0% ", "dim")]
    if paint is not None:
        spans += [("█", paint(share)) for share in shares]
    else:
        spans.append(("".join(map(density, shares)), "plain"))
    return [*spans, (f" {scale:.1%}{' or more' if is_exceeded else ''}", "dim")]


def _caption(trace: Trace, n_shown: int, n_pooled: int, *, is_halved: bool) -> str:
    """Describe the rows and columns of the map, and any rows that are not shown."""
    n = len(trace.steps)
    what = "tokens" if trace.has_prompt_rows else "generated tokens"
    rows = f"rows: {what}" if n_shown == n else f"rows: the newest {n_shown} of {n}"
    if is_halved:
        rows += ", two per line, labelled by the upper"
    is_signed = trace.steps[0].row.is_signed
    columns = "columns: " + ("earlier positions" if is_signed else "positions attended to")
    if n_pooled > 1:
        columns += f", each the mean of {n_pooled}"
    return f"{rows}; {columns}; sink: position {trace.header.sink}."
