"""Gemma 3 text models: Gemma 2 with QK-norm, and other RoPE frequencies in sliding layers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minigpt.checkpoint.families import (
    check_count,
    gemma2,
    hf_fields,
    is_positive,
    llama,
    unsupported,
)
from minigpt.checkpoint.families.gemma import GemmaNorm
from minigpt.checkpoint.families.gemma2 import Gemma2Attention, Gemma2Family, Gemma2GPT
from minigpt.checkpoint.long_rope import ORIGINAL_CONTEXT
from minigpt.checkpoint.sliding_windows import SLIDING, sliding_layers
from minigpt.config import ModelConfig
from minigpt.model.layers import Rotary, rotary_table, rotate

_LOCAL_THETA = 10_000.0


class Gemma3Attention(Gemma2Attention):
    """Attention with Gemma's norm on queries and keys, and RoPE frequencies by layer type."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.query_norm = GemmaNorm(config.d_head, eps=config.norm_eps)
        self.key_norm = GemmaNorm(config.d_head, eps=config.norm_eps)
        types = hf_fields(config).get("layer_types") or [SLIDING]
        self.is_local = types[layer % len(types)] == SLIDING

    def rotate(self, x_BHTD: Tensor, rotary: Rotary) -> Tensor:
        cos, sin = (table[:, int(self.is_local)] for table in rotary)
        return rotate(x_BHTD, cos, sin)


class Gemma3GPT(Gemma2GPT):
    """Gemma 3.

    Source: Gemma Team 2025, arXiv:2503.19786.
    """

    attention_class = Gemma3Attention

    def rotary_table(self, divisor: Tensor | None = None, scale: float = 1.0) -> Rotary:
        """Return cos and sin, each (context_length, 2, D / 2), for full and for sliding layers."""
        theta = hf_fields(self.config).get("rope_local_base_freq", _LOCAL_THETA)
        full = rotary_table(self.config, divisor, scale)
        unscaled = replace(self.config, rope_scaling_factor=1.0, rope_attention_factor=1.0)
        local = rotary_table(replace(unscaled, rope_theta=theta))
        cos, sin = (torch.stack(tables, dim=1) for tables in zip(full, local, strict=True))
        return cos, sin


@dataclass(frozen=True, kw_only=True)
class Gemma3Family(Gemma2Family):
    """The Gemma 3 layout."""

    def read_rope(self, config: Mapping[str, Any]) -> dict[str, Any]:
        theta = config.get("rope_theta", 1_000_000.0)
        nested, scaling = config.get("rope_parameters"), config.get("rope_scaling") or {}
        # For these models, transformers only reads it inside the fields of RoPE.
        config = {name: config[name] for name in config if name != ORIGINAL_CONTEXT}
        if nested is None:
            return llama.read_rope(scaling, "rope_scaling", config, theta)
        if not isinstance(nested, Mapping) or not nested.keys() <= {"full_attention", SLIDING}:
            raise unsupported("rope_parameters", nested, f"full_attention and {SLIDING}")
        name, full = "rope_parameters.full_attention", nested.get("full_attention") or {}
        for table in (scaling, full):
            if not isinstance(table, Mapping):
                raise unsupported(name, table, {"rope_type": "default"})
        return llama.read_rope({**full, **scaling}, name, config, theta)

    def read_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        name = f"rope_parameters.{SLIDING}"
        rope = (config.get("rope_parameters") or {}).get(SLIDING) or {}
        theta = config.get("rope_local_base_freq", _LOCAL_THETA)
        local = llama.read_rope(rope, name, config, theta)
        theta = local["rope_theta"]
        factors = (local.get(f"rope_{what}_factor", 1) for what in ("scaling", "attention"))
        if any(factor != 1 for factor in factors) or "hf_fields" in local:
            raise unsupported(f"{name}.rope_type", rope.get("rope_type"), "default")
        if not is_positive(theta, limit=1e12):
            raise unsupported(f"{name}.rope_theta", theta, "a positive number")
        return super().read_fields(config) | {"rope_local_base_freq": float(theta)}

    def layer_types(self, config: Mapping[str, Any]) -> list[str]:
        every = config.get("sliding_window_pattern", 6)
        check_count("sliding_window_pattern", every)
        n_layer = config.get("num_hidden_layers")
        return sliding_layers(n_layer, lambda i: (i + 1) % every != 0)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        written = super().write(config)
        theta = hf_fields(config).get("rope_local_base_freq", _LOCAL_THETA)
        local = {"rope_type": "default", "rope_theta": theta}
        return written | {
            "rope_parameters": {"full_attention": written["rope_parameters"], SLIDING: local}
        }


FAMILY = Gemma3Family(
    architecture="Gemma3ForCausalLM",
    prefix="model.",
    fields=gemma2.FAMILY.fields,
    activations=gemma2.FAMILY.activations,
    defaults={**gemma2.FAMILY.defaults, "final_logit_softcapping": None},
    # transformers' Gemma 3 has no softcapping of scores, whatever this field says.
    fixed={**gemma2.FAMILY.fixed, "attn_logit_softcapping": None},
    no_effect=gemma2.FAMILY.no_effect | {"rope_local_base_freq", "sliding_window_pattern"},
    constants={"family": "llama", "qk_norm": True},
    norms=gemma2.NORMS,
    numbers=("query_pre_attn_scalar", "final_logit_softcapping"),
    model=Gemma3GPT,
)
