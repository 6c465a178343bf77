"""Claim 1: attention reaches far back, where a recurrent network has forgotten."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import mean

import torch

from minigpt.model.cost import parameter_count
from minigpt.model.language_model import LanguageModel
from minigpt.studies.claims.learning import Progress
from minigpt.studies.claims.study import LEARNED, Panel, Study, Verdict, percent
from minigpt.studies.claims.tasks import TASKS, Task

LOST = 0.2
"""Smallest relevant difference in the share of right answers, between the nearest and the farthest
distance or between two models."""
TEST_SEED = 2**31
"""Seed offset of test sequences; training seeds are smaller. (A CPU generator uses only the lowest
32 bits of its seed.)"""
_ARCHS = ("lstm", "lstm-attention", "gpt")
_BATCH_TOKENS = 2**14


@dataclass(frozen=True, kw_only=True)
class AccuracyCurve:
    """A model's share of right answers by the distance of the answer's source."""

    task: str
    arch: str
    seed: int
    """Seed of the training."""
    n_parameters: int
    distances: tuple[int, ...]
    accuracy: tuple[float, ...]
    """Share of right answers at each distance."""
    n_answers: tuple[int, ...]
    """Number of answers at each distance."""
    train_s: float


def measure(study: Study) -> Generator[Progress, None, tuple[AccuracyCurve, ...]]:
    """Train each architecture on each task and test it at each distance."""
    curves = []
    for task, arch, seed in product(TASKS.values(), _ARCHS, study.seeds):
        model, train_s = yield from study.trained(arch, task, seed)
        distances, n_sequences = study.size.distances, study.size.n_sequences
        found = (accuracy(model, task, d, n_sequences=n_sequences, seed=seed) for d in distances)
        shares, n_answers = zip(*found, strict=True)
        curves.append(
            AccuracyCurve(
                task=task.name,
                arch=arch,
                seed=seed,
                n_parameters=parameter_count(model.config),
                distances=distances,
                accuracy=shares,
                n_answers=n_answers,
                train_s=train_s,
            )
        )
    return tuple(curves)


@torch.inference_mode()
def accuracy(
    model: LanguageModel, task: Task, distance: int, *, n_sequences: int, seed: int
) -> tuple[float, int]:
    """Return the share of right answers to test sequences of a distance, and the number of answers.

    The answer is the most probable token. In a copy, the symbols before it are given correctly.
    """
    generator = torch.Generator().manual_seed(TEST_SEED + seed)
    n_right = n_answers = 0
    for batch in task.batches(distance, n_sequences, generator, batch_tokens=_BATCH_TOKENS):
        logits = model(batch.tokens_BT.to(model.device), logits_to_keep=task.n_asked)
        answers = logits.argmax(dim=-1).cpu()[:, : task.n_exact]
        targets = batch.targets_BT[:, -task.n_asked :][:, : task.n_exact]
        n_right += int((answers == targets).sum())
        n_answers += targets.numel()
    return n_right / n_answers, n_answers


def judge(curves: Sequence[AccuracyCurve]) -> Verdict:
    """Judge whether attention answers from far away, and the LSTM only from nearby.

    Borne out if in every task the Transformer is right at the largest distance, where the LSTM is
    worse than at the smallest; in part if in some task the Transformer is only better there, than
    the LSTM and than an informed guess.
    """
    reasons, holds, better = [], [], []
    for task in dict.fromkeys(curve.task for curve in curves):
        near, far = _ends(curves, task, 0), _ends(curves, task, -1)
        distances = next(curve.distances for curve in curves if curve.task == task)
        for arch in near:
            reasons.append(
                f"{task}, {arch}: {percent(near[arch])} right at distance {distances[0]}, "
                f"{percent(far[arch])} at {distances[-1]}: {_range(task, near[arch], far[arch])}."
            )
        holds.append(far["gpt"] >= LEARNED and near["lstm"] - far["lstm"] >= LOST)
        better.append(far["gpt"] - max(far["lstm"], TASKS[task].informed_chance) >= LOST)
        if near["gpt"] - near["lstm"] >= far["gpt"] - far["lstm"] - LOST / 2 > 0:
            reasons.append(
                f"{task}: the LSTM is just as far behind at short distances, so range is not its "
                "problem."
            )
        if far["lstm-attention"] - far["lstm"] >= LOST:
            reasons.append(
                f"{task}: at distance {distances[-1]}, the LSTM gets better with attention on top."
            )
    return Verdict.of("long-range", reasons, holds=all(holds), in_part=any(better))


def _ends(curves: Sequence[AccuracyCurve], task: str, end: int) -> dict[str, float]:
    """Return each architecture's accuracy at one end of its curves, averaged over the seeds."""
    found: dict[str, list[float]] = {}
    for curve in curves:
        if curve.task == task:
            found.setdefault(curve.arch, []).append(curve.accuracy[end])
    return {arch: mean(values) for arch, values in found.items()}


def _range(task: str, near: float, far: float) -> str:
    if near - far >= LOST:
        return "it loses what is far away"
    if far >= LEARNED:
        return "it reaches that far"
    if near < TASKS[task].informed_chance + LOST:
        return "not learned, near or far"
    return "learned in part, equally well near and far"


def table(curves: Sequence[AccuracyCurve]) -> list[list[str]]:
    """Return a table for each task: a row per model, then chance level."""
    rows = []
    for name in dict.fromkeys(curve.task for curve in curves):
        found = [curve for curve in curves if curve.task == name]
        distances, task = found[0].distances, TASKS[name]
        rows.append([f"{name}: % right", "seed", "parameters", *map(str, distances)])
        for one in found:
            shares = [f"{100 * share:.0f}" for share in one.accuracy]
            rows.append([one.arch, str(one.seed), str(one.n_parameters), *shares])
        for guess, chance in (("guess", task.chance), ("informed guess", task.informed_chance)):
            rows.append([guess, "", "", *[f"{100 * chance:.0f}"] * len(distances)])
    return rows


def panels(curves: Sequence[AccuracyCurve]) -> list[Panel]:
    """Return a chart for each task: accuracy by distance."""
    lines: dict[str, list[tuple[str, Sequence[float], Sequence[float]]]] = {}
    for curve in curves:
        line = curve.arch, curve.distances, [100 * share for share in curve.accuracy]
        lines.setdefault(curve.task, []).append(line)
    return [
        Panel(task, "distance of the source", "% right", of_task, 100 * TASKS[task].informed_chance)
        for task, of_task in lines.items()
    ]
