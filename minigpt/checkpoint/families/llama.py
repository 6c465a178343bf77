"""Llama: RMSNorm, RoPE, gated MLP, grouped heads. Many families vary it."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from minigpt.checkpoint.families import (
    ACTIVATIONS,
    Family,
    TensorName,
    check_fixed,
    hf_fields,
    same,
    unsupported,
)
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError
from minigpt.model.attention import Attention
from minigpt.model.gpt import GPT

SLIDING, _FULL = "sliding_attention", "full_attention"
_MANY_LAYERS = 10_000
NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
"""Norms of a block: Hugging Face's name -> ours."""
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
_ROPE_FIELDS = {
    "linear": {},
    "dynamic": {},
    "llama3": {
        "rope_low_freq_factor": "low_freq_factor",
        "rope_high_freq_factor": "high_freq_factor",
        "rope_original_context": "original_max_position_embeddings",
    },
    "yarn": {
        "rope_beta_fast": "beta_fast",
        "rope_beta_slow": "beta_slow",
        "rope_attention_factor": "attention_factor",
        "rope_original_context": "original_max_position_embeddings",
    },
}
"""Method of RoPE scaling -> ModelConfig field -> key, besides the factor."""
_ATTENTION = {
    f"layers.{{i}}.self_attn.{name[0]}_proj": f"blocks.{{i}}.attention.{name}"
    for name in ("query", "key", "value", "output")
}
_MLP = {
    f"layers.{{i}}.mlp.{name}_proj": f"blocks.{{i}}.mlp.{name}" for name in ("gate", "up", "down")
}


class WindowedAttention(Attention):
    """Attention whose queries see a sliding window of positions in some layers."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.score.window = window_of(config, layer)


class WindowedGPT(GPT):
    """GPT with sliding windows.

    Source: Child et al. 2019, arXiv:1904.10509; Jiang et al. 2023, arXiv:2310.06825, section 2.
    """

    attention_class: type[Attention] = WindowedAttention


def window_of(config: ModelConfig, layer: int) -> int:
    """Return a layer's sliding window, 0 if its queries see all positions before them."""
    fields = hf_fields(config)
    types = fields.get("layer_types")
    slides = types is None or types[layer % len(types)] == SLIDING
    return int(fields.get("sliding_window") or 0) if slides else 0


def read_windows(config: Mapping[str, Any], window: Any, types: Any) -> dict[str, Any]:
    """Return the fields of config.json that ``window_of`` reads, none if no window hides anything.

    Args: window, in positions, or None; types, of each layer, or None if all slide.
    Raises: CheckpointError if one of them is no window or no list of types.
    """
    n_layer, context = config.get("num_hidden_layers"), config.get("max_position_embeddings")
    if types is not None:
        is_list = isinstance(types, list) and all(t in (SLIDING, _FULL) for t in types)
        if not is_list or len(types) != n_layer:
            raise unsupported("layer_types", types, f"a list of {SLIDING} and {_FULL} by layer")
        if SLIDING not in types:
            return {}
        if window is None:
            raise unsupported("sliding_window", window, "a number, where layers slide")
    if window is None:
        return {}
    if type(window) is not int or window < 1:
        raise unsupported("sliding_window", window, "a positive integer")
    if isinstance(context, int) and window >= context:
        return {}
    return {"sliding_window": window} | ({} if types is None else {"layer_types": types})


def sliding_layers(n_layer: Any, slides: Callable[[int], bool]) -> list[str]:
    """Return the layer types: sliding_attention for the indices that ``slides`` accepts."""
    n_layer = n_layer if type(n_layer) is int and n_layer <= _MANY_LAYERS else 0
    return [SLIDING if slides(i) else _FULL for i in range(n_layer)]


