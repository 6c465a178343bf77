"""Our names and settings <-> Hugging Face's, in pairs: GPT-2, Llama and Qwen3.

A new model type is one more entry in FAMILIES and, if its tensors have other names, in the lists
of renamings.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minigpt.config import ModelConfig, build
from minigpt.errors import CheckpointError, ConfigError
from minigpt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Renaming:
    """One tensor of theirs and what it is with us; ``{i}`` stands for the block."""

    theirs: str
    """Without the prefix of the bare model."""
    ours: tuple[str, ...]
    """Several if theirs is ours fused, in this order, along the outputs."""
    is_transposed: bool = False
    """Theirs is (in, out), as GPT-2's Conv1D keeps it; ours is nn.Linear's (out, in)."""


@dataclass(frozen=True)
class Family:
    """A Hugging Face model type in terms of ModelConfig."""

    ours: str
    """ModelConfig.family."""
    architecture: str
    prefix: str
    """What the language-model class puts before the names of the bare model."""
    fields: Mapping[str, str]
    """ModelConfig field -> config.json field."""
    defaults: Mapping[str, Any]
    """config.json field -> what transformers takes if it is absent."""
    fixed: Mapping[str, Any]
    """config.json field -> the only value that we compute; absent and null mean it too."""
    renamings: tuple[Renaming, ...]
    ignored: re.Pattern[str]
    """Tensors of old files that hold no weights: causal masks, rotary tables."""


def _same(theirs: str, ours: str, suffixes: tuple[str, ...] = ("weight",)) -> list[Renaming]:
    return [Renaming(f"{theirs}.{s}", (f"{ours}.{s}",)) for s in suffixes]


def _conv1d(theirs: str, *ours: str) -> list[Renaming]:
    return [
        Renaming(f"{theirs}.weight", tuple(f"{name}.weight" for name in ours), is_transposed=True),
        Renaming(f"{theirs}.bias", tuple(f"{name}.bias" for name in ours)),
    ]


_BOTH = ("weight", "bias")
_QKV = ("query", "key", "value")

_GPT2_RENAMINGS = (
    *_same("wte", "embedding"),
    *_same("wpe", "positions"),
    *_same("h.{i}.ln_1", "blocks.{i}.attention_norm", _BOTH),
    *_conv1d("h.{i}.attn.c_attn", *(f"blocks.{{i}}.attention.{name}" for name in _QKV)),
    *_conv1d("h.{i}.attn.c_proj", "blocks.{i}.attention.output"),
    *_same("h.{i}.ln_2", "blocks.{i}.mlp_norm", _BOTH),
    *_conv1d("h.{i}.mlp.c_fc", "blocks.{i}.mlp.up"),
    *_conv1d("h.{i}.mlp.c_proj", "blocks.{i}.mlp.down"),
    *_same("ln_f", "final_norm", _BOTH),
)
_LLAMA_RENAMINGS = (
    *_same("embed_tokens", "embedding"),
    *_same("layers.{i}.input_layernorm", "blocks.{i}.attention_norm"),
    *_same("layers.{i}.self_attn.q_proj", "blocks.{i}.attention.query"),
    *_same("layers.{i}.self_attn.k_proj", "blocks.{i}.attention.key"),
    *_same("layers.{i}.self_attn.v_proj", "blocks.{i}.attention.value"),
    *_same("layers.{i}.self_attn.o_proj", "blocks.{i}.attention.output"),
    *_same("layers.{i}.post_attention_layernorm", "blocks.{i}.mlp_norm"),
    *_same("layers.{i}.mlp.gate_proj", "blocks.{i}.mlp.gate"),
    *_same("layers.{i}.mlp.up_proj", "blocks.{i}.mlp.up"),
    *_same("layers.{i}.mlp.down_proj", "blocks.{i}.mlp.down"),
    *_same("norm", "final_norm"),
)
_QWEN3_RENAMINGS = (
    *_LLAMA_RENAMINGS,
    *_same("layers.{i}.self_attn.q_norm", "blocks.{i}.attention.query_norm"),
    *_same("layers.{i}.self_attn.k_norm", "blocks.{i}.attention.key_norm"),
)
_HEAD = Renaming("lm_head.weight", ("unembedding.weight",))

_LLAMA_FIELDS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "d_model": "hidden_size",
    "n_kv_head": "num_key_value_heads",
    "d_head": "head_dim",
    "d_mlp": "intermediate_size",
    "activation": "hidden_act",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_LLAMA_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_LLAMA_FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "use_sliding_window": False,
}

FAMILIES = {
    "gpt2": Family(
        ours="gpt2",
        architecture="GPT2LMHeadModel",
        prefix="transformer.",
        fields={
            "vocab_size": "vocab_size",
            "context_length": "n_positions",
            "n_layer": "n_layer",
            "n_head": "n_head",
            "d_model": "n_embd",
            "d_mlp": "n_inner",
            "activation": "activation_function",
            "norm_eps": "layer_norm_epsilon",
            "tie_embeddings": "tie_word_embeddings",
        },
        defaults={
            "n_inner": None,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        },
        fixed={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        renamings=_GPT2_RENAMINGS,
        ignored=re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"),
    ),
    "llama": Family(
        ours="llama",
        architecture="LlamaForCausalLM",
        prefix="model.",
        fields=_LLAMA_FIELDS,
        defaults=_LLAMA_DEFAULTS | {"num_key_value_heads": None, "head_dim": None},
        fixed=_LLAMA_FIXED,
        renamings=_LLAMA_RENAMINGS,
        ignored=re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
    ),
    "qwen3": Family(
        ours="llama",
        architecture="Qwen3ForCausalLM",
        prefix="model.",
        fields=_LLAMA_FIELDS,
        defaults=_LLAMA_DEFAULTS | {"num_key_value_heads": 32, "head_dim": 128},
        fixed=_LLAMA_FIXED,
        renamings=_QWEN3_RENAMINGS,
        ignored=re.compile(r"(?!)"),
    ),
}
"""Model type, as config.json names it, -> how we read and write it."""

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_ACTIVATIONS_TO_HF = {"silu": "silu", "relu2": "relu2", "gelu": "gelu"}
_TANH_GELU = {"gpt2": "gelu_new", "llama": "gelu_pytorch_tanh"}  # one function, two names
_FIXED_EVERYWHERE = {"quantization_config": None, "is_encoder_decoder": False}
_DROPOUTS = ("resid_pdrop", "embd_pdrop")


def model_type(config: ModelConfig) -> str:
    """Return the Hugging Face model type whose layout a config has."""
    return "qwen3" if config.qk_norm else config.family


def model_config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Read a parsed config.json.

    Raises: CheckpointError naming the field, if one is missing or of the wrong type, or would
        make the model compute what ours cannot.
    """
    name = config.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise CheckpointError(
            f"config.json: model_type is {name!r}, which is not read. "
            f"Choose a model of type {', '.join(FAMILIES)}."
        )
    for field, value in {**family.fixed, **_FIXED_EVERYWHERE}.items():
        _check_fixed(field, config.get(field), value)
    layers = config.get("layer_types")
    for layer in layers if isinstance(layers, list) else [layers]:
        _check_fixed("layer_types", layer, "full_attention")
    values = {field: _field(config, family, theirs) for field, theirs in family.fields.items()}
    values = {field: value for field, value in values.items() if value is not None}
    values["activation"] = _activation(family.fields["activation"], values["activation"])
    values |= {"family": family.ours, "qk_norm": name == "qwen3"}
    values["dropout"] = config.get(_DROPOUTS[0]) or 0.0
    if family.ours == "llama":
        values["rope_theta"] = _rope_theta(config)
    try:
        return build(ModelConfig, values)
    except ConfigError as error:
        raise CheckpointError(f"config.json: {str(error)[:200]}") from None


