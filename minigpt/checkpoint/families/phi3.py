"""Phi-3 and Phi-4-mini: Llama with fused projections, RoPE on a part of each head, and LongRoPE."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minigpt.checkpoint.families import TensorName, head_width, hf_fields, llama, same, unsupported
from minigpt.checkpoint.families.gpt_neox import (
    PartialRotaryAttention,
    PartialRotaryGPT,
    rotated_width,
)
from minigpt.checkpoint.families.llama import LlamaFamily
from minigpt.checkpoint.long_rope import ORIGINAL_CONTEXT
from minigpt.checkpoint.sliding_windows import window_of
from minigpt.config import ModelConfig

_OLD_NAMES = ("su", "yarn")  # of LongRoPE


class Phi3Attention(PartialRotaryAttention):
    """Attention with RoPE on a part of each head and an optional sliding window."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.score.window = window_of(config, layer)


class Phi3GPT(PartialRotaryGPT):
    """Phi-3.

    Source: Abdin et al. 2024, arXiv:2404.14219.
    """

    attention_class = Phi3Attention


@dataclass(frozen=True, kw_only=True)
class Phi3Family(LlamaFamily):
    """The Phi-3 layout."""

    def read_rope(self, config: Mapping[str, Any]) -> dict[str, Any]:
        name, rope = llama.rope_field(config)
        if isinstance(rope, Mapping):
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind not in ("default", "longrope", *_OLD_NAMES):
                raise unsupported(f"{name}.rope_type", kind, "default, longrope")
            kind = "longrope" if kind in _OLD_NAMES else kind
            rope = {**rope, "rope_type": kind, "type": kind}
        theta, share = config.get("rope_theta"), _rotated_share(config)
        known = {**self.defaults, **config}
        return llama.read_rope(rope, name, known, theta, partial=share)

    def read_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        share = _rotated_share(config)
        if d_head := head_width(config):
            rotated_width("partial_rotary_factor", d_head, share)
        return super().read_fields(config) | {"partial_rotary_factor": share}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        written = super().write(config)
        share = hf_fields(config).get("partial_rotary_factor", 1.0)
        written["rope_parameters"] |= {"partial_rotary_factor": share}
        original = written["rope_parameters"].get(ORIGINAL_CONTEXT)
        return written | ({} if original is None else {ORIGINAL_CONTEXT: original})

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


def _rotated_share(config: Mapping[str, Any]) -> Any:
    _, rope = llama.rope_field(config)
    share = config.get("partial_rotary_factor")
    if isinstance(rope, Mapping):
        share = rope.get("partial_rotary_factor", share)
    return 1.0 if share is None else share


FAMILY = Phi3Family(
    architecture="Phi3ForCausalLM",
    prefix="model.",
    fields=llama.FIELDS,
    activations=llama.FAMILY.activations,
    defaults=llama.DEFAULTS | {"rms_norm_eps": 1e-5, ORIGINAL_CONTEXT: 4096},
    fixed={name: value for name, value in llama.FIXED.items() if name != "partial_rotary_factor"}
    | llama.NO_BIASES
    | {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False},
    no_effect=llama.FAMILY.no_effect | {"partial_rotary_factor", "resid_pdrop"},
    constants={"family": "llama"},
    written={"sliding_window": None},
    windows=("sliding_window",),
    model=Phi3GPT,
)
