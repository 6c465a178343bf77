"""Traces on stdout: a line per token, as it is generated."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from minigpt.commands.loading import show_model
from minigpt.console import write_result
from minigpt.text.escape import token_name
from minigpt.tracing.events import TraceEvent, TraceStep


class TraceOutput:
    """Shows traces on stdout, one after another; a context manager."""

    dense: Callable[[Tensor], None] | None = None
    """Function called with the weights of all heads at each step. None if nothing needs them."""

    def __init__(self, *, model: Path | None = None) -> None:
        """Args: model, named on stderr when the first trace begins."""
        self._model = model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        """Nothing is open."""

    def show(self, events: Iterator[TraceEvent]) -> bool:
        """Show a trace as its events arrive; return whether it ended without Ctrl-C."""
        for event in events:
            self.name_model()
            if isinstance(event, TraceStep):  # the token and what it attended to
                row = event.row
                parts = [f"sink {row.sink:.0%}"]
                parts += [f"{token_name(one.token.data)} {one.weight:.0%}" for one in row.sources]
                parts += [f"rest {row.rest:.0%}", f"{row.entropy:.1f} bits"]
                left = f"{token_name(event.token.data):<9} {event.probability:>4.0%}"
                write_result(f"{left}  {', '.join(parts)}\n")
        return True

    def name_model(self) -> None:
        """Name the model on stderr, once."""
        if self._model is not None:
            show_model(self._model)
            self._model = None
