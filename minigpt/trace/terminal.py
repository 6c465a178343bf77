"""A trace as lines for a terminal: pure layout, in spans of text and style names.

One line per generated token. From left to right: step, token, the model's probability of it, the
share that went to position 0 (the sink), then the earlier tokens that got the most, each with its
position, a bar and its share, and at last what is left. A row accounts for 100 %.
"""

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

from minigpt.text.visible import visible
from minigpt.trace.tracer import Source, Token, TraceFooter, TraceHeader, TraceStep

Span = tuple[str, str]
"""Text, and the name of its style: plain, dim, token, sink, or heat0 (faint) to heat4 (strong)."""
Line = list[Span]

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_N_HEATS = 5
_HEAT_BOUNDS = (0.05, 0.12, 0.25, 0.5)
_BAR_WIDTH = 3
_SHARE_WIDTH = 3
_LEFT_WIDTH = 4  # of the step number


def bar(share: float, width: int = _BAR_WIDTH) -> str:
    """Return a bar of eighths of a cell: empty for 0, ``width`` full cells for 1."""
    n_eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, part = divmod(n_eighths, 8)
    return ("█" * full + (_EIGHTHS[part] if part else "")).ljust(width)


def percent(share: float) -> str:
    """Return a share in whole percent, three cells wide: `` 7%``, ``<1%``, ``100``."""
    whole = round(share * 100)
    if whole >= 100:
        return "100"
    if whole == 0 and share > 0.0005:
        return "<1%"
    return f"{whole}%".rjust(_SHARE_WIDTH)


def heat(share: float) -> str:
    """Return the style of a share of the attention."""
    return f"heat{sum(share >= bound for bound in _HEAT_BOUNDS)}"


def fit(text: str, width: int) -> str:
    """Pad or cut a text to a number of terminal cells; a cut one ends in an ellipsis."""
    if cell_len(text) <= width:
        return set_cell_size(text, width)
    return set_cell_size(text, width - 1) + "…"


class TraceLayout:
    """Columns that fit a width, for one vocabulary."""

    def __init__(
        self, width: int, *, token_width: int, n_positions: int, n_sources: int | None = None
    ) -> None:
        """Lay out a line.

        Args: width, cells of the terminal; token_width, cells of a token; n_positions, the most
            that will be shown; n_sources, sources per token, None for as many as fit one line.
        """
        self.token_width = token_width
        self.position_width = max(3, len(str(n_positions - 1)))
        # step, token, probability, sink, then two cells of air
        self.left_width = _LEFT_WIDTH + 1 + token_width + 1 + _SHARE_WIDTH + 2 + _SHARE_WIDTH + 2
        self.source_width = (
            self.position_width + 1 + token_width + 1 + _BAR_WIDTH + 1 + _SHARE_WIDTH + 1
        )
        room = width - self.left_width - len("rest")
        self.per_line = max(1, room // self.source_width)
        self.n_sources = n_sources if n_sources is not None else min(self.per_line, 8)
        self.per_line = min(self.per_line, max(1, self.n_sources))

    def heading(self) -> Line:
        """Return the line above the columns."""
        left = (
            "step".rjust(_LEFT_WIDTH)
            + " "
            + "token".ljust(self.token_width)[: self.token_width]
            + " "
            + "prob".rjust(_SHARE_WIDTH + 1)
            + " "
            + "sink".rjust(_SHARE_WIDTH + 1)
            + " "
        )
        sources = "  at token, share of its attention"
        room = self.per_line * self.source_width
        return [(left + fit(sources, room) + "rest", "dim")]

    def step(self, step: TraceStep) -> list[Line]:
        """Return the lines of one generated token: one, or more if the sources need it."""
        token = fit(visible(step.token.data), self.token_width)
        first: Line = [
            (f"{step.index + 1:>{_LEFT_WIDTH}} ", "dim"),
            (token, "token"),
            (f"  {percent(step.probability)}", "plain"),
            (f"  {percent(step.sink)}", "sink"),
            (" ", "plain"),
        ]
        rows = [
            step.sources[i : i + self.per_line]
            for i in range(0, max(1, len(step.sources)), self.per_line)
        ]
        lines = [first] + [[(" " * self.left_width, "plain")] for _ in rows[1:]]
        for line, sources in zip(lines, rows, strict=True):
            for source in sources:
                line += self._source(source)
        if step.rest is not None:
            gap = (self.per_line - len(rows[-1])) * self.source_width
            lines[-1].append((" " * (gap + 1) + percent(step.rest), "dim"))
        return lines

    def _source(self, source: Source) -> Line:
        token = fit(visible(source.token.data), self.token_width)
        style = heat(source.weight)
        return [
            (f" {source.token.position:>{self.position_width}} ", "dim"),
            (token, "plain"),
            (f" {bar(source.weight)}", style),
            (f" {percent(source.weight)}", style),
        ]


def token_width(vocab_size: int) -> int:
    """Return the cells that a token gets: few for a vocabulary of bytes, more for words."""
    return 4 if vocab_size <= 300 else 9


def header_lines(header: TraceHeader, width: int) -> list[Line]:
    """Return what stands above a trace: what it is of, and the end of the prompt."""
    n_heads = header.selection.n_chosen
    which = "every head" if header.selection.is_all else header.selection.as_text()
    shape = f"{header.n_layer} layers x {header.n_head} heads"
    reduced = f"the {header.reduce} over {n_heads} heads" if n_heads > 1 else "one head"
    what = f"attention of each generated token: {reduced} ({which}; the model has {shape})"
    prompt = f"prompt, positions 0 to {len(header.prompt) - 1}: "
    return [
        [(fit_end(what, width), "plain")],
        [(prompt, "dim"), (_end_of_prompt(header.prompt, width - len(prompt)), "token")],
    ]


def footer_lines(footer: TraceFooter) -> list[Line]:
    """Return what stands below a trace."""
    ends = {
        "length": "the token limit was reached",
        "stop": "a stop text was found",
        "end_of_text": "the model ended the text",
        "context": "the context window is full",
        None: "interrupted",
    }
    check = ""
    if footer.worst_row_sum_error is not None:
        check = f"; rows sum to 1 within {footer.worst_row_sum_error:.0e}"
    text = f"{footer.n_tokens} tokens; {ends[footer.finish]}{check}"
    return [[(text, "dim")]]


def fit_end(text: str, width: int) -> str:
    """Cut a text that is too wide, with an ellipsis; do not pad."""
    return text if cell_len(text) <= width else fit(text, width).rstrip()


def _end_of_prompt(prompt: Sequence[Token], width: int) -> str:
    text = "".join(visible(token.data) for token in prompt[-max(width, 1) :])
    is_cut = cell_len(text) > width or len(prompt) > width
    while cell_len(text) > max(width - 1, 1):
        text = text[1:]
    return ("…" if is_cut else "") + text
