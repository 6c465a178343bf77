"""A trace as lines for a terminal: pure layout, in spans of text and style names.

One line per generated token. From left to right: step, token, the model's probability of it, the
share that went to position 0 (the sink), then the earlier tokens that got the most, each with its
position, its share and a bar, and at last what is left. A row accounts for 100 %.
"""

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

from minigpt.text.visible import visible
from minigpt.tracing.events import Source, Token, TraceFooter, TraceHeader, TraceStep

Span = tuple[str, str]
"""Text, and the name of its style: plain, dim, token, or heat0 (faint) to heat4 (strong)."""
Line = list[Span]

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_HEAT_BOUNDS = (0.05, 0.12, 0.25, 0.5)
_BAR_WIDTH = 3
_SHARE_WIDTH = 3
_STEP_WIDTH = 4
_BYTE_WIDTH = 4  # \xe2
_WORD_WIDTH = 9

_ENDINGS = {
    "length": "the token limit was reached",
    "stop": "a stop text was found",
    "end_of_text": "the model ended the text",
    "context": "the context window is full",
    None: "interrupted",
}


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
    if whole == 0 and share > 0:
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
        self, width: int, *, vocab_size: int, n_positions: int, n_sources: int | None = None
    ) -> None:
        """Lay out a line.

        Args: width, cells of the terminal; vocab_size, which tells bytes from words; n_positions,
            the most that will be shown; n_sources, sources per token, None for as many as fit one
            line. More than fit go on below.
        """
        self.source_token_width = _BYTE_WIDTH if vocab_size <= 300 else _WORD_WIDTH
        self.token_width = max(len("token"), self.source_token_width)
        self.position_width = max(3, len(str(n_positions - 1)))
        self.left_width = _STEP_WIDTH + self.token_width + 2 * _SHARE_WIDTH + 5
        self.source_width = (
            self.position_width + self.source_token_width + _SHARE_WIDTH + _BAR_WIDTH + 4
        )
        room = width - self.left_width - _SHARE_WIDTH - 1
        n_fitting = max(1, room // self.source_width)
        self.n_sources = n_fitting if n_sources is None else n_sources
        self.per_line = max(1, min(n_fitting, self.n_sources))

    def heading(self) -> Line:
        """Return the line above the columns."""
        token = "token".ljust(self.token_width)
        left = f"{'step':>{_STEP_WIDTH}} {token} prob sink"
        room = self.per_line * self.source_width
        title = f"{'at':>{self.position_width + 1}} the earlier token, share of the attention"
        # "rest" is one cell wider than its column: it borrows the blank before it.
        sources = fit(title, room) if self.n_sources else " " * room
        return [(left + sources + "rest", "dim")]

    def step(self, step: TraceStep) -> list[Line]:
        """Return the lines of one generated token: one, or more if the sources need it."""
        row = step.row
        first: Line = [
            (f"{step.index + 1:>{_STEP_WIDTH}} ", "dim"),
            (fit(visible(step.token.data), self.token_width), "token"),
            (f"  {percent(step.probability)}", "plain"),
            (f"  {percent(row.sink)}", "dim"),
        ]
        rows = [
            row.sources[i : i + self.per_line]
            for i in range(0, max(1, len(row.sources)), self.per_line)
        ]
        lines = [first] + [[(" " * self.left_width, "plain")] for _ in rows[1:]]
        for line, sources in zip(lines, rows, strict=True):
            for source in sources:
                line.extend(self._source(source))
        if row.rest is not None:
            gap = (self.per_line - len(rows[-1])) * self.source_width
            lines[-1].append((" " * (gap + 1) + percent(row.rest), "dim"))
        return lines

    def _source(self, source: Source) -> Line:
        token = fit(visible(source.token.data), self.source_token_width)
        style = heat(source.weight)
        return [
            (f" {source.token.position:>{self.position_width}} ", "dim"),
            (f"{token} {percent(source.weight)} {bar(source.weight)}", style),
        ]


def header_lines(header: TraceHeader, width: int) -> list[Line]:
    """Return what stands above a trace: what it is of, and the end of the prompt."""
    n_heads = header.selection.n_chosen
    if n_heads == 1:
        heads = f"head {header.selection.as_text()}"
    elif header.selection.is_all:
        layers = f"{header.n_layer} layer{'s' if header.n_layer > 1 else ''}"
        heads = f"{header.reduce} of all {n_heads} heads ({layers} x {header.n_head})"
    else:
        heads = f"{header.reduce} of {n_heads} heads ({header.selection.as_text()})"
    prompt = f"prompt   positions 0 to {len(header.prompt) - 1}: "
    return [
        [("model    ", "dim"), (fit_start(header.model, width - 9), "plain")],
        [("weights  ", "dim"), (fit_end(heads, width - 9), "plain")],
        [(prompt, "dim"), (_end_of_prompt(header.prompt, width - len(prompt)), "token")],
        [],
    ]


def footer_lines(footer: TraceFooter) -> list[Line]:
    """Return what stands below a trace."""
    check = ""
    if footer.worst_row_sum_error is not None:
        check = f"; every row sums to 1 within {max(footer.worst_row_sum_error, 1e-7):.0e}"
    ending = f"{footer.n_tokens} tokens; {_ENDINGS[footer.finish]}{check}."
    return [[], [(ending, "dim")], [("Where a head looked is not why a token came.", "dim")]]


def fit_end(text: str, width: int) -> str:
    """Cut the end of a text that is too wide; do not pad."""
    return text if cell_len(text) <= width else fit(text, width).rstrip()


def fit_start(text: str, width: int) -> str:
    """Cut the start of a text that is too wide; do not pad."""
    if cell_len(text) <= width:
        return text
    while cell_len(text) > max(width - 1, 1):
        text = text[1:]
    return "…" + text


def _end_of_prompt(prompt: Sequence[Token], width: int) -> str:
    # A token has at least one cell, so what is before the last width of them cannot be shown.
    n_shown = max(width, 1)
    text = "".join(visible(token.data) for token in prompt[-n_shown - 1 :])
    return fit_start(text, width)
