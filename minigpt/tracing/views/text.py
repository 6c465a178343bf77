"""The text of a trace, shaded by the attention of one of its tokens.

Below each line of text, bars of different heights show the shares even without colours.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from minigpt.text.escape import token_name, visible
from minigpt.text.joined import JoinedTokens
from minigpt.tracing.analysis_config import facts_of
from minigpt.tracing.config import DIGITS
from minigpt.tracing.events import Token
from minigpt.tracing.findings import Row, Trace, TraceStep, shown_probability
from minigpt.tracing.spans import Line, bar, cell_len, eighths, encodable, fit, heat, percent
from minigpt.tracing.summary import measured
from minigpt.tracing.views import DEFAULTS, ViewOptions
from minigpt.tracing.views.matrix import scale_end
from minigpt.tracing.wrapping import signed, upright_bar, wrapped

_N_SOURCES = 12
_MIN_SHARE = 0.005
_TOKEN_WIDTH = 9
_MARK = "^"
_NEGATIVE = "#e07b39"  # orange, as on the page


def show(trace: Trace, options: ViewOptions = DEFAULTS) -> list[Line]:
    """Return the prompt and the generated text, shaded by the attention of one token.

    Raises: ConfigError for a position that has no row.
    """
    step = options.step(trace)
    token, row = step.token, step.row
    texts = JoinedTokens((token.data for token in trace.tokens), escape=readable).texts
    texts = [encodable(text, options.encoding) for text in texts]
    firsts = _first_tokens(trace.tokens, texts)
    shares_S = np.zeros_like(row.weights_S)
    np.add.at(shares_S, firsts[: len(shares_S)], row.weights_S)
    scale = scale_end(shares_S, trace.header.sink)
    legend = _legend(row, scale, trace.header.sink, has_colour=options.has_colour)
    if any(i != first for i, first in enumerate(firsts)):
        numbers = "numbers" if row.is_signed else "shares"
        legend += f" A character of several tokens shows the sum of their {numbers}."
    chosen = firsts[token.position]
    what = f"What position {token.position} attended to"
    if row.is_signed:
        what = f"What raised or lowered the logit of position {token.position}"
    by = measured(trace.header, (row.measure,))
    title = f"{what}, from the query at {token.position - 1}: {by}."
    return [
        *wrapped(title, options.width),
        [],
        *_shaded_text(trace, texts, shares_S / scale, chosen, options.width),
        [],
        *wrapped(legend, options.width),
        *_candidates(step, options.width),
        *_sources(trace, row, options),
    ]


def _first_tokens(tokens: Sequence[Token], texts: Sequence[str]) -> list[int]:
    """Return, for each token, the position of the token at which its character is shown."""
    firsts: list[int] = []
    for token, text in zip(tokens, texts, strict=True):
        continues = token.data and not text
        firsts.append(firsts[-1] if continues else token.position)
    return firsts


def _shaded_text(
    trace: Trace, texts: Sequence[str], levels_S: NDArray[np.float32], chosen: int, width: int
) -> list[Line]:
    """Wrap the text into lines that start with the position of their first token.

    Each line is followed by its bars unless all are blank.
    """
    number_width = len(str(len(trace.tokens) - 1))
    room = width - number_width - 1
    used = room
    pairs: list[tuple[Line, Line]] = []  # a line of text, and the bars below it
    for word in _words(trace.tokens):
        word_width = sum(cell_len(texts[token.position]) for token in word)
        if word_width <= room < used + word_width:
            used = room
        for token in word:
            style, block, block_style = _look(trace, levels_S, chosen, token.position)
            # Pieces never split a character that is several cells wide.
            for piece in _pieces(texts[token.position], room):
                if used + cell_len(piece) > room:
                    number = f"{token.position:>{number_width}} "
                    pairs.append(([(number, "dim")], [(" " * len(number), "plain")]))
                    used = 0
                text, blocks = pairs[-1]
                text.append((piece, style))
                blocks.append((block * cell_len(piece), block_style))
                used += cell_len(piece)
            if token.data.endswith(b"\n"):
                used = room
    return [
        line
        for text, blocks in pairs
        for line in ([text, blocks] if any(block.strip() for block, _ in blocks) else [text])
    ]


def _look(
    trace: Trace, levels_S: NDArray[np.float32], chosen: int, position: int
) -> tuple[str, str, str]:
    """Return a token's style, the bar below it and the bar's style."""
    if position == chosen:
        return "chosen", _MARK, "token"
    if position > chosen:
        return "dim", " ", "plain"
    share = abs(float(levels_S[position]))
    if position == trace.header.sink:
        return "plain", upright_bar(share), "dim"
    level = -(-eighths(share) // 2)  # 0 to 4
    if levels_S[position] < 0 and level:
        return _NEGATIVE, upright_bar(share), _NEGATIVE
    unshaded = "plain" if position < len(trace.header.prompt) else "token"
    return f"shade{level}" if level else unshaded, upright_bar(share), f"heat{level}"


def readable(data: bytes) -> str:
    """Return a token's text with spaces unchanged and other special characters escaped."""
    return " ".join(visible(part) for part in data.split(b" "))


