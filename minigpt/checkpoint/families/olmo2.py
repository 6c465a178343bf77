"""OLMo 2: Llama with norms after attention and MLP, and QK-norm across all heads."""

from dataclasses import replace

from torch import Tensor, nn

from minigpt.checkpoint.families import llama
from minigpt.config import ModelConfig
from minigpt.model.attention import Attention
from minigpt.model.gpt import GPT, Block
from minigpt.model.layers import RMSNorm


class WideNorm(RMSNorm):
    """RMSNorm over all heads together: (B, H, T, D) -> (B, H, T, D)."""

    def forward(self, x: Tensor) -> Tensor:
        normed = super().forward(x.transpose(1, 2).flatten(2))  # (B, T, H D)
        return normed.unflatten(2, (x.shape[1], -1)).transpose(1, 2)


class Olmo2Attention(Attention):
    """Attention with one norm across all query heads and one across all key heads."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.query_norm = WideNorm(config.n_head * config.d_head, eps=config.norm_eps)
        self.key_norm = WideNorm(config.n_kv_head * config.d_head, eps=config.norm_eps)


class Olmo2Block(Block):
    """Block with norms after attention and MLP instead of before them."""

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__(config, attention)
        self.attention_norm, self.attention_post_norm = nn.Identity(), self.attention_norm
        self.mlp_norm, self.mlp_post_norm = nn.Identity(), self.mlp_norm


class Olmo2GPT(GPT):
    """OLMo 2.

    Source: OLMo Team 2025, arXiv:2501.00656, section 2.
    """

    block_class = Olmo2Block
    attention_class = Olmo2Attention


FAMILY = replace(
    llama.FAMILY,
    architecture="Olmo2ForCausalLM",
    fields=llama.FIELDS | {"attention_bias": "attention_bias"},
    defaults=llama.DEFAULTS | {"rms_norm_eps": 1e-5},
    fixed=llama.FIXED | {"mlp_bias": False},
    constants={"family": "llama", "qk_norm": True},
    norms={
        "post_attention_layernorm": "attention_post_norm",
        "post_feedforward_layernorm": "mlp_post_norm",
    },
    model=Olmo2GPT,
)
