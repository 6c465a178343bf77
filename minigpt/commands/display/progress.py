"""The progress of a long task on stderr: live on a terminal, occasional lines elsewhere."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderResult
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType, Segment
from rich.text import Text

from minigpt.console import make_console
from minigpt.streams import wrapped
from minigpt.styles import spans_to_text
from minigpt.text.escape import one_line, printable

if TYPE_CHECKING:  # progress works without the ring of corpora too
    from minigpt.text.corpus import PrepareProgress

FREE_CELLS = 3
"""Cells left free at the end of a line. The terminal writes ^C there; without room for it, the line
would wrap and could not be erased."""
_SHORTEST_BAR = 6
_LONGEST_BAR = 40
PLAIN_EVERY_S = 5.0
"""Seconds between lines where stderr is not a terminal."""
_STAGES = {
    "download": "downloading",
    "split": "choosing validation documents",
    "train tokenizer": "training tokenizer",
    "encode": "encoding",
}


@dataclass
class StatusLine:
    """A line that rich can redraw: the current task, a bar and details."""

    label: str = ""
    """Current task. If empty, the line is not shown."""
    share: float = 0.0
    """Completed share of the task, 0 to 1."""
    details: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the line for the current width."""
        if self.label:
            yield self.draw(options.max_width - FREE_CELLS, is_ascii=options.ascii_only)

    def draw(
        self, width: int, *, is_ascii: bool = False, details: Sequence[str] | None = None
    ) -> Text:
        """Return the line in at most ``width`` cells; bar and label shrink before the details.

        Details without room are left out from the last but one on: the last is the time left.

        Args: details, shown instead of the line's own.
        """
        texts = list(self.details if details is None else details)
        # From wide to narrow; the first layout that fits is used.
        layouts = ((self.label, "  ", _SHORTEST_BAR), (self.label, " ", _SHORTEST_BAR))
        for label, gap, shortest in (*layouts, (self.label, " ", 0), ("", " ", 0)):
            shown = gap.join(texts)
            room = width - len(f"{label} {gap}{shown}")
            if room >= shortest:
                break
        while len(shown) > width and len(texts) > 1:
            del texts[max(len(texts) - 2, 1)]
            shown = gap.join(texts)
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

    A terminal wraps lines that no longer fit into additional rows, and rich alone would not erase
    those. On a terminal that truncates lines instead, as many rows above them are erased.
    """

    def __init__(self, lines: RenderableType, console: Console) -> None:
        """Args: lines, none wider than the console."""
        self._drawn = _MeasuredLines(lines)
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


class _MeasuredLines:
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


class ProgressLine:
    """Context manager that shows the progress of successive tasks."""

    def __init__(self, label: str = "", *, is_quiet: bool = False) -> None:
        """Args: label, of the first task; nothing is shown while it is empty, or if is_quiet."""
        self.console = make_console(is_stderr=True)
        self.console.quiet = is_quiet
        self.line = StatusLine(label)
        is_terminal = not is_quiet and sys.stderr.isatty() and not self.console.is_dumb_terminal
        self.live = LiveLines(self.line, self.console) if is_terminal else None
        """Lines that are redrawn in place. None outside a terminal."""
        self._last_line_at = time.monotonic()
        self._stage: PrepareProgress | None = None
        self._stage_began_at = 0.0

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.stop()

    def note(self, text: str) -> None:
        """Print a line."""
        self.console.print(*wrapped(one_line(text)), sep="\n", style="dim")

    def print_fact(self, name: str, fact: str) -> None:
        """Print a fact after its name, wrapped in a column of its own."""
        for line in wrapped(fact, indent=7):
            self.console.print(spans_to_text([(f"{name:<7}", "dim"), (line, "plain")]))
            name = ""

    def show_task(
        self, label: str, share: float, details: Sequence[str], *, is_due: bool = False
    ) -> None:
        """Show the current task, the share of it that is done (0 to 1), and details.

        Without a terminal, a line is printed every few seconds, or if is_due.
        """
        self.line.label, self.line.share, self.line.details = label, share, details
        is_due = is_due or time.monotonic() - self._last_line_at >= PLAIN_EVERY_S
        if is_due and not self.live:
            self._last_line_at = time.monotonic()
            self.console.print(printable("  ".join([label, *details])))

    def preparing(self, progress: "PrepareProgress") -> None:
        """Show the progress of preparing a text, and its speed since the stage began."""
        if progress.note:
            self.print_fact("text", progress.note)
            return
        if self._stage is None or self._stage.stage != progress.stage:
            self._stage, self._stage_began_at = progress, time.monotonic()
        seconds = time.monotonic() - self._stage_began_at
        details = [f"{progress.done / 1e6:.1f} of {progress.total / 1e6:.1f} MB"]
        if progress.done > self._stage.done:
            details.append(f"{(progress.done - self._stage.done) / 1e6 / seconds:.3g} MB/s")
        share = progress.done / progress.total if progress.total else 0.0
        self.show_task(_STAGES.get(progress.stage, progress.stage), share, details)
