"""Several queries of one sequence at once, each with earlier positions hidden from it.

A query is a token at its position. All queries share the cache, which is not changed, and each has
its own key and value, because those of higher layers depend on the positions hidden in lower ones.
So the queries of several tokens are rows of the same products: on a CPU, a product of 64 rows costs
three to four times as much as one of a single row, and 128 rows a sixth less per row than 64.

Shapes: B queries, S positions in view of the last query, C model dim, V vocabulary, H query heads,
G key/value heads, R = H / G, D head dim.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minigpt.generation.fast.decode_step import Attend, DecodeStep, Function
from minigpt.generation.fast.eager import EagerKernels
from minigpt.generation.fast.matvec import MAX_ROWS
from minigpt.generation.fast.products import Product
from minigpt.model.attention import Attention
from minigpt.model.cache import KVCache
from minigpt.model.gpt import GPT

MIN_ROWS = MAX_ROWS + 1
"""Minimum number of rows for the bits of each not to depend on the others; on some CPUs, products
of fewer rows use different kernels."""


@dataclass(frozen=True, eq=False)
class Hidden:
    """The positions that are hidden from each query."""

    positions_B: Tensor
    """Position of each query."""
    hidden_BS: Tensor
    """True for positions that are hidden from a query."""
    heads_LGR: Tensor | None
    """True for heads from which the positions are hidden; None for all heads."""
    is_value: bool
    """Whether to hide the values and leave the weights unchanged, instead of hiding the keys."""

    def layers(self, cache: KVCache) -> list[tuple[Tensor, Tensor, "_Masks"]]:
        """Return each layer's keys and values (G, S, D), and its masks."""
        end = self.hidden_BS.shape[1]
        later = (torch.arange(end) > self.positions_B[:, None])[None, :, None]
        hidden = self.hidden_BS[None, :, None]
        if self.heads_LGR is None:
            masks = [self._masks(later, hidden)] * len(cache.keys_LBGSD)
        else:
            heads_LGBR = self.heads_LGR[:, :, None, :, None]
            masks = [self._masks(later, hidden & heads) for heads in heads_LGBR]
        keys, values = cache.keys_LBGSD[:, 0, :, :end], cache.values_LBGSD[:, 0, :, :end]
        return list(zip(keys, values, masks, strict=True))

    def _masks(self, later: Tensor, hidden: Tensor) -> "_Masks":
        if self.is_value:
            return later, hidden
        masked = later | hidden
        is_blind = masked.all(dim=-1, keepdim=True)  # a softmax over no position is NaN
        return masked, is_blind if is_blind.any() else None


_Masks = tuple[Tensor, Tensor | None]
"""Positions masked before the softmax, and weights set to 0 after it; (G, B, R, S)."""


class QueryStep:
    """Computes the logits after queries, with the decode step and attention to a shared cache."""

    def __init__(self, model: GPT) -> None:
        """Args: model, supported by the fast ring, whose score is a dot product."""
        self._kernels = QueryKernels(model, copies=False)
        self._step = DecodeStep(model, self._kernels, "nothing")
        self._n_rows = 1

    @torch.inference_mode()
    def __call__(self, tokens_B: Tensor, hidden: Hidden, cache: KVCache) -> Tensor:
        """Return the logits (B, V), float32, after each token at its position.

        Args: cache, of one sequence, with at least the positions in view.
        """
        if len(tokens_B) != self._n_rows:
            self._n_rows = len(tokens_B)
            self._kernels.bind(self._n_rows)
        (logits,) = self._step(tokens_B, hidden, hidden.layers(cache))
        return logits.float()


class QueryKernels(EagerKernels):
    """Eager kernels for queries that share keys and values."""

    def embed(self, tokens: Tensor, position: Hidden) -> Tensor:  # type: ignore[override]
        return super().embed(tokens, position.positions_B)

    def rotary(self, position: Hidden) -> Iterable[tuple[Tensor, Tensor] | None]:  # type: ignore[override]
        return super().rotary(position.positions_B)

    def unembed(self, module: nn.Module) -> Function:
        # The logits of many rows are the largest tensor, so they are not copied to a buffer.
        return lambda normed_BC: Product.apply(module, normed_BC)

    def attention(self, module: Attention) -> Attend:
        project, scale = self.projection(module), module.d_head**-0.5

        def attend(
            normed_BC: Tensor,
            position: Hidden,
            rotary: tuple[Tensor, Tensor] | None,
            cache: tuple[Tensor, Tensor, _Masks],
        ) -> tuple[Tensor, Tensor]:
            k_GSD, v_GSD, (masked, zeroed) = cache
            project(normed_BC, rotary)
            q_GBRD = self._q_BGRD.transpose(0, 1).float()
            own_k_GB1D = self._k_BGD.transpose(0, 1)[:, :, None].float()
            own_v_GB1D = self._v_BGD.transpose(0, 1)[:, :, None].float()
            score_GNS = torch.baddbmm(
                self._zero, q_GBRD.flatten(1, 2), k_GSD.float().mT, beta=0, alpha=scale
            )
            score_GBRS = score_GNS.unflatten(1, q_GBRD.shape[1:3])
            own = position.positions_B[None, :, None, None].expand(*q_GBRD.shape[:3], 1)
            own_score_GBR1 = (q_GBRD * own_k_GB1D).sum(dim=-1, keepdim=True) * scale
            score_GBRS.scatter_(3, own, own_score_GBR1)
            weights_GBRS = score_GBRS.masked_fill_(masked, -torch.inf).softmax(dim=-1)
            if zeroed is not None:
                weights_GBRS.masked_fill_(zeroed, 0)
            own_weight_GBR1 = weights_GBRS.gather(3, own)
            weights_GBRS.scatter_(3, own, 0)
            context_GND = torch.bmm(weights_GBRS.flatten(1, 2), v_GSD.float())
            context_GBRD = context_GND.view_as(q_GBRD) + own_weight_GBR1 * own_v_GB1D
            context_BX = context_GBRD.transpose(0, 1).reshape(len(normed_BC), -1)
            # The weights of all layers together would take more memory than everything else.
            return context_BX.to(normed_BC.dtype), self._zero

        return attend
