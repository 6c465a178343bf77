"""The terminal: the only home of rich.Console, and the place where untrusted text is escaped.

stdout carries the result, stderr everything else.
"""

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text
from rich.theme import Theme

from minigpt.text.visible import printable

# Middle luminance, so that every step of the heat reads on dark and on light backgrounds.
_THEME = Theme(
    {
        "plain": "none",
        "token": "bold",
        "sink": "dim",
        "heat0": "dim",
        "heat1": "#4c9bc6",
        "heat2": "#2aa198",
        "heat3": "#cb8b16",
        "heat4": "bold #e0561f",
        "good": "green",
        "bad": "bold red",
    }
)
_PIPE_WIDTH = 100


def make_console(*, is_stderr: bool) -> Console:
    """Return a console on the current stdout or stderr; plain where that is no terminal."""
    stream = sys.stderr if is_stderr else sys.stdout
    return Console(
        stderr=is_stderr,
        theme=_THEME,
        highlight=False,
        emoji=False,
        markup=False,
        soft_wrap=True,
        width=None if stream.isatty() else _PIPE_WIDTH,
    )


def spans_to_text(spans: Iterable[tuple[str, str]]) -> Text:
    """Turn (text, style name) pairs into a rich Text, everything that could steer it escaped."""
    return Text.assemble(*((printable(text), style) for text, style in spans))


def write_result(text: str) -> None:
    """Write model text to stdout at once: exact into a pipe, harmless on a terminal."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
