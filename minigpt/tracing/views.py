"""The views of a whole trace, by name."""

from minigpt.errors import ConfigError, nearest
from minigpt.tracing.events import Measure, Trace
from minigpt.tracing.heads_view import heads_view
from minigpt.tracing.matrix_view import matrix_view
from minigpt.tracing.spans import Line
from minigpt.tracing.text_view import text_view

VIEWS = ("text", "matrix", "heads")


def draw_view(
    view: str,
    trace: Trace,
    width: int,
    height: int | None = None,
    *,
    position: int | None = None,
    measure: Measure | None = None,
    has_colour: bool = True,
) -> list[Line]:
    """Return the lines of one of VIEWS.

    Args: width, height, cells of the terminal, height None for no limit; position, of the token
        that the view text is of, None for the last; measure, None for the trace's first;
        has_colour, whether the terminal shows colours.
    Raises: ConfigError for what the trace does not have.
    """
    match view:
        case "text":
            return text_view(trace, width, position=position, measure=measure)
        case "matrix":
            return matrix_view(trace, width, height, measure=measure, has_colour=has_colour)
        case "heads":
            return heads_view(trace, width, measure=measure)
    raise ConfigError(f"there is no view {view!r}. {nearest(view, VIEWS)}")
