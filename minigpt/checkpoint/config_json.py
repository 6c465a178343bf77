"""config.json <-> ModelConfig: our own model type here, Hugging Face's in a ring."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError, ConfigError, cut
from minigpt.model_config import OWN_TYPE
from minigpt.rings import ring
from minigpt.settings import build, to_dict
from minigpt.text.tokenizer import Tokenizer

# Fields that we and transformers write into every config.json.
_NO_EFFECT = """
    architectures bos_token_id dtype eos_token_id initializer_range model_type pad_token_id
    torch_dtype transformers_version use_cache
"""


def read_config_json(config: Mapping[str, Any], path: str = "config.json") -> ModelConfig:
    """Read a parsed config.json.

    Raises: CheckpointError naming the path and the field, if it is missing, of the wrong type,
        unknown, or changes the computation in a way that we do not implement.
    """
    try:
        if config.get("model_type") != OWN_TYPE:
            return ring("checkpoint.families").model_config_from_hf(config)
        ours = {f.name for f in fields(ModelConfig)}
        check_known(config, ours)
        return build(ModelConfig, {name: config[name] for name in config if name in ours})
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{path}: {str(error)[:400]}") from None


def check_known(config: Mapping[str, Any], known: set[str]) -> None:
    """Raise CheckpointError for an unknown field of a config.json."""
    known = known.union(_NO_EFFECT.split())
    for name, value in config.items():
        if name not in known and not name.startswith("_") and value is not None:
            raise CheckpointError(
                f"unknown field {cut(name)} with value {cut(value)}. "
                "If it does not change what the model computes, remove it."
            )


def config_json(config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return config.json for transformers 4 and 5; only minigpt can read that of OWN_TYPE."""
    if config.model_type != OWN_TYPE:
        return ring("checkpoint.families").model_config_to_hf(config, tokenizer)
    own = {"architectures": ["MinigptForCausalLM"]}
    return own | common_fields(config, tokenizer) | to_dict(config)


def common_fields(config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the fields that every config.json has."""
    ends = () if tokenizer is None else tokenizer.end_of_text_ids
    prefix = () if tokenizer is None else tokenizer.prefix
    begin = prefix[0] if prefix else None if tokenizer is None else tokenizer.end_of_text
    return {
        "model_type": config.model_type,
        "bos_token_id": begin,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None,
        "pad_token_id": None if tokenizer is None else tokenizer.end_of_text,
        "initializer_range": 0.02,
        "use_cache": True,
    }