def _unsupported(field: str, value: Any, supported: Any) -> CheckpointError:
    shown = repr(value)[:80]
    return CheckpointError(
        f"config.json: {field} is {shown}, and this program computes only {supported!r}. "
        "Choose another model."
    )


def _check_fixed(field: str, value: Any, supported: Any) -> None:
    if value is not None and value != supported:
        raise _unsupported(field, value, supported)


def _field(config: Mapping[str, Any], family: Family, name: str) -> Any:
    value = config.get(name)
    if value is None and name not in family.defaults:
        raise CheckpointError(
            f"config.json: the field {name} is missing. Download config.json again."
        )
    return family.defaults[name] if value is None else value


def _activation(field: str, value: Any) -> str:
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise _unsupported(field, value, ", ".join(_ACTIVATIONS))
    return _ACTIVATIONS[value]


def _rope_theta(config: Mapping[str, Any]) -> Any:
    theta = config.get("rope_theta")
    # transformers before 5 calls it rope_scaling, and keeps the theta beside it.
    for field in ("rope_scaling", "rope_parameters"):
        rope = config.get(field) or {}
        if not isinstance(rope, Mapping):
            raise _unsupported(field, rope, {"rope_type": "default"})
        known = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
        for key, value in rope.items():
            if key != "rope_theta":
                _check_fixed(f"{field}.{key}", value, known.get(key))
        theta = rope.get("rope_theta", theta)
    return 10_000.0 if theta is None else theta


