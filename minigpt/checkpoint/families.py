"""Our settings of a model <-> config.json: GPT-2, Llama, Mistral, Qwen2, Qwen3, and our own.

Each field of a config.json is used, known to change nothing, or refused. A new model type is one
more entry in FAMILIES.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError, ConfigError
from minigpt.settings import build, to_dict
from minigpt.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Family:
    """A Hugging Face model type in terms of ModelConfig."""

    architecture: str
    fields: Mapping[str, str]
    """ModelConfig field -> config.json field."""
    defaults: Mapping[str, Any]
    """config.json field -> what transformers takes if it is absent."""
    fixed: Mapping[str, Any]
    """config.json field -> the only value that we compute; absent and null mean it too."""
    harmless: frozenset[str]
    """config.json fields that change no logits."""
    constants: Mapping[str, Any]
    """ModelConfig field -> the value that the model type implies."""
    written: Mapping[str, Any]
    """config.json field -> what it must say of any model of ours."""


_GENERIC = """
    architectures auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cls_token_id decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label
    initializer_range is_decoder is_llama_config label2id length_penalty license mask_token_id
    max_length max_sequence_length min_length model_max_length model_type name_or_path
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_past output_scores pad_token_id prefix
    problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unk_token_id unsloth_fixed unsloth_version use_bfloat16
    use_cache vocab_file
"""
_HARMLESS = frozenset(_GENERIC.split())
_FIXED_EVERYWHERE = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "quantization_config": None,
}

_GPT2_FIELDS = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "d_model": "n_embd",
    "d_mlp": "n_inner",
    "activation": "activation_function",
    "norm_eps": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
    "dropout": "resid_pdrop",
}
# How much is dropped at other places matters in training only, and in ours nothing is.
_GPT2_HARMLESS = """
    attn_pdrop embd_pdrop n_ctx predict_special_tokens reorder_and_upcast_attn summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
