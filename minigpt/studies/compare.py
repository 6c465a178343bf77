"""Compare architectures on the same text, with equal parameter counts and budgets.

Every run is an ordinary training run. This module plans the runs and summarizes their metrics.
"""

import statistics
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.resolve import ROOT
from minigpt.config import ModelConfig, RunConfig, SamplingConfig
from minigpt.errors import CheckpointError, ConfigError, require_choice
from minigpt.generation.decoder import Decoder
from minigpt.generation.loading import load
from minigpt.model.cache import cache_bytes_per_token
from minigpt.model.cost import parameter_count
from minigpt.model_config import ATTENTIONS
from minigpt.studies import VARIANTS
from minigpt.studies.matching import closest_in_size
from minigpt.training.reports.curves import read_curves
from minigpt.training.reports.plan import flops_of_steps

TOLERANCE = 0.03
"""Largest relative difference between the parameter counts of a variant and the base model."""
BUDGETS = ("steps", "seconds", "flops")
_DEFAULT_SECONDS = 60.0
# Multiples of 8 are faster; other widths are tried only if no multiple comes close enough.
_WIDTH_STEPS = ((8, 0.01), (1, TOLERANCE))
_DECODED_TOKENS = 128
_DECODING_ROUNDS = 5
_RECURRENT_SHAPE = {
    "attention": "",
    "family": "llama",
    "n_head": 1,
    "n_kv_head": 0,
    "d_head": 0,
    "d_mlp": 0,
    "activation": "",
    "qk_norm": False,
    "attention_bias": "none",
    "mlp_bias": False,
    "model_type": "",
}


@dataclass(frozen=True)
class Budget:
    """The training budget of each run."""

    kind: str
    """Unit: steps, seconds of training, or flops of forward and backward passes."""
    amount: float


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison: a variant, trained with one seed."""

    variant: str
    seed: int
    config: RunConfig
    folder: RunFolder


@dataclass(frozen=True)
class RunResult:
    """Result of one run."""

    name: str
    seed: int
    steps: int
    seconds: float
    """Training time, without evaluation and saving."""
    val_loss: float
    """Lowest validation loss, in nats/token."""
    bits_per_byte: float
    """Bits/byte of the same evaluation."""
    train_tokens_per_s: float


@dataclass(frozen=True)
class VariantResult:
    """Result of a variant over all seeds."""

    variant: str
    n_parameters: int
    cache_bytes_per_token: int
    """Cache bytes of one position of one sequence, in float32."""
    decode_tokens_per_s: float | None
    """Decoding speed at batch size 1; None if not measured."""
    runs: tuple[RunResult, ...]
    """Results of its runs, at least one."""
    val_loss: float = field(init=False)
    """Mean of the runs' lowest validation losses, in nats/token."""
    val_loss_spread: float | None = field(init=False)
    """Sample standard deviation of the same losses; None for a single run."""
    bits_per_byte: float = field(init=False)
    """Mean over the runs."""
    train_tokens_per_s: float = field(init=False)
    """Mean over the runs."""

    def __post_init__(self) -> None:
        for name in ("val_loss", "bits_per_byte", "train_tokens_per_s"):
            mean = statistics.fmean(getattr(run, name) for run in self.runs)
            object.__setattr__(self, name, mean)
        losses = [run.val_loss for run in self.runs]
        spread = statistics.stdev(losses) if len(losses) > 1 else None
        object.__setattr__(self, "val_loss_spread", spread)


