"""What a run is to be: its settings, from a preset and the user's words, and its name."""

import re
from collections.abc import Mapping
from itertools import count
from math import gcd
from pathlib import Path
from typing import Any

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.resolve import ROOT
from minigpt.config import DataConfig, RunConfig
from minigpt.errors import ConfigError
from minigpt.presets import preset as preset_settings
from minigpt.settings import build, merge, to_dict
from minigpt.text.shards import prepared_tokenizer

_NAME = re.compile(r"\w[\w.-]{0,99}")
# What a checkpoint was made with and cannot be taken out of it. The text is not among them: it may
# have moved, and the trainer compares the tokens themselves.
_FIXED = (
    "preset",
    "from",
    "model",
    "data.tokenizer",
    "data.val_fraction",
    "training.seed",
    "training.batch_size",
    "training.sequence_length",
    "training.optimizer",
)
_LIMITS = {"max_steps": 0, "max_minutes": 0.0, "max_epochs": 0.0}


def settings_of(overrides: dict[str, Any]) -> dict[str, Any]:
    """Lay what the user asked for over a preset.

    Raises: ConfigError for all that can be refused before there is a vocabulary; DataError for a
        prepared folder that cannot be used.
    """
    overrides = {"preset": "nano"} | overrides
    if not isinstance(overrides["preset"], str):
        raise ConfigError(f"preset must be the name of one: it is {overrides['preset']!r}.")
    preset = _fitting(preset_settings(overrides["preset"]), overrides)
    settings = merge(preset, one_budget(overrides))
    config = build(RunConfig, merge({"model": {"vocab_size": 1}}, settings))
    # A prepared folder has a tokenizer of its own, which goes before that of the preset.
    own = prepared_tokenizer(config.data.paths)
    if own is not None and given(overrides, "data", "tokenizer") is None:
        settings = merge(settings, {"data": {"tokenizer": own}})
    return settings


def one_budget(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Let the limits that the user gives replace all those of the preset or the run."""
    if all(given(overrides, "training", name) is None for name in _LIMITS):
        return dict(overrides)
    return merge({"training": _LIMITS}, overrides)


def _fitting(preset: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Adapt what a preset derives from shape, context and batch to those that the user gives."""
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


def given(overrides: Mapping[str, Any], table: str, name: str) -> Any:
    """Return what the user said of a setting; None if nothing, or no table at all."""
    values = overrides.get(table)
    return values.get(name) if isinstance(values, Mapping) else None


def with_vocabulary(settings: dict[str, Any], vocab_size: int) -> RunConfig:
    """Build the run's config, now that the tokenizer is there.

    Raises: ConfigError if the user asked for a vocabulary that does not hold it.
    """
    config = build(RunConfig, merge({"model": {"vocab_size": vocab_size}}, settings))
    if config.model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size must hold the tokenizer's {vocab_size} tokens: it is "
            f"{config.model.vocab_size}. Leave it out."
        )
    return config


def require_same(saved: RunConfig, wanted: RunConfig) -> None:
    """Raise ConfigError if a setting differs that a checkpoint cannot be taken out of."""
    before, after = flat(to_dict(saved)), flat(to_dict(wanted))
    for key in before | after:
        is_fixed = any(key == fixed or key.startswith(f"{fixed}.") for fixed in _FIXED)
        if is_fixed and before.get(key) != after.get(key):
            raise ConfigError(
                f"--resume cannot change {key}: it is {before.get(key)!r} in this run, not "
                f"{after.get(key)!r}. Leave it out, or start a new run under another --name."
            )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names, as ``--set`` has them."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        is_table = isinstance(value, Mapping)
        result |= flat(value, f"{prefix}{key}.") if is_table else {f"{prefix}{key}": value}
    return result


def checked_name(name: str) -> str:
    """Return a name that is one folder's, on every system.

    Raises: ConfigError if it is not.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"--name {name[:120]!r} is no name for a folder. Use up to 100 letters, digits, '.', "
            "'_' and '-', the first one a letter or digit."
        )
    return name


def fresh_name(data: DataConfig, start: str) -> str:
    """Return a name that says what the run is of, and that no run under ROOT has.

    Args: start, the preset or the model that it starts from.
    """
    corpus = "python"
    if data.paths:
        first = data.paths[0]
        corpus = "stdin" if first == "-" else Path(first).name.split(".")[0]
    stem = f"{_plain(corpus) or 'text'}-{_plain(start) or 'model'}"
    names = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
    return next(name for name in names if not RunFolder(ROOT / name).steps())


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_")[:48]
