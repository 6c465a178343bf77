"""Llama: RMSNorm, RoPE, gated MLP, grouped-query attention. Many families are variants of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from minigpt.checkpoint import sliding_windows
from minigpt.checkpoint.families import (
    ACTIVATIONS,
    Family,
    TensorName,
    check_fixed,
    check_flag,
    hf_fields,
    same,
    unsupported,
)
from minigpt.checkpoint.rope_scaling import read_scaling, write_scaling
from minigpt.config import ModelConfig

NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
"""Norms of a block: Hugging Face's name -> ours."""
NO_BIASES = {"attention_bias": False, "mlp_bias": False}
"""config.json fields of models without biases."""
FIXED = {"partial_rotary_factor": 1.0, "rope_interleaved": False, "use_mrope": False}
"""config.json field -> the only supported value, for all Llama-like models."""
FIELDS = {
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
"""ModelConfig field -> config.json field of all Llama-like models."""
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "resid_pdrop": 0.0,
    **NO_BIASES,
}
"""Defaults of all Llama-like models."""
# pretraining_tp only splits matrix products; ``read`` handles the second and third lines.
_NO_EFFECT = """
    attention_dropout embd_pdrop pretraining_tp
    rope_theta rope_scaling rope_parameters original_max_position_embeddings
    sliding_window use_sliding_window layer_types max_window_layers
"""
_ATTENTION = {
    f"layers.{{i}}.self_attn.{name[0]}_proj": f"blocks.{{i}}.attention.{name}"
    for name in ("query", "key", "value", "output")
}
_MLP = {
    f"layers.{{i}}.mlp.{name}_proj": f"blocks.{{i}}.mlp.{name}" for name in ("gate", "up", "down")
}


@dataclass(frozen=True, kw_only=True)
class LlamaFamily(Family):
    """The Llama layout."""

    norms: Mapping[str, str] = field(default_factory=lambda: NORMS)
    """Norms of a block: Hugging Face's name -> ours."""
    windows: tuple[str, ...] = ()
    """Sliding-window fields of config.json that transformers reads for this family."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        values = self.read_rope(config)
        if "attention_bias" in self.fields:
            bias = config.get("attention_bias")
            check_flag("attention_bias", bias)
            values["attention_bias"] = "all" if bias else "none"
        return values | {"hf_fields": values.get("hf_fields", {}) | self.read_fields(config)}

    def read_rope(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the ModelConfig fields of RoPE."""
        name, rope = rope_field(config)
        theta = config.get("rope_theta", self.defaults.get("rope_theta"))
        return read_rope(rope, name, {**self.defaults, **config}, theta)

    def read_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config.json fields that the model class reads, by default sliding windows."""
        given = {name: config.get(name, self.defaults.get(name)) for name in self.windows}
        return sliding_windows.read_fields(config, given)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        has_field = "attention_bias" in self.fields
        bias = {"attention_bias": config.attention_bias == "all"} if has_field else {}
        scaling = write_rope(config)
        theta = {"rope_theta": config.rope_theta}
        rope = {"rope_parameters": (scaling or {"rope_type": "default"}) | theta}
        return bias | theta | {"rope_scaling": scaling, "attention_dropout": 0.0} | rope

    def tensors(self, config: ModelConfig) -> Iterator[TensorName]:
        yield from same("embed_tokens", "embedding")
        for theirs, ours in self.norms.items():
            yield from same(f"layers.{{i}}.{theirs}", f"blocks.{{i}}.{ours}")
        for theirs, ours in (_ATTENTION | _MLP).items():
            yield from same(theirs, ours)
        yield from same("norm", "final_norm")
        if config.qk_norm:
            for name in ("query", "key"):
                theirs = f"layers.{{i}}.self_attn.{name[0]}_norm"
                yield from same(theirs, f"blocks.{{i}}.attention.{name}_norm")
        n_biased = {"none": 0, "qkv": 3, "all": 4}[config.attention_bias]
        for theirs, ours in list(_ATTENTION.items())[:n_biased]:
            yield from same(theirs, ours, "bias")
        for theirs, ours in _MLP.items() if config.mlp_bias else ():
            yield from same(theirs, ours, "bias")


def rope_field(config: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the name and value of the field of config.json that describes RoPE."""
    # Before version 5, transformers writes rope_scaling and a separate rope_theta.
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    return name, config.get(name) or {}


def read_rope(
    rope: Any, name: str, config: Mapping[str, Any], theta: Any = None, *, partial: Any = 1.0
) -> dict[str, Any]:
    """Return the ModelConfig fields of RoPE in the field ``name`` of config.json.

    Args: theta, used if the field has none; partial, the supported partial_rotary_factor.
    Raises: CheckpointError for an unsupported key or value.
    """
    if not isinstance(rope, Mapping):
        raise unsupported(name, rope, {"rope_type": "default"})
    theta = rope.get("rope_theta", theta)
    values: dict[str, Any] = {"rope_theta": 10_000.0 if theta is None else theta}
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {"rope_type": kind, "type": kind, "partial_rotary_factor": partial, "rope_theta": theta}
    if kind == "default":
        known["factor"] = 1.0
    else:
        scaling, keys = read_scaling(rope, name, config, partial)
        values, known = values | scaling, known | keys
    for key, value in rope.items():
        check_fixed(f"{name}.{key}", value, known.get(key))
    return values


def write_rope(config: ModelConfig) -> dict[str, Any] | None:
    """Return the rope_scaling field of config.json; None if RoPE is not scaled."""
    if long := hf_fields(config).get("rope_scaling"):
        return dict(long)
    if config.rope_scaling_factor == 1 and config.rope_attention_factor == 1:
        return None
    return write_scaling(config)


FAMILY = LlamaFamily(
    architecture="LlamaForCausalLM",
    prefix="model.",
    fields=FIELDS | {name: name for name in NO_BIASES},
    activations=ACTIVATIONS,
    defaults=DEFAULTS,
    fixed=FIXED,
    no_effect=frozenset(_NO_EFFECT.split()),
    constants={"family": "llama"},
)
