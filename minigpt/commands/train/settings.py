"""The settings of a training run: those of the preset, the user, and the text."""

from collections.abc import Mapping
from dataclasses import replace
from math import gcd
from typing import Any

from minigpt.config import RunConfig
from minigpt.errors import ConfigError
from minigpt.presets import DEFAULT_PRESET
from minigpt.presets import preset as preset_settings
from minigpt.rings import ring
from minigpt.settings import build, given, merge
from minigpt.text.tokens import prepared_settings

_LIMITS = {"max_steps": 0, "max_minutes": 0.0, "max_epochs": 0.0}


def settings_of(overrides: dict[str, Any]) -> dict[str, Any]:
    """Merge the user's settings over those of the preset, and check them.

    Raises: ConfigError for invalid settings; DataError for a prepared folder that cannot be used.
    """
    overrides = {"preset": DEFAULT_PRESET} | overrides
    if not isinstance(overrides["preset"], str):
        raise ConfigError(f"preset must be the name of a preset: it is {overrides['preset']!r}.")
    preset = _adapted(preset_settings(overrides["preset"]), overrides)
    settings = merge(preset, one_budget(overrides))
    config = build(RunConfig, merge({"model": {"vocab_size": 1}}, settings))
    # The tokenizer and the split of a prepared folder win over those of the preset.
    own = prepared_settings(config.data)
    return merge(settings, {"data": own}, {"data": overrides.get("data", {})})


def _adapted(preset: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Drop or adapt the preset's values that depend on a shape or batch the user changed."""
    model, training = dict(preset["model"]), dict(preset["training"])
    is_recurrent = given(overrides, "model", "arch") in ("lstm", "lstm-attention")
    if given(overrides, "model", "family") == "gpt2" or is_recurrent:
        for name in ("qk_norm", "n_kv_head", "d_mlp"):
            model.pop(name, None)
    if is_recurrent:
        model["n_head"] = 1
    if given(overrides, "model", "d_model") is not None:
        model.pop("d_mlp", None)
    n_head = given(overrides, "model", "n_head")
    if isinstance(n_head, int) and "n_kv_head" in model:
        model["n_kv_head"] = gcd(n_head, model["n_kv_head"])
    context = given(overrides, "model", "context_length")
    if isinstance(context, int) and context % training.get("context_warmup_length", 1):
        training["context_warmup_length"] = 0
    batch = given(overrides, "training", "batch_size")
    if isinstance(batch, int) and "micro_batch_size" in training:
        training["micro_batch_size"] = gcd(batch, training["micro_batch_size"])
    return preset | {"model": model, "training": training}


def with_vocabulary(settings: dict[str, Any], vocab_size: int) -> RunConfig:
    """Build the config of a run from its settings and its tokenizer's size.

    Raises: ConfigError if the user asked for a smaller vocabulary.
    """
    config = build(RunConfig, merge({"model": {"vocab_size": vocab_size}}, settings))
    if config.model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size must be at least {vocab_size}, the size of the tokenizer: it is "
            f"{config.model.vocab_size}. Leave it out."
        )
    if not config.model.has_own_class:
        return config
    return replace(config, model=ring("checkpoint.published_models").canonical(config.model))


def one_budget(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the preset's or run's limits if the user gives any limit."""
    if all(given(overrides, "training", name) is None for name in _LIMITS):
        return dict(overrides)
    return merge({"training": _LIMITS}, overrides)
