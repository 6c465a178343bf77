"""Kernels of the decode step for a compiled graph: pure functions that fuse into few loops.

Activations are float32 for every dtype of the weights: weights are converted as they are read,
which saves memory bandwidth, and only the weights and the cache are rounded.

Shapes: B rows, C model dim, V vocabulary, L layers, H query heads, G key/value heads, R = H / G, D
head dim, S positions in view, P capacity of the caches, I inputs, O outputs.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.generation.fast.decode_step import Add, Attend, DecodeStep, Function, Shown
from minigpt.generation.fast.nodes import as_one_node
from minigpt.model.attention import Attention
from minigpt.model.gpt import GPT
from minigpt.model.layers import MLP, GatedMLP, rotate

_CPU_PARTS = 4
"""Parts of a weight that a CPU reads alternately. The fastest of 1, 2, 4 and 8: 20% faster than 1
for float32 and bfloat16, 50% for int8."""
_MAX_CUDA_PARTS = 8
"""Maximum number of parts of a weight on CUDA. Products with the same number of outputs become one
kernel, so queries are split into parts with as many outputs as the keys and values have."""


class GraphStep(nn.Module):
    """The decode step as a function of tensors, which can be exported."""

    def __init__(self, model: GPT, shown: Shown = "residual") -> None:
        """Args: shown, the outputs of forward in addition to the logits: by default all."""
        super().__init__()
        self.model, self.shown = model, shown
        self._step = DecodeStep(model, GraphKernels(model), shown)

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        in_view: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """Write the tokens' keys and values into the caches, and attend to positions up to them.

        Args: tokens (B,); position (1,), their index; in_view (S,), any tensor whose length is the
            number of positions to read; keys and values, for each layer (B, G, P, D), finite.
        Returns: logits (B, V), float32, and the other outputs of DecodeStep.
        """
        is_filled_S = torch.arange(in_view.shape[0], device=tokens.device) <= position
        caches = [(*pair, is_filled_S) for pair in zip(keys, values, strict=True)]
        return self._step(tokens, position, caches)


class GraphKernels:
    """Kernels that change nothing except the caches; they read the modules when called."""

    def __init__(self, model: GPT) -> None:
        self._model = model

    def embed(self, tokens: Tensor, position: Tensor) -> Tensor:
        model = self._model
        x = _float32(model.embedding.weight[tokens])  # (B, C)
        scale = getattr(model.embedding, "scale", None)
        if scale is not None:
            x = x * _float32(scale[tokens])[:, None]
        if model.config.family == "gpt2":
            x = x + _float32(model.positions.weight[position])
        return x

    def rotary(self, position: Tensor) -> Sequence[tuple[Tensor, Tensor] | None]:
        model = self._model
        if model.config.family == "gpt2":
            return [None] * model.config.n_layer
        rotary = _float32(model.rotary_cos[position]), _float32(model.rotary_sin[position])
        return [rotary] * model.config.n_layer

    def norm(self, module: nn.Module) -> Function:
        return lambda x: _stored(_norm(module, x))

    def attention(self, module: Attention) -> Attend:
        n_shared = module.query.out_features // module.key.out_features
        n_parts = n_shared if n_shared <= _MAX_CUDA_PARTS else 1

        def heads(projection: nn.Linear, norm: nn.Module, x: Tensor, n_parts: int = 1) -> Tensor:
            projected = _product(projection, x, n_parts).unflatten(-1, (-1, 1, module.d_head))
            return _norm(norm, projected)  # (B, H or G, 1, D)

        def attend(
            normed_BC: Tensor,
            position: Tensor,
            rotary: tuple[Tensor, Tensor] | None,
            cache: tuple[Tensor, Tensor, Tensor],
        ) -> tuple[Tensor, Tensor]:
            keys_BGPD, values_BGPD, is_filled_S = cache
            q_BHTD = heads(module.query, module.query_norm, normed_BC, n_parts)
            k_BGTD = heads(module.key, module.key_norm, normed_BC)
            v_BGTD = heads(module.value, nn.Identity(), normed_BC)
            if rotary is not None:
                q_BHTD, k_BGTD = rotate(q_BHTD, *rotary), rotate(k_BGTD, *rotary)
            keys_BGPD.index_copy_(2, position, k_BGTD.to(keys_BGPD.dtype))
            values_BGPD.index_copy_(2, position, v_BGTD.to(values_BGPD.dtype))
            weights_BHS, context_BX = _attended(
                q_BHTD * module.d_head**-0.5, keys_BGPD, values_BGPD, is_filled_S
            )
            return _stored(context_BX), weights_BHS

        return attend

    def hidden(self, module: MLP | GatedMLP) -> Function:
        def hidden(normed_BC: Tensor) -> Tensor:
            up = _product(module.up, normed_BC)
            if isinstance(module, GatedMLP):
                return _stored(module.activation(_product(module.gate, normed_BC)) * up)
            return _stored(module.activation(up))

        return hidden

    def add(self, module: nn.Module) -> Add:
        return lambda x_BC, branch: _stored(x_BC + _product(module, branch))

    def unembed(self, module: nn.Module) -> Function:
        return lambda normed_BC: _product(module, normed_BC)


def _empty_attended(
    q_BHTD: Tensor, keys_BGPD: Tensor, values_BGPD: Tensor, is_filled_S: Tensor
) -> tuple[Tensor, Tensor]:
    n_rows, n_head, _, d_head = q_BHTD.shape
    new = q_BHTD.new_empty
    return new((n_rows, n_head, is_filled_S.shape[0])), new((n_rows, n_head * d_head))


@as_one_node(_empty_attended)
def _attended(
    q_BHTD: Tensor, keys_BGPD: Tensor, values_BGPD: Tensor, is_filled_S: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weights (B, H, S) of scaled queries and the heads' outputs (B, X)."""
    n_group, n_view = keys_BGPD.shape[1], is_filled_S.shape[0]
    # Sums of products instead of a matmul: see _sum_of_products.
    q_BGRTD = _stored(q_BHTD).unflatten(1, (n_group, -1))
    score_BGRS = (q_BGRTD * _float32(keys_BGPD[:, :, None, :n_view])).sum(-1)
    masked_BGRS = torch.where(is_filled_S, score_BGRS, -torch.inf)
    weights_BGRS = _stored(masked_BGRS.softmax(-1))
    values_BGTSD = _float32(values_BGPD[:, :, None, :n_view])
    context_BGRD = (weights_BGRS[..., None] * values_BGTSD).sum(-2)
    # flatten(1, 2) of a view of dynamic size cannot be exported by torch 2.11.
    n_rows, n_shared = weights_BGRS.shape[0], weights_BGRS.shape[2]
    size_BHS = n_rows, n_group * n_shared, n_view
    weights_BHS = weights_BGRS.as_strided(size_BHS, (weights_BGRS.stride(0), n_view, 1))
    return weights_BHS, context_BGRD.flatten(1)


