"""SmolLM3: Llama without RoPE in every fourth layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from minigpt.checkpoint.families import check_count, hf_fields, llama, unsupported
from minigpt.checkpoint.families.llama import LlamaFamily
from minigpt.checkpoint.sliding_windows import (
    SLIDING,
    WindowedAttention,
    read_windows,
    sliding_layers,
)
from minigpt.config import ModelConfig
from minigpt.model.gpt import GPT
from minigpt.model.layers import Rotary, rotate


class SmolLM3Attention(WindowedAttention):
    """Attention with RoPE in most layers.

    Source: Yang et al. 2025, arXiv:2501.18795 (NoPE layers among RoPE layers).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        has_rope = hf_fields(config).get("no_rope_layers") or [1]
        self.has_rope = bool(has_rope[layer % len(has_rope)])

    def rotate(self, x_BHTD: Tensor, rotary: Rotary) -> Tensor:
        return rotate(x_BHTD, *rotary) if self.has_rope else x_BHTD


class SmolLM3GPT(GPT):
    """SmolLM3."""

    attention_class = SmolLM3Attention


@dataclass(frozen=True, kw_only=True)
class SmolLM3Family(LlamaFamily):
    """The SmolLM3 layout."""

    def read_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        n_layer = config.get("num_hidden_layers")
        has_rope = config.get("no_rope_layers")  # 1 where there is RoPE, despite the name
        if has_rope is None:
            every = config.get("no_rope_layer_interval", 4)
            check_count("no_rope_layer_interval", every)
            without = sliding_layers(n_layer, lambda i: (i + 1) % every == 0)
            has_rope = [int(kind != SLIDING) for kind in without]
        is_list = isinstance(has_rope, list) and all(type(v) in (int, bool) for v in has_rope)
        if not is_list or not isinstance(n_layer, int) or len(has_rope) < n_layer:
            raise unsupported("no_rope_layers", has_rope, "0 or 1 for each layer")
        window, types = config.get("sliding_window"), config.get("layer_types")
        if types is None:
            window = window if config.get("use_sliding_window") else None
            types = sliding_layers(n_layer, lambda i: bool(window) and not has_rope[i])
        fields = read_windows(config, window, types)
        fields = fields and fields | {"use_sliding_window": True}
        return fields | {"no_rope_layers": has_rope}


FAMILY = SmolLM3Family(
    architecture="SmolLM3ForCausalLM",
    prefix="model.",
    fields=llama.FAMILY.fields,
    activations=llama.FAMILY.activations,
    defaults=llama.DEFAULTS
    | {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2_000_000.0},
    fixed=llama.FIXED,
    no_effect=llama.FAMILY.no_effect | {"no_rope_layers", "no_rope_layer_interval"},
    constants={"family": "llama"},
    written={"use_sliding_window": False, "sliding_window": None},
    model=SmolLM3GPT,
)