@dataclass(frozen=True, kw_only=True)
class LlamaFamily(Family):
    """The Llama layout."""

    norms: Mapping[str, str] = field(default_factory=lambda: NORMS)
    """Norms of a block: Hugging Face's name -> ours."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        values = self.read_rope(config)
        if "attention_bias" in self.fields:
            bias = config.get("attention_bias")
            if not isinstance(bias, bool | None):
                raise unsupported("attention_bias", bias, "true, false")
            values["attention_bias"] = "all" if bias else "none"
        return values | {"hf_fields": self.read_fields(config)}

    def read_rope(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the ModelConfig fields of RoPE."""
        # transformers before 5 calls it rope_scaling, and has theta beside it.
        name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        theta = config.get("rope_theta", self.defaults.get("rope_theta"))
        return read_rope(config.get(name) or {}, name, config, theta)

    def read_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config.json fields that the model class reads."""
        window = config.get("sliding_window", self.defaults.get("sliding_window"))
        types = config.get("layer_types")
        slides = config.get("use_sliding_window", self.defaults.get("use_sliding_window"))
        if slides is None:  # as in Mistral, where every layer has the window
            return read_windows(config, window, types)
        if not slides:
            window = None
        elif types is None:
            first = config.get("max_window_layers", self.defaults.get("max_window_layers"))
            if type(first) is not int:
                raise unsupported("max_window_layers", first, "an integer")
            types = sliding_layers(config.get("num_hidden_layers"), lambda i: i >= first)
        fields = read_windows(config, window, types)
        return fields and fields | {"use_sliding_window": True}

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


def read_rope(
    rope: Any, name: str, config: Mapping[str, Any], theta: Any = None, *, partial: Any = 1.0
) -> dict[str, Any]:
    """Return the ModelConfig fields of RoPE in the field ``name`` of config.json.

    Args: theta, if it is not in there; partial, the supported partial_rotary_factor.
    Raises: CheckpointError for a key or value that changes the angles in a way we do not compute.
    """
    if not isinstance(rope, Mapping):
        raise unsupported(name, rope, {"rope_type": "default"})
    theta = rope.get("rope_theta", theta)
    values: dict[str, Any] = {"rope_theta": 10_000.0 if theta is None else theta}
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {"rope_type": kind, "type": kind, "partial_rotary_factor": partial, "rope_theta": theta}
    if kind == "default":
        known |= {"factor": 1.0}
    elif isinstance(kind, str) and kind in _ROPE_FIELDS:
        given = {"original_max_position_embeddings": config.get("max_position_embeddings"), **rope}
        keys = {"rope_scaling_factor": "factor"} | _ROPE_FIELDS[kind]
        if kind == "yarn":
            given = _yarn_defaults(name, given)
            known |= {"mscale": rope.get("mscale"), "mscale_all_dim": rope.get("mscale_all_dim")}
            values["rope_truncate"] = bool(rope.get("truncate", True))
            known |= {"truncate": values["rope_truncate"]}
        known |= {key: rope.get(key) for key in keys.values()}
        for ours, theirs in keys.items():
            if given.get(theirs) is None:
                raise CheckpointError(
                    f"config.json: {name}.{theirs} is missing. Download it again."
                )
            values[ours] = given[theirs]
        values["rope_scaling"] = kind
    else:
        raise unsupported(f"{name}.rope_type", kind, f"default, {', '.join(_ROPE_FIELDS)}")
    for key, value in rope.items():
        check_fixed(f"{name}.{key}", value, known.get(key))
    return values


def _yarn_defaults(name: str, rope: dict[str, Any]) -> dict[str, Any]:
    """Fill in what transformers computes: YaRN's attention factor, and the turns of its paper."""
    rope = {"beta_fast": 32.0, "beta_slow": 1.0} | {k: v for k, v in rope.items() if v}
    factor = rope.get("factor")
    if rope.get("attention_factor") is not None or factor is None:
        return rope
    scales = [rope[key] for key in ("mscale", "mscale_all_dim") if key in rope]
    scales = scales if len(scales) == 2 else [1.0, 0.0]
    for value in (factor, *scales):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise unsupported(f"{name}.factor, mscale or mscale_all_dim", value, "a number")
    above, below = (1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1 for scale in scales)
    return rope | {"attention_factor": above / below}


def write_rope(config: ModelConfig) -> dict[str, Any] | None:
    """Return rope_scaling of config.json, None if RoPE is not scaled."""
    if config.rope_scaling_factor == 1 and config.rope_attention_factor == 1:
        return None
    keys = {"rope_scaling_factor": "factor"} | _ROPE_FIELDS[config.rope_scaling]
    scaling = {theirs: getattr(config, ours) for ours, theirs in keys.items()}
    scaling |= {} if config.rope_truncate else {"truncate": False}
    return {"rope_type": config.rope_scaling} | scaling


FAMILY = LlamaFamily(
    architecture="LlamaForCausalLM",
    prefix="model.",
    fields=FIELDS | {name: name for name in NO_BIASES},
    activations=ACTIVATIONS,
    defaults=DEFAULTS,
    fixed=FIXED,
    no_effect=frozenset(_NO_EFFECT.split()),
    constants={"family": "llama"},
    model=WindowedGPT,
)