"""
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
    "dropout": "resid_pdrop",
}
_LLAMA_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "resid_pdrop": 0.0,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
}
_LLAMA_FIXED = {"partial_rotary_factor": 1.0, "rope_interleaved": False, "use_mrope": False}
# pretraining_tp says in how many parts products are computed.
_LLAMA_HARMLESS = "attention_dropout embd_pdrop pretraining_tp"
# Read by _rope and _check_window.
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
_WINDOW = ("sliding_window", "use_sliding_window", "layer_types", "max_window_layers")
_BIASED = {"attention_bias": "attention_bias"}
_NO_BIASES = {"attention_bias": False, "mlp_bias": False}
_QWEN_DEFAULTS = {"num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False}


def _llama_like(
    architecture: str,
    *,
    fields: Mapping[str, str],
    defaults: Mapping[str, Any],
    constants: Mapping[str, Any],
    written: Mapping[str, Any],
) -> Family:
    return Family(
        architecture=architecture,
        fields={**_LLAMA_FIELDS, **fields},
        defaults={**_LLAMA_DEFAULTS, **defaults},
        fixed=_LLAMA_FIXED | {name: no for name, no in _NO_BIASES.items() if name not in fields},
        harmless=_HARMLESS.union(_LLAMA_HARMLESS.split(), _ROPE, _WINDOW),
        constants={"family": "llama", **constants},
        written=written,
    )


FAMILIES = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        fields=_GPT2_FIELDS,
        defaults={
            "n_inner": None,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "resid_pdrop": 0.1,
        },
        fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
        harmless=_HARMLESS.union(_GPT2_HARMLESS.split()),
        constants={"family": "gpt2"},
        written={"attn_pdrop": 0.0},
    ),
    "llama": _llama_like(
        "LlamaForCausalLM",
        fields={**_BIASED, "mlp_bias": "mlp_bias"},
        defaults={},
        constants={},
        written={},
    ),
    "mistral": _llama_like(
        "MistralForCausalLM",
        fields={},
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        constants={},
        written={"sliding_window": None},
    ),
    "qwen2": _llama_like(
        "Qwen2ForCausalLM",
        fields={},
        defaults=_QWEN_DEFAULTS,
        constants={"attention_bias": "qkv"},
        written={"use_sliding_window": False, "sliding_window": None},
    ),
    "qwen3": _llama_like(
        "Qwen3ForCausalLM",
        fields=_BIASED,
        defaults=_QWEN_DEFAULTS | {"head_dim": 128},
        constants={"qk_norm": True},
        written={"use_sliding_window": False, "sliding_window": None},
    ),
}
"""Model type, as config.json names it, -> how we read and write it."""
OWN_TYPE = "minigpt"
"""Model type of what has no Hugging Face layout: attention of another score, recurrence."""

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
_DERIVED = ("n_inner", "num_key_value_heads", "head_dim")
"""Fields that are derived from others where they are null."""
_LLAMA3_ROPE = {
    "rope_scaling_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_context": "original_max_position_embeddings",
}


def model_config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Read a parsed config.json.

    Raises: CheckpointError naming the field, if one is missing or of the wrong type, or would
        make the model compute what ours cannot, or is not known.
    """
    name = config.get("model_type")
    if name == OWN_TYPE:
        return _own_config(config)
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise CheckpointError(
            f"config.json: model_type is {str(name)[:80]!r}, which is not read. "
            f"Choose a model of type {', '.join(FAMILIES)} or {OWN_TYPE}."
        )
    fixed = {**family.fixed, **_FIXED_EVERYWHERE}
    _check_known(config, {*family.fields.values(), *fixed, *family.harmless})
    for field, value in fixed.items():
        _check_fixed(field, config.get(field), value)
    values = {ours: _value(config, family, theirs) for ours, theirs in family.fields.items()}
    values = {ours: value for ours, value in values.items() if value is not None}
    values["activation"] = _activation(family.fields["activation"], values["activation"])
    if "attention_bias" in values:
        values["attention_bias"] = _attention_bias(values["attention_bias"])
    values |= {"model_type": name, **family.constants}
    if values["family"] == "llama":
        values |= _rope(config)
    model = _built(values)
    _check_window(config, family, model)
    return model


def _own_config(config: Mapping[str, Any]) -> ModelConfig:
    """Read a config.json of a model that has no Hugging Face layout: its fields are ours."""
    ours = {field.name for field in fields(ModelConfig)}
    _check_known(config, ours | _HARMLESS)
    return _built({name: value for name, value in config.items() if name in ours})


def _built(values: Mapping[str, Any]) -> ModelConfig:
    try:
        return build(ModelConfig, values)
    except ConfigError as error:
        raise CheckpointError(f"config.json: {str(error)[:200]}") from None


def _check_known(config: Mapping[str, Any], known: set[str]) -> None:
    for name, value in config.items():
        if name not in known and not name.startswith("_") and value is not None:
            raise CheckpointError(
                f"config.json: {name[:80]!r} is {repr(value)[:80]}, a field that is not known. "
                "If it does not change what the model computes, take it out."
            )


def _unsupported(field: str, value: Any, supported: Any) -> CheckpointError:
    shown = repr(value)[:80]
    return CheckpointError(
        f"config.json: {field} is {shown}, and this program computes only {supported!r}. "
        "Choose another model."
    )


def _check_fixed(field: str, value: Any, supported: Any) -> None:
    if value is not None and value != supported:
        raise _unsupported(field, value, supported)


def _value(config: Mapping[str, Any], family: Family, name: str) -> Any:
    value = config.get(name, family.defaults.get(name))
    if value is None and name not in _DERIVED:
        value = family.defaults.get(name)
        if value is None:
            raise CheckpointError(
                f"config.json: the field {name} is missing. Download config.json again."
            )
    return value


