"""Training the models that the claims compare: of equal size, on a synthetic task."""

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from minigpt.config import ModelConfig, TrainingConfig
from minigpt.errors import DivergedError
from minigpt.model.cost import parameter_count
from minigpt.model.language_model import LanguageModel
from minigpt.model.registry import model_class
from minigpt.studies.claims.tasks import VOCAB_SIZE, Task
from minigpt.studies.matching import closest_in_size
from minigpt.training.optim import make_optimizers
from minigpt.training.schedule import lr_scale

_REPORT_EVERY = 10  # reading the loss waits for the device
_MIN_BATCH_SIZE = 4
_STEPS_FACTOR = {"gpt": 1, "lstm-attention": 1, "lstm": 3}
_SHAPES: dict[str, dict[str, Any]] = {
    "gpt": {"n_layer": 2, "n_head": 4, "qk_norm": True},
    "lstm": {"n_layer": 2, "n_head": 1},
    "lstm-attention": {"n_layer": 1, "n_head": 1},
}


@dataclass(frozen=True)
class Progress:
    """Progress of one part of a measurement."""

    label: str
    """Name of the part, such as "lstm learns recall"."""
    share: float
    """Share of the part that is done, 0 to 1."""
    facts: tuple[str, ...] = ()
    """Current numbers, such as the loss."""


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Length of the training on a task, and the order of its distances."""

    n_steps: int
    """Optimizer steps; three times as many for an LSTM, whose step takes a third of the time."""
    batch_tokens: int
    """Approximate tokens in a step; longer sequences come in smaller batches."""
    stages: tuple[int, ...]
    """Largest distance of each stage, ascending. A step draws one of the stages reached so far,
    and each of its sequences a distance up to that stage's."""
    d_model: int
    """Width of the Transformer; the other models get the width that makes them as large."""


def equal_size_config(
    arch: str, d_model: int, *, context_length: int, vocab_size: int = VOCAB_SIZE
) -> ModelConfig:
    """Return a model as large as a Transformer with two layers of width ``d_model``.

    The LSTM has two layers too; the LSTM with attention has one, and attention on top.
    """

    def with_width(width: int, arch: str = arch) -> ModelConfig:
        return ModelConfig(
            arch=arch,
            d_model=width,
            vocab_size=vocab_size,
            context_length=context_length,
            **_SHAPES[arch],
        )

    transformer = with_width(d_model, "gpt")
    if arch == "gpt":
        return transformer
    widths = range(d_model // 2, 3 * d_model)
    return closest_in_size(with_width, widths, parameter_count(transformer))


def train_on_task(
    config: ModelConfig, task: Task, curriculum: Curriculum, *, seed: int, device: torch.device
) -> Generator[Progress, None, LanguageModel]:
    """Train a new model on a task; yield the progress and return the model.

    The stages of the curriculum are added one by one in the first half of the steps.

    Raises: DivergedError on a NaN or infinite loss.
    """
    generator = torch.Generator().manual_seed(seed)
    model = model_class(config)(config)
    model.init_weights(generator)
    model.to(device)
    n_steps = _STEPS_FACTOR[config.arch] * curriculum.n_steps
    training = TrainingConfig(max_steps=n_steps, seed=seed)
    optimizers = make_optimizers(model, training, torch.float32)
    label = f"{config.arch} learns {task.name}"
    for step in range(n_steps):
        share = step / n_steps
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_scale(training, share)
        loss = _loss(model, task, curriculum, share, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % _REPORT_EVERY == 0:
            value = loss.item()
            if not math.isfinite(value):
                raise DivergedError(f"{label}: loss {value} at step {step}. Try another device.")
            yield Progress(label, share, (f"step {step}", f"loss {value:.2f}"))
    return model.eval()


def _loss(
    model: LanguageModel, task: Task, curriculum: Curriculum, share: float, rng: torch.Generator
) -> torch.Tensor:
    """Return the loss of a fresh batch, drawn for this share of the training."""
    stages = curriculum.stages
    n_reached = min(len(stages), 1 + int(2 * share * len(stages)))
    longest = stages[int(torch.randint(n_reached, (), generator=rng))]
    n_batch = max(_MIN_BATCH_SIZE, curriculum.batch_tokens // (longest + 2 * task.n_asked))
    distance_B = torch.randint(task.least_distance, longest + 1, (n_batch,), generator=rng)
    batch = task.draw(distance_B, rng)
    logits = model(batch.tokens_BT.to(model.device), logits_to_keep=task.n_asked)
    targets = batch.targets_BT[:, -task.n_asked :].to(model.device)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
