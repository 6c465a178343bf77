"""Attention with other scales of the scores, and GPT-2 with it."""

from torch import Tensor

from minigpt.checkpoint.families import hf_fields
from minigpt.config import ModelConfig
from minigpt.model.attention import Attention
from minigpt.model.gpt import GPT
from minigpt.model.scores import Score


class ScaledScore(Score):
    """The dot product of queries and keys times a constant."""

    changes_queries = True

    def __init__(self, config: ModelConfig, scale: float) -> None:
        super().__init__(config)
        self.scale = scale

    def fold(self, q_BHTD: Tensor) -> Tensor:
        return q_BHTD * (self.scale * self.d_head**0.5)


class RescaledAttention(Attention):
    """Attention whose scores q . k are scaled by 1 / sqrt(D), 1 / (layer + 1), both or neither."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        fields = hf_fields(config)
        scale = config.d_head**-0.5 if fields.get("scale_attn_weights", True) else 1.0
        if fields.get("scale_attn_by_inverse_layer_idx"):
            scale /= layer + 1
        self.score = ScaledScore(config, scale)


class RescaledGPT(GPT):
    """GPT with the scales of attention scores that GPT-2's config.json can set.

    Source: Mistral, github.com/stanford-crfm/mistral, which trains GPT-2 in half precision.
    """

    attention_class = RescaledAttention
