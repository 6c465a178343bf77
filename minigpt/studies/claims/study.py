"""The claims measured and judged, one after the other: sizes, and what comes of them."""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from minigpt.model.language_model import LanguageModel
from minigpt.studies.claims.explainable import Explanation, explain
from minigpt.studies.claims.learning import Lesson, Progress, contender, learn
from minigpt.studies.claims.long_range import Curve, measure_curve
from minigpt.studies.claims.parallel import Timing, measure_timings
from minigpt.studies.claims.tasks import MOST_ASKED, RECALL, TASKS, Task
from minigpt.studies.claims.verdicts import (
    Verdict,
    judge_explainable,
    judge_long_range,
    judge_parallel,
)

CLAIMS = ("long-range", "explainable", "parallel")
_LEARNERS = ("lstm", "lstm-attention", "gpt")
_ATTENDING = ("lstm-attention", "gpt")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured."""

    lesson: Lesson
    """Of each model and task."""
    distances: tuple[int, ...]
    """At which models are tested, rising."""
    n_sequences: int
    """Fresh sequences at each distance."""
    lengths: tuple[int, ...]
    """Of sequences whose training is timed, rising."""
    step_tokens: int
    """Tokens in a timed step."""
    n_repeats: int
    """Timed steps of each kind."""
    timed_d_model: int
    """Width of the Transformer whose training is timed."""


DEFAULT = Size(
    lesson=Lesson(n_steps=700, batch_tokens=1280, stages=(12, 24, 48, 128, 512), d_model=64),
    distances=(8, 16, 32, 64, 128, 256, 512),
    n_sequences=200,
    lengths=(64, 128, 256, 512, 1024, 2048),
    step_tokens=4096,
    n_repeats=5,
    timed_d_model=128,
)
QUICK = Size(
    lesson=Lesson(n_steps=150, batch_tokens=640, stages=(16, 64), d_model=48),
    distances=(8, 16, 32, 64),
    n_sequences=50,
    lengths=(64, 256, 1024),
    step_tokens=1024,
    n_repeats=3,
    timed_d_model=64,
)


@dataclass(frozen=True)
class Finding:
    """What was measured for a claim, and whether it bears it out."""

    verdict: Verdict
    measured: tuple[Curve, ...] | tuple[Explanation, ...] | tuple[Timing, ...]
    elapsed_s: float
    """Seconds that it took, without the models that an earlier claim had taught."""


class Study:
    """Measures claims, and keeps the models that one has taught for the next."""

    def __init__(self, size: Size, *, seeds: Sequence[int], device: torch.device) -> None:
        self.size, self.seeds, self.device = size, seeds, device
        self._taught: dict[tuple[str, str, int], tuple[LanguageModel, float]] = {}

    def measure(self, claim: str) -> Iterator[Progress | Finding]:
        """Yield how far the measurement of one of the CLAIMS is, and at last what was found.

        Raises: DivergedError if a model cannot learn.
        """
        started_at = time.monotonic()
        measured: tuple[Curve, ...] | tuple[Explanation, ...] | tuple[Timing, ...]
        if claim == "long-range":
            measured = yield from self._curves()
            verdict = judge_long_range(measured)
        elif claim == "explainable":
            measured = yield from self._explanations()
            verdict = judge_explainable(measured)
        else:
            measured = yield from self._timings()
            verdict = judge_parallel(measured)
        yield Finding(verdict, measured, time.monotonic() - started_at)

    def _curves(self) -> Generator[Progress, None, tuple[Curve, ...]]:
        curves = []
        for task in TASKS.values():
            for arch in _LEARNERS:
                for seed in self.seeds:
                    model, train_s = yield from self._teach(arch, task, seed)
                    curve = measure_curve(
                        model,
                        task,
                        self.size.distances,
                        n_sequences=self.size.n_sequences,
                        seed=seed,
                        train_s=train_s,
                    )
                    curves.append(curve)
        return tuple(curves)

    def _explanations(self) -> Generator[Progress, None, tuple[Explanation, ...]]:
        explanations = []
        for arch in _ATTENDING:
            for seed in self.seeds:
                model, _ = yield from self._teach(arch, RECALL, seed)
                yield Progress(f"{arch} is asked", 0.0)
                explanation = explain(
                    model,
                    self.size.distances,
                    n_sequences=self.size.n_sequences,
                    seed=seed,
                )
                explanations.append(explanation)
        return tuple(explanations)

    def _timings(self) -> Generator[Progress, None, tuple[Timing, ...]]:
        timings: tuple[Timing, ...] = ()
        # The CPU is always there, and what is claimed of it differs from what is of a GPU.
        for device in dict.fromkeys((torch.device("cpu"), self.device)):
            timings += yield from measure_timings(
                self.size.lengths,
                step_tokens=self.size.step_tokens,
                n_repeats=self.size.n_repeats,
                d_model=self.size.timed_d_model,
                device=device,
            )
        return timings

    def _teach(
        self, arch: str, task: Task, seed: int
    ) -> Generator[Progress, None, tuple[LanguageModel, float]]:
        """Return a model and the seconds that it took to learn."""
        key = arch, task.name, seed
        if key not in self._taught:
            context_length = max(*self.size.distances, *self.size.lesson.stages) + 2 * MOST_ASKED
            config = contender(arch, self.size.lesson.d_model, context_length=context_length)
            started_at = time.monotonic()
            model = yield from learn(config, task, self.size.lesson, seed=seed, device=self.device)
            self._taught[key] = model, time.monotonic() - started_at
        return self._taught[key]
