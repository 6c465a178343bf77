"""The logit lens of a trace: the most probable token after each layer, for each token."""

from functools import partial

from minigpt.errors import ConfigError
from minigpt.text.escape import token_name
from minigpt.tracing.findings import Trace, shown_probability
from minigpt.tracing.spans import Line, encodable, fit, heat, percent
from minigpt.tracing.views import DEFAULTS, ViewOptions, require_steps
from minigpt.tracing.wrapping import upright_bar, wrapped

_TOKEN_WIDTH = 9
_CELL_WIDTH = _TOKEN_WIDTH + 6


def show(trace: Trace, options: ViewOptions = DEFAULTS) -> list[Line]:
    """Return a table: for each token, the first choice and the token's probability by layer.

    Raises: ConfigError if the trace has no steps, or no lens.
    """
    require_steps(trace)
    shown = partial(encodable, encoding=options.encoding)
    number_width = len(str(trace.steps[-1].token.position))
    left = number_width + _TOKEN_WIDTH + 7
    per_line = max(1, (options.width - left) // _CELL_WIDTH)
    titles: Line = [
        (f"layer {layer}".ljust(_CELL_WIDTH), "dim") for layer in range(trace.header.n_layer)
    ]
    heading = f"{'':{number_width}} {'token':{_TOKEN_WIDTH}} from"
    rows = [(heading, "dim", titles)]
    for step in trace.steps:
        lens = step.lens
        if lens is None:
            raise ConfigError("the trace has no lens. Trace again with --lens.")
        name = fit(shown(trace.joined.names[step.token.position]), _TOKEN_WIDTH)
        layer = "-" if lens.layer is None else str(lens.layer)
        cells: Line = []
        for [first, *_], p in zip(
            lens.top, map(shown_probability, lens.log_probabilities), strict=True
        ):
            text = (
                f"{upright_bar(p)}{fit(shown(token_name(first.data)), _TOKEN_WIDTH)} {percent(p)} "
            )
            cells.append((text, heat(p) if first.id == step.token.id else "dim"))
        start = f"{step.token.position:>{number_width}} {name} {layer:>4}"
        rows.append((start, "plain" if step.is_given else "token", cells))
    lines: list[Line] = [
        [(fit("" if begin else start, left), style), *cells[begin : begin + per_line]]
        for start, style, cells in rows
        for begin in range(0, len(cells), per_line)
    ]
    caption = (
        "Logit lens: the residual stream after each layer, through the final norm and the "
        "unembedding. Each cell: the first choice, and the probability of the token itself. "
        "from: the layer from which the token is the first choice; - if it is not at the end."
    )
    return [*lines, [], *wrapped(caption, options.width)]
