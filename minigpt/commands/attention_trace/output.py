"""Traces on stdout: a line per token, as it is generated."""

import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from minigpt.commands.loading import show_model
from minigpt.console import make_console, note, print_lines
from minigpt.errors import cut
from minigpt.rings import find_ring
from minigpt.text.escape import JoinedTokens, visible
from minigpt.tracing.events import TraceEvent, TraceFooter, TraceHeader, TraceStep
from minigpt.tracing.lines import TraceLayout
from minigpt.tracing.tracer import RECORDS


class TraceOutput:
    """Shows traces on stdout, one after another; a context manager."""

    dense: Callable[[Tensor], None] | None = None
    """Function that takes the weights of all heads at each step. None if nothing needs them."""

    def __init__(self, layout: TraceLayout, *, model: Path | None = None) -> None:
        """Args: model, named on stderr when the first trace begins."""
        self.console = make_console(is_stderr=False)
        self._layout, self._model = layout, model
        self._is_named = False  # the model, on stderr
        self._summary = find_ring("tracing.summary")
        self._joined = JoinedTokens()
        self._header: TraceHeader | None = None  # of the trace that is shown
        self._n_rows = 0  # of it, so far
        self._waiting: list[TraceStep] = []  # steps whose token may be part of a character

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        """Nothing is open."""

    def show(self, events: Iterator[TraceEvent]) -> bool:
        """Show a trace as its events come; return whether it ended without Ctrl-C.

        Raises: KeyboardInterrupt for Ctrl-C before the header.
        """
        started = time.perf_counter()
        header: TraceHeader | None = None
        texts: list[str] = []
        footer: TraceFooter | None = None
        signal: SystemExit | None = None
        while footer is None:
            try:
                event = next(events)
                match event:
                    case TraceHeader():
                        header = event
                    case TraceStep():
                        texts.append(event.text)
                    case TraceFooter():
                        footer = event
                self.show_event(event)
            except (KeyboardInterrupt, SystemExit) as error:
                if header is None or footer is not None or not isinstance(events, Generator):
                    raise
                signal = error if isinstance(error, SystemExit) else None
                try:
                    footer = events.throw(KeyboardInterrupt)
                except KeyboardInterrupt:  # it had ended
                    seconds = time.perf_counter() - started
                    footer = RECORDS.TraceFooter(len(texts), None, seconds, None)
                self.show_event(footer)
        self.end("".join(texts) if footer.n_tokens else None)
        if signal is not None:
            raise signal
        return footer.finish is not None

    def show_event(self, event: TraceEvent) -> None:
        """Show an event of a trace."""
        if self._model is not None:
            show_model(self._model)
            self._model, self._is_named = None, True
        against = getattr(event, "against", None)  # of an analysis
        if against is not None and against.n_tokens > 1:
            first = f"{visible(against.data)}, the first of {against.n_tokens} tokens"
            note(f"--against {cut(against.text)}: compared with {first}")
        self.show_lines(event)

    def show_lines(self, event: TraceEvent) -> None:
        """Show an event as lines."""
        width = self.console.width
        if isinstance(event, TraceHeader):
            self._joined = JoinedTokens(token.data for token in event.prompt)
            self._header, self._n_rows = event, 0
            if self._summary:
                lines = self._summary.header_lines(event, width)
                if self._is_named and sys.stdout.isatty() and sys.stderr.isatty():
                    del lines[0]  # the model
                lines += self._summary.legend(self._layout, event)
                print_lines(self.console, [*lines, []])
            print_lines(self.console, [self._layout.heading()])
        elif isinstance(event, TraceStep):
            if event.token.position == len(self._joined.names):  # generated, not of the prompt
                self._joined.add(event.token.data)
            self._n_rows += 1
            self._waiting.append(event)
            if not self._joined.is_open:
                self._show_waiting()
        else:
            self._show_waiting()
            if self._summary and self._header is not None:
                n_rows = self._n_rows
                lines = self._summary.footer_lines(event, self._header, width, n_rows=n_rows)
                print_lines(self.console, lines)

    def end(self, text: str | None) -> None:
        """End a trace. Args: text, what was generated; None if nothing was."""
        if text is not None:
            print_lines(self.console, [[], [(text, "token")]], is_cut=False)

    def _show_waiting(self) -> None:
        for step in self._waiting:
            rows = (replace(r, sources=r.sources[: self._layout.n_sources]) for r in step.rows)
            lines = self._layout.step(replace(step, rows=tuple(rows)), self._joined.names)
            print_lines(self.console, lines)
        self._waiting = []
