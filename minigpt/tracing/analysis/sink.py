"""Finding the attention sink: the position that heads attend to when nothing is relevant.

Shapes: H query heads, T newest queries, S keys.
"""

import torch
from torch import Tensor


class SinkFinder:
    """Sums the weight that each position of a prompt gets from later positions, over all heads.

    Source: Xiao et al. 2023, arXiv:2309.17453: one of the first positions, usually position 0,
    gets the most.
    """

    def __init__(self, n_prompt: int) -> None:
        self._n_prompt = n_prompt
        self._received_S = torch.zeros(n_prompt)

    def add(self, layer: int, weights_HTS: Tensor) -> None:
        """Add the weights of the newest queries of a layer; later tokens are ignored."""
        n_new, end = weights_HTS.shape[1:]
        if end <= self._n_prompt:
            # Below the diagonal: a token that attends to itself is not a sink.
            self._received_S = self._received_S.to(weights_HTS.device)
            self._received_S[:end] += weights_HTS.tril(end - n_new - 1).sum(dim=(0, 1))

    def sink(self) -> int:
        """Return the position with the most weight per later position.

        Only the first half of the prompt is considered: too few positions follow the others.
        """
        n = self._n_prompt
        n_later = torch.arange(n - 1, -1, -1).clamp(min=1)
        return int((self._received_S.cpu() / n_later)[: max(1, n // 2)].argmax())
