"""Text on a terminal as it is generated: its lines break between words."""

import re
import shutil
from collections.abc import Callable

from rich.cells import cell_len

from minigpt.text.escape import printable

# Between these characters a line may break without a space: East Asian scripts and emoji.
_WIDE = (
    "\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60"
    "\U0001f300-\U0001faff\U00020000-\U0003fffd"
)
# A line break, a wide character or a word, each with the blanks before it; or blanks at the end.
_PIECES = re.compile(rf"[^\S\n]*(?:\n|[{_WIDE}]|[^\s{_WIDE}]+)|[^\S\n]+")
_IS_WIDE = re.compile(rf"[{_WIDE}]$")
_LONGEST_HELD = 40
"""Most characters that wait for the end of their word: some scripts have no spaces."""


class WrappedText:
    """Writes text in pieces, and begins a new line before a word that would cross the edge.

    The last word is held back until the next piece shows that it is complete. A terminal alone
    would break lines inside words.
    """

    def __init__(self) -> None:
        self._held = ""
        self._column = 0
        self._can_break = False  # before a word without a blank

    def write(self, text: str, sink: Callable[[str], object]) -> None:
        """Write text, except for a word at its end that may go on. Args: sink, a terminal."""
        pieces = _PIECES.findall(self._held + printable(text))
        last = pieces[-1] if pieces else ""
        is_open = not (last.endswith("\n") or _IS_WIDE.search(last) or len(last) > _LONGEST_HELD)
        self._held = pieces.pop() if pieces and is_open else ""
        for piece in pieces:
            self._put(piece, sink)

    def flush(self, sink: Callable[[str], object]) -> None:
        """Write what was held back."""
        held, self._held = self._held, ""
        if held:
            self._put(held, sink)

    def _put(self, piece: str, sink: Callable[[str], object]) -> None:
        width = max(shutil.get_terminal_size().columns, 1)
        word = piece.lstrip()
        n_cells = cell_len(piece.expandtabs())
        is_wide = bool(_IS_WIDE.search(piece))
        can_break = word != piece or is_wide or self._can_break
        if piece.endswith("\n"):
            n_cells = self._column = 0
        elif self._column and self._column + n_cells > width >= cell_len(word) and can_break:
            piece, n_cells, self._column = f"\n{word}", cell_len(word), 0
        sink(piece)
        # Of a word wider than the terminal, the last row counts.
        self._column += n_cells
        self._column = (self._column - 1) % width + 1 if self._column else 0
        self._can_break = is_wide
