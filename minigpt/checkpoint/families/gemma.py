"""Gemma: Llama with scaled embeddings and norms whose weights are stored minus 1."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.checkpoint.families import llama
from minigpt.config import ModelConfig
from minigpt.model.attention import Attention
from minigpt.model.gpt import GPT, Block
from minigpt.model.layers import RMSNorm

DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "head_dim": 256}
"""Defaults of all Gemma models."""
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", **llama.FAMILY.activations}
FIXED = llama.FIXED | {"mlp_bias": False, "use_bidirectional_attention": False}


class GemmaNorm(RMSNorm):
    """RMSNorm whose weight is stored minus 1, computed in float32."""

    @property
    def gain(self) -> Tensor:
        return 1 + self.weight.float()

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.gain, self.eps).type_as(x)


class GemmaBlock(Block):
    """Block with Gemma's norms."""

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__(config, attention)
        self.attention_norm = GemmaNorm(config.d_model, eps=config.norm_eps)
        self.mlp_norm = GemmaNorm(config.d_model, eps=config.norm_eps)


class GemmaGPT(GPT):
    """Gemma.

    Source: Gemma Team 2024, arXiv:2403.08295.
    """

    block_class: type[Block] = GemmaBlock

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.final_norm = GemmaNorm(config.d_model, eps=config.norm_eps)

    def embed(self, tokens: Tensor) -> Tensor:
        x = super().embed(tokens)
        # Rounded to the dtype first, as in transformers.
        return x * torch.tensor(self.config.d_model**0.5, dtype=x.dtype)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        super().init_weights(generator)
        for module in self.modules():
            if isinstance(module, GemmaNorm):
                nn.init.zeros_(module.weight)


FAMILY = replace(
    llama.FAMILY,
    architecture="GemmaForCausalLM",
    fields=llama.FIELDS | {"attention_bias": "attention_bias"},
    # The first Gemma models say gelu but mean its tanh approximation.
    activations=ACTIVATIONS | {"gelu": "gelu_tanh"},
    defaults=llama.DEFAULTS
    | DEFAULTS
    | {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 16},
    fixed=FIXED,
    no_effect=llama.FAMILY.no_effect | {"hidden_activation"},
    model=GemmaGPT,
)
