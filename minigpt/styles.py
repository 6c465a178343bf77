"""Define the colors of styled lines, and print the lines."""

from collections.abc import Iterable
from functools import cache

from rich.console import Console
from rich.text import Text
from rich.theme import Theme

from minigpt.text.escape import printable

# Medium luminance, so that all colors are readable on dark and light backgrounds.
THEME = Theme(
    {
        "plain": "none",
        "token": "bold",
        "heat0": "dim",
        "heat1": "#4c9bc6",
        "heat2": "#2aa198",
        "heat3": "#cb8b16",
        "heat4": "bold #e0561f",
        # The same colors as backgrounds; black text is readable on all of them.
        "shade1": "#000000 on #4c9bc6",
        "shade2": "#000000 on #2aa198",
        "shade3": "#000000 on #cb8b16",
        "shade4": "bold #000000 on #e0561f",
        "chosen": "bold reverse",
    }
)
"""Color of each style name used in traces."""
_ASCII = dict(zip("█▉▊▋▌▍▎▏▇▆▅▄▃▂▁▀━─│┬┴┼·…␣⋯∅", "#===---.#==--..#--|+++.~_~0", strict=True))
"""ASCII replacements of characters in bars, charts and tokens that a stream cannot encode."""


def spans_to_text(spans: Iterable[tuple[str, str]]) -> Text:
    """Turn (text, style name) pairs into a rich Text, with control characters escaped."""
    return Text.assemble(*((printable(text), style) for text, style in spans))


def print_lines(
    console: Console, lines: Iterable[Iterable[tuple[str, str]]], *, is_cut: bool = True
) -> None:
    """Print lines of (text, style name) pairs, with control characters escaped.

    Args: is_cut, whether lines too wide for the terminal are truncated instead of wrapped.
    """
    missing = _in_ascii(console.encoding) if is_cut else {}
    is_plain = console.color_system is None and not (is_cut and console.is_terminal)
    for line_spans in lines:
        if is_plain:
            # The same output, without rich's 0.5 ms per line.
            line = "".join([text for text, _ in line_spans])
            line = printable(line.translate(missing) if missing else line).expandtabs()
            console.file.write((line.rstrip(" ") if is_cut else line) + "\n")
            continue
        spans = [(text.translate(missing), style) for text, style in line_spans]
        text = spans_to_text(spans)
        if is_cut and console.is_terminal and text.cell_len > console.width:
            text.truncate(console.width, overflow="ellipsis")
        console.print(text, soft_wrap=is_cut)  # without it, rich wraps at words
    console.file.flush()


@cache
def _in_ascii(encoding: str) -> dict[int, str]:
    """Return the ``str.translate`` table that replaces characters an encoding cannot represent."""
    table = {}
    for character, replacement in _ASCII.items():
        try:
            character.encode(encoding)
        except UnicodeEncodeError:
            table[ord(character)] = replacement
    return table
