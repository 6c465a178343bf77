"""Where a trace goes: its lines or a view of it on stdout, and files."""

import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from minigpt.commands.attention_trace.targets import LINES, Targets
from minigpt.console import make_console, print_lines, write_result
from minigpt.files import resource_errors, write_atomically
from minigpt.rings import ring
from minigpt.tracing import lines as terminal
from minigpt.tracing.events import (
    Trace,
    TraceEvent,
    TraceFooter,
    TraceHeader,
    TraceStep,
)
from minigpt.tracing.file import to_json_line
from minigpt.tracing.lines import TraceLayout
from minigpt.tracing.spans import Line

_BELOW = 3  # lines: the seed, and the shell's next prompt


class Shower:
    """Shows traces, one after another."""

    def __init__(self, targets: Targets, layout: TraceLayout) -> None:
        self._targets, self._layout = targets, layout
        self._console = make_console(is_stderr=False)
        self._files = ExitStack()
        self._out: IO[str] | None = None

    def __enter__(self) -> "Shower":
        path = self._targets.out
        if path is not None:
            with resource_errors(path):
                self._out = self._files.enter_context(path.open("w", encoding="utf-8"))
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # of what could not be written, and was said
            self._files.close()

    def show(self, events: Iterable[TraceEvent]) -> bool:
        """Show a trace to its end, or to a footer where Ctrl-C ends it; tell whether it was whole.

        Raises: ConfigError if it has not what a view asks for; ResourceError if a file cannot be
            written.
        """
        started = time.perf_counter()
        shown: list[TraceEvent] = []
        try:
            for event in events:
                shown.append(event)
                self._stream(event, shown)
        except KeyboardInterrupt:
            n_tokens = sum(isinstance(event, TraceStep) for event in shown)
            shown.append(TraceFooter(n_tokens, None, time.perf_counter() - started, None))
            self._stream(shown[-1], shown)
        header, *steps, footer = shown
        assert isinstance(header, TraceHeader)
        assert isinstance(footer, TraceFooter)
        self._end(Trace(header, tuple(s for s in steps if isinstance(s, TraceStep)), footer))
        return footer.finish is not None

    def _stream(self, event: TraceEvent, shown: list[TraceEvent]) -> None:
        targets = self._targets
        if self._out is not None:
            with resource_errors(targets.out or Path()):
                self._out.write(to_json_line(event) + "\n")
                self._out.flush()
        if targets.as_json:
            write_result(to_json_line(event) + "\n")
        elif targets.view == LINES:
            print_lines(self._console, self._lines(event, shown))

    def _lines(self, event: TraceEvent, shown: list[TraceEvent]) -> list[Line]:
        width = self._console.width
        if isinstance(event, TraceHeader):
            return [*terminal.header_lines(event, width), self._layout.heading()]
        if isinstance(event, TraceStep):
            return self._layout.step(with_sources(event, self._layout.n_sources))
        text = "".join(step.text for step in shown if isinstance(step, TraceStep))
        return [*terminal.footer_lines(event, width), [], [(text, "token")]]

    def _end(self, trace: Trace) -> None:
        targets = self._targets
        if targets.view != LINES and not targets.as_json:
            print_lines(self._console, self._view(targets.view, trace))
        if targets.html is not None:
            write_atomically(targets.html, self._view("page", trace))
        for path in (targets.svg, targets.png):
            if path is not None:
                format = path.suffix.lower().removeprefix(".")
                write_atomically(path, self._view("pictures", trace, format=format))

    def _view(self, name: str, trace: Trace, **more: Any) -> Any:
        height = self._console.height - _BELOW if sys.stdout.isatty() else None
        options = ring("tracing.views").ViewOptions(
            position=self._targets.position,
            width=self._console.width,
            height=height,
            has_colour=self._console.color_system in ("256", "truecolor"),
            picture=self._targets.picture,
            **more,
        )
        return ring(f"tracing.views.{name}").show(trace, options)


def with_sources(step: TraceStep, n_sources: int) -> TraceStep:
    """Return a step whose rows have at most so many sources."""
    return replace(
        step, rows=tuple(replace(row, sources=row.sources[:n_sources]) for row in step.rows)
    )
