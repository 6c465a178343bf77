"""A trace as a map: the generated tokens down, the positions that they looked at across.

Each cell of the terminal holds two tokens, one above the other, where they would not fit as a line
each. Without colours a cell is a character of rising density, and a row ends in a bar.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len

from minigpt.text.escape import visible
from minigpt.tracing.events import Measure, Token, Trace
from minigpt.tracing.spans import Line, Span, fit, wrapped
from minigpt.tracing.views.choosing import as_matrix, chosen_rows, largest_but_sink
from minigpt.tracing.views.colormap import colour, density
from minigpt.tracing.words import measured

_WORD_WIDTH = 9
_MOST_NAME_LINES = 6
_LEAST_HEIGHT_WITH_NAMES = 30
_CELL_WIDTH = 2  # square, or nearly, in most fonts
_LEGEND_WIDTH = 20
_FEWEST_LINES = 3


def matrix_view(
    trace: Trace,
    width: int,
    height: int | None = None,
    *,
    measure: Measure | None = None,
    has_colour: bool = True,
) -> list[Line]:
    """Return the token x token map of the reduced rows, cropped to the newest tokens.

    Args: width, height, cells of the terminal, height None for as many lines as there are tokens;
        measure, None for the trace's first; has_colour, whether the terminal shows colours, as
        styles such as ``#fde725 on #440154``.
    Raises: ConfigError if nothing was generated, or for a measure that the trace lacks.
    """
    header = trace.header
    rows = chosen_rows(trace, measure)
    matrix = as_matrix(rows)
    tokens = [step.token for step in trace.steps]
    word_width = min(_WORD_WIDTH, max(cell_len(visible(token.data)) for token in tokens))
    number_width = len(str(tokens[-1].position))
    label_width = number_width + word_width + 2
    room = width - label_width - (0 if has_colour else 1)
    n_pooled = -(-matrix.shape[1] // room)
    cell_width = max(1, min(_CELL_WIDTH, room // matrix.shape[1]))
    columns = _pool(matrix, n_pooled)
    scale = largest_but_sink(columns, header.sink // n_pooled)

    title = wrapped(f"{measured(header, (rows[0].measure,))}.".capitalize(), width)
    names: list[str] = []
    if n_pooled == 1 and (height is None or height >= _LEAST_HEIGHT_WITH_NAMES):
        names = _column_names(trace.tokens[: matrix.shape[1]], cell_width)
    below = 3 + len(wrapped(_caption(trace, len(rows), n_pooled, is_halved=True), width))
    n_lines = len(rows)
    if height is not None:
        n_lines = min(n_lines, max(_FEWEST_LINES, height - len(title) - len(names) - below))
    is_halved = has_colour and n_lines < len(rows)
    n_shown = min(len(rows), n_lines * (2 if is_halved else 1))

    cells = columns[-n_shown:] / scale
    labels = [
        f"{token.position:>{number_width}} {fit(visible(token.data), word_width)} "
        for token in tokens[-n_shown:]
    ]
    if is_halved:
        labels = labels[::2]
        drawn = [_halves(cells[i : i + 2]) for i in range(0, n_shown, 2)]
    else:
        drawn = [_whole(row, cell_width, has_colour) for row in cells]
    indent = " " * label_width
    caption = _caption(trace, n_shown, n_pooled, is_halved=is_halved)
    return [
        *title,
        *([(indent + line, "dim")] for line in names),
        *([(label, "token"), *spans] for label, spans in zip(labels, drawn, strict=True)),
        [(indent + _ticks(matrix.shape[1], n_pooled, cell_width), "dim")],
        [],
        _legend(scale, is_exceeded=float(np.nanmax(columns)) > scale, has_colour=has_colour),
        *wrapped(caption, width),
    ]


def _pool(matrix: NDArray[np.float32], n_pooled: int) -> NDArray[np.float32]:
    """Return the mean of every few neighbouring columns, of the numbers that are there."""
    if n_pooled == 1:
        return matrix
    n_rows, n_columns = matrix.shape
    n_groups = -(-n_columns // n_pooled)
    padded = np.full((n_rows, n_groups * n_pooled), np.nan, np.float32)
    padded[:, :n_columns] = matrix
    groups = padded.reshape(n_rows, n_groups, n_pooled)
    n_there = (~np.isnan(groups)).sum(axis=2)
    sums = np.nansum(groups, axis=2)
    return np.where(n_there > 0, sums / np.maximum(n_there, 1), np.nan).astype(np.float32)


def _whole(row: NDArray[np.float32], cell_width: int, has_colour: bool) -> Line:
    """Return one row as one line."""
    shares = row[~np.isnan(row)].tolist()
    if has_colour:
        return [("█" * cell_width, colour(share)) for share in shares]
    return [("".join(density(share) * cell_width for share in shares) + "|", "plain")]


def _halves(pair: NDArray[np.float32]) -> Line:
    """Return two rows as one line; the newer one below may have one more position."""
    upper = [colour(x) for x in pair[0][~np.isnan(pair[0])].tolist()]
    if len(pair) == 1:
        return [("▀", above) for above in upper]
    lower = [colour(x) for x in pair[1][~np.isnan(pair[1])].tolist()]
    spans: list[Span] = [
        ("▀", f"{above} on {below}") for above, below in zip(upper, lower, strict=False)
    ]
    return spans + [("▄", below) for below in lower[len(upper) :]]


def _column_names(tokens: Sequence[Token], cell_width: int) -> list[str]:
    """Return the tokens as lines of text that is read downwards, each above its column."""
    names = []
    for token in tokens:
        characters = [c if cell_len(c) <= cell_width else "·" for c in visible(token.data)]
        if len(characters) > _MOST_NAME_LINES:
            characters = [*characters[: _MOST_NAME_LINES - 1], "…"]
        names.append(characters)
    depth = max(len(name) for name in names)
    # Short ones stand at the bottom, next to what they name.
    padded = [[" "] * (depth - len(name)) + name for name in names]
    return ["".join(fit(name[i], cell_width) for name in padded).rstrip() for i in range(depth)]


def _ticks(n_positions: int, n_pooled: int, cell_width: int) -> str:
    """Return positions below their columns, with room between them."""
    line = ""
    for column in range(-(-n_positions // n_pooled)):
        place, text = column * cell_width, str(column * n_pooled)
        is_round = column % 5 == 0
        if is_round and (not line or len(line) + 2 <= place):
            line = line.ljust(place) + text
    last = -(-n_positions // n_pooled) * cell_width
    return line[:last] if len(line) > last else line


def _legend(scale: float, *, is_exceeded: bool, has_colour: bool) -> Line:
    steps = [i / (_LEGEND_WIDTH - 1) for i in range(_LEGEND_WIDTH)]
    spans: Line = [("0% ", "dim")]
    if has_colour:
        spans += [("█", colour(share)) for share in steps]
    else:
        spans.append(("".join(density(share) for share in steps), "plain"))
    return [*spans, (f" {scale:.1%}{' or more' if is_exceeded else ''}", "dim")]


def _caption(trace: Trace, n_shown: int, n_pooled: int, *, is_halved: bool) -> str:
    """Return what is left out, and how to read what is there."""
    n = len(trace.steps)
    facts = ["rows: generated tokens" if n_shown == n else f"rows: the newest {n_shown} of {n}"]
    if is_halved:
        facts[0] += ", two a line, named by the upper"
    columns = "columns: the positions that they looked at"
    if n_pooled > 1:
        columns += f", each the mean of {n_pooled}"
    return "; ".join([*facts, columns]) + f"; sink: position {trace.header.sink}."
