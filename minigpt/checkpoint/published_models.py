"""New models of the published types beyond those that GPT itself computes."""

from dataclasses import fields

from minigpt.checkpoint.families import family_of, model_config_from_hf, model_config_to_hf
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError, ConfigError


def canonical(config: ModelConfig) -> ModelConfig:
    """Return the config of a new model as it will be read from its config.json.

    Raises: ConfigError for a field that the model type does not have, so that the model could not
        be read again.
    """
    kind = config.model_type
    if config.activation not in family_of(kind).activations.values():
        raise ConfigError(
            f"a model of type {kind} cannot have the activation {config.activation!r}. Choose "
            f"{', '.join(sorted(set(family_of(kind).activations.values())))}."
        )
    try:
        again = model_config_from_hf(model_config_to_hf(config, None))
    except CheckpointError as error:
        raise ConfigError(f"a model of type {kind} cannot be like this: {error}") from None
    for f in fields(ModelConfig):
        asked, has = getattr(config, f.name), getattr(again, f.name)
        if f.name != "hf_fields" and asked != has:
            raise ConfigError(
                f"a model of type {kind} always has {f.name} {has!r}: it is {asked!r}. Set "
                f"model.{f.name} to that."
            )
    return again
