"""Views of a trace: text, matrix, heads and lens in a terminal; page and pictures as files.

A view is a module of this package, found by name, with a function that returns the lines for a
terminal or the bytes of a file:

    def show(trace: Trace, options: ViewOptions = DEFAULTS) -> list[Line] | bytes
"""

from dataclasses import dataclass
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Literal

from minigpt.errors import ConfigError

if TYPE_CHECKING:
    from minigpt.tracing.findings import Trace, TraceStep

FILE_VIEWS = ("page", "pictures")
"""Views that return the bytes of a file; all others are for a terminal."""


@dataclass(frozen=True)
class ViewOptions:
    """Options of a view: the part of the trace to show, and the size of the terminal."""

    position: int | None = None
    """Position of the token whose row is shown. None for the last one."""
    width: int = 80
    """Width of the terminal, in cells."""
    encoding: str = "utf-8"
    """Encoding of the terminal."""
    height: int | None = None
    """Height of the terminal, in lines. None for no limit."""
    has_colour: bool = True
    """Whether the terminal supports at least 256 colours."""
    picture: Literal["matrix", "strip"] = "matrix"
    """Content of a picture."""
    format: Literal["svg", "png", "pdf"] = "svg"
    """File format of a picture."""

    def step(self, trace: "Trace") -> "TraceStep":
        """Return the step of the token at ``position``.

        Raises: ConfigError if that position has no step.
        """
        require_steps(trace)
        first, last = trace.steps[0].token.position, trace.steps[-1].token.position
        position = last if self.position is None else self.position
        require_position(position, first, last)
        return trace.steps[position - first]


DEFAULTS = ViewOptions()


def require_position(position: int, first: int, last: int) -> None:
    """Raise ConfigError for a position before the first row or after the last."""
    if not first <= position <= last:
        raise ConfigError(
            f"the trace has no row for position {position}. Choose a position from {first} to "
            f"{last}."
        )


def require_steps(trace: "Trace") -> None:
    """Raise ConfigError for a trace without steps."""
    if not trace.steps:
        raise ConfigError(
            "the trace has no generated token, so there is no row to show. Trace at least one."
        )


def terminal_views() -> tuple[str, ...]:
    """Return the names of the views for a terminal, without importing them."""
    return tuple(sorted({module.name for module in iter_modules(__path__)} - {*FILE_VIEWS}))
