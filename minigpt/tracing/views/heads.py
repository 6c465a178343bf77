"""The heads of a model as a grid of layers and heads: what each looks like, and its role."""

from collections.abc import Sequence

import numpy as np

from minigpt.errors import ConfigError
from minigpt.tracing.events import Measure, Roles, Trace
from minigpt.tracing.spans import Line, bar, heat, percent, wrapped
from minigpt.tracing.views.choosing import chosen_rows
from minigpt.tracing.words import SCORES

_TAG_WIDTH = 5
_NO_TAG = "·"
_CELL_WIDTH = 8
_ROLE_CELL_WIDTH = 6
_COLUMN_WIDTH = 10
_NARROW_COLUMN_WIDTH = 5
_BAR_WIDTH = 5


def heads_view(trace: Trace, width: int, *, measure: Measure | None = None) -> list[Line]:
    """Return a grid: each head's role, its mean entropy over the steps, its mean share on the sink.

    Raises: ConfigError if the trace has not the rows of its heads, or not that measure.
    """
    header, rows = trace.header, chosen_rows(trace, measure)
    kept = [row.heads for row in rows if row.heads is not None]
    if len(kept) < len(rows):
        raise ConfigError(
            "the trace has not the rows of single heads. Trace again with --view heads, or with "
            "--out or --html."
        )
    entropy_LH = np.mean([heads.entropy_LH for heads in kept], axis=0)
    sink_LH = np.mean([heads.sink_LH for heads in kept], axis=0)
    most_bits = float(np.log2(np.mean([len(row.weights_S) for row in rows])))
    grid: list[list[list[Line]]] = []
    for layer in range(header.n_layer):
        cells = []
        for head in range(header.n_head):
            entropy, sink = float(entropy_LH[layer, head]), float(sink_LH[layer, head])
            focus = 1 - entropy / most_bits if most_bits > 0 else 1.0
            numbers: Line = [(f"{entropy:3.1f} ", heat(focus)), (percent(sink), heat(sink))]
            tag: list[Line] = []
            if header.roles is not None:
                name = header.roles[layer][head].tag
                tag = [[((name or _NO_TAG).ljust(_CELL_WIDTH - 1), "token" if name else "dim")]]
            cells.append([*tag, numbers])
        grid.append(cells)
    role = "role; below it " if header.roles is not None else ""
    caption = (
        f"Each head: {role}mean entropy in bits (0: all on one position; {most_bits:.1f}: all "
        f"alike), mean share on the sink (position {header.sink}), over {len(rows)} tokens by "
        f"{rows[0].measure}."
    )
    return [*_blocks(grid, width, _CELL_WIDTH), [], *wrapped(caption, width)]


def roles_grid(roles: tuple[tuple[Roles, ...], ...], width: int) -> list[Line]:
    """Return a grid of the heads' roles, each with the score that it is by; the best one if none.

    Args: roles, for each layer its heads'; width, cells of the terminal.
    """
    grid = [[_role_cell(role) for role in layer] for layer in roles]
    return _blocks(grid, width, _ROLE_CELL_WIDTH)


def _role_cell(role: Roles) -> list[Line]:
    score = _score_of(role)
    style = heat(score) if role.tag else "dim"
    return [
        [((role.tag or _NO_TAG).ljust(_TAG_WIDTH), "token" if role.tag else "dim")],
        [(percent(score).ljust(_TAG_WIDTH), style)],
    ]


def _score_of(role: Roles) -> float:
    """Return the score that a tag, the start of its name, is by; the largest for no tag."""
    named = [name for name in SCORES if role.tag and name.startswith(role.tag)]
    return max(float(getattr(role, name)) for name in named or SCORES)


def roles_table(roles: tuple[tuple[Roles, ...], ...], width: int) -> list[Line]:
    """Return a line for each head with all its scores in percent, and its role."""
    is_wide = width >= 6 + len(SCORES) * _COLUMN_WIDTH + _TAG_WIDTH
    column = _COLUMN_WIDTH if is_wide else _NARROW_COLUMN_WIDTH
    names = [name if is_wide else name[: column - 1] for name in SCORES]
    lines: list[Line] = [
        [("head  " + "".join(name.ljust(column) for name in names) + "role", "dim")]
    ]
    for layer, heads in enumerate(roles):
        for head, role in enumerate(heads):
            line: Line = [(f"{f'{layer}.{head}':<6}", "plain")]
            for name in SCORES:
                score = float(getattr(role, name))
                drawn = percent(score) + (f" {bar(score, _BAR_WIDTH)}" if is_wide else "")
                line.append((drawn.ljust(column), heat(score)))
            lines.append([*line, (role.tag, "token")])
    return lines


def _blocks(grid: Sequence[Sequence[list[Line]]], width: int, cell_width: int) -> list[Line]:
    """Lay out cells, layers down, heads across, in as few blocks of heads as the width allows.

    The first column names the layer, the first line the heads.
    """
    n_head = len(grid[0])
    label_width = max(len("layer"), len(str(len(grid) - 1))) + 1
    n_fitting = max(1, (width - label_width) // cell_width)
    n_blocks = -(-n_head // n_fitting)
    per_block = -(-n_head // n_blocks)
    lines: list[Line] = []
    for first in range(0, n_head, per_block):
        heads = range(first, min(first + per_block, n_head))
        if lines:
            lines.append([])
        title = "layer".ljust(label_width) + "".join(
            f"head {head}".ljust(cell_width) if cell_width > 7 else f"h{head}".ljust(cell_width)
            for head in heads
        )
        lines.append([(title.rstrip(), "dim")])
        for layer, cells in enumerate(grid):
            for i in range(len(cells[first])):
                label = f"{layer:>5}" if i == 0 else ""
                line: Line = [(label.ljust(label_width), "dim")]
                for head in heads:
                    line += _padded(cells[head][i], cell_width)
                lines.append(line)
    return lines


def _padded(spans: Line, width: int) -> Line:
    used = sum(len(text) for text, _ in spans)
    return [*spans, (" " * (width - used), "plain")]
