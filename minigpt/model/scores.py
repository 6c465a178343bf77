"""Attention scores and the weights made of them.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim.
"""

import torch
from torch import Tensor


def scaled_dot_score(q_BHTD: Tensor, k_BGSD: Tensor) -> Tensor:
    """Score each query against each key by their dot product over sqrt(D).

    Query heads share key heads in groups of H / G, neighbours together.

    Args: q (B, H, T, D); k (B, G, S, D), G dividing H.
    Returns: (B, H, T, S), float32, before mask and softmax.
    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1; groups: Ainslie et al. 2023,
        arXiv:2305.13245.
    """
    n_batch, n_head, n_query, d_head = q_BHTD.shape
    n_group, n_key = k_BGSD.shape[1], k_BGSD.shape[2]
    # Folding the group into the rows of one product reads each key once and repeats none.
    q_BGRD = q_BHTD.float().reshape(n_batch, n_group, -1, d_head) * d_head**-0.5
    score = q_BGRD @ k_BGSD.float().mT  # (B, G, H / G * T, S)
    return score.reshape(n_batch, n_head, n_query, n_key)


def causal_mask(n_query: int, n_key: int, device: torch.device | str = "cpu") -> Tensor:
    """Return (T, S), true where a query may look, the last query aligned with the last key."""
    mask = torch.ones(n_query, n_key, dtype=torch.bool, device=device)
    return mask.tril(n_key - n_query)


def attention_weights(q_BHTD: Tensor, k_BGSD: Tensor) -> Tensor:
    """Return softmax over the keys of the causal scaled dot score: (B, H, T, S), float32."""
    score_BHTS = scaled_dot_score(q_BHTD, k_BGSD)
    n_query, n_key = score_BHTS.shape[-2:]
    if n_query > 1:
        mask = causal_mask(n_query, n_key, score_BHTS.device)
        score_BHTS = score_BHTS.masked_fill(~mask, -torch.inf)
    return score_BHTS.softmax(dim=-1)
