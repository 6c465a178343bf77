"""Several architectures on the same data: parameters matched, one budget, and what came of it.

Every run is an ordinary one, which the trainer makes; here is which runs there are to be, and what
their metrics say.
"""

import statistics
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.resolve import ROOT
from minigpt.config import ARCHS, ATTENTIONS, ModelConfig, RunConfig, SamplingConfig
from minigpt.errors import CheckpointError, ConfigError, nearest
from minigpt.generation.api import load
from minigpt.generation.decoder import Decoder
from minigpt.model.cost import cache_bytes_per_token, parameter_count
from minigpt.training.reports.curves import LossCurves, read_curves
from minigpt.training.reports.plan import flops_of_steps

TOLERANCE = 0.03
"""By what share a variant's parameters may be more or fewer than those aimed at."""
BUDGETS = ("steps", "seconds", "flops")
_DEFAULT_SECONDS = 60.0
# Multiples of 8 suit the kernels; any width is better than a count that is far off.
_WIDTH_STEPS = ((8, 0.01), (1, TOLERANCE))
_DECODED_TOKENS = 128
_DECODING_ROUNDS = 5


@dataclass(frozen=True)
class Variant:
    """What makes a variant of a model, and the width that is then searched for."""

    settings: Mapping[str, Any]
    """Of ModelConfig, laid over those of the model that is compared with."""
    width: str
    """The setting of ModelConfig that the number of parameters is matched by."""


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
VARIANTS: Mapping[str, Variant] = {
    **{name: Variant({"attention": name, "model_type": ""}, "d_mlp") for name in ATTENTIONS},
    **{name: Variant({"arch": name, **_RECURRENT_SHAPE}, "d_model") for name in list(ARCHS)[1:]},
}
"""The variants by name: each score of attention, and what there was before it."""


@dataclass(frozen=True)
class Budget:
    """What every run may spend."""

    kind: str
    """steps, seconds of training, or flops of forward and backward passes."""
    amount: float
    """Of a run."""


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison: a variant, trained from one seed."""

    variant: str
    seed: int
    config: RunConfig
    folder: RunFolder


@dataclass(frozen=True)
class RunResult:
    """What came of a run."""

    name: str
    """Of its folder."""
    seed: int
    steps: int
    seconds: float
    """Of training, without evaluation and saving."""
    val_loss: float
    """The least of its validation passes, nats/token."""
    bits_per_byte: float
    """Of that pass."""
    train_tokens_per_s: float


@dataclass(frozen=True)
class VariantResult:
    """What came of a variant, over its seeds."""

    variant: str
    n_parameters: int
    cache_bytes_per_token: int
    """Of one sequence, in float32."""
    decode_tokens_per_s: float | None
    """At batch 1; None if it was not measured."""
    runs: tuple[RunResult, ...]
    """At least one."""
    val_loss: float = field(init=False)
    """Mean over the runs of their least validation losses, nats/token."""
    val_loss_spread: float | None = field(init=False)
    """Sample standard deviation of those; None of a single run."""
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
    """Return the names in a list with commas, each once.

    Raises: ConfigError if there is no variant of that name.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in VARIANTS:
            raise ConfigError(f"there is no variant {name!r}. {nearest(name, VARIANTS)}")
    return names


def parse_budget(text: str, config: RunConfig) -> Budget:
    """Read KIND or KIND:N, as in steps:500.

    Without a number, steps are those of the config, flops those of its steps, seconds a minute.

    Args: config, of the model that is compared with, its epochs already made steps.
    Raises: ConfigError if it is no budget, or the config has no number of steps.
    """
    kind, colon, number = text.partition(":")
    if kind not in BUDGETS:
        raise ConfigError(f"there is no --budget {kind!r}. {nearest(kind, BUDGETS)}")
    max_steps = config.training.max_steps
    if not colon:
        if kind == "seconds":
            return Budget(kind, _DEFAULT_SECONDS)
        if not max_steps:
            raise ConfigError(f"--budget {kind} needs a number here. Say it, as in {kind}:500.")
        flops = float(flops_of_steps(config, max_steps, max_steps))
        return Budget(kind, max_steps if kind == "steps" else flops)
    try:
        amount = float(number)
    except ValueError:
        amount = 0.0
    is_whole = amount.is_integer() or kind != "steps"
    if not (0 < amount < float("inf") and is_whole):
        what = "a whole number" if kind == "steps" else "a number"
        raise ConfigError(f"--budget {kind} takes {what} above 0: it is {number!r}.")
    return Budget(kind, amount)


