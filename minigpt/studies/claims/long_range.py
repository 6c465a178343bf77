"""Claim 1: attention reaches what is far away, where a recurrent network has lost it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minigpt.model.cost import parameter_count
from minigpt.model.language_model import LanguageModel
from minigpt.studies.claims.tasks import Task

_TOKENS_AT_ONCE = 2**14
TEST_SEED = 2**31
"""Tests are drawn from generators of this seed and above, training from those below. (A generator
on the CPU heeds the lowest 32 bits of its seed alone.)"""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """How often a model answers right, against the distance of the answer's source."""

    task: str
    arch: str
    seed: int
    n_parameters: int
    distances: tuple[int, ...]
    accuracy: tuple[float, ...]
    """Share of right answers at each distance."""
    n_answers: tuple[int, ...]
    """Answers at each distance."""
    train_s: float
    """Seconds that the model took to learn."""


@torch.inference_mode()
def accuracy(
    model: LanguageModel, task: Task, distance: int, *, n_sequences: int, seed: int
) -> tuple[float, int]:
    """Return the share of right answers to fresh sequences of this distance, and their number.

    The most probable answer counts. Of a copy, the symbols before the asked one were given right.
    """
    generator = torch.Generator().manual_seed(TEST_SEED + seed)
    n_at_once = max(1, _TOKENS_AT_ONCE // (distance + 2 * task.n_asked))
    n_right = n_answers = 0
    for first in range(0, n_sequences, n_at_once):
        n_batch = min(n_at_once, n_sequences - first)
        batch = task.draw(torch.full((n_batch,), distance), generator)
        logits = model(batch.tokens_BT.to(model.device), logits_to_keep=task.n_asked)
        answers = logits.argmax(dim=-1).cpu()[:, : task.n_exact]
        targets = batch.targets_BT[:, -task.n_asked :][:, : task.n_exact]
        n_right += int((answers == targets).sum())
        n_answers += targets.numel()
    return n_right / n_answers, n_answers


def measure_curve(
    model: LanguageModel,
    task: Task,
    distances: Sequence[int],
    *,
    n_sequences: int,
    seed: int,
    train_s: float,
) -> Curve:
    """Return a model's accuracy at each distance.

    Args: seed and train_s, of its training.
    """
    found = [accuracy(model, task, d, n_sequences=n_sequences, seed=seed) for d in distances]
    return Curve(
        task=task.name,
        arch=model.config.arch,
        seed=seed,
        n_parameters=parameter_count(model.config),
        distances=tuple(distances),
        accuracy=tuple(share for share, _ in found),
        n_answers=tuple(n for _, n in found),
        train_s=train_s,
    )
