"""The heads of a model as a grid (layers x heads): entropy, share on the sink, and role."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from minigpt.errors import ConfigError
from minigpt.format import count
from minigpt.tracing.analysis_config import facts_of
from minigpt.tracing.findings import ROLE_SCORES, Roles, Trace
from minigpt.tracing.spans import SHARE_WIDTH, Line, bar, heat, percent
from minigpt.tracing.views import DEFAULTS, ViewOptions, require_steps
from minigpt.tracing.wrapping import SIGNED_WIDTH, signed, wrapped

_NO_TAG = "·"
_CELL_WIDTH = 8
_ROLE_CELL_WIDTH = 6
_COLUMN_WIDTH = 10
_NARROW_COLUMN_WIDTH = 5
_BAR_WIDTH = 5
_EFFECT_WIDTH = SIGNED_WIDTH + 1


def show(trace: Trace, options: ViewOptions = DEFAULTS) -> list[Line]:
    """Return a grid of each head's role, mean entropy and mean share on the sink.

    Raises: ConfigError if the trace has no steps, or no rows of single heads.
    """
    require_steps(trace)
    header, rows = trace.header, [step.row for step in trace.steps]
    kept = [row.heads.shown() for row in rows if row.heads is not None]
    if not facts_of(rows[0].measure).has_heads:
        raise ConfigError(
            f"measure {rows[0].measure} is of the entire model and has no rows of single heads. "
            "Show another view, or trace again with --measure logit."
        )
    if len(kept) < len(rows):
        raise ConfigError(
            "the trace has no rows of single heads. Trace again with --view heads, --out or --html."
        )
    entropy_LH = np.mean([heads.entropy for heads in kept], axis=0)
    sink_LH = np.mean([heads.sink for heads in kept], axis=0)
    is_signed = rows[0].is_signed
    max_bits = float(np.log2(np.mean([len(row.weights_S) for row in rows])))
    bits_width = len(f"{max_bits:.1f}")
    width = _CELL_WIDTH - 3 + bits_width + (SIGNED_WIDTH - SHARE_WIDTH) * is_signed

    def cell(layer: int, head: int) -> list[Line]:
        entropy, sink = float(entropy_LH[layer, head]), float(sink_LH[layer, head])
        focus = 1 - entropy / max_bits if max_bits > 0 else 1.0
        of_sink = (signed(sink), "plain") if is_signed else (percent(sink), heat(sink))
        numbers: Line = [(f"{entropy:{bits_width}.1f} ", heat(focus)), of_sink]
        if header.roles is None:
            return [numbers]
        return [_tag(header.roles[layer][head], _CELL_WIDTH - 1), numbers]

    grid = [[cell(layer, head) for head in range(header.n_head)] for layer in range(header.n_layer)]
    role = "role; below it " if header.roles is not None else ""
    caption = (
        f"Each head: {role}mean entropy in bits (0: all on one position; {max_bits:.1f}: uniform), "
        f"mean {'number' if is_signed else 'share'} on the sink (position {header.sink}), over "
        f"{count(len(rows), 'token')} by {rows[0].measure}."
    )
    return [*_blocks(grid, options.width, width), [], *wrapped(caption, options.width)]


def roles_grid(
    roles: Sequence[Sequence[Roles]], width: int, logits_LH: NDArray[np.float32] | None = None
) -> list[Line]:
    """Return a grid of the heads' roles, each with its score, or the largest score if it has none.

    Args: roles, for each layer the roles of its heads; width, of the terminal, in cells; logits_LH,
        the heads' effects on a logit, if known.
    """

    def cell(layer: int, head: int) -> list[Line]:
        role = roles[layer][head]
        named = [name for name in ROLE_SCORES if role.tag and name.startswith(role.tag)]
        score = max(float(getattr(role, name)) for name in named or ROLE_SCORES)
        style = heat(score) if role.tag else "dim"
        numbers = [(percent(score).ljust(_ROLE_CELL_WIDTH - 1), style)]
        lines = [_tag(role, _ROLE_CELL_WIDTH - 1), numbers]
        if logits_LH is not None:
            lines.append([(signed(float(logits_LH[layer, head])), "dim")])
        return lines

    grid = [[cell(i, h) for h in range(len(layer))] for i, layer in enumerate(roles)]
    return _blocks(grid, width, _ROLE_CELL_WIDTH)


def roles_table(
    roles: Sequence[Sequence[Roles]], width: int, logits_LH: NDArray[np.float32] | None = None
) -> list[Line]:
    """Return a line for each head: all its scores in percent, its effect and its role.

    Args: as for ``roles_grid``.
    """
    room = (width - 6 - 5 - _EFFECT_WIDTH) // len(ROLE_SCORES)  # beside the head and its role
    is_wide = room >= _COLUMN_WIDTH
    column = _COLUMN_WIDTH if is_wide else min(max(room, SHARE_WIDTH + 1), _NARROW_COLUMN_WIDTH)
    names = "".join(name[: column - 1].ljust(column) for name in ROLE_SCORES)
    logit = "" if logits_LH is None else "logit".ljust(_EFFECT_WIDTH)
    lines: list[Line] = [[(f"head  {names}{logit}role", "dim")]]
    for layer, heads in enumerate(roles):
        for head, role in enumerate(heads):
            line: Line = [(f"{layer}.{head}".ljust(6), "plain")]
            for name in ROLE_SCORES:
                score = float(getattr(role, name))
                text = percent(score) + (f" {bar(score, _BAR_WIDTH)}" if is_wide else "")
                line.append((text.ljust(column), heat(score)))
            if logits_LH is not None:
                effect = signed(float(logits_LH[layer, head])).ljust(_EFFECT_WIDTH)
                line.append((effect, "plain"))
            lines.append([*line, (role.tag, "token")])
    return lines


def _tag(role: Roles, width: int) -> Line:
    return [((role.tag or _NO_TAG).ljust(width), "token" if role.tag else "dim")]


def _blocks(grid: Sequence[Sequence[list[Line]]], width: int, cell_width: int) -> list[Line]:
    """Lay out multi-line cells in a grid with layers as rows and heads as columns.

    Heads that do not fit the width continue in another block below.
    """
    n_head = len(grid[0])
    label_width = max(len("layer"), len(str(len(grid) - 1))) + 1
    n_fitting = max(1, (width - label_width) // cell_width)
    n_blocks = -(-n_head // n_fitting)
    per_block = -(-n_head // n_blocks)
    noun = "head " if cell_width > len(f"head {n_head - 1}") else "h"
    lines: list[Line] = []
    for first in range(0, n_head, per_block):
        heads = range(first, min(first + per_block, n_head))
        if lines:
            lines.append([])
        names = "".join(f"{noun}{head}".ljust(cell_width) for head in heads)
        lines.append([(("layer".ljust(label_width) + names).rstrip(), "dim")])
        for layer, cells in enumerate(grid):
            for i in range(len(cells[first])):
                label = f"{layer:>5}" if i == 0 else ""
                line: Line = [(label.ljust(label_width), "dim")]
                for head in heads:
                    used = sum(len(text) for text, _ in cells[head][i])
                    line += [*cells[head][i], (" " * (cell_width - used), "plain")]
                lines.append(line)
    return lines
