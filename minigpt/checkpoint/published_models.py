"""Published models: tensor names and sizes in their files, and new models of their types."""

import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from minigpt.checkpoint.config_json import config_json, read_config_json
from minigpt.checkpoint.families import family_of, hf_fields
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError, ConfigError, cut
from minigpt.files import read_json
from minigpt.model_config import OWN_TYPE

# Tensors of old files that are not weights: causal masks, RoPE tables.
_IGNORED = re.compile(
    r"(.*\.)?(attn\.(bias|masked_bias)|attention\.(bias|masked_bias)|rotary_emb\.inv_freq)"
)
_HEAD = "lm_head.weight"  # in a state_dict, also where save_pretrained writes another name
_LARGEST_WIDTH = 2**28
_LARGEST_CONTEXT = 2**20  # RoPE tables are computed for all positions


def canonical_names(config: ModelConfig, names: Iterable[str]) -> dict[str, str]:
    """Map the names that ``tensors_from_hf`` expects to the names in a file.

    Adds the prefix that files of the bare model omit, removes torch.compile's, and drops tensors
    that are not weights. The output projection may have its name in a state_dict of transformers.
    Raises: CheckpointError if a tensor occurs both with and without the prefix.
    """
    prefix, head = "", _HEAD
    if config.model_type != OWN_TYPE:
        family = family_of(config.model_type)
        prefix, head = family.prefix, family.head
    model, _, inner = prefix.partition(".")  # of "model.decoder.", a bare model omits "model."
    canonical: dict[str, str] = {}
    for name in names:
        plain = name.replace("_orig_mod.", "")  # torch.compile's
        if plain in (head, _HEAD):
            full = head
        elif inner and plain.startswith(inner):
            full = f"{model}.{plain}"
        else:
            full = plain if plain.startswith(prefix) else prefix + plain
        if prefix and _IGNORED.fullmatch(full):
            continue
        if canonical.setdefault(full, name) != name:
            raise CheckpointError(f"the tensor {cut(full)} occurs twice. Download the model again.")
    return canonical


def other_class(config: ModelConfig, folder: Path) -> str:
    """Return that config.json names another class than the family's; "" if it does not."""
    if config.model_type == OWN_TYPE or not (folder / "config.json").is_file():
        return ""
    needed = family_of(config.model_type).architecture
    named = read_json(folder / "config.json").get("architectures")
    if not isinstance(named, list) or not named or needed in named:
        return ""
    return f"{str(folder)!r} is a {str(named[0])[:80]}, but minigpt needs a {needed}"


def check_size(config: ModelConfig, n_tensors: int, folder: Path) -> None:
    """Raise CheckpointError for sizes that no model has, before anything is allocated."""
    sizes = {
        "vocabulary": (config.vocab_size, _LARGEST_WIDTH),
        "width": (config.d_model, _LARGEST_WIDTH),
        "width of the MLP": (config.d_mlp, _LARGEST_WIDTH),
        "width of all heads": (config.n_head * config.d_head, _LARGEST_WIDTH),
        "context": (config.context_length, _LARGEST_CONTEXT),
        "number of layers": (config.n_layer, n_tensors),
    }
    for what, (size, largest) in sizes.items():
        if size > largest:
            raise CheckpointError(
                f"config.json in {str(folder)!r} asks for a {what} of {size}, but at most "
                f"{largest} is possible here. Download it again."
            )


def canonical(config: ModelConfig) -> ModelConfig:
    """Return a new model's config as it will be read back from its config.json.

    Raises: ConfigError for a field value that the model's config.json cannot express.
    """
    if not config.has_own_class:
        return config
    kind = config.model_type
    if config.activation not in family_of(kind).activations.values():
        raise ConfigError(
            f"a model of type {kind} cannot have the activation {config.activation!r}. Choose "
            f"{', '.join(sorted(set(family_of(kind).activations.values())))}."
        )
    try:
        again = read_config_json(config_json(config, None))
    except CheckpointError as error:
        raise ConfigError(f"a model of type {kind} cannot have this config: {error}") from None
    for f in fields(ModelConfig):
        asked, has = getattr(config, f.name), getattr(again, f.name)
        if f.name != "hf_fields" and asked != has:
            raise ConfigError(
                f"a model of type {kind} always has {f.name} {has!r}, not {asked!r}. Set "
                f"model.{f.name} to {has!r}."
            )
    if lost := sorted(hf_fields(config).keys() - hf_fields(again).keys()):
        raise ConfigError(
            f"{lost[0]} changes nothing in a model of type {kind} with this config. Leave it out "
            "of model.hf_fields."
        )
    return again