def with_budget(config: RunConfig, budget: Budget) -> RunConfig:
    """Return a run's config with the budget as its only limit.

    Of flops, as many steps as fit into it, and one at least.
    """
    limits: dict[str, Any] = {"max_steps": 0, "max_minutes": 0.0, "max_epochs": 0.0}
    if budget.kind == "seconds":
        limits["max_minutes"] = budget.amount / 60
    elif budget.kind == "steps":
        limits["max_steps"] = int(budget.amount)
    else:
        most = (
            int(budget.amount / flops_of_steps(config, 1, 1)) + 1
        )  # the first step is a short one
        n_steps = range(1, most + 1)
        fitting = bisect_right(n_steps, budget.amount, key=lambda n: flops_of_steps(config, n, n))
        limits["max_steps"] = max(1, fitting)
    return replace(config, training=replace(config.training, **limits))


def matched(base: ModelConfig, name: str) -> ModelConfig:
    """Return a variant of a model that has as many parameters, within ``TOLERANCE``.

    Raises: ConfigError if no width comes as close.
    """
    variant, target = VARIANTS[name], parameter_count(base)

    def of_width(width: int) -> ModelConfig:
        return replace(base, **(dict(variant.settings) | {variant.width: width}))

    def count(width: int) -> int:
        return parameter_count(of_width(width))

    own: int = getattr(base, variant.width)
    if count(own) == target:
        return of_width(own)
    closest = of_width(1)
    for step, most in _WIDTH_STEPS:
        widths = range(step, max(own, target) + step, step)
        place = bisect_right(widths, target, key=count)
        near = [of_width(width) for width in widths[max(place - 1, 0) : place + 1]]
        closest = min(near, key=lambda config: abs(parameter_count(config) - target))
        if abs(parameter_count(closest) - target) <= most * target:
            return closest
    raise ConfigError(
        f"no {variant.width} gives the variant {name} {target:,} parameters within "
        f"{TOLERANCE:.0%}: the closest is {parameter_count(closest):,}. Compare a larger model, or "
        "leave the variant out."
    )


def compared_runs(
    base: RunConfig, variants: Sequence[str], n_seeds: int, budget: Budget, name: str
) -> list[ComparedRun]:
    """Return the runs of a comparison, seed by seed, so that an early end leaves whole rounds.

    Args: base, the model that sets the number of parameters, and all other settings; name, with
        which those of their folders in checkpoints/ begin.
    Raises: ConfigError if a variant cannot have as many parameters.
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
    """Return what came of runs that are finished, the least validation loss first.

    Raises: CheckpointError if the metrics of a run do not tell.
    """
    by_variant: dict[str, list[ComparedRun]] = {}
    for run in runs:
        by_variant.setdefault(run.variant, []).append(run)
    results = [
        VariantResult(
            variant=variant,
            n_parameters=parameter_count(same[0].config.model),
            cache_bytes_per_token=cache_bytes_per_token(same[0].config.model),
            decode_tokens_per_s=decode_tokens_per_s.get(variant),
            runs=tuple(_result(run, read_curves(run.folder.path)) for run in same),
        )
        for variant, same in by_variant.items()
    ]
    return sorted(results, key=lambda result: result.val_loss)


def _result(run: ComparedRun, curves: LossCurves) -> RunResult:
    best = min(curves.val, key=lambda point: point.loss, default=None)
    last = curves.train[-1] if curves.train else None
    if best is None or best.bits_per_byte is None or last is None or last.tokens is None:
        raise CheckpointError(
            f"the metrics of {str(run.folder.path)!r} tell no loss. Delete that run, and give the "
            "same command again."
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
    """Return how many tokens a second each model decodes at batch 1, the prompt left out.

    The models take turns, so that whatever else the machine does meets all of them; the medians
    count.

    Args: models, folders by name; prompt, at least a token, of which as many are taken as leave
        the context room for what is decoded.
    """
    decoders, sampling = {}, {}
    for name, folder in models.items():
        model = load(folder, device=device).model
        n_new = max(1, min(_DECODED_TOKENS, model.config.context_length // 2))
        room = max(1, model.config.context_length - n_new)
        decoders[name] = Decoder(model, prompt[:room], max_new_tokens=n_new)
        sampling[name] = SamplingConfig(max_new_tokens=n_new)
    speeds: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(_DECODING_ROUNDS):
        for name, decoder in decoders.items():
            started = time.perf_counter()
            n_tokens = sum(1 for _ in decoder.generate(sampling[name], seed=0))
            speeds[name].append(n_tokens / (time.perf_counter() - started))
    return {name: statistics.median(found) for name, found in speeds.items()}
