"""Attention rollout: attention followed through all layers, down to the embeddings.

Shapes: L layers, B batch, H query heads, G key/value heads, T new queries, S keys, D head dim,
P positions for which memory is allocated.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from minigpt.model.scores import Weights, attention_weights
from minigpt.tracing.selection import HeadSelection

MAX_POSITIONS = 1024
"""Longest sequence: each layer keeps a matrix of positions x positions in float32."""
_CHUNK = 64  # queries whose weights are in memory together


class Rollout:
    """How much of each token reaches each position, residual stream included.

    A' = 0.5 mean_h A + 0.5 I in each layer, multiplied from the first layer to the last. Rows of A
    sum to 1, and so do the rows of the product. New tokens add rows: one per layer and step.

    Source: Abnar & Zuidema 2020, arXiv:2005.00928, section 3.
    """

    def __init__(self, selection: HeadSelection, n_positions: int) -> None:
        """Roll out the mean of the chosen heads; layers without a chosen head are skipped.

        Args: n_positions, at most MAX_POSITIONS.
        """
        assert n_positions <= MAX_POSITIONS
        self._heads_by_layer = selection.heads_by_layer
        self._layers = [i for i, heads in enumerate(selection.heads_by_layer) if heads]
        self._n_positions = n_positions
        self._products: dict[int, Tensor] = {}
        """For each chosen layer (P, P); the first ``_end`` rows are filled."""
        self._end = 0

    def watch(
        self, layer: int, q_BHTD: Tensor, k_BGSD: Tensor, weights: Weights = attention_weights
    ) -> None:
        """Add the new queries of a layer; weights, the layer's own function of q and k."""
        for _, weights_HTS in weight_rows(q_BHTD, k_BGSD, weights):
            self.extend(layer, weights_HTS)

    def extend(self, layer: int, weights_HTS: Tensor) -> None:
        """Add the weights of the newest queries of a layer; lower layers must come first."""
        if layer not in self._layers:
            return
        n_new, end = weights_HTS.shape[1:]
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


def weight_rows(q_BHTD: Tensor, k_BGSD: Tensor, weights: Weights) -> Iterator[tuple[range, Tensor]]:
    """Yield the weights of the first sequence, a few queries at a time, to save memory.

    Yields: indices of the queries, and their weights (H, queries, S up to the last of them).
    """
    n_query, n_key = q_BHTD.shape[2], k_BGSD.shape[2]
    for first in range(0, n_query, _CHUNK):
        chunk = range(first, min(first + _CHUNK, n_query))
        in_view = n_key - n_query + chunk.stop
        yield chunk, weights(q_BHTD[:1, :, first : chunk.stop], k_BGSD[:1, :, :in_view])[0]
