"""metrics.jsonl: the events of a run, one JSON object per line."""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from minigpt.checkpoint.folder import METRICS_FILE, moved
from minigpt.files import read_bytes, resource_errors, write_atomically
from minigpt.rings import ring
from minigpt.training.events import Event

TENSORBOARD_FOLDER = "tensorboard"
"""Folder of TensorBoard's event files inside a run."""


class MetricsLog:
    """Appends events to a file. A resumed run first drops the lines after its checkpoint."""

    def __init__(self, path: Path, *, from_step: int | None = None) -> None:
        """Open the log. Args: from_step, last step whose lines are kept; None for a new run."""
        self.path = path
        kept = []
        if from_step is not None and os.path.lexists(path):
            lines = read_bytes(path).splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= from_step]
        write_atomically(path, b"".join(kept))

    def write(self, event: Event) -> None:
        """Append one event, unless it is a sample. NaN and inf become null."""
        if not event.kind:
            return
        facts = {key: _in_json(fact) for key, fact in asdict(event).items() if key != "folder"}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event.kind, **facts}) + "\n")


def _step_of(line: bytes) -> float:
    """Return the step of a line, inf for one that is damaged, as a kill or a disk may leave it."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"}\n") else None
    except (ValueError, TypeError, KeyError, RecursionError):
        step = None
    return step if isinstance(step, int) else math.inf


def _in_json(fact: object) -> object:
    return None if isinstance(fact, float) and not math.isfinite(fact) else fact


@contextmanager
def logging_to(
    run: Path, report_to: str | None, *, from_step: int | None
) -> Iterator[Callable[[Event], None]]:
    """Yield a function that writes an event to a run's metrics.jsonl, and to TensorBoard if wanted.

    Args: report_to, ``tensorboard`` or ``none``; None for what the run did before. from_step, the
        step that the run resumes from; None for a new run.
    Raises: ConfigError if TensorBoard is asked for and not installed; ResourceError.
    """
    board = run / TENSORBOARD_FOLDER
    has_board = from_step is not None and board.is_dir()
    with ExitStack() as stack:
        with resource_errors(run):
            writes = [MetricsLog(run / METRICS_FILE, from_step=from_step).write]
            if report_to == "tensorboard" or (report_to is None and has_board):
                log_class = ring("training.reports.tensorboard").TensorBoardLog
                scalars = log_class(board, from_step=from_step)
                stack.callback(scalars.close)
                writes.append(scalars.write)

        def write(event: Event) -> None:
            try:
                with resource_errors(run):
                    for write_to in writes:
                        write_to(event)
            except FileNotFoundError:
                raise moved(run) from None

        yield write