def _words(tokens: Sequence[Token]) -> list[list[Token]]:
    """Group tokens into unbreakable words; each starts with a space or after a line break."""
    words: list[list[Token]] = []
    for token in tokens:
        if not words or token.data.startswith((b" ", b"\n")) or words[-1][-1].data.endswith(b"\n"):
            words.append([])
        words[-1].append(token)
    return words


def _pieces(text: str, width: int) -> list[str]:
    """Split a text into non-empty pieces of at most ``width`` cells."""
    pieces: list[str] = []
    for character in text:
        if pieces and cell_len(pieces[-1] + character) <= width:
            pieces[-1] += character
        else:
            pieces.append(character)
    return pieces


def _legend(row: Row, scale: float, sink: int, *, has_colour: bool) -> str:
    of_sink, prompt, generated = (round(x, DIGITS) for x in (row.sink, row.prompt, row.generated))
    if row.is_signed:
        unit = facts_of(row.measure).unit
        beyond = " or more" if abs(of_sink) > scale else ""
        signs = "orange where it lowered the token" if has_colour else "with its sign in the list"
        return (
            f"█ is a magnitude of {scale:.3g} {unit}{beyond}, {signs}; {_MARK} the token itself; "
            f"sink (position {sink}) {of_sink:+z.2f}; prompt {prompt:+z.2f}, generated "
            f"{generated:+z.2f}."
        )
    more = " or more" if of_sink > scale else ""
    entropy = round(row.entropy, DIGITS)
    return (
        f"█ is {scale:.1%}{more}, {_MARK} the token itself; sink (position {sink}) {of_sink:.1%}; "
        f"prompt {prompt:.0%}, generated {generated:.0%}; entropy {entropy:.1f} bits."
    )


def _candidates(step: TraceStep, width: int) -> list[Line]:
    """Return lines with the most probable tokens at a step, if they were kept."""
    parts = [
        f"{token_name(one.data)} {percent(shown_probability(one.log_probability)).strip()}"
        for one in step.candidates
    ]
    return wrapped(" | ".join(parts), width, "plain", label="candidates ") if parts else []


def _sources(trace: Trace, row: Row, options: ViewOptions) -> list[Line]:
    """Return lines with the strongest positions except the sink, in as many columns as fit."""
    position_width = max(3, len(str(len(trace.tokens) - 1)))
    cell_width = position_width + _TOKEN_WIDTH + 10
    per_line = max(1, (options.width + 1) // (cell_width + 1))
    order = np.argsort(-np.abs(row.weights_S), kind="stable").tolist()
    largest = max(float(np.abs(row.weights_S).max()), 1e-9)
    lines: list[Line] = []
    for position in [p for p in order if p != trace.header.sink][:_N_SOURCES]:
        share = float(row.weights_S[position])
        if abs(share) < _MIN_SHARE * (largest if row.is_signed else 1):
            break
        shown = f"{percent(share)} {bar(share)}"
        style = heat(share)
        if row.is_signed:
            shown = f"{signed(share)}  "
            style = _NEGATIVE if share < 0 else heat(share / largest)
        text = fit(encodable(trace.joined.names[position], options.encoding), _TOKEN_WIDTH)
        if not lines or len(lines[-1]) == 2 * per_line:
            lines.append([])
        lines[-1] += [
            (f"{position:>{position_width}} ", "dim"),
            (f"{text} {shown}  ", style),
        ]
    return lines
