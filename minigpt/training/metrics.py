"""Events -> metrics.jsonl: one JSON object a line, for plots and for programs."""

import json
from dataclasses import asdict
from pathlib import Path

from minigpt.checkpoint.disk import write_atomically
from minigpt.training.trainer import EvalEvent, Event, SaveEvent, StepEvent

_KINDS = {StepEvent: "step", EvalEvent: "eval", SaveEvent: "save"}


class MetricsLog:
    """Appends events to a file; a resumed run first drops the lines past where it resumes."""

    def __init__(self, path: Path, *, from_step: int = 0) -> None:
        """Open the log, keeping what it says of steps up to ``from_step``."""
        self.path = path
        kept = [line for line in self._lines() if json.loads(line)["step"] <= from_step]
        write_atomically(path, "".join(kept).encode())

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.endswith("}\n")]  # a kill can cut the last one

    def write(self, event: Event) -> None:
        """Append one event; samples are not metrics and are left out."""
        kind = _KINDS.get(type(event))
        if kind is None:
            return
        facts = {key: value for key, value in asdict(event).items() if key != "folder"}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": kind, **facts}) + "\n")
