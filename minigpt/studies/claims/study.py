"""A study of the claims: its size, trained models and findings."""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from minigpt.model.language_model import LanguageModel
from minigpt.studies.claims.learning import Progress, Size, equal_size_config, train_on_task
from minigpt.studies.claims.tasks import MAX_ASKED, Task

LEARNED = 0.9
"""Share of right answers at which a task counts as learned."""


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds for the measured numbers."""

    claim: str
    outcome: str
    """``borne out``, ``borne out in part`` or ``not borne out``."""
    reasons: tuple[str, ...]
    """Sentences about the measurements, and about where the claim goes too far."""

    @classmethod
    def of(cls, claim: str, reasons: Sequence[str], *, holds: bool, in_part: bool) -> "Verdict":
        """Return the verdict of a claim that holds, holds in part, or does not hold."""
        not_fully = "borne out in part" if in_part else "not borne out"
        return cls(claim, "borne out" if holds else not_fully, tuple(reasons))


@dataclass(frozen=True)
class Panel:
    """A line chart of results: a line per architecture and seed."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[tuple[str, Sequence[float], Sequence[float]]]
    """Architecture, x values and y values of each line."""
    guess: float | None = None
    """Height of a dotted line for chance level; None draws no line."""


@dataclass(frozen=True)
class Finding:
    """Measurements for a claim, and their verdict."""

    verdict: Verdict
    measured: tuple[Any, ...]
    """Results, dataclasses of the claim's module."""
    table: list[list[str]]
    """Results as rows of text."""
    panels: list[Panel]
    """Results as line charts; may be empty."""
    elapsed_s: float
    """Seconds spent, without the training of models reused from an earlier claim."""


class Study:
    """Measures claims, and reuses trained models for later claims."""

    def __init__(self, size: Size, *, seeds: Sequence[int], device: torch.device) -> None:
        self.size, self.seeds, self.device = size, seeds, device
        self._trained: dict[tuple[str, str, int], tuple[LanguageModel, float]] = {}

    def measure(self, claim: str) -> Iterator[Progress | Finding]:
        """Yield the progress of measuring one of the CLAIMS, then the finding.

        Raises: DivergedError on a NaN or infinite loss.
        """
        module = import_module(f"minigpt.studies.claims.{claim.replace('-', '_')}")
        started_at = time.monotonic()
        measured = yield from module.measure(self)
        elapsed_s = time.monotonic() - started_at
        verdict, table = module.judge(measured), module.table(measured)
        yield Finding(verdict, measured, table, module.panels(measured), elapsed_s)

    def trained(
        self, arch: str, task: Task, seed: int
    ) -> Generator[Progress, None, tuple[LanguageModel, float]]:
        """Return a model trained on a task, and the seconds that its training took."""
        key = arch, task.name, seed
        if key not in self._trained:
            size = self.size
            context_length = max(*size.distances, *size.stages) + 2 * MAX_ASKED
            config = equal_size_config(arch, size.d_model, context_length=context_length)
            started_at = time.monotonic()
            model = yield from train_on_task(config, task, size, seed=seed, device=self.device)
            self._trained[key] = model, time.monotonic() - started_at
        return self._trained[key]


def percent(share: float) -> str:
    """Return a share in whole percent, as in ``12%``."""
    return f"{100 * share:.0f}%"
