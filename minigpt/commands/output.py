"""Notes on stderr."""

from minigpt.console import make_console
from minigpt.text.escape import printable


def one_line(text: str) -> str:
    """Escape control characters and line breaks."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def note(text: str) -> None:
    """Write a line to stderr that is not part of the result."""
    make_console(is_stderr=True).print(one_line(text), style="dim")
