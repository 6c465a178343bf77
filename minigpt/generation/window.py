"""The context window: the tokens in view of the model, all or, after sliding, some of them.

A full window slides: it keeps the first few tokens and the newest half of a window, and encodes
them again from position 0. The first tokens are kept because they are attention sinks: without
them, the model's predictions break down.
Source: Xiao et al. 2023, arXiv:2309.17453, section 3.
"""

from collections.abc import Sequence

_N_SINK = 4


class Window:
    """The tokens in view of rows of equal length, and how many have left the window."""

    def __init__(self, rows: Sequence[Sequence[int]], n_slides: int = 0, n_forgotten: int = 0):
        self.rows = [list(row) for row in rows]
        self.n_slides = n_slides
        """Number of times that it has slid."""
        self.n_forgotten = n_forgotten
        """Tokens of each row that have left the window."""

    def __len__(self) -> int:
        return len(self.rows[0])

    def copies(self, n_rows: int) -> "Window":
        """Return a window of n copies of its one row."""
        return Window(self.rows * n_rows, self.n_slides, self.n_forgotten)

    def slide(self, context_length: int) -> None:
        """Keep the first tokens and the newest half of a window."""
        n_newest = max(1, context_length // 2)
        n_sink = min(_N_SINK, context_length // 4)
        n_lost = len(self) - n_newest - n_sink
        self.rows = [row[:n_sink] + row[len(row) - n_newest :] for row in self.rows]
        self.n_slides += 1
        self.n_forgotten += n_lost
