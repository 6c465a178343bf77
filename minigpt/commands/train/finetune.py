"""minigpt train --from: fine-tuning, which starts from a model instead of a preset."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minigpt.checkpoint.carried import read_carried
from minigpt.checkpoint.model_folder import read_model
from minigpt.checkpoint.resolve import resolve_model
from minigpt.commands.train.job import LIMITS, Request, Start, one_budget, require_memory
from minigpt.config import RunConfig
from minigpt.errors import CheckpointError, ConfigError
from minigpt.evaluation import LOGITS_AT_ONCE
from minigpt.model.language_model import LanguageModel
from minigpt.rings import find_ring, ring
from minigpt.settings import build, flat, given, merge, to_dict
from minigpt.text.tokenizer import Tokenizer
from minigpt.text.tokens import PreparedData, prepare, prepared_settings

_LONGEST_SEQUENCE = 512  # default limit, because a large model's full context may not fit


@dataclass(frozen=True)
class Base:
    """The model that a fine-tuning run starts from."""

    source: str
    """Folder of the model, or its name and commit on the Hub."""
    model: LanguageModel
    """Model in float32."""
    tokenizer: Tokenizer
    folder: Path = Path()
    """Folder of the model on disk."""

    @property
    def name(self) -> str:
        """Name of the run that a step belongs to, or of the folder or repository."""
        path = Path(os.path.abspath(self.source))
        name = path.parent.name if path.name.startswith("step-") else path.name
        return name.partition("@")[0]


def with_sequence_length(settings: dict[str, Any]) -> dict[str, Any]:
    """Use --context-length as the length of training sequences, because the model's is fixed."""
    model = dict(settings.get("model", {}))
    if "context_length" not in model:
        return settings
    length = {"sequence_length": model.pop("context_length")}
    return settings | {"model": model, "training": settings.get("training", {}) | length}


def one_lr(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Use the user's learning rate for embeddings too, unless ``embedding_lr`` is given."""
    lr = given(overrides, "training", "lr")
    return merge({} if lr is None else {"training": {"embedding_lr": lr}}, overrides)


def read_base(spec: str) -> Base:
    """Read the model and the tokenizer to fine-tune.

    Raises: ConfigError if ``spec`` is not a text; CheckpointError if the model is missing or
        damaged, or has no tokenizer.
    """
    if not isinstance(spec, str):  # as a --config file may have it
        raise ConfigError(f"from must name a model: it is of type {type(spec).__name__}.")
    folder = resolve_model(spec)
    hub = find_ring("checkpoint.tools.hub")
    is_remote = hub is not None and hub.is_hub_name(spec) and not os.path.exists(spec)
    source = f"{spec.partition('@')[0]}@{folder.name}" if is_remote else str(folder)
    loaded = read_model(folder, dtype=torch.float32)
    for name, tensor in loaded.model.state_dict().items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"the weights of {str(folder)!r} are damaged: {name} has NaN or inf. Use another "
                "checkpoint, or download it again."
            )
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        remedy = ring("checkpoint.vocabulary_files").tokenizer_remedy(folder)
        raise CheckpointError(
            f"{str(folder)!r} has no tokenizer.json, so it cannot be trained on text. {remedy}"
        )
    return Base(source, loaded.model, tokenizer, folder)


def start_from_model(request: Request) -> Start:
    """Read the model, the settings and the text of a fine-tuning run.

    Raises: ConfigError, CheckpointError and ResourceError, as ``open_job``.
    """
    base = read_base(request.overrides["from"])
    config = finetuning_config(request.overrides, base)
    require_memory(config, request)  # before the text is read
    data = prepare(
        config.data,
        on_progress=request.on_progress,
        tokenizer=base.tokenizer,
        chat_model=base.folder,
    )
    notes = _budget_notes(config, request.overrides, data)
    carried = read_carried(base.folder)
    ends = base.tokenizer.end_of_text_ids
    with_turns = _ends_with_turns(base, data.manifest.chat_template)
    if ends and with_turns != ends:  # a first one also separates documents
        carried = carried.ending_at(with_turns)
    return Start(config, data, base.name, base.model, carried, notes)


