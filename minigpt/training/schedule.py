"""The budget and the learning rate schedule, as pure functions of step and time."""

import math
from dataclasses import replace

from minigpt.config import RunConfig, TrainingConfig

_FIRST_MOMENTUM = 0.7


def steps_of_max_epochs(config: RunConfig, n_train_tokens: int) -> int:
    """Return ``max_epochs`` as a number of steps, rounded up; 0 for no limit.

    An epoch is the number of steps that process ``n_train_tokens`` tokens.
    """
    n_epochs = config.training.max_epochs
    return max(1, math.ceil(n_epochs * n_train_tokens / config.step_tokens)) if n_epochs else 0


def with_max_steps(config: RunConfig, n_train_tokens: int) -> RunConfig:
    """Convert ``max_epochs`` to ``max_steps``. If both are set, the lower limit applies."""
    limits = (config.training.max_steps, steps_of_max_epochs(config, n_train_tokens))
    max_steps = min((limit for limit in limits if limit), default=0)
    return replace(config, training=replace(config.training, max_steps=max_steps))


def progress(config: TrainingConfig, step: int, elapsed_s: float) -> float:
    """Return the fraction of the budget used, in [0, 1]: the larger one of steps and of minutes.

    Without ``max_minutes`` it depends only on the step. With it, the schedule ends when the time is
    up, on any machine.
    """
    assert config.max_steps or config.max_minutes, "with_max_steps has not been called"
    of_steps = step / config.max_steps if config.max_steps else 0.0
    of_minutes = elapsed_s / (60 * config.max_minutes) if config.max_minutes else 0.0
    return min(1.0, max(of_steps, of_minutes))


def lr_scale(config: TrainingConfig, progress: float) -> float:
    """Return the learning rate as a fraction of its peak.

    Args: progress, fraction of the budget used, in [0, 1].

    Source: wsd, Hu et al. 2024, arXiv:2404.06395; cosine, Loshchilov & Hutter 2017,
        arXiv:1608.03983.
    """
    if progress < config.warmup_fraction:
        # Starts at 0.1, because a rate of 0 would waste the first step.
        return 0.1 + 0.9 * progress / config.warmup_fraction
    after_warmup = (progress - config.warmup_fraction) / max(1 - config.warmup_fraction, 1e-12)
    match config.schedule:
        case "constant":
            shape = 1.0
        case "linear":
            shape = 1 - after_warmup
        case "cosine":
            shape = 0.5 * (1 + math.cos(math.pi * after_warmup))
        case _:  # wsd (warm-up, stable, decay): linear decay at the end
            shape = min(1.0, (1 - progress) / max(config.decay_fraction, 1e-12))
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * shape


def momentum(config: TrainingConfig, step: int) -> float:
    """Return Muon's momentum at a step.

    A low momentum gives a lower loss in a short run, and a higher one in a long run
    (docs/training.md).
    """
    if step >= config.momentum_warmup_steps:
        return config.momentum
    start = min(_FIRST_MOMENTUM, config.momentum)
    return start + (config.momentum - start) * step / config.momentum_warmup_steps


def is_due(step: int, every: int | None) -> bool:
    """Return whether something is due after a step; never if ``every`` is None or 0."""
    return step % every == 0 if every else False
