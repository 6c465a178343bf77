"""Plans of comparisons: parameter counts, budgets and statistics of the losses."""

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from small_models import small_config

from minigpt.config import ModelConfig, RunConfig, TrainingConfig
from minigpt.errors import ConfigError
from minigpt.model.cost import training_flops_per_token
from minigpt.model.language_model import model_class
from minigpt.presets import PRESETS
from minigpt.settings import build
from minigpt.studies import VARIANTS
from minigpt.studies.compare import (
    TOLERANCE,
    Budget,
    RunResult,
    VariantResult,
    compared_runs,
    matched,
    parse_budget,
    parse_variants,
    with_budget,
)

BASES = {
    **{
        name: build(ModelConfig, settings["model"] | {"vocab_size": 997})
        for name, settings in PRESETS.items()
    },
    "tiny": small_config("qwen3"),
    "gpt2-tied": small_config("gpt2-tied", d_mlp=203),
}


def run_config(**training: Any) -> RunConfig:
    training = {"max_steps": 40, "batch_size": 3, "context_warmup_length": 8} | training
    model = small_config("llama-grouped", d_mlp=96)
    return RunConfig(model=model, training=TrainingConfig(**training))


@functools.cache
def built_parameters(config: ModelConfig) -> int:
    model = model_class(config).without_weights(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", BASES)
def test_every_variant_matches_the_parameter_count_within_3_percent(
    base: str, variant: str
) -> None:
    wanted, config = built_parameters(BASES[base]), matched(BASES[base], variant)
    assert abs(built_parameters(config) - wanted) <= 0.03 * wanted
    kind = config.attention if config.arch == "gpt" else config.arch
    assert kind == variant
    for name in ("vocab_size", "context_length", "n_layer", "tie_embeddings", "dropout"):
        assert getattr(config, name) == getattr(BASES[base], name)
    if config.arch == "gpt":
        assert config.d_model == BASES[base].d_model


@pytest.mark.parametrize("base", BASES)
def test_the_base_model_matches_itself(base: str) -> None:
    assert matched(BASES[base], "scaled_dot") == BASES[base]


def test_an_unreachable_parameter_count_is_an_error() -> None:
    base = small_config(d_mlp=1)
    with pytest.raises(ConfigError, match=r"no d_mlp gives the variant concat .* within 3%: the"):
        matched(base, "concat")
    assert TOLERANCE == 0.03


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_budget_of_flops_is_spent_to_within_a_step(variant: str) -> None:
    base = run_config()
    budget = parse_budget("flops", base)
    (run,) = compared_runs(base, [variant], 1, budget, "x")
    training, length = run.config.training, run.config.sequence_length

    def step_flops(step: int, n_steps: int) -> int:
        is_short = step / n_steps < training.context_warmup_fraction
        n_seen = training.context_warmup_length if is_short else length
        model = replace(run.config.model, context_length=n_seen)
        return training.batch_size * length * training_flops_per_token(model)

    spent, with_one_more = (
        sum(step_flops(step, n) for step in range(n))
        for n in (training.max_steps, training.max_steps + 1)
    )
    assert spent <= budget.amount < with_one_more
    if variant == "scaled_dot":
        assert training.max_steps == base.training.max_steps


def test_a_budget_is_the_only_limit() -> None:
    base = run_config(max_steps=7, max_minutes=3.0, max_epochs=2.0)
    for text, limits in (
        ("steps:9", (9, 0.0, 0.0)),
        ("steps:1e3", (1000, 0.0, 0.0)),
        ("steps", (7, 0.0, 0.0)),
        ("seconds:30", (0, 0.5, 0.0)),
        ("seconds", (0, 1.0, 0.0)),
        ("flops:1", (1, 0.0, 0.0)),
    ):
        training = with_budget(base, parse_budget(text, base)).training
        assert (training.max_steps, training.max_minutes, training.max_epochs) == limits, text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step", "unknown --budget 'step'. Did you mean steps?"),
        ("steps:", "takes a whole number above 0: it is ''"),
        ("steps:2.5", "takes a whole number above 0: it is '2.5'"),
        ("seconds:-1", "takes a number above 0: it is '-1'"),
        ("flops:inf", "takes a number above 0: it is 'inf'"),
        ("seconds:nan", "takes a number above 0: it is 'nan'"),
    ],
)
def test_an_invalid_budget_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_budget(text, run_config())
    assert message in str(raised.value)


@pytest.mark.parametrize("text", ["steps", "flops"])
def test_a_budget_without_a_number_needs_max_steps(text: str) -> None:
    with pytest.raises(ConfigError, match=f"needs a number here, as in {text}:500"):
        parse_budget(text, run_config(max_steps=0, max_minutes=1.0))


def test_variants_are_deduplicated_and_unknown_ones_are_errors() -> None:
    assert parse_variants("dot, lstm,dot") == ["dot", "lstm"]
    with pytest.raises(ConfigError, match=r"unknown variant 'aditive'. Did you mean additive\?"):
        parse_variants("dot,aditive")
    with pytest.raises(ConfigError, match="unknown variant ''"):
        parse_variants("dot,")


def test_every_variant_is_planned_with_every_seed_and_the_same_settings() -> None:
    base = run_config(seed=5)
    runs = compared_runs(base, ["dot", "lstm"], 2, Budget("steps", 3), "name")
    assert [(run.variant, run.seed) for run in runs] == [
        ("dot", 5),
        ("lstm", 5),
        ("dot", 6),
        ("lstm", 6),
    ]
    for run in runs:
        assert run.folder.path.name == f"name-{run.variant}-s{run.seed}"
        same = replace(base.training, seed=run.seed, max_steps=3)
        assert run.config == replace(base, model=matched(base.model, run.variant), training=same)


@pytest.mark.parametrize("losses", [[1.5], [1.5, 1.75], [2.0, 1.0, 4.5]])
def test_means_and_spread_equal_numpy(losses: list[float]) -> None:
    runs = tuple(
        RunResult("x", seed, 9, 2.0, loss, loss / 2, 100.0 + seed)
        for seed, loss in enumerate(losses)
    )
    result = VariantResult("dot", 10, 20, None, runs)
    assert result.val_loss == pytest.approx(np.mean(losses))
    assert result.bits_per_byte == pytest.approx(np.mean(losses) / 2)
    assert result.train_tokens_per_s == pytest.approx(100 + np.mean(range(len(losses))))
    if len(losses) == 1:
        assert result.val_loss_spread is None
    else:
        assert result.val_loss_spread == pytest.approx(np.std(losses, ddof=1))
