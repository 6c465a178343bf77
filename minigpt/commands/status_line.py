"""What a terminal shows of work that goes on: one line, redrawn in place, never wider than it."""

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

# The terminal itself writes ^C after the line: were there no room for it, it would wrap, and the
# line could not be erased.
_FREE_CELLS = 3
_SHORTEST_BAR = 6
_LONGEST_BAR = 40


class StatusLine:
    """A line that rich can draw again and again: a label, a bar, and facts."""

    def __init__(self) -> None:
        self.label = ""
        """What goes on; while it is empty, there is no line."""
        self.share = 0.0
        """Of the bar that is full, 0 to 1."""
        self.facts: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the line for the width of this moment."""
        if self.label:
            yield self.draw(options.max_width - _FREE_CELLS, is_ascii=options.ascii_only)

    def draw(self, width: int, *, is_ascii: bool = False) -> Text:
        """Return the line in at most ``width`` cells: the facts go before the bar and the label."""
        # From roomy to narrow; the first layout that fits is taken.
        layouts = ((self.label, "  ", _SHORTEST_BAR), (self.label, " ", _SHORTEST_BAR))
        for label, gap, shortest in (*layouts, (self.label, " ", 0), ("", " ", 0)):
            facts = gap.join(self.facts)
            room = width - len(f"{label} {gap}{facts}")
            if room >= shortest:
                break
        line = Text(label, no_wrap=True)
        if shortest:
            n_bar = min(room, _LONGEST_BAR)
            n_full = round(n_bar * min(max(self.share, 0.0), 1.0))
            line.append(" ")
            line.append(("#" if is_ascii else "━") * n_full, style="cyan")
            line.append(("-" if is_ascii else "━") * (n_bar - n_full), style="bright_black")
        line.append((gap if label else "") + facts)
        line.truncate(max(width, 1), overflow="ellipsis")
        return line
