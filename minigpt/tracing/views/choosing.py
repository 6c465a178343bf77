"""What of a whole trace a view shows: the rows of one measure, the step of one position."""

import numpy as np
from numpy.typing import NDArray

from minigpt.errors import ConfigError
from minigpt.tracing.events import Measure, Row, Trace, TraceStep


def chosen_step(trace: Trace, position: int | None) -> TraceStep:
    """Return the step that generated the token at a position; None for the last one.

    Raises: ConfigError if no token was generated there.
    """
    if not trace.steps:
        raise ConfigError("the trace has no generated token: there is no row to show. Trace more.")
    first, last = trace.steps[0].token.position, trace.steps[-1].token.position
    if position is None:
        return trace.steps[-1]
    if not first <= position <= last:
        raise ConfigError(
            f"position {position} is not of a generated token, and only these have rows. Choose "
            f"one from {first} to {last}."
        )
    return trace.steps[position - first]


def chosen_rows(trace: Trace, measure: Measure | None) -> list[Row]:
    """Return the rows of all steps by a measure; None for the trace's first.

    Raises: ConfigError if the trace has no step, or not that measure.
    """
    chosen_step(trace, None)
    measures = trace.header.measures
    if measure is None:
        measure = measures[0]
    if measure not in measures:
        raise ConfigError(
            f"the trace is by {' and '.join(measures)}, and not by {measure}. Trace again with "
            f"--measure {measure} or both."
        )
    return [step.rows[measures.index(measure)] for step in trace.steps]


def as_matrix(rows: list[Row]) -> NDArray[np.float32]:
    """Return whole rows (rows, positions), NaN where a position was not yet in view."""
    matrix = np.full((len(rows), len(rows[-1].weights_S)), np.nan, np.float32)
    for i, row in enumerate(rows):
        matrix[i, : len(row.weights_S)] = row.weights_S
    return matrix


def largest_but_sink(matrix: NDArray[np.float32], sink: int) -> float:
    """Return the largest number off the sink's column, where a scale of colours ends."""
    others = np.delete(matrix, sink, axis=1)
    largest = float(np.nanmax(others, initial=0.0)) if others.size else 0.0
    return largest if largest > 0 else 1.0
