"""Published models: fields of their config.json without effect, and new models of their types."""

import re
from dataclasses import fields

from minigpt.checkpoint.families import (
    family_of,
    hf_fields,
    model_config_from_hf,
    model_config_to_hf,
)
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError, ConfigError

# Parts of the names of what a model computes. Sizes are not among them: a size that is not read
# cannot be wrong, since the shapes of all tensors are checked.
_COMPUTATION = re.compile(
    r"""(?:^|[_.])(?:
    act(?:_|$)|activation|alibi|attend|attention|attn|bidirectional|cap|causal|clamp|clip|conv|embed|embedding|eps|
    epsilon|expert|factor|fourier|gate|gelu|global|glu|interpolat|kv_shar|layernorm|local|logit|
    loop|mamba|mask|memory|mix|moe|mrope|multipl|mup|nope|norm|ntk|parallel|position|qk|quant|
    recurren|relu|residual|rmsnorm|rop|rotar|router|scal|shar|silu|sink|sliding|soft|sparse|
    sparsity|ssm|swiglu|temperature|theta|window|yarn)""",
    re.VERBOSE | re.IGNORECASE,
)
# Of training, of generation, and of other tasks, although their names are like the above.
_WORDS = """
    attn_implementation encoder_no_repeat_ngram_size epsilon_cutoff eta_cutoff
    experts_implementation gradient_checkpointing guidance_scale low_memory mask_token_id
    num_logits_to_keep
    output_attentions output_hidden_states output_logits output_router_logits temperature
    renormalize_logits router_aux_loss_coef use_flash_attention use_flash_attn
"""
_NO_EFFECT = frozenset(_WORDS.split())


def is_ignored(name: str) -> bool:
    """Return whether a field of config.json that its family does not read changes no logits.

    transformers ignores such fields too. By its name, one may still be read by code of the model's
    own, or by a later version: then it is not ignored.
    """
    return name in _NO_EFFECT or not _COMPUTATION.search(name)


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
    if lost := sorted(hf_fields(config).keys() - hf_fields(again).keys()):
        raise ConfigError(
            f"{lost[0]} changes nothing in a model of type {kind} like this. Leave it out of "
            "model.hf_fields."
        )
    return again
