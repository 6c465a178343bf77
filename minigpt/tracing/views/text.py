"""The text of a trace, shaded by what one of its generated tokens attended to.

Below each line of text stand blocks that fill with the share, so that it reads without colour too.
"""

from collections.abc import Sequence

import numpy as np
from rich.cells import cell_len

from minigpt.text.escape import visible
from minigpt.tracing.events import Measure, Row, Token, Trace
from minigpt.tracing.spans import (
    Line,
    bar,
    eighths,
    fit,
    heat,
    percent,
    upright_bar,
    wrapped,
)
from minigpt.tracing.views.choosing import chosen_rows, chosen_step, largest_but_sink
from minigpt.tracing.words import measured

_N_STRONGEST = 12
_LEAST_SHARE = 0.005
_WORD_WIDTH = 9
_MARK = "^"


def text_view(
    trace: Trace, width: int, *, position: int | None = None, measure: Measure | None = None
) -> list[Line]:
    """Return the prompt and what was generated, shaded by what one token attended to.

    Args: width, cells of the terminal; position, of a generated token, None for the last one;
        measure, None for the trace's first.
    Raises: ConfigError for a position that has no row, or a measure that the trace lacks.
    """
    step = chosen_step(trace, position)
    header, row = trace.header, chosen_rows(trace, measure)[step.index]
    scale = largest_but_sink(row.weights_S[None], header.sink)
    title = (
        f"What position {step.token.position} attended to, from the query at "
        f"{step.token.position - 1}: {measured(header, (row.measure,))}."
    )
    return [
        *wrapped(title, width),
        [],
        *_Page(trace, row, step.token, scale, width).lines(),
        [],
        *_legend(trace, row, scale, width),
        *_strongest(trace, row, width),
    ]


class _Page:
    """The text, wrapped at the width, with its line numbers: the position of a line's first token.

    Each line of text is two lists of spans: what is written, and the blocks below it.
    """

    def __init__(self, trace: Trace, row: Row, chosen: Token, scale: float, width: int) -> None:
        self.trace, self.row, self.chosen, self.scale = trace, row, chosen, scale
        self.number_width = len(str(len(trace.tokens) - 1))
        self.room = width - self.number_width - 1
        self.pages: list[tuple[Line, Line]] = []
        self.used = self.room

    def lines(self) -> list[Line]:
        """Return the lines of text, each with its blocks if it has any."""
        for word in _words(self.trace.tokens):
            word_width = sum(cell_len(shown(token.data)) for token in word)
            if word_width <= self.room < self.used + word_width:
                self._break(word[0])
            for token in word:
                self._write(token)
        lines = []
        for written, blocks in self.pages:
            lines.append(written)
            if any(text.strip() for text, _ in blocks):
                lines.append(blocks)
        return lines

    def _write(self, token: Token) -> None:
        style, block, block_style = self._look(token)
        for piece in _pieces(shown(token.data), self.room):
            if self.used + cell_len(piece) > self.room:
                self._break(token)
            written, blocks = self.pages[-1]
            written.append((piece, style))
            blocks.append((block * cell_len(piece), block_style))
            self.used += cell_len(piece)
        if token.data.endswith(b"\n"):
            self.used = self.room

    def _break(self, token: Token) -> None:
        number = f"{token.position:>{self.number_width}} "
        self.pages.append(([(number, "dim")], [(" " * len(number), "plain")]))
        self.used = 0

    def _look(self, token: Token) -> tuple[str, str, str]:
        """Return a token's style, the block below it and the block's style."""
        position = token.position
        if position == self.chosen.position:
            return "chosen", _MARK, "token"
        if position > self.chosen.position:
            return "dim", " ", "plain"
        share = float(self.row.weights_S[position]) / self.scale
        if position == self.trace.header.sink:
            return "plain", upright_bar(share), "dim"
        level = -(-eighths(share) // 2)  # 0 to 4
        unshaded = "plain" if position < len(self.trace.header.prompt) else "token"
        return f"shade{level}" if level else unshaded, upright_bar(share), f"heat{level}"


def _words(tokens: Sequence[Token]) -> list[list[Token]]:
    """Return the tokens that stay on a line together: a word begins with a blank or a new line."""
    words: list[list[Token]] = []
    for token in tokens:
        if not words or token.data.startswith((b" ", b"\n")) or words[-1][-1].data.endswith(b"\n"):
            words.append([])
        words[-1].append(token)
    return words


def shown(data: bytes) -> str:
    """Return a token as it stands in a text: its spaces are spaces, all else is visible."""
    return " ".join(visible(part) for part in data.split(b" "))


def _pieces(text: str, width: int) -> list[str]:
    """Cut a text into pieces of at most a number of cells; no piece is empty."""
    pieces, piece = [], ""
    for character in text:
        if piece and cell_len(piece + character) > width:
            pieces.append(piece)
            piece = ""
        piece += character
    return [*pieces, piece] if piece else pieces


def _legend(trace: Trace, row: Row, scale: float, width: int) -> list[Line]:
    sink = trace.header.sink
    more = " or more" if row.sink > scale else ""
    facts = [
        f"█ is {scale:.1%}{more}, {_MARK} the token itself",
        f"sink (position {sink}) {row.sink:.1%}",
        f"prompt {row.prompt:.0%}, generated {row.generated:.0%}",
        f"entropy {row.entropy:.1f} bits",
    ]
    return wrapped("; ".join(facts) + ".", width)


def _strongest(trace: Trace, row: Row, width: int) -> list[Line]:
    """Return the positions with the most weight but the sink, as many columns as fit."""
    position_width = max(3, len(str(len(trace.tokens) - 1)))
    cell_width = position_width + _WORD_WIDTH + 10
    per_line = max(1, (width + 1) // (cell_width + 1))
    order = [
        p for p in np.argsort(-row.weights_S, kind="stable").tolist() if p != trace.header.sink
    ]
    cells = [
        _cell(trace.tokens[p], float(row.weights_S[p]), position_width)
        for p in order[:_N_STRONGEST]
        if row.weights_S[p] >= _LEAST_SHARE
    ]
    return [_joined(cells[i : i + per_line]) for i in range(0, len(cells), per_line)]


def _cell(token: Token, share: float, position_width: int) -> Line:
    text = fit(visible(token.data), _WORD_WIDTH)
    return [
        (f"{token.position:>{position_width}} ", "dim"),
        (f"{text} {percent(share)} {bar(share)}  ", heat(share)),
    ]


def _joined(cells: Sequence[Line]) -> Line:
    return [span for cell in cells for span in cell]
