"""Causal multi-head self-attention with grouped heads, QK-norm, rotary positions and a cache.

``Attention`` is the layer; the classes above it pass its weights to a recorder, if there is one.

Shapes: L layers, N = 2 L + 1 states of the residual stream, B batch, T queries, S keys, H query
heads, G key/value heads, D head dim, C model dim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from minigpt.config import ModelConfig
from minigpt.errors import ConfigError
from minigpt.model.cache import KVCache
from minigpt.model.layers import RMSNorm, Rotary, rotate
from minigpt.model.scores import Score, make_score, weighted_sum


@dataclass(frozen=True)
class AttentionPass:
    """The attention of one forward pass, in all layers.

    The tensors are valid until the next forward pass: copy them to keep them longer.
    """

    weights_LBHS: Tensor
    """Attention weights of the last query, float32. In a decode step, the ones the model used."""
    context_LBHD: Tensor
    """Head outputs of the last query, before the output projection."""
    values_LBGSD: Tensor
    """Values of every position in view."""
    n_new: int
    """Number of positions that this pass added, T."""
    queries: Sequence[Tensor] | None = None
    """All queries of each layer (B, H, T, D), after ``Score.fold``. None for a single query, or
    unless the recorder needs them."""
    keys: Sequence[Tensor] | None = None
    """Keys in view of each layer (B, G, S, D). None if ``queries`` is None."""
    residual_NBC: Tensor | None = None
    """Residual stream of the last position: the embedding, then after each layer's attention branch
    and after its MLP branch. None unless the recorder needs it."""
    replaced: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Layer -> replacement of head outputs at the last position by an intervention: mask of these
    heads (H, 1), and input of the output projection (B, H, D)."""
    first_state: int = 0
    """Index in ``residual_NBC`` of the last state that an intervention replaced; 0 for none."""


class Recorder(Protocol):
    """Receives the attention of every forward pass, once, and must not modify the tensors."""

    needs_queries: bool
    """Whether to receive all queries and keys of a prompt, not only the last query's weights."""
    needs_residual: bool
    """Whether to receive the residual stream of the last position."""

    def record(self, attention: AttentionPass) -> None:
        """Record the attention of a forward pass."""


class AttentionLayer(Protocol):
    """A layer of attention, as recorders and analyses see it: score and output projection W_O."""

    score: Score
    output: nn.Linear


class PassCollector:
    """Collects the attention of each layer during a forward pass, and passes it to a recorder."""

    def __init__(self, recorder: Recorder, n_new: int) -> None:
        self._recorder, self._n_new = recorder, n_new
        self._has_queries = recorder.needs_queries and n_new > 1
        self.residual_BC: list[Tensor] = []
        self.replaced: dict[int, tuple[Tensor, Tensor]] = {}
        self.first_state = 0
        self._weights_BHS: list[Tensor] = []
        self._context_BHD: list[Tensor] = []
        self._values_BGSD: list[Tensor] = []
        self._queries: list[Tensor] = []
        self._keys: list[Tensor] = []

    def add(
        self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, context_BHTD: Tensor, w_BHTS: Tensor
    ) -> None:
        """Add a layer, with the weights of its last query."""
        self._weights_BHS.append(w_BHTS[:, :, -1])
        self._context_BHD.append(context_BHTD[:, :, -1])
        self._values_BGSD.append(v_BGSD)
        if self._has_queries:
            self._queries.append(q_BHTD)
            self._keys.append(k_BGSD)

    def add_residual(self, *states_BTC: Tensor) -> None:
        """Add states of the residual stream: the embedding, or those after a block's branches."""
        if self._recorder.needs_residual:
            self.residual_BC += [x_BTC[:, -1].detach().clone() for x_BTC in states_BTC]

    @torch.no_grad()
    def finish(self, values_LBGSD: Tensor | None = None) -> None:
        """Pass the attention of all layers to the recorder.

        Args: values_LBGSD, the values of all layers, if a cache has them in one tensor.
        Raises: ConfigError if the recorder needs the residual stream of a model that has none.
        """
        has_residual = self._recorder.needs_residual
        if has_residual and len(self.residual_BC) != 2 * len(self._weights_BHS) + 1:
            raise ConfigError(
                "this model does not report its residual stream (add_residual), which --lens and "
                "--measure logit need. Leave them out, or choose another model."
            )
        if values_LBGSD is None:
            values_LBGSD = torch.stack(self._values_BGSD)
        attention = AttentionPass(
            weights_LBHS=torch.stack(self._weights_BHS),
            context_LBHD=torch.stack(self._context_BHD),
            values_LBGSD=values_LBGSD,
            n_new=self._n_new,
            queries=self._queries or None,
            keys=self._keys or None,
            residual_NBC=torch.stack(self.residual_BC) if has_residual else None,
            replaced=self.replaced,
            first_state=self.first_state,
        )
        self._recorder.record(attention)


def attend(
    score: Score,
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    visible_BS: Tensor | None = None,
    collector: PassCollector | None = None,
) -> Tensor:
    """Return each head's output (B, H, T, D) for folded queries, and add it to the collector.

    For a single query, the weights are computed explicitly, and the collector gets the same tensor.
    For more queries, the fused kernel is faster, and the weights of the last query are recomputed
    for the collector.
    """
    if q_BHTD.shape[2] == 1:
        weights_BHTS = score.weights(q_BHTD, k_BGSD, visible_BS)
        context_BHTD = weighted_sum(weights_BHTS, v_BGSD)
    else:
        context_BHTD = score.attend(q_BHTD, k_BGSD, v_BGSD, visible_BS)
        if collector is not None:
            with torch.no_grad():
                weights_BHTS = score.weights(q_BHTD[:, :, -1:], k_BGSD, visible_BS)
    if collector is not None:
        collector.add(q_BHTD, k_BGSD, v_BGSD, context_BHTD, weights_BHTS)
    return context_BHTD


class Attention(nn.Module):
    """Causal self-attention: (B, T, C) -> (B, T, C).

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
        self.score = make_score(config)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        cache: KVCache | None = None,
        collector: PassCollector | None = None,
        visible_BS: Tensor | None = None,
    ) -> Tensor:
        """Attend to the cached and the new positions, and add the new ones to the cache.

        Args: x (B, T, C), normed; rotary, cos and sin of these positions, each (T, D / 2);
            visible_BS, false for keys that no query of a sequence may attend to.
        """
        q_BHTD = self.query_norm(self._split_heads(self.query(x)))
        k_BGSD = self.key_norm(self._split_heads(self.key(x)))
        v_BGSD = self._split_heads(self.value(x))
        if rotary is not None:
            q_BHTD = self.rotate(q_BHTD, rotary)
            k_BGSD = self.rotate(k_BGSD, rotary)
        q_BHTD = self.score.fold(q_BHTD)
        if cache is not None:
            k_BGSD, v_BGSD = cache.write(self.layer, k_BGSD, v_BGSD)
        context_BHTD = attend(self.score, q_BHTD, k_BGSD, v_BGSD, visible_BS, collector)
        return self.output(context_BHTD.transpose(1, 2).flatten(2))  # (B, T, C)

    def rotate(self, x_BHTD: Tensor, rotary: Rotary) -> Tensor:
        """Apply RoPE to queries or keys; a subclass may rotate only some dimensions, or none."""
        return rotate(x_BHTD, *rotary)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.d_head)).transpose(1, 2)  # (B, H, T, D)
