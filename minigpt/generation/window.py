"""What a model has in view: all that was said, or, once its window has slid, some of it.

A window that is full slides: the first few tokens stay, with the newest half of a window, and what
is between is forgotten. They are encoded again, as positions from 0 on. The first tokens stay
because heads put the attention there that they have no use for: without them, a model that was
trained with them falls apart.
Source: Xiao et al. 2023, arXiv:2309.17453, section 3.
"""

from collections.abc import Sequence

_N_SINK = 4


class Window:
    """The tokens in view of some rows, all as long, and what has been forgotten before."""

    def __init__(self, rows: Sequence[Sequence[int]], n_slides: int = 0, n_forgotten: int = 0):
        self.rows = [list(row) for row in rows]
        self.n_slides = n_slides
        """How often it has slid."""
        self.n_forgotten = n_forgotten
        """Tokens of a row that are no longer in view."""

    def __len__(self) -> int:
        return len(self.rows[0])

    def copies(self, n_rows: int) -> "Window":
        """Return a window of n rows that are its one row."""
        return Window(self.rows * n_rows, self.n_slides, self.n_forgotten)

    def slide(self, context_length: int) -> None:
        """Forget all but the first tokens and the newest half of a window."""
        n_newest = max(1, context_length // 2)
        n_sink = min(_N_SINK, context_length // 4)
        n_lost = len(self) - n_newest - n_sink
        self.rows = [row[:n_sink] + row[len(row) - n_newest :] for row in self.rows]
        self.n_slides += 1
        self.n_forgotten += n_lost
