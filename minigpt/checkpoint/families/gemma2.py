"""Gemma 2: Gemma with norms also after attention and MLP, softcapping, and some sliding layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minigpt.checkpoint.families import gemma, hf_fields, is_positive, llama, unsupported
from minigpt.checkpoint.families.gemma import GemmaBlock, GemmaGPT, GemmaNorm
from minigpt.checkpoint.rescaled_attention import ScaledScore
from minigpt.checkpoint.sliding_windows import read_windows, sliding_layers, window_of
from minigpt.config import ModelConfig
from minigpt.model.attention import Attention
from minigpt.model.scores import weighted_sum

NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
_CHUNK = 256  # queries per step of ``attend``


class SoftcappedScore(ScaledScore):
    """The scaled dot product s, bounded smoothly: cap * tanh(s / cap).

    Source: Gemma Team 2024, arXiv:2408.00118, section 2.
    """

    is_dot_product = False
    kept_per_weight = 2  # tanh's and softmax's

    def __init__(self, config: ModelConfig, scale: float, cap: float) -> None:
        super().__init__(config, scale)
        self.cap = cap

    def score(self, q_BHTD: Tensor, k_BGSD: Tensor) -> Tensor:
        return self.cap * (super().score(q_BHTD, k_BGSD) / self.cap).tanh()

    def attend(
        self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, visible_BS: Tensor | None = None
    ) -> Tensor:
        contexts, end = [], k_BGSD.shape[2] - q_BHTD.shape[2]
        for q in q_BHTD.split(_CHUNK, dim=2):
            end += q.shape[2]
            visible = None if visible_BS is None else visible_BS[:, :end]
            weights = self.weights(q, k_BGSD[:, :, :end], visible)
            contexts.append(weighted_sum(weights, v_BGSD[:, :, :end]))
        return torch.cat(contexts, dim=2)


class Gemma2Attention(Attention):
    """Attention with a configured scale, optional softcapping, and windows in some layers."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        fields = hf_fields(config)
        scale = fields.get("query_pre_attn_scalar", 256) ** -0.5
        cap = fields.get("attn_logit_softcapping")
        self.score = SoftcappedScore(config, scale, cap) if cap else ScaledScore(config, scale)
        self.score.window = window_of(config, layer)


class Gemma2Block(GemmaBlock):
    """Block with norms both before and after attention and MLP."""

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__(config, attention)
        self.attention_post_norm = GemmaNorm(config.d_model, eps=config.norm_eps)
        self.mlp_post_norm = GemmaNorm(config.d_model, eps=config.norm_eps)


class Gemma2GPT(GemmaGPT):
    """Gemma 2.

    Source: Gemma Team 2024, arXiv:2408.00118.
    """

    block_class = Gemma2Block
    attention_class: type[Attention] = Gemma2Attention

    @property
    def logit_softcap(self) -> float:
        return hf_fields(self.config).get("final_logit_softcapping") or 0.0


@dataclass(frozen=True, kw_only=True)
class Gemma2Family(llama.LlamaFamily):
    """The Gemma 2 layout."""

    numbers: tuple[str, ...] = (
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    )
    """Fields that are positive numbers; a softcapping may be null."""

    def read_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        fields = {name: config.get(name, self.defaults.get(name)) for name in self.numbers}
        for name, value in fields.items():
            if not is_positive(value) and (value is not None or "scalar" in name):
                raise unsupported(name, value, "a positive number")
        window = config.get("sliding_window", self.defaults["sliding_window"])
        types = config.get("layer_types")
        if types is None:
            types = self.layer_types(config)
        # Written even if no window hides anything, because transformers' defaults differ.
        both = {"sliding_window": window, "layer_types": types}
        return fields | (read_windows(config, window, types) or both)

    def layer_types(self, config: Mapping[str, Any]) -> list[str]:
        """Return the layer types for a config.json without them."""
        return sliding_layers(config.get("num_hidden_layers"), lambda i: i % 2 == 0)


FAMILY = Gemma2Family(
    architecture="Gemma2ForCausalLM",
    prefix="model.",
    fields={**gemma.FAMILY.fields, "activation": "hidden_activation"},
    activations=gemma.ACTIVATIONS,
    defaults={
        **gemma.FAMILY.defaults,
        "hidden_activation": "gelu_pytorch_tanh",
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    },
    fixed=gemma.FIXED,
    no_effect=llama.FAMILY.no_effect
    | {"hidden_act", "query_pre_attn_scalar"}
    | {"attn_logit_softcapping", "final_logit_softcapping", "cache_implementation"},
    constants={"family": "llama"},
    norms=NORMS,
    model=Gemma2GPT,
)
