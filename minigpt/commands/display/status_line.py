"""Lines on stderr that are redrawn in place, and a status line with a bar."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderResult
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType, Segment
from rich.text import Text

FREE_CELLS = 3
"""Cells left free at the end of a line. The terminal writes ^C there; without room for it, the line
would wrap and could not be erased."""
_SHORTEST_BAR = 6
_LONGEST_BAR = 40


@dataclass
class StatusLine:
    """A line that rich can draw again and again: what is being done, a bar and facts."""

    label: str = ""
    """Current work. An empty label is not shown."""
    share: float = 0.0
    """Share of it that is done, 0 to 1."""
    facts: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the line for the current width."""
        if self.label:
            yield self.draw(options.max_width - FREE_CELLS, is_ascii=options.ascii_only)

    def draw(
        self, width: int, *, is_ascii: bool = False, facts: Sequence[str] | None = None
    ) -> Text:
        """Return the line in at most ``width`` cells; bar and label shrink before the facts.

        Args: facts, shown in place of the line's own.
        """
        # From wide to narrow; the first layout that fits is used.
        layouts = ((self.label, "  ", _SHORTEST_BAR), (self.label, " ", _SHORTEST_BAR))
        for label, gap, shortest in (*layouts, (self.label, " ", 0), ("", " ", 0)):
            shown = gap.join(self.facts if facts is None else facts)
            room = width - len(f"{label} {gap}{shown}")
            if room >= shortest:
                break
        line = Text(label, no_wrap=True)
        if shortest:
            n_bar = min(room, _LONGEST_BAR)
            n_full = round(n_bar * min(max(self.share, 0.0), 1.0))
            line.append(" ")
            line.append(("#" if is_ascii else "━") * n_full, style="cyan")
            line.append(("-" if is_ascii else "─") * (n_bar - n_full), style="bright_black")
        line.append((gap if label else "") + shown)
        line.truncate(max(width, 1), overflow="crop" if is_ascii else "ellipsis")
        return line


class LiveLines(Live):
    """Lines that rich redraws in place, even if the terminal was narrowed in between.

    A terminal wraps lines that no longer fit into more rows than were drawn, and rich alone would
    erase too few. On a terminal that truncates them instead, as many rows above are lost from view.
    """

    def __init__(self, lines: RenderableType, console: Console) -> None:
        """Args: lines, none wider than the console."""
        self._drawn = _Measured(lines)
        super().__init__(
            self._drawn,
            console=console,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
        )

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Move up to the first row that the lines occupy now, then let rich redraw them."""
        width = max(self.console.width, 1)
        n_more = sum(max(n_cells - 1, 0) // width for n_cells in self._drawn.widths)
        up = ((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)) * n_more
        return [Control(*up), *super().process_renderables(renderables)]


class _Measured:
    """Lines, and their widths when they were last drawn."""

    def __init__(self, lines: RenderableType) -> None:
        self.lines = lines
        self.widths: list[int] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self.lines, options, pad=False)
        self.widths = [Segment.get_line_length(line) for line in lines]
        for line in lines:
            yield from line
            yield Segment.line()
