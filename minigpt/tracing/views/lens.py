"""The logit lens of a trace: the most probable token after each layer, token by token."""

from minigpt.errors import ConfigError
from minigpt.text.escape import visible
from minigpt.tracing.findings import Trace
from minigpt.tracing.spans import Line, fit, heat, percent
from minigpt.tracing.views import DEFAULTS, ViewOptions
from minigpt.tracing.wrapping import upright_bar, wrapped

_TOKEN_WIDTH = 9
_CELL_WIDTH = _TOKEN_WIDTH + 6


def show(trace: Trace, options: ViewOptions = DEFAULTS) -> list[Line]:
    """Return a table: for each token, the first choice and the token's probability by layer.

    Raises: ConfigError if the trace has no lens.
    """
    options.rows(trace)  # there must be some
    number_width = len(str(trace.steps[-1].token.position))
    left = number_width + _TOKEN_WIDTH + 7
    per_line = max(1, (options.width - left) // _CELL_WIDTH)
    from_title = "from".rjust(left - number_width - _TOKEN_WIDTH - 2)
    lines: list[Line] = []
    n_layer = 0
    for step in trace.steps:
        lens = step.lens
        if lens is None:
            raise ConfigError("the trace has no lens. Trace again with --lens.")
        n_layer = len(lens.top)
        name = fit(trace.joined.names[step.token.position], _TOKEN_WIDTH)
        start = f"{step.token.position:>{number_width}} {name} "
        layer = "-" if lens.layer is None else str(lens.layer)
        for first in range(0, n_layer, per_line):
            begin = start + layer.rjust(4) + "  " if first == 0 else " " * left
            line: Line = [(begin, "plain" if step.is_given else "token")]
            for top, p in zip(
                lens.top[first : first + per_line],
                lens.probabilities[first : first + per_line],
                strict=True,
            ):
                style = heat(p) if top[0].id == step.token.id else "dim"
                text = fit(visible(top[0].data), _TOKEN_WIDTH)
                line.append((f"{upright_bar(p)}{text} {percent(p)} ", style))
            lines.append(line)
    titles = [f"layer {layer}".ljust(_CELL_WIDTH) for layer in range(n_layer)]
    heading: list[Line] = []
    for first in range(0, n_layer, per_line):
        begin = " " * (number_width + 1) + "token".ljust(_TOKEN_WIDTH + 1) + from_title.strip()
        begin = begin.ljust(left) if first == 0 else " " * left
        heading.append([(begin + "".join(titles[first : first + per_line]), "dim")])
    caption = (
        "Logit lens: the residual stream after each layer, through the final norm and the "
        "unembedding. Each cell: the first choice, and the probability of the token itself. "
        "from: the layer from which the token is the first choice; - if it is not at the end."
    )
    return [*heading, *lines, [], *wrapped(caption, options.width)]
