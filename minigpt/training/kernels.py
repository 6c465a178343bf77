"""Causal attention in bfloat16 on a CPU, with a faster backward pass than torch's.

torch's fused kernel is fast for long sequences, but its backward pass is slow in bfloat16
(docs/training.md compares both). Here, the backward pass consists of batched matrix products.
Without bfloat16 instructions of the CPU, these are slower than torch's kernel.

- Up to ``BLOCK`` positions, attention weights are computed explicitly and kept for the backward
  pass.
- For longer sequences, the forward pass is torch's, and the backward pass recomputes the weights
  for one block of queries at a time, so memory does not grow with the square of the length.

Shapes: B batch, H query heads, G key/value heads, T positions, D head dim, N = B G, R = H / G.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.model.device import has_fast_bfloat16
from minigpt.model.scores import Score

BLOCK = 128
"""Queries per block. Keys after the last query of a block are left out of its products."""


def use_kernels(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Train with these kernels, if in bfloat16 on a CPU with bfloat16 instructions."""
    if _are_used(device, dtype):
        for module in model.modules():
            if isinstance(module, Score):
                module.fused = attention


def keep_weights(device: torch.device, dtype: torch.dtype, n_positions: int) -> bool:
    """Return whether training keeps the attention weights of sequences of this length."""
    return _are_used(device, dtype) and n_positions <= BLOCK


def _are_used(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype == torch.bfloat16 and has_fast_bfloat16(device)


def attention(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute F.scaled_dot_product_attention: (B, H, T, D), in the values' dtype.

    It calls that function if another mask is given, if the dtype is not bfloat16, and while
    gradients are disabled, so that a validation loss is the same in ``train`` and ``evaluate``.
    """
    q_BHTD, k_BGTD = q_BHTD.to(v_BGTD.dtype), k_BGTD.to(v_BGTD.dtype)
    is_plain = attn_mask is None and is_causal
    if is_plain and v_BGTD.dtype == torch.bfloat16 and torch.is_grad_enabled():
        is_short = q_BHTD.shape[2] <= BLOCK
        kernel = _ShortAttention if is_short else _LongAttention
        return kernel.apply(q_BHTD, k_BGTD, v_BGTD)
    return F.scaled_dot_product_attention(
        q_BHTD, k_BGTD, v_BGTD, attn_mask, is_causal=is_causal, enable_gqa=enable_gqa
    )


def _in_groups(q_BHTD: Tensor, n_group: int) -> Tensor:
    """Return queries as (N, R T, D): a group shares its keys, so they are rows of one product."""
    n_batch, n_head, n_query, d_head = q_BHTD.shape
    return q_BHTD.reshape(n_batch * n_group, n_head // n_group * n_query, d_head)


def _causal_weights(q: Tensor, k: Tensor, n_query: int) -> Tensor:
    """Return the attention weights of the last queries: (N, R T, S), in the queries' dtype.

    Args: q (N, R T, D); k (N, S, D); n_query, T.
    """
    mask = torch.full((n_query, k.shape[1]), -torch.inf).triu(k.shape[1] - n_query + 1)
    mask = mask.repeat(q.shape[1] // n_query, 1)
    # In float32, as in torch's kernel: bfloat16 rounds a score of 80 by up to 0.25.
    scores = torch.baddbmm(mask, q.float(), k.float().mT, alpha=q.shape[-1] ** -0.5)
    return torch.softmax(scores, -1, out=scores).to(q.dtype)


class _ShortAttention(torch.autograd.Function):
    """Causal attention that keeps its weights."""

    @staticmethod
    def forward(ctx: Any, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
        n_query, n_group = q_BHTD.shape[2], k_BGTD.shape[1]
        q, k, v = _in_groups(q_BHTD, n_group), k_BGTD.flatten(0, 1), v_BGTD.flatten(0, 1)
        weights = _causal_weights(q, k, n_query)
        ctx.save_for_backward(q, k, v, weights)
        ctx.shapes = q_BHTD.shape, k_BGTD.shape
        return (weights @ v).view(q_BHTD.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, weights = ctx.saved_tensors
        q_shape, k_shape = ctx.shapes
        scale = q.shape[-1] ** -0.5
        gradient = _in_groups(gradients[0], k_shape[1])
        dweights = gradient @ v.mT
        dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
        dq, dk = (dscores @ k).mul_(scale), (dscores.mT @ q).mul_(scale)
        dv = weights.mT @ gradient
        return dq.view(q_shape), dk.view(k_shape), dv.view(k_shape)


class _LongAttention(torch.autograd.Function):
    """Causal attention that recomputes its weights in the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        is_grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return attention_backward(gradients[0], *ctx.saved_tensors)


# One operator for torch.compile, which would otherwise unroll the loop over blocks.
@torch.library.custom_op("minigpt::attention_backward", mutates_args=())
def attention_backward(
    gradient_BHTD: Tensor, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the queries, keys and values of causal attention.

    Args: gradient of the outputs, (B, H, T, D).
    Source: Dao et al. 2022, arXiv:2205.14135, appendix B.2, with a softmax of whole rows.
    """
    n_batch, n_head, n_query, d_head = q_BHTD.shape
    n_group = k_BGTD.shape[1]
    by_group = (n_batch * n_group, n_head // n_group, n_query, d_head)
    # The heads of a group share keys, so their queries are the rows of one product.
    q, gradient = q_BHTD.reshape(by_group), gradient_BHTD.reshape(by_group)
    k, v = k_BGTD.flatten(0, 1), v_BGTD.flatten(0, 1)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    scale = d_head**-0.5
    for start in range(0, n_query, BLOCK):
        end = min(start + BLOCK, n_query)
        q_block = q[:, :, start:end].flatten(1, 2)
        gradient_block = gradient[:, :, start:end].flatten(1, 2)
        k_seen, v_seen = k[:, :end], v[:, :end]
        weights = _causal_weights(q_block, k_seen, end - start)
        dv[:, :end].baddbmm_(weights.mT, gradient_block)
        dweights = gradient_block @ v_seen.mT
        dscores = torch._softmax_backward_data(dweights, weights, -1, q.dtype)
        dq[:, :, start:end] = (dscores @ k_seen).mul_(scale).unflatten(1, (by_group[1], -1))
        dk[:, :end].baddbmm_(dscores.mT, q_block, alpha=scale)
        del weights, dweights, dscores  # before the next block's float32 scores
    return dq.view(q_BHTD.shape), dk.view(k_BGTD.shape), dv.view(v_BGTD.shape)


@attention_backward.register_fake
def _(
    gradient_BHTD: Tensor, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        q_BHTD.new_empty(q_BHTD.shape),
        k_BGTD.new_empty(k_BGTD.shape),
        v_BGTD.new_empty(v_BGTD.shape),
    )