def _product(linear: nn.Module, x_BI: Tensor, n_cuda_parts: int = 1) -> Tensor:
    """Return the output (B, O) of a linear layer, or of a transposed embedding."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    n_parts = _CPU_PARTS if weight.device.type == "cpu" else n_cuda_parts
    scale, bias = getattr(linear, "scale", None), getattr(linear, "bias", None)
    return _sum_of_products(x_BI, weight, scale, bias, n_parts)


def _empty_product(x_BI: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x_BI.new_empty((len(weight), x_BI.shape[0])).mT


@as_one_node(_empty_product)
def _sum_of_products(
    x_BI: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, n_parts: int
) -> Tensor:
    """Return a product (B, O) that fuses into one loop.

    A sum of products fuses, with the conversion of the weight before it and the bias and residual
    after it, into one loop that reads each weight once for all rows; a matmul is a library call
    optimized for many rows. Several parts of the weight are read alternately: a single sum would
    wait for its previous addition, with fewer memory reads in flight.
    """
    n_each, n_rest = divmod(len(weight), n_parts)
    sizes = [n_each] * n_parts if n_each else []
    parts = weight[:, None].split([*sizes, n_rest] if n_rest else sizes)
    sums = [(_float32(part) * x_BI).sum(-1) for part in parts]
    y_OB = torch.cat(sums) if len(sums) > 1 else sums[0]
    y_BO = y_OB.mT
    if scale is not None:
        y_BO = y_BO * _float32(scale)
    if bias is not None:
        y_BO = y_BO + _float32(bias)
    return y_BO


def _float32(x: Tensor) -> Tensor:
    """Return x in float32; conversions without effect would be a third of the graph's nodes."""
    return x if x.dtype == torch.float32 else x.float()


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    if not isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        return x
    return _normed(x, norm.weight, getattr(norm, "bias", None), norm.eps)


@as_one_node(lambda x, *_: torch.empty_like(x))
def _normed(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float | None) -> Tensor:
    """Return the LayerNorm of x if there is a bias, else its RMSNorm."""
    if bias is None:
        return F.rms_norm(x, weight.shape, _float32(weight), eps)
    return F.layer_norm(x, weight.shape, _float32(weight), _float32(bias), eps or 0)


def _stored(x: Tensor) -> Tensor:
    """Return x as a tensor that the compiler must store instead of recomputing it for each row."""
    return torch.as_strided(x, x.shape, x.stride())
