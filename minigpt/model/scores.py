"""Attention scores, and the weights that are their softmax.

A score compares queries (B, H, T, D) with keys (B, G, S, D): (B, H, T, S), float32 (float64 for
float64 inputs), before mask and softmax. Neighbouring query heads share a key head, in groups of
H / G. To add a score, write a subclass of ``Score`` and name it in ``model_config.ATTENTIONS``.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.config import ModelConfig
from minigpt.model_config import ATTENTIONS
from minigpt.rings import load_class


class Score(nn.Module):
    """The scaled dot product of queries and keys, q . k / sqrt(D).

    Subclasses that change only the queries, in ``fold``, use the same fused kernel. Others override
    ``score``, ``weights`` and ``attend`` and set ``is_dot_product`` to False. All methods except
    ``fold`` expect folded queries.

    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1; groups: Ainslie et al. 2023,
        arXiv:2305.13245.
    """

    is_dot_product = True
    """Whether the scaled dot product of folded queries and keys is the score."""
    changes_queries = False
    """Whether ``fold`` does anything."""
    flops_per_weight = 12
    """FLOPs per attention weight and head dimension: 2 for the score, 2 for the weighted sum, and
    twice that backward."""
    kept_per_weight = 0
    """Float32 values saved for the backward pass per attention weight."""
    fused: Callable[..., Tensor] | None = None
    """Fused kernel of ``attend``, with a faster backward pass than torch's. None for torch's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.name = config.attention
        self.n_head, self.d_head = config.n_head, config.d_head
        self.window = 0
        """Sliding window: number of positions that a query attends to, up to its own; 0 for all."""

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw initial weights in-place, for queries and keys with entries of about 1."""

    def fold(self, q_BHTD: Tensor) -> Tensor:
        """Return the queries whose scaled dot product with the keys is the score."""
        return q_BHTD

    def score(self, q_BHTD: Tensor, k_BGSD: Tensor) -> Tensor:
        """Return the scores of all pairs: (B, H, T, S), float32, before mask and softmax."""
        return scaled_dot_score(q_BHTD, k_BGSD)

    def weights(self, q_BHTD: Tensor, k_BGSD: Tensor, visible_BS: Tensor | None = None) -> Tensor:
        """Return the causal attention weights: (B, H, T, S), float32. Args: as for ``attend``."""
        # Autocast would round scores to bfloat16, as the fused kernel does not.
        with torch.autocast(q_BHTD.device.type, enabled=False):
            return causal_softmax(self.score(q_BHTD, k_BGSD), visible_BS, self.window)

    def attend(
        self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, visible_BS: Tensor | None = None
    ) -> Tensor:
        """Return each head's output (B, H, T, D), computed by a fused kernel.

        Args: visible_BS, false for keys that no query of a sequence may attend to.
        """
        n_query, n_key = q_BHTD.shape[2], k_BGSD.shape[2]
        # Constants: computed from n_query, which torch.compile makes symbolic, they are not bools.
        mask, is_causal = None, True
        # SDPA's own causal mask is aligned upper-left; after a cached prefix it must be
        # lower-right, so that the last query sees every key.
        if visible_BS is not None or n_query != n_key or 0 < self.window < n_key:
            mask = visibility(n_query, n_key, q_BHTD.device, visible_BS, self.window)
            is_causal = False
        is_grouped = k_BGSD.shape[1] != q_BHTD.shape[1]
        kernel: Any = self.fused or F.scaled_dot_product_attention
        options = {"attn_mask": mask, "is_causal": is_causal, "enable_gqa": is_grouped}
        return kernel(q_BHTD, k_BGSD, v_BGSD, **options)


def make_score(config: ModelConfig) -> Score:
    """Return the score that a config names, with initial weights."""
    return load_class(ATTENTIONS[config.attention])(config)


def scaled_dot_score(q_BHTD: Tensor, k_BGSD: Tensor) -> Tensor:
    """Return q . k / sqrt(D) of all pairs: (B, H, T, S), float32, before mask and softmax.

    Args: q (B, H, T, D); k (B, G, S, D), G dividing H.
    """
    n_batch, n_head, n_query, d_head = q_BHTD.shape
    n_group, n_key = k_BGSD.shape[1], k_BGSD.shape[2]
    # With each group's queries as rows of one product, keys are read once and not repeated.
    q_BGRD = (in_float32(q_BHTD) * d_head**-0.5).reshape(n_batch, n_group, -1, d_head)
    score = q_BGRD @ in_float32(k_BGSD).mT  # (B, G, H / G * T, S)
    return score.reshape(n_batch, n_head, n_query, n_key)


def causal_softmax(score_BHTS: Tensor, visible_BS: Tensor | None = None, window: int = 0) -> Tensor:
    """Return the weights (B, H, T, S) of scores, the last query aligned with the last key.

    Args: visible_BS, false for keys that no query of a sequence may attend to. The weights of a
        query without any visible key are 0. window, as ``Score.window``.
    """
    n_query, n_key = score_BHTS.shape[-2:]
    mask = visibility(n_query, n_key, score_BHTS.device, visible_BS, window)
    if mask is None:
        return score_BHTS.softmax(dim=-1)
    weights_BHTS = score_BHTS.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    if visible_BS is not None:
        weights_BHTS = weights_BHTS.masked_fill(~mask.any(dim=-1, keepdim=True), 0)
    return weights_BHTS


def weighted_sum(weights_BHTS: Tensor, v_BGSD: Tensor) -> Tensor:
    """Return each head's output, (B, H, T, D), in the dtype of the values."""
    with torch.autocast(v_BGSD.device.type, enabled=False):
        n_group = v_BGSD.shape[1]
        weights_BGRS = weights_BHTS.unflatten(1, (n_group, -1)).flatten(2, 3)  # R = H / G * T
        context_BGRD = weights_BGRS @ in_float32(v_BGSD)
    return context_BGRD.reshape(*weights_BHTS.shape[:3], -1).to(v_BGSD.dtype)


def causal_mask(
    n_query: int, n_key: int, device: torch.device | str = "cpu", window: int = 0
) -> Tensor:
    """Return (T, S), true where a query may attend, the last query aligned with the last key.

    Args: window, as ``Score.window``.
    """
    mask = torch.ones(n_query, n_key, dtype=torch.bool, device=device).tril(n_key - n_query)
    return mask.triu(n_key - n_query - window + 1) if window else mask


def visibility(
    n_query: int,
    n_key: int,
    device: torch.device | str,
    visible_BS: Tensor | None,
    window: int = 0,
) -> Tensor | None:
    """Return (T, S) or (B, 1 or H, 1 or T, S), true where a query may attend; None if everywhere.

    Args: visible_BS, of all heads, or (B, H, 1, S).
    """
    is_everywhere = n_query == 1 and not 0 < window < n_key
    mask = None if is_everywhere else causal_mask(n_query, n_key, device, window)
    if visible_BS is None:
        return mask
    visible_B1TS = visible_BS if visible_BS.ndim == 4 else visible_BS[:, None, None]
    return visible_B1TS if mask is None else visible_B1TS & mask


def in_float32(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 if it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
