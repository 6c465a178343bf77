"""Log the events of a run: a JSON object per line in metrics.jsonl, and scalars for TensorBoard."""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minigpt.checkpoint.folder import METRICS_FILE, moved_error
from minigpt.errors import ConfigError, install_extra
from minigpt.files import read_lines, resource_errors, writing_aside
from minigpt.training.events import Event

TENSORBOARD_FOLDER = "tensorboard"
"""Folder of TensorBoard's event files inside a run."""
_FLUSH_S = 10
_TAGS: dict[str, dict[str, str]] = {
    "step": {"train_loss": "loss/train"}
    | {name: name for name in ("lr", "grad_norm", "tokens_per_s", "mfu")},
    "skip": {"n_skipped": "skipped_steps"},
    "eval": {"val_loss": "loss/val", "bits_per_byte": "bits_per_byte/val"},
}


class MetricsLog:
    """Appends events to a file. A resumed run first drops the lines after its checkpoint."""

    def __init__(self, path: Path, *, from_step: int | None = None) -> None:
        """Open the log. Args: from_step, last step whose lines are kept; None for a new run."""
        self.path = path
        with resource_errors(path), writing_aside(path) as file:
            if from_step is not None and os.path.lexists(path):
                file.writelines(line for line in read_lines(path) if _step_of(line) <= from_step)

    def write(self, event: Event) -> None:
        """Append one event, unless it is a sample. NaN and inf become null."""
        if not event.kind:
            return
        values = {key: _in_json(value) for key, value in asdict(event).items() if key != "folder"}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event.kind, **values}) + "\n")


def _step_of(line: bytes) -> float:
    """Return the step of a line; inf if the line is damaged, for example by a kill."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"}\n") else None
    except (ValueError, TypeError, KeyError, RecursionError):
        step = None
    return step if isinstance(step, int) else math.inf


def _in_json(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary_writer() -> Any:
    """Import and return TensorBoard's writer of event files.

    Raises: ConfigError if TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "--report-to tensorboard needs TensorBoard. Install it: "
            f"{install_extra('tensorboard')}; or give --report-to none."
        ) from None
    return SummaryWriter


@contextmanager
def _logging_scalars(folder: Path, from_step: int | None) -> Iterator[Callable[[Event], None]]:
    """Yield a function that logs the scalars of an event, and flushes at each checkpoint."""
    # TensorBoard drops the points of earlier files from purge_step on.
    purge_step = 0 if from_step is None else from_step + 1
    with summary_writer()(str(folder), purge_step=purge_step, flush_secs=_FLUSH_S) as writer:

        def write(event: Event) -> None:
            for name, tag in _TAGS.get(event.kind, {}).items():
                value = getattr(event, name)
                if value is not None:
                    writer.add_scalar(tag, value, event.step)
            if event.kind == "save":
                writer.flush()

        yield write


@contextmanager
def logging_to(
    run: Path, report_to: str | None, *, from_step: int | None
) -> Iterator[Callable[[Event], None]]:
    """Yield a function that writes an event to a run's metrics.jsonl, and to TensorBoard if wanted.

    Args: report_to, ``tensorboard`` or ``none``; None to log as before. from_step, the step that
        the run resumes from; None for a new run.
    Raises: ConfigError if TensorBoard is requested but not installed; ResourceError.
    """
    board = run / TENSORBOARD_FOLDER
    has_board = from_step is not None and board.is_dir()
    with ExitStack() as stack:
        with resource_errors(run):
            writes: list[Callable[[Event], None]] = []
            writes.append(MetricsLog(run / METRICS_FILE, from_step=from_step).write)
            if report_to == "tensorboard" or (report_to is None and has_board):
                writes.append(stack.enter_context(_logging_scalars(board, from_step)))

        def write(event: Event) -> None:
            try:
                with resource_errors(run):
                    for write_to in writes:
                        write_to(event)
            except FileNotFoundError:
                raise moved_error(run) from None

        yield write
