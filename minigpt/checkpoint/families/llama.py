"""Llama: RMSNorm, RoPE, gated MLP, grouped heads. Mistral, Qwen2 and Qwen3 vary it."""

from collections.abc import Iterator, Mapping
from typing import Any

from minigpt.checkpoint.families import Family, TensorName, check_fixed, same, unsupported
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError

NO_BIASES = {"attention_bias": False, "mlp_bias": False}
"""config.json fields of models without biases."""
FIXED = {"partial_rotary_factor": 1.0, "rope_interleaved": False, "use_mrope": False}
"""config.json fields of all Llama-like models whose other values we do not compute."""
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
# pretraining_tp: into how many parts products are split. The second and third lines: see ``read``.
_NO_EFFECT = """
    attention_dropout embd_pdrop pretraining_tp
    rope_theta rope_scaling rope_parameters
    sliding_window use_sliding_window layer_types max_window_layers
"""
_LLAMA3_ROPE = {
    "rope_scaling_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_context": "original_max_position_embeddings",
}
_ATTENTION = {
    f"layers.{{i}}.self_attn.{name[0]}_proj": f"blocks.{{i}}.attention.{name}"
    for name in ("query", "key", "value", "output")
}
_MLP = {
    f"layers.{{i}}.mlp.{name}_proj": f"blocks.{{i}}.mlp.{name}" for name in ("gate", "up", "down")
}


class LlamaFamily(Family):
    """The Llama layout."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        values = _read_rope(config)
        if "attention_bias" in self.fields:
            bias = config.get("attention_bias")
            if not isinstance(bias, bool | None):
                raise unsupported("attention_bias", bias, "true, false")
            values["attention_bias"] = "all" if bias else "none"
        self._check_window(config)
        return values

    def _check_window(self, config: Mapping[str, Any]) -> None:
        """Refuse a sliding window that hides positions of the context."""
        layers = config.get("layer_types")
        for layer in layers if isinstance(layers, list) else [layers]:
            check_fixed("layer_types", layer, "full_attention")
        window = config.get("sliding_window", self.defaults.get("sliding_window"))
        slides = config.get("use_sliding_window", self.defaults.get("use_sliding_window"))
        context = config["max_position_embeddings"]
        if slides is False or window is None or not isinstance(context, int):
            return
        if not isinstance(window, int) or window < context:
            raise CheckpointError(
                f"config.json: sliding_window is {repr(window)[:80]}, and only full attention is "
                "supported. The two are equal up to that many positions: set "
                "max_position_embeddings to it there."
            )

    def write(self, config: ModelConfig) -> dict[str, Any]:
        has_field = "attention_bias" in self.fields
        bias = {"attention_bias": config.attention_bias == "all"} if has_field else {}
        scaling: dict[str, Any] | None = None
        if config.rope_scaling_factor != 1:
            scaling = {theirs: getattr(config, ours) for ours, theirs in _LLAMA3_ROPE.items()}
            scaling = {"rope_type": "llama3"} | scaling
        theta = {"rope_theta": config.rope_theta}
        rope = {"rope_parameters": (scaling or {"rope_type": "default"}) | theta}
        return bias | theta | {"rope_scaling": scaling, "attention_dropout": 0.0} | rope

    def tensors(self, config: ModelConfig) -> Iterator[TensorName]:
        yield from same("embed_tokens", "embedding")
        yield from same("layers.{i}.input_layernorm", "blocks.{i}.attention_norm")
        for theirs, ours in _ATTENTION.items():
            yield from same(theirs, ours)
        yield from same("layers.{i}.post_attention_layernorm", "blocks.{i}.mlp_norm")
        for theirs, ours in _MLP.items():
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


def _read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    # transformers before 5 calls it rope_scaling, and has theta beside it.
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    if not isinstance(rope, Mapping):
        raise unsupported(name, rope, {"rope_type": "default"})
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
        raise unsupported(f"{name}.rope_type", kind, "default, llama3")
    for key, value in rope.items():
        check_fixed(f"{name}.{key}", value, known.get(key))
    return values


FAMILY = LlamaFamily(
    architecture="LlamaForCausalLM",
    prefix="model.",
    fields=FIELDS | {name: name for name in NO_BIASES},
    activations={
        "silu": "silu",
        "swish": "silu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_new": "gelu_tanh",
        "gelu": "gelu",
        "relu2": "relu2",
    },
    defaults=DEFAULTS,
    fixed=FIXED,
    no_effect=frozenset(_NO_EFFECT.split()),
    constants={"family": "llama"},
)
