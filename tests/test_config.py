"""Configs check themselves, say what is wrong, and go through TOML unchanged."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from minigpt.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    SamplingConfig,
    TrainingConfig,
    build,
    merge,
    parse_assignment,
    read_toml,
    round_up,
    to_dict,
    to_toml,
)
from minigpt.errors import ConfigError

SHAPE: dict[str, Any] = {
    "vocab_size": 257,
    "context_length": 64,
    "n_layer": 2,
    "n_head": 4,
    "d_model": 48,
}


def run_config(**model: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(**(SHAPE | model)),
        training=TrainingConfig(max_steps=10, lr=0.03, grad_clip=0.0),
        data=DataConfig(paths=("a b.txt", "-", 'quo"te\\'), tokenizer="bpe:512"),
        preset="mini",
    )


def test_what_is_left_out_is_derived_when_the_config_is_made() -> None:
    llama, gpt2 = ModelConfig(**SHAPE), ModelConfig(**SHAPE, family="gpt2")
    assert (llama.n_kv_head, llama.d_head, llama.d_mlp) == (4, 12, 128)
    assert (gpt2.n_kv_head, gpt2.d_head, gpt2.d_mlp) == (4, 12, 192)
    assert (llama.activation, gpt2.activation) == ("silu", "gelu_tanh")
    assert TrainingConfig(max_steps=1, batch_size=12).micro_batch_size == 12
    assert TrainingConfig(max_steps=1, batch_size=12, micro_batch_size=3).accumulation_steps == 4


@pytest.mark.parametrize(
    ("value", "multiple", "expected"),
    [(128, 32, 128), (129, 32, 160), (0.5, 8, 8), (1024.0, 1, 1024)],
)
def test_round_up_finds_the_least_multiple(value: float, multiple: int, expected: int) -> None:
    assert round_up(value, multiple) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 5}, "n_head must divide d_model: 5 does not divide 48. Try d_model 50."),
        ({"n_head": 16}, "d_head must be even: it is 3. Try d_model 64."),
        ({"n_kv_head": 3}, "n_kv_head must divide n_head: 3 does not divide 4."),
        ({"n_kv_head": 8}, "n_kv_head must divide n_head: 8 does not divide 4."),
        ({"n_kv_head": -1}, "n_kv_head must be at least 1: it is -1."),
        ({"n_layer": 0}, "n_layer must be at least 1: it is 0."),
        ({"d_model": -48}, "d_model must be at least 1: it is -48."),
        ({"family": "lama"}, "family is 'lama', which does not exist. Did you mean llama?"),
        ({"activation": "relu"}, "Did you mean relu2?"),
        ({"dropout": 1.0}, "dropout must be in [0, 1): it is 1.0."),
        ({"dropout": math.nan}, "dropout must be in [0, 1): it is nan."),
        ({"rope_theta": 0.0}, "rope_theta must be a finite number above 0: it is 0.0."),
        ({"norm_eps": math.inf}, "norm_eps must be a finite number above 0: it is inf."),
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
        ({"max_steps": 0}, "training needs an end: set max_steps or max_minutes."),
        ({"max_steps": -1}, "max_steps must be at least 0: it is -1."),
        ({"max_minutes": math.inf}, "max_minutes must be a finite number: it is inf."),
        ({"max_minutes": math.nan}, "max_minutes must be at least 0: it is nan."),
        ({"batch_size": 0}, "batch_size must be at least 1: it is 0."),
        ({"batch_size": 10, "micro_batch_size": 4}, "4 does not divide 10."),
        ({"lr": 0.0}, "lr must be a finite number above 0: it is 0.0."),
        ({"embedding_lr": math.inf}, "embedding_lr must be a finite number above 0: it is inf."),
        ({"momentum": 1.0}, "momentum must be in [0, 1): it is 1.0."),
        ({"beta2": -0.1}, "beta2 must be in [0, 1): it is -0.1."),
        ({"warmup_fraction": 1.5}, "warmup_fraction must be between 0 and 1: it is 1.5."),
        ({"schedule": "cosin"}, "Did you mean cosine?"),
        ({"optimizer": "sgd"}, "Choose from muon, adamw."),
        ({"dtype": "float16"}, "dtype is 'float16', which does not exist."),
        ({"device": "gpu"}, "device is 'gpu', which does not exist."),
        ({"seed": -1}, "seed must be between 0 and"),
        ({"seed": 2**63}, "seed must be between 0 and"),
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
        ({"temperature": -0.1}, "temperature must be 0 or more and finite: it is -0.1."),
        ({"temperature": math.inf}, "temperature must be 0 or more and finite: it is inf."),
        ({"temperature": math.nan}, "temperature must be 0 or more and finite: it is nan."),
        ({"top_p": 0.0}, "top_p must be in (0, 1]: it is 0.0."),
        ({"top_p": 1.01}, "top_p must be in (0, 1]: it is 1.01."),
        ({"top_k": -1}, "top_k must be at least 0: it is -1."),
        ({"min_p": 1.1}, "min_p must be between 0 and 1: it is 1.1."),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a finite number above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1: it is 0."),
        ({"num_samples": 0}, "num_samples must be at least 1: it is 0."),
        ({"seed": 2**63}, "seed must be between 0 and"),
        ({"stop": ("a", "")}, "stop must not be the empty text."),
    ],
)
def test_sampling_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingConfig(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, math.nan])
def test_validation_takes_a_part_and_neither_nothing_nor_all(fraction: float) -> None:
    with pytest.raises(ConfigError, match="val_fraction must be between 0 and 1"):
        DataConfig(val_fraction=fraction)


@pytest.mark.parametrize(
    "model", [{}, {"family": "gpt2", "dropout": 0.1}, {"qk_norm": True, "rope_theta": 1e6}]
)
def test_a_run_goes_through_toml_unchanged(model: dict[str, Any], tmp_path: Path) -> None:
    config = run_config(**model)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert build(RunConfig, read_toml(path)) == config
    assert build(RunConfig, to_dict(config)) == config


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        run_config().model.n_layer = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"n_layers": 3}}, "unknown setting model.n_layers. Did you mean n_layer?"),
        ({"trainning": {}}, "unknown setting trainning. Did you mean training?"),
        ({"model": {"n_layer": 2.5}}, "model.n_layer must be of type int: it is 2.5."),
        ({"model": {"n_layer": True}}, "model.n_layer must be of type int: it is True."),
        ({"model": {"n_layer": "2"}}, "model.n_layer must be of type int: it is '2'."),
        ({"model": {"qk_norm": 1}}, "model.qk_norm must be of type bool: it is 1."),
        ({"model": {"dropout": True}}, "model.dropout must be of type float: it is True."),
        ({"model": 3}, "model must be a table of settings: it is 3."),
        ({"data": {"paths": "a.txt"}}, "data.paths must be a list of texts: it is 'a.txt'."),
        ({"data": {"paths": ["a", 3]}}, "data.paths must be a list of texts: it is ['a', 3]."),
        ({"training": {"max_steps": 0}}, "training needs an end"),
    ],
)
def test_values_are_taken_strictly(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(RunConfig, merge(to_dict(run_config()), values))
    assert message in str(caught.value)


def test_a_missing_setting_is_named() -> None:
    values = to_dict(run_config())
    del values["model"]["d_model"]
    with pytest.raises(ConfigError, match=r"^the setting model\.d_model is missing\.$"):
        build(RunConfig, values)


def test_whole_numbers_and_lists_are_taken_where_they_fit() -> None:
    assert build(SamplingConfig, {"temperature": 1}).temperature == 1.0
    assert build(SamplingConfig, {"stop": ["a", "b"]}).stop == ("a", "b")
    assert build(SamplingConfig, {"seed": None}).seed is None
    assert build(SamplingConfig, {"seed": 3}).seed == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist."),
        (b"a = = 3", "is not valid TOML"),
        (b"\xff\xfe", "is not valid TOML"),
    ],
)
def test_a_config_file_that_cannot_be_read_is_an_error_that_names_it(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_toml(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model.n_layer=4", {"model": {"n_layer": 4}}),
        ("training.lr = 1e-3", {"training": {"lr": 1e-3}}),
        ("model.qk_norm=true", {"model": {"qk_norm": True}}),
        ("data.tokenizer=bpe:512", {"data": {"tokenizer": "bpe:512"}}),
        ('data.paths=["a", "b"]', {"data": {"paths": ["a", "b"]}}),
        ("data.tokenizer=a=b", {"data": {"tokenizer": "a=b"}}),
        ("preset=", {"preset": ""}),
    ],
)
def test_assignments_are_parsed_as_toml_values_else_as_text(
    text: str, expected: dict[str, Any]
) -> None:
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("text", ["model.n_layer", "=4", "model.=4", ".n_layer=4", ""])
def test_an_assignment_without_a_name_or_a_sign_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_assignment(text)
    assert str(caught.value) == f"--set takes name=value, as in model.n_layer=4: it is {text!r}."


def test_an_assignment_sets_nothing_but_its_name() -> None:
    """A line break in the value could smuggle in a second line of TOML."""
    assert parse_assignment("a.b=1\nvalue2 = 3") == {"a": {"b": "1\nvalue2 = 3"}}


def test_later_layers_win_table_by_table_and_change_no_earlier_one() -> None:
    first = {"model": {"n_layer": 1, "n_head": 2}, "preset": "nano"}
    second = {"model": {"n_layer": 3}, "training": {"lr": 0.1}}
    assert merge(first, second, {"preset": "mini"}) == {
        "model": {"n_layer": 3, "n_head": 2},
        "training": {"lr": 0.1},
        "preset": "mini",
    }
    assert first == {"model": {"n_layer": 1, "n_head": 2}, "preset": "nano"}
    merged = merge(first)
    merged["model"]["n_layer"] = 9
    assert first["model"] == {"n_layer": 1, "n_head": 2}
