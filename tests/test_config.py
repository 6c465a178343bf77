"""Configs validate their values and name invalid settings."""

import dataclasses
import math
from typing import Any

import pytest

from minigpt.config import DataConfig, ModelConfig, RunConfig, SamplingConfig, TrainingConfig
from minigpt.errors import ConfigError
from minigpt.fields import round_up

SHAPE: dict[str, Any] = {
    "vocab_size": 257,
    "context_length": 64,
    "n_layer": 2,
    "n_head": 4,
    "d_model": 48,
}


def test_missing_values_are_derived_when_the_config_is_created() -> None:
    llama, gpt2 = ModelConfig(**SHAPE), ModelConfig(**SHAPE, family="gpt2")
    assert (llama.n_kv_head, llama.d_head, llama.d_mlp) == (4, 12, 128)
    assert (gpt2.n_kv_head, gpt2.d_head, gpt2.d_mlp) == (4, 12, 192)
    assert (llama.activation, gpt2.activation) == ("silu", "gelu_tanh")
    assert TrainingConfig(max_steps=1, batch_size=12).micro_batch_size == 12


@pytest.mark.parametrize(
    ("value", "multiple", "expected"),
    [(128, 32, 128), (129, 32, 160), (0.5, 8, 8), (1024.0, 1, 1024)],
)
def test_round_up_returns_the_smallest_multiple(value: float, multiple: int, expected: int) -> None:
    assert round_up(value, multiple) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 5}, "n_head must divide d_model: 5 does not divide 48. Try d_model 50."),
        (
            {"n_head": 16},
            "d_head must be even, because RoPE rotates pairs: it is 3. Try d_model 64.",
        ),
        ({"n_kv_head": 3}, "n_kv_head must divide n_head: 3 does not divide 4."),
        ({"n_kv_head": 8}, "n_kv_head must divide n_head: 8 does not divide 4."),
        ({"n_kv_head": -1}, "n_kv_head must be at least 0: it is -1."),
        ({"n_layer": 0}, "n_layer must be at least 1: it is 0."),
        ({"d_model": -48}, "d_model must be at least 1: it is -48."),
        ({"family": "lama"}, "unknown family 'lama'. Did you mean llama?"),
        ({"activation": "rellu2"}, "Did you mean relu2?"),
        ({"model_type": "__init__"}, "unknown model_type '__init__'"),
        ({"model_type": "qwen2", "qk_norm": True}, "model_type 'qwen2' does not fit"),
        ({"model_type": "gpt2"}, "which are those of llama or mistral"),
        ({"dropout": 1.0}, "dropout must be in [0, 1): it is 1.0."),
        ({"dropout": math.nan}, "dropout must be a finite number: it is nan."),
        ({"rope_theta": 0.0}, "rope_theta must be above 0: it is 0.0."),
        ({"norm_eps": math.inf}, "norm_eps must be a finite number: it is inf."),
        ({"family": "gpt2", "qk_norm": True}, "has neither qk_norm nor grouped heads"),
        ({"family": "gpt2", "n_kv_head": 2}, "has neither qk_norm nor grouped heads"),
        ({"family": "gpt2", "d_head": 8}, "needs d_head = d_model / n_head: d_head is 8."),
        ({"family": "gpt2", "d_head": 8, "n_head": 5}, "n_head must divide d_model"),
    ],
)
def test_an_impossible_shape_is_refused_with_the_remedy(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**(SHAPE | changes))
    assert message in str(caught.value)


def test_the_remedy_for_a_width_that_does_not_divide_is_a_config_that_works() -> None:
    ModelConfig(**(SHAPE | {"n_head": 5, "d_model": 50}))
    ModelConfig(**(SHAPE | {"n_head": 16, "d_model": 64}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "training needs a limit: set max_steps, max_minutes or max_epochs."),
        ({"max_steps": -1}, "max_steps must be at least 0: it is -1."),
        ({"max_minutes": math.inf}, "max_minutes must be a finite number: it is inf."),
        ({"max_minutes": math.nan}, "max_minutes must be a finite number: it is nan."),
        ({"batch_size": 0}, "batch_size must be at least 1: it is 0."),
        ({"batch_size": 10, "micro_batch_size": 4}, "4 does not divide 10."),
        ({"lr": 0.0}, "lr must be above 0: it is 0.0."),
        ({"embedding_lr": math.inf}, "embedding_lr must be a finite number: it is inf."),
        ({"momentum": 1.0}, "momentum must be in [0, 1): it is 1.0."),
        ({"beta2": -0.1}, "beta2 must be in [0, 1): it is -0.1."),
        ({"warmup_fraction": 1.5}, "warmup_fraction must be in [0, 1]: it is 1.5."),
        ({"schedule": "cosin"}, "Did you mean cosine?"),
        ({"optimizer": "sgd"}, "Choose from muon, adamw."),
        ({"dtype": "float16"}, "unknown dtype 'float16'. Did you mean bfloat16?"),
        ({"device": "gpu"}, "unknown device 'gpu'. Did you mean cuda?"),
        ({"seed": -1}, "seed must be in [0, 2**63)"),
        ({"seed": 2**63}, "seed must be in [0, 2**63)"),
        ({"log_every": 0}, "log_every must be at least 1: it is 0."),
        ({"eval_every": -5}, "eval_every must be at least 0: it is -5."),
    ],
)
def test_impossible_training_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(**({"max_steps": 1} | changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0: it is -0.1."),
        ({"temperature": math.inf}, "temperature must be a finite number: it is inf."),
        ({"temperature": math.nan}, "temperature must be a finite number: it is nan."),
        ({"top_p": 0.0}, "top_p must be in (0, 1]: it is 0.0."),
        ({"top_p": 1.01}, "top_p must be in (0, 1]: it is 1.01."),
        ({"top_k": -1}, "top_k must be at least 0: it is -1."),
        ({"min_p": 1.1}, "min_p must be in [0, 1]: it is 1.1."),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0: it is -1."),
        ({"num_samples": 0}, "num_samples must be at least 1: it is 0."),
        ({"seed": 2**63}, "seed must be in [0, 2**63)"),
        ({"stop": ("a", "")}, "stop must not be the empty string."),
        ({"presence_penalty": math.nan}, "presence_penalty must be a finite number: it is nan."),
        ({"frequency_penalty": math.inf}, "frequency_penalty must be a finite number: it is inf."),
        ({"presence_penalty": 1e300}, "presence_penalty must be in (-1e30, 1e30): it is 1e+300."),
        ({"logprobs": -1}, "logprobs must be at least 0: it is -1."),
        ({"overflow": "slid"}, "unknown overflow 'slid'. Did you mean slide?"),
    ],
)
def test_sampling_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingConfig(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("fraction", [1.0, -0.1, math.nan])
def test_val_fraction_is_at_least_0_and_below_1(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"val_fraction must be (in \[0, 1\)|a finite number)"):
        DataConfig(val_fraction=fraction)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 65}, "(--context-length with --from) is 65, and the model sees 64"),
        ({"context_warmup_length": 24}, "model.context_length, or the sequence_length if there"),
        ({"context_warmup_length": 32, "sequence_length": 48}, "32 does not divide 48."),
    ],
)
def test_sequence_lengths_must_fit_the_model_and_the_warm_up(
    changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig(model=ModelConfig(**SHAPE), training=TrainingConfig(max_steps=1, **changes))
    assert message in str(caught.value)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig(**SHAPE).n_layer = 3  # type: ignore[misc]