def parse_variants(text: str) -> list[str]:
    """Return the names in a comma-separated list, without duplicates.

    Raises: ConfigError for an unknown variant.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        require_choice("variant", name, VARIANTS)
    return names


def parse_budget(text: str, config: RunConfig) -> Budget:
    """Read KIND or KIND:N, as in steps:500.

    Without a number: the steps of the config, the flops of those steps, or 60 seconds.

    Args: config, that of the base model, with epochs already converted to steps.
    Raises: ConfigError for an invalid budget, or if a number is needed and missing.
    """
    kind, colon, number = text.partition(":")
    require_choice("--budget", kind, BUDGETS)
    max_steps = config.training.max_steps
    if not colon:
        if kind == "seconds":
            return Budget(kind, _DEFAULT_SECONDS)
        if not max_steps:
            raise ConfigError(f"--budget {kind} needs a number here, as in {kind}:500.")
        flops = float(flops_of_steps(config, max_steps, max_steps))
        return Budget(kind, max_steps if kind == "steps" else flops)
    try:
        amount = float(number)
    except ValueError:
        amount = 0.0
    if not 0 < amount < float("inf") or (kind == "steps" and not amount.is_integer()):
        what = "a whole number" if kind == "steps" else "a number"
        raise ConfigError(f"--budget {kind} takes {what} above 0: it is {number!r}.")
    return Budget(kind, amount)


def with_budget(config: RunConfig, budget: Budget) -> RunConfig:
    """Return a run's config with the budget as its only limit.

    A budget of flops becomes the number of steps that fit into it, at least one.

    Raises: ConfigError if the steps are too many to count.
    """
    n_steps = int(budget.amount) if budget.kind == "steps" else 0
    if budget.kind == "flops":
        # Every step costs at least as much as the first, whose sequences are short.
        n_most = int(budget.amount / flops_of_steps(config, 1, 1))
        if n_most >= 2**53:
            raise ConfigError(
                f"--budget flops:{budget.amount:g} is up to {n_most:.0e} steps of this model, more "
                "than a run can take. Give fewer flops."
            )
        steps = range(1, n_most + 2)
        fitting = bisect_right(steps, budget.amount, key=lambda n: flops_of_steps(config, n, n))
        n_steps = max(1, fitting)
    minutes = budget.amount / 60 if budget.kind == "seconds" else 0.0
    limits = replace(config.training, max_steps=n_steps, max_minutes=minutes, max_epochs=0.0)
    return replace(config, training=limits)


def matched(base: ModelConfig, name: str) -> ModelConfig:
    """Return a variant of a model with as many parameters, within ``TOLERANCE``.

    Raises: ConfigError if no width comes close enough.
    """
    target = parameter_count(base)
    settings: dict[str, Any] = {"arch": name, **_RECURRENT_SHAPE}
    width_field = "d_model"
    if name in ATTENTIONS:
        settings, width_field = {"attention": name, "model_type": ""}, "d_mlp"

    def with_width(width: int) -> ModelConfig:
        return replace(base, **(settings | {width_field: width}))

    own: int = getattr(base, width_field)
    closest = with_width(own)
    if parameter_count(closest) == target:
        return closest
    for step, tolerance in _WIDTH_STEPS:
        widths = range(step, max(own, target) + step, step)
        closest = closest_in_size(with_width, widths, target)
        if abs(parameter_count(closest) - target) <= tolerance * target:
            return closest
    raise ConfigError(
        f"no {width_field} gives the variant {name} {target:,} parameters within "
        f"{TOLERANCE:.0%}: the closest is {parameter_count(closest):,}. Compare a larger model, or "
        "leave the variant out."
    )


def compared_runs(
    base: RunConfig, variants: Sequence[str], n_seeds: int, budget: Budget, name: str
) -> list[ComparedRun]:
    """Return the runs of a comparison, seed by seed, so that stopping early leaves full rounds.

    Args: base, the settings of the base model; name, prefix of the run folders in checkpoints/.
    Raises: ConfigError if a variant cannot match the parameter count.
    """
    models = {variant: matched(base.model, variant) for variant in variants}
    runs = []
    for seed in range(base.training.seed, base.training.seed + n_seeds):
        training = replace(base.training, seed=seed)
        for variant, model in models.items():
            config = with_budget(replace(base, model=model, training=training), budget)
            folder = RunFolder(ROOT / f"{name}-{variant}-s{seed}")
            runs.append(ComparedRun(variant, seed, config, folder))
    return runs


def summarize(
    runs: Sequence[ComparedRun], decode_tokens_per_s: Mapping[str, float]
) -> list[VariantResult]:
    """Return the results of finished runs by variant, lowest validation loss first.

    Raises: CheckpointError if a run's metrics have no loss.
    """
    models = {run.variant: run.config.model for run in runs}
    results = [
        VariantResult(
            variant=variant,
            n_parameters=parameter_count(model),
            cache_bytes_per_token=cache_bytes_per_token(model),
            decode_tokens_per_s=decode_tokens_per_s.get(variant),
            runs=tuple(_result(run) for run in runs if run.variant == variant),
        )
        for variant, model in models.items()
    ]
    return sorted(results, key=lambda result: result.val_loss)


def _result(run: ComparedRun) -> RunResult:
    curves = read_curves(run.folder.path)
    best = min(curves.val, key=lambda point: point.loss, default=None)
    last = curves.train[-1] if curves.train else None
    if best is None or best.bits_per_byte is None or last is None or last.tokens is None:
        raise CheckpointError(
            f"the metrics of {str(run.folder.path)!r} have no loss. Delete that run and repeat the "
            "command."
        )
    return RunResult(
        name=run.folder.path.name,
        seed=run.seed,
        steps=last.steps,
        seconds=last.seconds,
        val_loss=best.loss,
        bits_per_byte=best.bits_per_byte,
        train_tokens_per_s=last.tokens / last.seconds,
    )


def decoding_speeds(
    models: Mapping[str, Path], prompt: Sequence[int], device: str
) -> dict[str, float]:
    """Return each model's decoding speed in tokens/s at batch size 1, without the prompt.

    The models alternate, so that other load on the machine affects all of them; each speed is a
    median.

    Args: models, folders by name; prompt, at least one token, truncated to leave room in the
        context.
    """
    decodings = {}
    for name, folder in models.items():
        model = load(folder, device=device).model
        n_new = max(1, min(_DECODED_TOKENS, model.config.context_length // 2))
        room = max(1, model.config.context_length - n_new)
        decoder = Decoder(model, prompt[:room], max_new_tokens=n_new)
        decodings[name] = partial(decoder.generate, SamplingConfig(max_new_tokens=n_new), seed=0)
    speeds: dict[str, list[float]] = {name: [] for name in decodings}
    for _, (name, decoding) in product(range(_DECODING_ROUNDS), decodings.items()):
        started = time.perf_counter()
        n_tokens = sum(1 for _ in decoding())
        speeds[name].append(n_tokens / (time.perf_counter() - started))
    return {name: statistics.median(found) for name, found in speeds.items()}
