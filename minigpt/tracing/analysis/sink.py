"""Finding the attention sink: the position that heads attend to when nothing is relevant.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim.
"""

import torch
from torch import Tensor

from minigpt.model.scores import Weights, attention_weights
from minigpt.tracing.analysis.rollout import weight_rows


class SinkFinder:
    """Sums the weight that each position of a prompt gets from later positions, over all heads.

    Source: Xiao et al. 2023, arXiv:2309.17453: a few of the first positions get the most, mostly
    the first one.
    """

    def __init__(self) -> None:
        self._received_S: Tensor | None = None

    def watch(
        self, layer: int, q_BHTD: Tensor, k_BGSD: Tensor, weights: Weights = attention_weights
    ) -> None:
        """Add a layer's attention over the whole prompt; passes of later tokens are ignored.

        Args: weights, the layer's own function of q and k.
        """
        n_query = q_BHTD.shape[2]
        if n_query < k_BGSD.shape[2]:
            return
        if self._received_S is None:
            self._received_S = torch.zeros(n_query, device=q_BHTD.device)
        if self._received_S.shape[0] != n_query:
            return
        for chunk, weights_HTS in weight_rows(q_BHTD, k_BGSD, weights):
            own = torch.arange(chunk.start, chunk.stop, device=q_BHTD.device)
            weights_HTS[:, own - chunk.start, own] = 0  # a token that attends to itself is no sink
            self._received_S[: chunk.stop] += weights_HTS.sum(dim=(0, 1))

    def sink(self) -> int:
        """Return the position that gets the most weight per later position.

        Only the first half of the prompt is considered: later positions have too few after them.
        """
        if self._received_S is None:  # the prompt is a single token
            return 0
        n = self._received_S.shape[0]
        n_later = torch.arange(n - 1, -1, -1, device=self._received_S.device).clamp(min=1)
        return int((self._received_S / n_later)[: max(1, n // 2)].argmax())
