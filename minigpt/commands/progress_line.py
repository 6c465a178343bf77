"""How far some work is, on stderr: a live line on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from minigpt.commands.status_line import LiveLines, StatusLine
from minigpt.console import make_console
from minigpt.text.building import PrepareProgress
from minigpt.text.escape import printable

PLAIN_EVERY_S = 5.0
"""Seconds between lines where there is no terminal."""
_STAGES = {"download": "downloading", "train tokenizer": "learning tokens", "encode": "encoding"}


class ProgressLine:
    """Shows one piece of work after another; use it as a context."""

    def __init__(self, label: str) -> None:
        """Args: label, what goes on at first."""
        self._console = make_console(is_stderr=True)
        self._line = StatusLine()
        self._line.label = label
        self._is_live = sys.stderr.isatty() and not self._console.is_dumb_terminal
        self._live = LiveLines(self._line, self._console)
        self._last_line_at = time.monotonic()
        self._stage: PrepareProgress | None = None
        self._stage_began_at = 0.0

    def __enter__(self) -> Self:
        if self._is_live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def show(self, label: str, share: float, facts: Sequence[str]) -> None:
        """Show what goes on, which share of it is done (0 to 1), and facts about it."""
        self._line.label, self._line.share, self._line.facts = label, share, facts
        if not self._is_live and time.monotonic() - self._last_line_at >= PLAIN_EVERY_S:
            self._last_line_at = time.monotonic()
            self._console.print(printable("  ".join([label, *facts])))

    def preparing(self, progress: PrepareProgress) -> None:
        """Show how far the preparation of a text is, and how fast since its stage began."""
        if self._stage is None or self._stage.stage != progress.stage:
            self._stage, self._stage_began_at = progress, time.monotonic()
        seconds = time.monotonic() - self._stage_began_at
        facts = [f"{progress.done / 1e6:.1f} of {progress.total / 1e6:.1f} MB"]
        if progress.done > self._stage.done:
            facts.append(f"{(progress.done - self._stage.done) / 1e6 / seconds:.3g} MB/s")
        share = progress.done / progress.total if progress.total else 0.0
        self.show(_STAGES.get(progress.stage, progress.stage), share, facts)