def _ends_with_turns(base: Base, template: str) -> tuple[int, ...]:
    """Return the end-of-text ids and those that end a turn of a template in Jinja, if any."""
    if not template:
        return base.tokenizer.end_of_text_ids
    chats = ring("text.chat")
    tokens = chats.named_tokens(chats.tokenizer_settings(base.folder))
    ending: Tokenizer = chats.ending_turns(base.tokenizer, chats.ChatTemplate(template, tokens, ""))
    return ending.end_of_text_ids


def finetuning_config(overrides: Mapping[str, Any], base: Base) -> RunConfig:
    """Merge the user's settings over the model's own and the defaults for fine-tuning.

    Raises: ConfigError for an invalid setting, or one that differs from the model's.
    """
    data = {"tokenizer": base.tokenizer.name}
    own: dict[str, Any] = {"preset": "", "model": to_dict(base.model.config), "data": data}
    asked = flat(overrides)
    for name, value in flat(own).items():
        # Dropout has no weights.
        if name != "model.dropout" and asked.get(name, value) != value:
            raise ConfigError(
                f"--from uses a model and its tokenizer unchanged: {name} is {value!r} there, not "
                f"{asked[name]!r}. Leave it out."
            )
    # AdamW's best learning rate is inversely proportional to the width: Yang et al. 2022,
    # arXiv:2203.03466. docs/training.md has the measurements of the others.
    lr = min(2e-3, float(f"{0.1 / base.model.config.d_model:.1g}"))
    defaults = {
        "max_steps": 300,
        "batch_size": 4,
        "sequence_length": min(base.model.config.context_length, _LONGEST_SEQUENCE),
        "optimizer": "adamw",
        "lr": lr,
        "embedding_lr": lr,
        "warmup_fraction": 0.05,
        "log_every": 1,
        "patience": 4.0,
        "save_every": 100,
    }
    wanted = one_lr(one_budget(overrides))
    own |= {"training": defaults}
    config = build(RunConfig, merge(own, wanted, {"from": base.source}))
    # The settings of a prepared folder win over the defaults, but not over the model's tokenizer.
    own["data"] = prepared_settings(config.data) | data
    config = build(RunConfig, merge(own, wanted, {"from": base.source}))
    if given(overrides, "training", "micro_batch_size"):
        return config
    # A micro-batch whose logits fit into a laptop's memory.
    n_fitting = max(1, LOGITS_AT_ONCE // (config.model.vocab_size * config.sequence_length))
    batch = config.training.batch_size
    size = max(n for n in range(1, min(batch, n_fitting) + 1) if batch % n == 0)
    return replace(config, training=replace(config.training, micro_batch_size=size))


def _budget_notes(config: RunConfig, overrides: Mapping[str, Any], data: PreparedData) -> list[str]:
    """Return a line about the length of a run with the default budget of fine-tuning."""
    training = config.training
    is_limited = any(given(overrides, "training", name) is not None for name in LIMITS)
    n_tokens = [len(part) for part in data.tokens.split(config.data.val_fraction)]
    # Too little text is refused later, with its own error.
    if is_limited or any(0 < n <= config.sequence_length for n in n_tokens):
        return []
    epochs = training.max_steps * config.step_tokens / max(n_tokens[0], 1)
    line = (
        f"{training.max_steps} steps are the default of --from, here {epochs:.3g} epochs "
        "(--max-steps, --max-epochs)"
    )
    if training.patience and config.data.val_fraction:
        line += (
            f"; the run ends after {training.patience:g} epochs without a lower validation loss "
            "(--patience), and its best checkpoint counts"
        )
    return [line]
