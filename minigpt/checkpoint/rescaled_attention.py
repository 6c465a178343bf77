"""GPT-2 with another scale of its attention scores."""

from minigpt.checkpoint.families import hf_fields
from minigpt.config import ModelConfig
from minigpt.model.attention import Attention
from minigpt.model.gpt import GPT
from minigpt.model.scores import ScaledScore


class RescaledAttention(Attention):
    """Attention whose scores are q . k, scaled by 1 / sqrt(D), by 1 / (layer + 1), both or none."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        fields = hf_fields(config)
        scale = config.d_head**-0.5 if fields.get("scale_attn_weights", True) else 1.0
        if fields.get("scale_attn_by_inverse_layer_idx"):
            scale /= layer + 1
        self.score = ScaledScore(config, scale)


class RescaledGPT(GPT):
    """GPT with another scale of its attention scores in each layer.

    Source: Mistral, github.com/stanford-crfm/mistral, which trains GPT-2 in half precision.
    """

    attention_class = RescaledAttention
