"""Causal multi-head self-attention with grouped heads, QK-norm, rotary positions and a cache.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, D head dim, C model dim.
"""

from typing import Protocol

from torch import Tensor, nn

from minigpt.config import ModelConfig
from minigpt.model.cache import KVCache
from minigpt.model.layers import RMSNorm, rotate
from minigpt.model.scores import Score


class Recorder(Protocol):
    """What forward tells of each layer's attention; it must change nothing that it is given.

    Queries are as ``Score.fold`` leaves them: ``Score.weights`` makes weights of them and the keys.
    """

    def record(
        self, layer: int, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, context_BHTD: Tensor
    ) -> None:
        """Take a layer's queries, all keys and values in view, and each head's output."""


class AttentionLayer(Protocol):
    """What a recorder asks of a layer that it is shown."""

    score: Score
    """Makes weights of queries and keys."""
    output: nn.Linear
    """What the heads' outputs go through on their way on."""


class Attention(nn.Module):
    """Each position looks at itself and those before it: (B, T, C) -> (B, T, C).

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.d_head = config.d_head
        has_output_bias = config.family == "gpt2" or config.attention_bias == "all"
        has_bias = has_output_bias or config.attention_bias == "qkv"
        d_query = config.n_head * config.d_head
        d_key = config.n_kv_head * config.d_head
        self.query = nn.Linear(config.d_model, d_query, bias=has_bias)
        self.key = nn.Linear(config.d_model, d_key, bias=has_bias)
        self.value = nn.Linear(config.d_model, d_key, bias=has_bias)
        self.output = nn.Linear(d_query, config.d_model, bias=has_output_bias)
        if config.qk_norm:
            # Source: Henry et al. 2020, arXiv:2010.04245; RMSNorm per head as in Qwen3.
            self.query_norm: nn.Module = RMSNorm(config.d_head, eps=config.norm_eps)
            self.key_norm: nn.Module = RMSNorm(config.d_head, eps=config.norm_eps)
        else:
            self.query_norm = self.key_norm = nn.Identity()
        self.score = Score(config)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        cache: KVCache | None = None,
        recorder: Recorder | None = None,
        visible_BS: Tensor | None = None,
    ) -> Tensor:
        """Attend; with a cache, also to the positions that it holds, and add these to it.

        Args: x (B, T, C), normed; rotary, cos and sin of these positions, each (T, D / 2).
            visible_BS, false for keys that a sequence of the batch shall not see; None for none.
        """
        q_BHTD = self.query_norm(self._split_heads(self.query(x)))
        k_BGSD = self.key_norm(self._split_heads(self.key(x)))
        v_BGSD = self._split_heads(self.value(x))
        if rotary is not None:
            q_BHTD = rotate(q_BHTD, *rotary)
            k_BGSD = rotate(k_BGSD, *rotary)
        q_BHTD = self.score.fold(q_BHTD)
        if cache is not None:
            k_BGSD, v_BGSD = cache.write(self.layer, k_BGSD, v_BGSD)
        context_BHTD = self.score.attend(q_BHTD, k_BGSD, v_BGSD, visible_BS)
        if recorder is not None:
            recorder.record(self.layer, q_BHTD, k_BGSD, v_BGSD, context_BHTD)
        output: Tensor = self.output(context_BHTD.transpose(1, 2).flatten(2))  # (B, T, C)
        return output

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.d_head)).transpose(1, 2)  # (B, H, T, D)
