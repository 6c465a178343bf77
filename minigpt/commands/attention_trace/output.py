"""Output of traces: lines or a view on stdout, and files."""

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
from minigpt.tracing.events import Trace, TraceEvent, TraceFooter, TraceHeader, TraceStep
from minigpt.tracing.file import to_json_line
from minigpt.tracing.lines import TraceLayout, footer_lines, header_lines

_LINES_BELOW = 3  # the seed, and the shell's next prompt


class TraceOutput:
    """Shows traces on stdout and writes their files, one trace after another."""

    def __init__(self, targets: Targets, layout: TraceLayout) -> None:
        self._targets, self._layout = targets, layout
        self._console = make_console(is_stderr=False)
        self._files = ExitStack()
        self._out: IO[str] | None = None

    def __enter__(self) -> "TraceOutput":
        path = self._targets.out
        if path is not None:
            with resource_errors(path):
                self._out = self._files.enter_context(path.open("w", encoding="utf-8"))
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # a failed write was reported already
            self._files.close()

    def show(self, events: Iterable[TraceEvent]) -> bool:
        """Show a trace as its events come; return whether it ended without Ctrl-C.

        Raises: ConfigError if the trace lacks what a view needs; ResourceError if a file cannot be
            written.
        """
        started = time.perf_counter()
        shown: list[TraceEvent] = []
        try:
            for event in events:
                shown.append(event)
                self._show_event(event)
        except KeyboardInterrupt:
            n_tokens = sum(isinstance(event, TraceStep) for event in shown)
            shown.append(TraceFooter(n_tokens, None, time.perf_counter() - started, None))
            self._show_event(shown[-1])
        header, *steps, footer = shown
        assert isinstance(header, TraceHeader)
        assert isinstance(footer, TraceFooter)
        self._end(Trace(header, tuple(s for s in steps if isinstance(s, TraceStep)), footer))
        return footer.finish is not None

    def _show_event(self, event: TraceEvent) -> None:
        targets, width = self._targets, self._console.width
        if self._out is not None:
            with resource_errors(targets.out or Path()):
                self._out.write(to_json_line(event) + "\n")
                self._out.flush()
        if targets.as_json:
            write_result(to_json_line(event) + "\n")
        elif targets.view != LINES:
            return
        elif isinstance(event, TraceHeader):
            lines = [*header_lines(event, width), self._layout.heading()]
            print_lines(self._console, lines)
        elif isinstance(event, TraceStep):
            rows = (replace(r, sources=r.sources[: self._layout.n_sources]) for r in event.rows)
            print_lines(self._console, self._layout.step(replace(event, rows=tuple(rows))))
        else:
            print_lines(self._console, footer_lines(event, width))

    def _end(self, trace: Trace) -> None:
        targets = self._targets
        if targets.view == LINES and not targets.as_json:
            print_lines(self._console, [[], [(trace.text, "token")]])
        elif not targets.as_json:
            print_lines(self._console, self._view(targets.view, trace))
        if targets.html is not None:
            write_atomically(targets.html, self._view("page", trace))
        for path in (targets.svg, targets.png):
            if path is not None:
                format = path.suffix.lower().removeprefix(".")
                write_atomically(path, self._view("pictures", trace, format=format))

    def _view(self, name: str, trace: Trace, **more: Any) -> Any:
        options = ring("tracing.views").ViewOptions(
            position=self._targets.position,
            width=self._console.width,
            height=self._console.height - _LINES_BELOW if sys.stdout.isatty() else None,
            has_colour=self._console.color_system in ("256", "truecolor"),
            picture=self._targets.picture,
            **more,
        )
        return ring(f"tracing.views.{name}").show(trace, options)
