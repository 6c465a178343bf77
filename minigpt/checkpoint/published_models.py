"""Published models: what their files have beyond our own, and new models of their types."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields

import torch
from torch import Tensor

from minigpt.checkpoint.families import (
    OWN_TYPE,
    family_of,
    hf_fields,
    model_config_from_hf,
    model_config_to_hf,
)
from minigpt.checkpoint.weights import tensor_names
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError, ConfigError, cut

# Parts of the names of what a model computes. Sizes are not among them: a size that is not read
# cannot be wrong, since the shapes of all tensors are checked.
_COMPUTATION = re.compile(
    r"""(?:^|[_.])(?:
    act(?:_|$)|activation|alibi|attend|attention|attn|bidirectional|cap(?!tion)|causal|clamp|clip|conv(?!er)|embed|embedding|eps|
    epsilon|expert|factor|fourier|gate|gelu|global|glu|interpolat|kv_shar|layernorm|local|logit|
    loop|mamba|mask|memory|mix|moe|mrope|multipl|mup|nope|norm|ntk|parallel|position|qk|quant|
    recurren|relu|residual|rmsnorm|rop|rotar|router|scal|shar(?!d)|silu|sink|sliding|soft|sparse|
    sparsity|ssm|swiglu|temperature|theta|window|yarn)""",
    re.VERBOSE | re.IGNORECASE,
)
# Of training, of generation, and of other tasks, although their names are like the above.
_WORDS = """
    attn_implementation clip_grad_norm encoder_no_repeat_ngram_size epsilon_cutoff eta_cutoff
    experts_implementation gradient_checkpointing gradient_clip_norm guidance_scale
    label_smoothing_factor local_dir local_files_only local_rank low_memory mask_token_id
    max_grad_norm mixed_precision num_logits_to_keep
    output_attentions output_hidden_states output_logits output_router_logits temperature
    renormalize_logits router_aux_loss_coef use_flash_attention use_flash_attn
"""
_NO_EFFECT = frozenset(_WORDS.split())
# Tensors of old files that are not weights: causal masks, RoPE tables.
_IGNORED = re.compile(
    r"(.*\.)?(attn\.(bias|masked_bias)|attention\.(bias|masked_bias)|rotary_emb\.inv_freq)"
)
_LARGEST_WIDTH = 2**28
_LARGEST_CONTEXT = 2**20  # RoPE tables of all positions are computed


def is_ignored(name: str) -> bool:
    """Return whether a field of config.json that its family does not read changes no logits.

    transformers ignores such fields too. By its name, one may still be read by code of the model's
    own, or by a later version: then it is not ignored.
    """
    return name in _NO_EFFECT or not _COMPUTATION.search(name)


def canonical_names(config: ModelConfig, names: Iterable[str]) -> dict[str, str]:
    """Return the names that ``tensors_from_hf`` takes -> the names in a file.

    Adds the prefix that files of the bare model lack, removes those of torch.compile, and drops
    tensors that are not weights.
    Raises: CheckpointError if a tensor is there with the prefix and without.
    """
    prefix = head = ""
    if config.model_type != OWN_TYPE:
        family = family_of(config.model_type)
        prefix, head = family.prefix, family.head
    canonical: dict[str, str] = {}
    for name in names:
        plain = name.replace("_orig_mod.", "")  # torch.compile's
        full = plain if plain.startswith(prefix) or plain == head else prefix + plain
        if prefix and _IGNORED.fullmatch(full):
            continue
        if canonical.setdefault(full, name) != name:
            raise CheckpointError(f"the tensor {cut(full)} occurs twice. Download the model again.")
    return canonical


def tied_head(config: ModelConfig) -> str:
    """Return the name of an output projection that only some files of tied embeddings have."""
    has_names = config.tie_embeddings and config.model_type != OWN_TYPE
    return family_of(config.model_type).head if has_names else ""


def check_tied(config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if tied embeddings are stored as two different tensors."""
    if (head := tied_head(config)) in tensors:
        embedding = next(tensor_names(config)).theirs
        if not torch.equal(tensors[head], tensors[embedding]):
            raise CheckpointError(
                f"config.json: tie_word_embeddings is true, but {head} is not the embedding. Set "
                "it to false there."
            )


def check_size(config: ModelConfig, n_tensors: int) -> None:
    """Refuse sizes that no model has, before anything is allocated."""
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
                f"config.json asks for a {what} of {size}, and at most {largest} is possible here. "
                "Download it again."
            )


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
        raise ConfigError(f"a model of type {kind} cannot have this config: {error}") from None
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
