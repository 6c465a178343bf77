"""The models that the claims compare, of about equal size, and how they learn a task."""

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
from minigpt.training.optim import make_optimizers
from minigpt.training.schedule import lr_scale

_LOOK_EVERY = 10  # steps between looks at the loss, which waits for the device
_LEAST_SEQUENCES = 4
_STEPS_OF = {"gpt": 1, "lstm-attention": 1, "lstm": 3}  # in proportion to the lesson's
_LAYERS: dict[str, dict[str, Any]] = {
    "gpt": {"n_layer": 2, "n_head": 4, "qk_norm": True},
    "lstm": {"n_layer": 2, "n_head": 1},
    "lstm-attention": {"n_layer": 1, "n_head": 1},
}


@dataclass(frozen=True)
class Progress:
    """How far a piece of work is."""

    label: str
    """What goes on."""
    share: float
    """Of it that is done, 0 to 1."""
    facts: tuple[str, ...] = ()
    """What is known by now."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """How long, and on what, a model learns."""

    n_steps: int
    """Optimizer steps; an LSTM has three times as many, as one takes it a third of the time."""
    batch_tokens: int
    """Tokens in a step, about: long sequences come in smaller batches, but never one alone."""
    stages: tuple[int, ...]
    """Greatest distances, rising: each step draws one of those that its stage has come to, and
    each sequence a distance up to it."""
    d_model: int
    """Width of the Transformer; the others are as wide as makes them as large."""


def contender(
    arch: str, d_model: int, *, context_length: int, vocab_size: int = VOCAB_SIZE
) -> ModelConfig:
    """Return a model with as many parameters as a Transformer of two layers of width ``d_model``.

    An LSTM has two layers, too; one with attention has it on top of one layer.
    """

    def shape(arch: str, width: int) -> ModelConfig:
        return ModelConfig(
            arch=arch,
            d_model=width,
            vocab_size=vocab_size,
            context_length=context_length,
            **_LAYERS[arch],
        )

    transformer = shape("gpt", d_model)
    if arch == "gpt":
        return transformer
    wanted = parameter_count(transformer)
    return min(
        (shape(arch, width) for width in range(d_model // 2, 3 * d_model)),
        key=lambda config: abs(parameter_count(config) - wanted),
    )


def learn(
    config: ModelConfig,
    task: Task,
    lesson: Lesson,
    *,
    seed: int,
    device: torch.device,
) -> Generator[Progress, None, LanguageModel]:
    """Teach a new model a task: yield how far it is, and return the model.

    The first half of the steps goes through the stages, the rest has all of them.

    Raises: DivergedError if the loss leaves the finite numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    model = model_class(config)(config)
    model.init_weights(generator)
    model.to(device)
    n_steps = _STEPS_OF[config.arch] * lesson.n_steps
    training = TrainingConfig(max_steps=n_steps, seed=seed)
    optimizers = make_optimizers(model, training, torch.float32)
    label = f"{config.arch} learns {task.name}"
    for step in range(n_steps):
        share = step / n_steps
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_scale(training, share)
        loss = _loss(model, task, lesson, share, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % _LOOK_EVERY == 0:
            value = loss.item()
            if not math.isfinite(value):
                raise DivergedError(
                    f"{label}: the loss of step {step} is {value}. Try another device."
                )
            yield Progress(label, share, (f"step {step}", f"loss {value:.2f}"))
    return model.eval()


def _loss(
    model: LanguageModel, task: Task, lesson: Lesson, share: float, generator: torch.Generator
) -> torch.Tensor:
    n_reached = min(len(lesson.stages), 1 + int(2 * share * len(lesson.stages)))
    longest = lesson.stages[int(torch.randint(n_reached, (), generator=generator))]
    n_batch = max(_LEAST_SEQUENCES, lesson.batch_tokens // (longest + 2 * task.n_asked))
    distance_B = torch.randint(task.least_distance, longest + 1, (n_batch,), generator=generator)
    batch = task.draw(distance_B, generator)
    logits = model(batch.tokens_BT.to(model.device), logits_to_keep=task.n_asked)
    targets = batch.targets_BT[:, -task.n_asked :].to(model.device)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
