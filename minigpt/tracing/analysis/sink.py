"""Finding the position that heads look at when they have no use for any.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim.
"""

import torch
from torch import Tensor

from minigpt.model.scores import Weights, attention_weights

_QUERIES_AT_ONCE = 64


class SinkFinder:
    """Counts what each position of a prompt gets from those after it, all heads together.

    Source: Xiao et al. 2023, arXiv:2309.17453: a few of the first positions get the most, mostly
    the first one.
    """

    def __init__(self) -> None:
        self._received_S: Tensor | None = None
        self._n_rows = 0

    def watch(
        self, layer: int, q_BHTD: Tensor, k_BGSD: Tensor, weights: Weights = attention_weights
    ) -> None:
        """Take a layer's queries and keys of a whole prompt; later tokens are passed by.

        Args: weights, the layer's own.
        """
        n_head, n_query = q_BHTD.shape[1:3]
        if n_query < k_BGSD.shape[2]:
            return
        if self._received_S is None:
            self._received_S = torch.zeros(n_query, device=q_BHTD.device)
        if self._received_S.shape[0] != n_query:
            return
        for first in range(0, n_query, _QUERIES_AT_ONCE):
            last = min(first + _QUERIES_AT_ONCE, n_query)
            weights_HTS = weights(q_BHTD[:, :, first:last], k_BGSD[:, :, :last])[0]
            own = torch.arange(first, last, device=q_BHTD.device)
            weights_HTS[:, own - first, own] = 0  # looking at itself makes no position a sink
            self._received_S[:last] += weights_HTS.sum(dim=(0, 1))
        self._n_rows += n_head

    def sink(self) -> int:
        """Return the position whose later tokens gave it most each; of the prompt's first half.

        Only there is it enough of them to tell.
        """
        if self._received_S is None:  # of one token, which has nothing else to look at
            return 0
        n = self._received_S.shape[0]
        n_later = torch.arange(n - 1, -1, -1, device=self._received_S.device).clamp(min=1)
        return int((self._received_S / n_later)[: max(1, n // 2)].argmax())
