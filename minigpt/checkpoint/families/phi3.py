"""Phi-3 and Phi-4-mini: Llama with fused projections, RoPE on a part of each head, and LongRoPE."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minigpt.checkpoint.families import TensorName, hf_fields, llama, same, unsupported
from minigpt.checkpoint.families.gpt_neox import (
    PartialRotaryAttention,
    partial_rotary_table,
    rotated_width,
)
from minigpt.checkpoint.families.llama import LlamaFamily
from minigpt.checkpoint.sliding_windows import window_of
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError
from minigpt.model.gpt import GPT


class Phi3Attention(PartialRotaryAttention):
    """Attention with RoPE on a part of each head, perhaps with a sliding window."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.score.window = window_of(config, layer)


class Phi3GPT(GPT):
    """Phi-3.

    LongRoPE has frequencies for up to the original context, and others beyond it, which would
    change all keys in the cache. We compute the former: context_length is the original context.

    Source: Abdin et al. 2024, arXiv:2404.14219; LongRoPE: Ding et al. 2024, arXiv:2402.13753.
    """

    attention_class = Phi3Attention

    def rotary_table(self) -> tuple[Tensor, Tensor]:
        fields = hf_fields(self.config)
        scaling = fields.get("rope_scaling")
        if scaling is None:
            return partial_rotary_table(self.config)
        divisor = torch.tensor(scaling["short_factor"], device="cpu", dtype=torch.float32)
        cos, sin = partial_rotary_table(self.config, divisor)
        scale = attention_factor(fields)
        return cos * scale, sin * scale


def attention_factor(fields: Mapping[str, Any]) -> float:
    """Return what LongRoPE multiplies cos and sin by, given the model's ``hf_fields``."""
    scaling, original = fields["rope_scaling"], fields["original_max_position_embeddings"]
    factor = scaling.get("factor") or fields["max_position_embeddings"] / original
    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)
    ratio = math.log(factor) / math.log(original) if factor > 1 else 0.0
    return math.sqrt(1 + ratio)


@dataclass(frozen=True, kw_only=True)
class Phi3Family(LlamaFamily):
    """The Phi-3 layout."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        values = super().read(config)
        if "rope_scaling" in values["hf_fields"]:
            original = values["hf_fields"]["original_max_position_embeddings"]
            values["context_length"] = min(config["max_position_embeddings"], original)
        return values

    def read_rope(self, config: Mapping[str, Any]) -> dict[str, Any]:
        rope = _rope(config)
        if _long_rope(config) is not None:
            rope = {key: value for key, value in rope.items() if key == "rope_theta"}
        theta, share = config.get("rope_theta"), _rotated_share(config)
        return llama.read_rope(rope, "rope_parameters", config, theta, partial=share)

    def read_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        share = _rotated_share(config)
        n_head, width = config.get("num_attention_heads"), config.get("hidden_size")
        n_rotated = 0
        if isinstance(n_head, int) and isinstance(width, int) and n_head > 0:
            d_head = config.get("head_dim") or width // n_head
            n_rotated = rotated_width("partial_rotary_factor", d_head, share)
        fields = super().read_fields(config) | {"partial_rotary_factor": share}
        scaling = _long_rope(config)
        if scaling is None:
            return fields
        for name in ("short_factor", "long_factor"):
            factors = scaling.get(name)
            is_fitting = isinstance(factors, list) and len(factors) == n_rotated // 2
            if not is_fitting or not all(map(_is_positive, factors or ())):
                raise unsupported(
                    f"rope_scaling.{name}", factors, f"a list of {n_rotated // 2} positive numbers"
                )
        numbers = {
            "original_max_position_embeddings": config.get(
                "original_max_position_embeddings", 4096
            ),
            "max_position_embeddings": config.get("max_position_embeddings"),
        }
        for name, value in numbers.items():
            if type(value) is not int or value < 2:
                raise unsupported(name, value, "an integer of 2 or more")
        return fields | numbers | {"rope_scaling": {"type": "longrope"} | scaling}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        written = super().write(config)
        fields = hf_fields(config)
        rope = {
            "rope_type": "longrope" if "rope_scaling" in fields else "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": fields.get("partial_rotary_factor", 1.0),
        }
        for name in ("short_factor", "long_factor", "factor", "attention_factor"):
            if name in fields.get("rope_scaling", {}):
                rope[name] = fields["rope_scaling"][name]
        return written | {"rope_parameters": rope}

    def tensors(self, config: ModelConfig) -> Iterator[TensorName]:
        attention, mlp = "blocks.{i}.attention", "blocks.{i}.mlp"
        yield from same("embed_tokens", "embedding")
        for theirs, ours in self.norms.items():
            yield from same(f"layers.{{i}}.{theirs}", f"blocks.{{i}}.{ours}")
        yield TensorName(
            "layers.{i}.self_attn.qkv_proj.weight",
            tuple(f"{attention}.{name}.weight" for name in ("query", "key", "value")),
            shares=(config.n_head, config.n_kv_head, config.n_kv_head),
        )
        yield from same("layers.{i}.self_attn.o_proj", f"{attention}.output")
        yield TensorName(
            "layers.{i}.mlp.gate_up_proj.weight", (f"{mlp}.gate.weight", f"{mlp}.up.weight")
        )
        yield from same("layers.{i}.mlp.down_proj", f"{mlp}.down")
        yield from same("norm", "final_norm")


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise unsupported("rope_parameters", rope, {"rope_type": "default"})
    return rope


def _rotated_share(config: Mapping[str, Any]) -> Any:
    share = _rope(config).get("partial_rotary_factor", config.get("partial_rotary_factor"))
    return 1.0 if share is None else share


def _long_rope(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the parameters of LongRoPE, None if the model does not have it."""
    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("longrope", "su", "yarn"):  # the last two are older names of it
        raise unsupported("rope_scaling.rope_type", kind, "default, longrope")
    known = {"short_factor", "long_factor", "factor", "attention_factor"}
    elsewhere = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    for name, value in rope.items():
        if name in ("factor", "attention_factor") and not (value is None or _is_positive(value)):
            raise unsupported(f"rope_scaling.{name}", value, "a positive number")
        if name not in known | elsewhere | {"original_max_position_embeddings"}:
            raise CheckpointError(f"config.json: rope_scaling has the unknown field {name[:80]!r}.")
    return {name: rope[name] for name in sorted(known & rope.keys()) if rope[name] is not None}


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value < 1e9


FAMILY = Phi3Family(
    architecture="Phi3ForCausalLM",
    prefix="model.",
    fields=llama.FIELDS,
    activations=llama.FAMILY.activations,
    defaults=llama.DEFAULTS | {"rms_norm_eps": 1e-5},
    fixed={name: value for name, value in llama.FIXED.items() if name != "partial_rotary_factor"}
    | llama.NO_BIASES
    | {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False},
    no_effect=llama.FAMILY.no_effect
    | {"partial_rotary_factor", "original_max_position_embeddings", "resid_pdrop"},
    constants={"family": "llama"},
    written={"sliding_window": None},
    windows=("sliding_window",),
    model=Phi3GPT,
)
