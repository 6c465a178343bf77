"""The progress of a long task on stderr: live on a terminal, now and then a line elsewhere."""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from minigpt.commands.display.status_line import LiveLines, StatusLine
from minigpt.console import make_console, one_line, spans_to_text
from minigpt.text.escape import printable

if TYPE_CHECKING:  # progress is shown without the ring of corpora too
    from minigpt.text.corpus import PrepareProgress

PLAIN_EVERY_S = 5.0
"""Seconds between lines where stderr is not a terminal."""
_STAGES = {
    "download": "downloading",
    "split": "choosing validation documents",
    "train tokenizer": "training tokenizer",
    "encode": "encoding",
}


class ProgressLine:
    """The progress of one task after another, as a context manager."""

    def __init__(self, label: str = "", *, is_quiet: bool = False) -> None:
        """Args: label, the first task. Nothing is shown before it has one, or if is_quiet."""
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
        self.console.print(one_line(text), style="dim")

    def show_task(
        self, label: str, share: float, facts: Sequence[str], *, is_due: bool = False
    ) -> None:
        """Show the current task, the share of it that is done (0 to 1), and facts about it.

        Without a terminal, a line is printed every few seconds, or if it is due.
        """
        self.line.label, self.line.share, self.line.facts = label, share, facts
        is_due = is_due or time.monotonic() - self._last_line_at >= PLAIN_EVERY_S
        if is_due and not self.live:
            self._last_line_at = time.monotonic()
            self.console.print(printable("  ".join([label, *facts])))

    def preparing(self, progress: "PrepareProgress") -> None:
        """Show the progress of preparing a text, and its speed since the stage began."""
        if progress.note:
            line = spans_to_text([("text   ", "dim"), (progress.note, "plain")])
            self.console.print(line, soft_wrap=True)
            return
        if self._stage is None or self._stage.stage != progress.stage:
            self._stage, self._stage_began_at = progress, time.monotonic()
        seconds = time.monotonic() - self._stage_began_at
        facts = [f"{progress.done / 1e6:.1f} of {progress.total / 1e6:.1f} MB"]
        if progress.done > self._stage.done:
            facts.append(f"{(progress.done - self._stage.done) / 1e6 / seconds:.3g} MB/s")
        share = progress.done / progress.total if progress.total else 0.0
        self.show_task(_STAGES.get(progress.stage, progress.stage), share, facts)
