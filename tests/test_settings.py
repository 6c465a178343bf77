"""Settings are read strictly, and configs survive a round trip through TOML."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minigpt.config import DataConfig, ModelConfig, RunConfig, SamplingConfig, TrainingConfig
from minigpt.errors import ConfigError
from minigpt.settings import build, merge, parse_assignment, read_toml, to_dict, to_toml

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


@pytest.mark.parametrize(
    "model", [{}, {"family": "gpt2", "dropout": 0.1}, {"qk_norm": True, "rope_theta": 1e6}]
)
def test_a_run_config_survives_a_round_trip_through_toml(
    model: dict[str, Any], tmp_path: Path
) -> None:
    config = run_config(**model)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert build(RunConfig, read_toml(path)) == config
    assert build(RunConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"n_layers": 3}}, "unknown setting model.n_layers. Did you mean n_layer?"),
        ({"lr": 0.1}, "unknown setting lr. Did you mean training.lr?"),
        ({"model": {"lr": 0.1}}, "unknown setting model.lr. Did you mean training.lr?"),
        ({"trainning": {}}, "unknown setting trainning. Did you mean training?"),
        ({"model": {"n_layer": 2.5}}, "model.n_layer must be of type int: it is 2.5."),
        ({"model": {"n_layer": True}}, "model.n_layer must be of type int: it is True."),
        ({"model": {"n_layer": "2"}}, "model.n_layer must be of type int: it is '2'."),
        ({"model": {"qk_norm": 1}}, "model.qk_norm must be of type bool: it is 1."),
        ({"model": {"dropout": True}}, "model.dropout must be of type float: it is True."),
        ({"model": 3}, "model must be a table of settings: it is 3."),
        ({"data": {"paths": "a.txt"}}, "data.paths must be a list of strings: it is 'a.txt'."),
        ({"data": {"paths": ["a", 3]}}, "data.paths must be a list of strings: it is ['a', 3]."),
        ({"training": {"max_steps": 0}}, "training needs a limit"),
    ],
)
def test_values_of_another_type_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(RunConfig, merge(to_dict(run_config()), values))
    assert message in str(caught.value)


def test_the_field_from_underscore_is_written_as_from_in_toml(tmp_path: Path) -> None:
    config = replace(run_config(), from_="a/b")
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert read_toml(path)["from"] == "a/b"
    assert build(RunConfig, read_toml(path)) == config
    assert "from" not in to_dict(run_config())
    for unknown in ("from_", "form"):
        with pytest.raises(ConfigError, match=f"^unknown setting {unknown}. Did you mean from?"):
            build(RunConfig, to_dict(run_config()) | {unknown: "a/b"})


def test_a_missing_setting_is_named() -> None:
    values = to_dict(run_config())
    del values["model"]["d_model"]
    with pytest.raises(ConfigError, match=r"^the setting model\.d_model is missing\.$"):
        build(RunConfig, values)


def test_integers_are_accepted_as_floats_and_lists_as_tuples() -> None:
    assert build(SamplingConfig, {"temperature": 1}).temperature == 1.0
    assert build(SamplingConfig, {"stop": ["a", "b"]}).stop == ("a", "b")
    assert build(SamplingConfig, {"seed": None}).seed is None
    assert build(SamplingConfig, {"seed": 3}).seed == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist."),
        (b"a = = 3", "is not valid TOML"),
        ("a = 3".encode("utf-16"), "is not UTF-8 text: byte 0 is invalid. Convert it first"),
        (b"a = " + b"[" * 100_000, "is not valid TOML"),
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
        ("preset=" + "[" * 3000, {"preset": "[" * 3000}),
    ],
)
def test_assignments_are_parsed_as_toml_values_or_text(text: str, expected: dict[str, Any]) -> None:
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("text", ["model.n_layer", "=4", "model.=4", ".n_layer=4", ""])
def test_an_assignment_without_a_name_or_an_equals_sign_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_assignment(text)
    assert str(caught.value) == f"--set takes name=value, as in model.n_layer=4: it is {text!r}."


def test_an_assignment_sets_only_its_name() -> None:
    """A line break in the value must not inject a second line of TOML."""
    assert parse_assignment("a.b=1\nvalue2 = 3") == {"a": {"b": "1\nvalue2 = 3"}}


def test_later_settings_win_table_by_table_without_changing_earlier_ones() -> None:
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
