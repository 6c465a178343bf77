"""Attention followed down through the layers: rollout.

Shapes: L layers, B batch, H query heads, G key/value heads, T new queries, S keys, D head dim, P
positions that there is room for.
"""

import torch
from torch import Tensor

from minigpt.model.scores import Weights, attention_weights
from minigpt.tracing.selection import HeadSelection

MAX_POSITIONS = 1024
"""A matrix of the positions is kept for each layer: 4 MiB at this length."""
_QUERIES_AT_ONCE = 64


class Rollout:
    """How much of each token reaches each position, if attention and the residual stream share.

    A' = 0.5 mean_h A + 0.5 I in each layer, multiplied from the first layer up; the rows of A sum
    to 1, and so do these. Rows are added as tokens are, so a step costs a row a layer.

    Source: Abnar & Zuidema 2020, arXiv:2005.00928, section 3.
    """

    def __init__(self, selection: HeadSelection, n_positions: int) -> None:
        """Follow the mean of the chosen heads; layers without one are passed by.

        Args: n_positions, at most MAX_POSITIONS.
        """
        assert n_positions <= MAX_POSITIONS
        self._heads_by_layer = selection.heads_by_layer
        self._layers = [i for i, heads in enumerate(selection.heads_by_layer) if heads]
        self._n_positions = n_positions
        self._products: dict[int, Tensor] = {}
        """For each chosen layer (P, P), of which the first ``_end`` rows are filled."""
        self._end = 0

    def watch(
        self, layer: int, q_BHTD: Tensor, k_BGSD: Tensor, weights: Weights = attention_weights
    ) -> None:
        """Take all new queries of one layer, and all keys in view; weights, the layer's own."""
        n_query, n_key = q_BHTD.shape[2], k_BGSD.shape[2]
        for first in range(0, n_query, _QUERIES_AT_ONCE):
            last = min(first + _QUERIES_AT_ONCE, n_query)
            in_view = n_key - n_query + last
            self.extend(layer, weights(q_BHTD[:, :, first:last], k_BGSD[:, :, :in_view])[0])

    def extend(self, layer: int, weights_HTS: Tensor) -> None:
        """Take the rows of the newest queries of one layer: of layer 0 first, in order."""
        if layer not in self._layers:
            return
        end, n_new = weights_HTS.shape[2], weights_HTS.shape[1]
        mean_TS = weights_HTS[list(self._heads_by_layer[layer])].mean(dim=0)
        identity_TS = torch.eye(end, device=mean_TS.device)[end - n_new :]
        mixed_TS = 0.5 * mean_TS + 0.5 * identity_TS
        if layer not in self._products:
            shape = (self._n_positions, self._n_positions)
            self._products[layer] = torch.zeros(shape, device=mean_TS.device)
        below = self._layers.index(layer) - 1
        if below >= 0:
            mixed_TS = mixed_TS @ self._products[self._layers[below]][:end, :end]
        self._products[layer][end - n_new : end, :end] = mixed_TS
        self._end = end

    def row(self) -> Tensor:
        """Return the newest query's row (S,) after the last chosen layer."""
        return self._products[self._layers[-1]][self._end - 1, : self._end]
