"""Train the models that the claims compare: equally large ones, on a synthetic task."""

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from minigpt.config import ModelConfig, TrainingConfig
from minigpt.errors import DivergedError
from minigpt.model.cost import parameter_count
from minigpt.model.language_model import LanguageModel, model_class
from minigpt.studies.claims.tasks import VOCAB_SIZE, Task
from minigpt.studies.matching import closest_in_size
from minigpt.training.optim import make_optimizers, scale_learning_rates
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
    details: tuple[str, ...] = ()
    """Current numbers, such as the loss."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of the models, the training and the measurements."""

    n_steps: int = 700
    """Optimizer steps; three times as many for an LSTM, whose step takes a third of the time."""
    batch_tokens: int = 1280
    """Approximate tokens in a step; longer sequences come in smaller batches."""
    stages: tuple[int, ...] = (12, 24, 48, 128, 512)
    """Largest distance of each stage of training, ascending. Each step draws one of the stages
    reached so far, and for each sequence a distance up to that stage's."""
    d_model: int = 64
    """Width of the Transformer; the other models get the width at which they are as large."""
    distances: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    """Distances at which models are tested, ascending."""
    n_sequences: int = 200
    """Test sequences at each distance."""
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    """Sequence lengths at which training is timed, ascending."""
    step_tokens: int = 4096
    """Tokens in a timed step."""
    n_repeats: int = 5
    """Timed steps of each architecture and length."""
    timed_d_model: int = 128
    """Width of the Transformer whose training is timed."""


QUICK = Size(
    n_steps=150,
    batch_tokens=640,
    stages=(16, 64),
    d_model=48,
    distances=(8, 16, 32, 64),
    n_sequences=50,
    lengths=(64, 256, 1024),
    step_tokens=1024,
    n_repeats=3,
    timed_d_model=64,
)
"""Size of a study that takes about a minute."""


def equal_size_config(
    arch: str, d_model: int, *, context_length: int, vocab_size: int = VOCAB_SIZE
) -> ModelConfig:
    """Return the config of a model as large as a Transformer with two layers of width ``d_model``.

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
    config: ModelConfig, task: Task, size: Size, *, seed: int, device: torch.device
) -> Generator[Progress, None, LanguageModel]:
    """Train a new model on a task; yield the progress and return the model.

    The stages are added one by one in the first half of the steps. The Trainer is not used, because
    it reads batches from a corpus, while these are sampled at each step.

    Raises: DivergedError on a NaN or infinite loss.
    """
    generator = torch.Generator().manual_seed(seed)
    model = model_class(config)(config)
    model.init_weights(generator)
    model.to(device)
    n_steps = _STEPS_FACTOR[config.arch] * size.n_steps
    training = TrainingConfig(max_steps=n_steps, seed=seed)
    optimizers = make_optimizers(model, training, torch.float32)
    label = f"{config.arch} learns {task.name}"
    for step in range(n_steps):
        share = step / n_steps
        scale_learning_rates(optimizers, lr_scale(training, share))
        loss = _loss(model, task, size, share, generator)
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
    model: LanguageModel, task: Task, size: Size, share: float, rng: torch.Generator
) -> torch.Tensor:
    """Return the loss of a new batch, drawn for this share of the training."""
    n_reached = min(len(size.stages), 1 + int(2 * share * len(size.stages)))
    longest = size.stages[int(torch.randint(n_reached, (), generator=rng))]
    n_batch = max(_MIN_BATCH_SIZE, size.batch_tokens // (longest + 2 * task.n_asked))
    distance_B = torch.randint(task.min_distance, longest + 1, (n_batch,), generator=rng)
    batch = task.draw(distance_B, rng)
    logits = model(batch.tokens_BT.to(model.device), logits_to_keep=task.n_asked)
    targets = batch.targets_BT[:, -task.n_asked :].to(model.device)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
