"""Traces on stdout: a line per token, as it is generated."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from minigpt.commands.loading import show_model
from minigpt.console import make_console, print_lines
from minigpt.text.escape import visible
from minigpt.tracing.events import TraceEvent, TraceHeader, TraceStep
from minigpt.tracing.lines import TraceLayout


class TraceOutput:
    """Shows traces on stdout, one after another; a context manager."""

    dense: Callable[[Tensor], None] | None = None
    """Function that takes the weights of all heads at each step. None if nothing needs them."""

    def __init__(self, layout: TraceLayout, *, model: Path | None = None) -> None:
        """Args: model, named on stderr when the first trace begins."""
        self.console = make_console(is_stderr=False)
        self._layout, self._model = layout, model
        self._names: list[str] = []  # of the tokens so far

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        """Nothing is open."""

    def show(self, events: Iterator[TraceEvent]) -> bool:
        """Show a trace as its events come; return whether it ended without Ctrl-C."""
        for event in events:
            self.show_event(event)
        return True

    def show_event(self, event: TraceEvent) -> None:
        """Show an event of a trace."""
        self.name_model()
        self.show_lines(event)

    def name_model(self) -> None:
        """Name the model on stderr, once."""
        if self._model is not None:
            show_model(self._model)
            self._model = None

    def show_lines(self, event: TraceEvent) -> None:
        """Show an event as lines."""
        if isinstance(event, TraceHeader):
            self._names = [visible(token.data) for token in event.prompt]
            print_lines(self.console, [self._layout.heading()])
        elif isinstance(event, TraceStep):
            if event.token.position == len(self._names):  # generated, not of the prompt
                self._names.append(visible(event.token.data))
            self.show_step(event, self._names)

    def show_step(self, step: TraceStep, names: list[str]) -> None:
        """Show a step. Args: names, of all tokens so far."""
        rows = (replace(r, sources=r.sources[: self._layout.n_sources]) for r in step.rows)
        print_lines(self.console, self._layout.step(replace(step, rows=tuple(rows)), names))