def model_config_to_hf(config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return config.json as transformers, 4 and 5, reads it."""
    name = model_type(config)
    family = FAMILIES[name]
    end = None if tokenizer is None else tokenizer.end_of_text
    written: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": name,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": None,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    written |= {theirs: getattr(config, field) for field, theirs in family.fields.items()}
    activation = _ACTIVATIONS_TO_HF.get(config.activation, _TANH_GELU[config.family])
    written[family.fields["activation"]] = activation
    written |= family.fixed
    if config.family == "gpt2":
        written |= {"n_ctx": config.context_length, "attn_pdrop": 0.0}
    else:
        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
        written |= {"attention_dropout": 0.0, "rope_theta": config.rope_theta}
        written["rope_parameters"] = rope
    if name == "qwen3":
        written |= {"sliding_window": None, "max_window_layers": config.n_layer}
    return written | dict.fromkeys(_DROPOUTS, config.dropout)


def _renamings(config: ModelConfig) -> Iterator[Renaming]:
    family = FAMILIES[model_type(config)]
    for renaming in family.renamings:
        blocks = range(config.n_layer) if "{i}" in renaming.theirs else range(1)
        for i in blocks:
            theirs = family.prefix + renaming.theirs.format(i=i)
            ours = tuple(name.format(i=i) for name in renaming.ours)
            yield Renaming(theirs, ours, renaming.is_transposed)
    if not config.tie_embeddings:
        yield _HEAD


def canonical_names(config: ModelConfig, names: Iterable[str]) -> dict[str, str]:
    """Return the names that ``tensors_from_hf`` takes -> the names found, where they differ or not.

    Adds the prefix that files of the bare model lack, and leaves out tensors that hold no weights.
    Raises: CheckpointError if a tensor is there with the prefix and without.
    """
    family = FAMILIES[model_type(config)]
    canonical: dict[str, str] = {}
    for name in names:
        has_prefix = name.startswith(family.prefix) or name == _HEAD.theirs
        full = name if has_prefix else family.prefix + name
        if family.ignored.fullmatch(full):
            continue
        if canonical.setdefault(full, name) != name:
            raise CheckpointError(f"the tensor {full!r} is there twice. Download the model again.")
    return canonical


def tensors_to_hf(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename, fuse and transpose a GPT's state_dict to what transformers calls it."""
    renamed = {}
    for renaming in _renamings(config):
        parts = [tensors[name] for name in renaming.ours]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        renamed[renaming.theirs] = (tensor.t() if renaming.is_transposed else tensor).contiguous()
    return renamed


def tensors_from_hf(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename, transpose and split tensors of canonical names to a GPT's state_dict.

    Raises: CheckpointError if the embeddings are said to be tied but are two; KeyError if a name
        is not there (``model_folder`` checks names and shapes first).
    """
    renamed = {}
    for renaming in _renamings(config):
        tensor = tensors[renaming.theirs]
        tensor = tensor.t() if renaming.is_transposed else tensor
        for name, part in zip(renaming.ours, tensor.chunk(len(renaming.ours)), strict=True):
            renamed[name] = part.contiguous()
    head = tensors.get(_HEAD.theirs, renamed["embedding.weight"])
    if config.tie_embeddings and not torch.equal(head, renamed["embedding.weight"]):
        raise CheckpointError(
            "config.json: tie_word_embeddings is true, but lm_head.weight is not the embedding. "
            "Set it to false there."
        )
    return renamed
