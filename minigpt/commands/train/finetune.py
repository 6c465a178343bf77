"""What a run that goes on from a model begins with: that model, and settings that suit it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minigpt.checkpoint.model_folder import read_model
from minigpt.checkpoint.resolve import resolve_model
from minigpt.checkpoint.tools.hub import is_hub_name
from minigpt.commands.train.run_settings import flat, given, one_budget
from minigpt.config import ModelConfig, RunConfig
from minigpt.errors import CheckpointError, ConfigError
from minigpt.evaluation import LOGITS_AT_ONCE
from minigpt.model.language_model import LanguageModel
from minigpt.settings import build, merge, to_dict
from minigpt.text.tokenizer import Tokenizer

_LONGEST_SEQUENCE = 512  # unless asked for: the whole context of a large model fits no machine


@dataclass(frozen=True)
class Base:
    """The model that a run goes on from."""

    source: str
    """Where it is: its folder, or its name and commit on the hub."""
    model: LanguageModel
    """In float32."""
    tokenizer: Tokenizer

    @property
    def name(self) -> str:
        """What to call it: the run of a step, else the folder or repository."""
        path = Path(os.path.abspath(self.source))
        name = path.parent.name if path.name.startswith("step-") else path.name
        return name.partition("@")[0]


def read_base(spec: str) -> Base:
    """Read the model that ``resolve_model`` finds.

    Raises: CheckpointError if it is missing or damaged, has no tokenizer.
    """
    folder = resolve_model(spec)
    is_remote = is_hub_name(spec) and not os.path.exists(spec)
    source = f"{spec.partition('@')[0]}@{folder.name}" if is_remote else str(folder)
    loaded = read_model(folder, dtype=torch.float32)
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise CheckpointError(
            f"{str(folder)!r} has neither tokenizer.json nor sp_vocab.json, so it cannot be "
            "trained on text. Add the one that the model was trained with."
        )
    return Base(source, loaded.model, tokenizer)


def finetuning_settings(model: ModelConfig) -> dict[str, Any]:
    """Return the training settings that take a preset's place; docs/training.md has the losses.

    The learning rate falls with the width, as the best one of AdamW does: Yang et al. 2022,
    arXiv:2203.03466.
    """
    lr = min(2e-3, float(f"{0.1 / model.d_model:.1g}"))
    return {
        "max_steps": 300,
        "batch_size": 4,
        "sequence_length": min(model.context_length, _LONGEST_SEQUENCE),
        "optimizer": "adamw",
        "lr": lr,
        "embedding_lr": lr,
        "warmup_fraction": 0.05,
        "log_every": 1,
        "eval_every": 100,
        "eval_tokens": 32_768,
        "save_every": 100,
    }


def finetuning_config(overrides: Mapping[str, Any], base: Base) -> RunConfig:
    """Lay what the user asked for over what the model is and what suits it.

    Raises: ConfigError for a setting that is not the model's, or cannot be.
    """
    own: dict[str, Any] = {
        "preset": "",
        "model": to_dict(base.model.config),
        "data": {"tokenizer": base.tokenizer.name},
    }
    _require_own(overrides, own)
    suited = {"training": finetuning_settings(base.model.config)}
    wanted = one_lr(one_budget(overrides))
    config = build(RunConfig, merge(own, suited, wanted, {"from": base.source}))
    return config if given(overrides, "training", "micro_batch_size") else _in_micro_batches(config)


def _require_own(overrides: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ConfigError if the user asks for another model than the one that is there."""
    asked = flat(overrides)
    for name, value in flat(own).items():
        # Dropout is no part of the weights.
        if name != "model.dropout" and asked.get(name, value) != value:
            raise ConfigError(
                f"--from goes on with a model and its tokenizer as they are: {name} is {value!r} "
                f"there, not {asked[name]!r}. Leave it out."
            )


def one_lr(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Let the learning rate that the user gives hold for embeddings too, unless they have one."""
    lr = given(overrides, "training", "lr")
    return merge({} if lr is None else {"training": {"embedding_lr": lr}}, overrides)


def _in_micro_batches(config: RunConfig) -> RunConfig:
    """Part the batch, so that a large vocabulary's logits fit into a laptop's memory."""
    n_fitting = LOGITS_AT_ONCE // (config.model.vocab_size * config.sequence_length)
    batch = config.training.batch_size
    size = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= max(1, n_fitting))
    return replace(config, training=replace(config.training, micro_batch_size=size))
