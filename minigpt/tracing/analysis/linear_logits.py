"""Logits as linear functions of the residual stream, with the scale of a norm frozen.

A norm divides by the magnitude of its input. If that scale is fixed to its value in a forward pass,
the rest is linear, so a logit is a sum over everything that was added to the stream (Elhage et al.
2021, "A Mathematical Framework for Transformer Circuits").

Shapes: L layers, C model dim, X all heads' outputs concatenated; ... any leading axes.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.model.gpt import GPT, Block
from minigpt.model.language_model import LanguageModel
from minigpt.model.layers import RMSNorm

_MAX_TOGETHER = 2**22
"""Maximum number of weights, over all layers, that are copied into one matrix."""


def why_not_linear(model: LanguageModel) -> str:
    """Return why the logits are not a sum of additions to the residual stream, or ""."""
    if not isinstance(model, GPT):
        return "it has no residual stream"
    if type(model).logits is not LanguageModel.logits:
        return "it overrides how logits are computed"
    for name in ("final_norm", "unembedding"):
        module = getattr(model, name)
        if module is not None and (module._forward_hooks or module._forward_pre_hooks):
            return f"the forward hooks of its {name} may change the logits"
    norms = [model.final_norm, *(norm for norm in _branch_norms(model) if norm is not None)]
    others = [n for n in norms if not isinstance(n, nn.LayerNorm | RMSNorm)]
    return f"the scale of its norm {type(others[0]).__name__} is not known" if others else ""


def frozen_norm(norm: nn.Module, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Return u (..., C) and b (...) with w . norm(x) = u . x + b, where the scale is frozen at x.

    Args: norm, LayerNorm or RMSNorm; x and w (..., C), float32.
    """
    if isinstance(norm, nn.LayerNorm):
        gain = norm.weight.float() * w
        scale = torch.rsqrt(x.var(dim=-1, correction=0, keepdim=True) + norm.eps)
        # Not a matrix product with w: its bits would depend on the number of rows of w.
        bias = (w * norm.bias.float()).sum(dim=-1)
        return (gain - gain.mean(dim=-1, keepdim=True)) * scale, bias
    assert isinstance(norm, RMSNorm)
    scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + (norm.eps or 0.0))
    return norm.gain * w * scale, w.new_zeros(w.shape[:-1])


def dense_weight(linear: nn.Module) -> Tensor:
    """Return the weight of a linear layer (O, I) in float32, dequantized if necessary."""
    dense: Any = linear
    weight: Tensor = dense.weight if isinstance(linear, nn.Linear) else dense.dense_weight()
    return weight.float()


def logit_weights(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Return the rows of the output projection for tokens (...): (..., C), float32."""
    layer: Any = model.embedding if model.unembedding is None else model.unembedding
    if isinstance(layer, nn.Linear | nn.Embedding):
        # Not weight[tokens]: for one token, that synchronizes with the GPU. Not layer(tokens): an
        # embedding's hooks change only inputs.
        return F.embedding(tokens, layer.weight).float()
    found: Tensor = layer.rows(tokens)  # quantized
    return found.float()


class HeadDirections:
    """Maps directions in the residual stream back through W_O to the heads' outputs."""

    def __init__(self, model: GPT) -> None:
        outputs = [attention.output for attention in model.attentions]
        self._norms = _branch_norms(model)
        # float32 weights are not copied; others are converted once.
        self._weights_CX = [dense_weight(output).detach() for output in outputs]
        zero_C = self._weights_CX[0].new_zeros(model.config.d_model)
        self._bias_LC = torch.stack(
            [zero_C if o.bias is None else o.bias.detach().float() for o in outputs]
        )
        self._has_biases = any(output.bias is not None for output in outputs)
        is_small = sum(weight.numel() for weight in self._weights_CX) <= _MAX_TOGETHER
        # Concatenated: one product instead of L.
        self._factors = [torch.cat(self._weights_CX, dim=1)] if is_small else self._weights_CX
        self._has_norms = any(norm is not None for norm in self._norms)

    def __call__(
        self, us: Sequence[Tensor], contexts: Sequence[Sequence[Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return, for each u, W_O^T u of all layers (L, ..., X), and the biases' part (L, ...).

        Each product has a single u, so its bits do not depend on the others. All products with the
        same weight are consecutive, so that it is read from memory once.

        Args: us, each (..., C); contexts, for each u the heads' outputs of each layer (..., X), at
            which any norms after the attention are frozen.
        """
        if self._has_norms:
            by_layer = zip(*contexts, strict=True)
            layers = zip(self._norms, self._weights_CX, self._bias_LC, by_layer, strict=True)
            directions = [
                [_direction(norm, weight, bias, u, x) for u, x in zip(us, of_layer, strict=True)]
                for norm, weight, bias, of_layer in layers
            ]
            by_u = (zip(*of_u, strict=True) for of_u in zip(*directions, strict=True))
            return [(torch.stack(products), torch.stack(biases)) for products, biases in by_u]
        products = [[u @ factor for u in us] for factor in self._factors]
        n_layer = len(self._bias_LC)
        return [
            (
                torch.cat(of_u, dim=-1).unflatten(-1, (n_layer, -1)).movedim(-2, 0),
                self._added_by_biases(u),
            )
            for u, of_u in zip(us, zip(*products, strict=True), strict=True)
        ]

    def _added_by_biases(self, u: Tensor) -> Tensor:
        if not self._has_biases:
            return u.new_zeros(len(self._bias_LC), *u.shape[:-1])
        return (u @ self._bias_LC.T).movedim(-1, 0)


def _direction(
    norm: nn.Module | None, weight_CX: Tensor, bias_C: Tensor, u: Tensor, context: Tensor
) -> tuple[Tensor, Tensor]:
    """Return W_O^T u (..., X) of one layer, and the part of its bias along u (...)."""
    bias = u.new_zeros(u.shape[:-1])
    if norm is not None:
        u, bias = frozen_norm(norm, context.float() @ weight_CX.T + bias_C, u)
    return u @ weight_CX, bias + u @ bias_C


def _branch_norms(model: GPT) -> list[nn.Module | None]:
    norms = [block.attention_post_norm for block in model.blocks if isinstance(block, Block)]
    return [None if isinstance(norm, nn.Identity) else norm for norm in norms]