def _activation(name: str, value: Any) -> str:
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise _unsupported(name, value, ", ".join(_ACTIVATIONS))
    return _ACTIVATIONS[value]


def _attention_bias(value: Any) -> str:
    if not isinstance(value, bool):
        raise _unsupported("attention_bias", value, "true, false")
    return "all" if value else "none"


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    # transformers before 5 calls it rope_scaling, and keeps the theta beside it.
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    if not isinstance(rope, Mapping):
        raise _unsupported(name, rope, {"rope_type": "default"})
    theta = rope.get("rope_theta", config.get("rope_theta"))
    values: dict[str, Any] = {"rope_theta": 10_000.0 if theta is None else theta}
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {"rope_type": kind, "type": kind, "partial_rotary_factor": 1.0, "rope_theta": theta}
    if kind == "llama3":
        known |= {key: rope.get(key) for key in _LLAMA3_ROPE.values()}
        given = {"original_max_position_embeddings": config.get("max_position_embeddings"), **rope}
        for ours, theirs in _LLAMA3_ROPE.items():
            if given.get(theirs) is None:
                raise CheckpointError(
                    f"config.json: {name}.{theirs} is missing. Download it again."
                )
            values[ours] = given[theirs]
    elif kind != "default":
        raise _unsupported(f"{name}.rope_type", kind, "default, llama3")
    for key, value in rope.items():
        _check_fixed(f"{name}.{key}", value, known.get(key))
    return values


def _check_window(config: Mapping[str, Any], family: Family, model: ModelConfig) -> None:
    """Refuse a sliding window that hides any of the positions in the context."""
    layers = config.get("layer_types")
    for layer in layers if isinstance(layers, list) else [layers]:
        _check_fixed("layer_types", layer, "full_attention")
    if model.family == "gpt2":
        return
    window = config.get("sliding_window", family.defaults["sliding_window"])
    slides = config.get("use_sliding_window", family.defaults.get("use_sliding_window"))
    if slides is False or window is None:
        return
    if not isinstance(window, int) or window < model.context_length:
        raise CheckpointError(
            f"config.json: sliding_window is {repr(window)[:80]}, and this program computes only "
            "full attention. Up to so many positions that is the same: set "
            "max_position_embeddings to it there."
        )


def model_config_to_hf(config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return config.json as transformers, 4 and 5, reads it; of OWN_TYPE, only we do."""
    ends = () if tokenizer is None else tokenizer.end_of_text_ids
    prefix = () if tokenizer is None else tokenizer.prefix
    begin = prefix[0] if prefix else None if tokenizer is None else tokenizer.end_of_text
    written: dict[str, Any] = {
        "model_type": config.model_type,
        "bos_token_id": begin,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None,
        "pad_token_id": None,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if config.model_type == OWN_TYPE:
        return {"architectures": ["MinigptForCausalLM"]} | written | to_dict(config)
    family = FAMILIES[config.model_type]
    written = {"architectures": [family.architecture]} | written
    written |= {theirs: getattr(config, ours) for ours, theirs in family.fields.items()}
    activation = _ACTIVATIONS_TO_HF.get(config.activation, _TANH_GELU[config.family])
    written[family.fields["activation"]] = activation
    if "attention_bias" in family.fields:
        written["attention_bias"] = config.attention_bias == "all"
    if config.family == "llama":
        written |= _rope_to_hf(config)
    return {**written, **family.written, "embd_pdrop": config.dropout}


def _rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    scaling: dict[str, Any] | None = None
    if config.rope_scaling_factor != 1:
        scaling = {theirs: getattr(config, ours) for ours, theirs in _LLAMA3_ROPE.items()}
        scaling = {"rope_type": "llama3"} | scaling
    theta = {"rope_theta": config.rope_theta}
    rope = {"rope_parameters": (scaling or {"rope_type": "default"}) | theta}
    return theta | {"rope_scaling": scaling, "attention_dropout": 0.0} | rope
