"""Attention rollout: attention propagated through all layers, down to the embeddings.

Shapes: H query heads, T newest queries, S keys, P positions for which memory is allocated.
"""

import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.tracing.head_lists import HeadSelection

MAX_POSITIONS = 1024
"""Maximum sequence length: each layer keeps a float32 matrix of positions x positions."""


class Rollout:
    """Product of the layers' attention, with the residual connections as identity matrices.

    A' = 0.5 mean_h A + 0.5 I in each layer, multiplied from the first layer to the last. Rows of A
    sum to 1, and so do the rows of the product. Each new token adds one row per layer.

    Source: Abnar & Zuidema 2020, arXiv:2005.00928, section 3.
    """

    def __init__(self, selection: HeadSelection, n_positions: int) -> None:
        """Roll out the mean of the chosen heads; layers without a chosen head are skipped.

        Args: n_positions, the maximum sequence length.
        Raises: ConfigError if it exceeds MAX_POSITIONS.
        """
        if n_positions > MAX_POSITIONS:
            raise ConfigError(
                "a rollout keeps a matrix of positions x positions for each layer, so at most "
                f"{MAX_POSITIONS} positions are possible: prompt and max_new_tokens are "
                f"{n_positions}. Reduce them."
            )
        by_layer = enumerate(selection.heads_by_layer)
        self._heads = {layer: torch.tensor(heads) for layer, heads in by_layer if heads}
        self._n_positions = n_positions
        self._products: dict[int, Tensor] = {}
        """Product up to each chosen layer (P, P); the first ``_end`` rows are filled."""
        self._end = 0

    def add(self, layer: int, weights_HTS: Tensor) -> None:
        """Add the weights of the newest queries of a layer; lower layers must come first."""
        if layer not in self._heads:
            return
        n_new, end = weights_HTS.shape[1:]
        if self._heads[layer].device != weights_HTS.device:  # once: a copy blocks the GPU
            self._heads[layer] = self._heads[layer].to(weights_HTS.device)
        mean_TS = weights_HTS[self._heads[layer]].mean(dim=0)
        mixed_TS = 0.5 * mean_TS + 0.5 * torch.eye(end, device=mean_TS.device)[end - n_new :]
        below = max((other for other in self._heads if other < layer), default=None)
        if below is not None:
            mixed_TS = mixed_TS @ self._products[below][:end, :end]
        if layer not in self._products:
            self._products[layer] = mixed_TS.new_zeros(self._n_positions, self._n_positions)
        self._products[layer][end - n_new : end, :end] = mixed_TS
        self._end = end

    def row(self) -> Tensor:
        """Return the newest query's row (S,) after the last chosen layer."""
        return self._products[max(self._heads)][self._end - 1, : self._end]
