"""OLMo 2: Llama whose norms come after the branches, with a norm over all queries and all keys."""

from dataclasses import replace

from torch import Tensor

from minigpt.checkpoint.families import llama
from minigpt.config import ModelConfig
from minigpt.model.attention import Attention, PassCollector
from minigpt.model.cache import KVCache
from minigpt.model.gpt import GPT, Block
from minigpt.model.layers import RMSNorm


class WideNorm(RMSNorm):
    """RMSNorm over all heads together: (B, H, T, D) -> (B, H, T, D)."""

    def forward(self, x: Tensor) -> Tensor:
        normed = super().forward(x.transpose(1, 2).flatten(2))  # (B, T, H D)
        return normed.unflatten(2, (x.shape[1], -1)).transpose(1, 2)


class Olmo2Attention(Attention):
    """Attention with a norm over all queries and one over all keys."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.query_norm = WideNorm(config.n_head * config.d_head, eps=config.norm_eps)
        self.key_norm = WideNorm(config.n_kv_head * config.d_head, eps=config.norm_eps)


class Olmo2Block(Block):
    """Block whose branches have a norm after, and none before."""

    attention_class = Olmo2Attention

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        cache: KVCache | None = None,
        collector: PassCollector | None = None,
        visible_BS: Tensor | None = None,
    ) -> Tensor:
        attended = self.attention(x, rotary, cache, collector, visible_BS)
        x = x + self.dropout(self.attention_norm(attended))
        return x + self.dropout(self.mlp_norm(self.mlp(x)))


class Olmo2GPT(GPT):
    """OLMo 2.

    Source: OLMo Team 2025, arXiv:2501.00656, section 2.
    """

    block_class = Olmo2Block


FAMILY = replace(
    llama.FAMILY,
    architecture="Olmo2ForCausalLM",
    fields=llama.FIELDS | {"attention_bias": "attention_bias"},
    defaults=llama.DEFAULTS | {"rms_norm_eps": 1e-5},
    fixed=llama.FIXED | {"mlp_bias": False},
    constants={"family": "llama", "qk_norm": True},
    norms={
        "post_attention_layernorm": "attention_norm",
        "post_feedforward_layernorm": "mlp_norm",
    },
    model=Olmo2GPT,
)
