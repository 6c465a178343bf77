"""Attention scores from a small tanh network, computed for some queries at a time.

All B H T S A hidden values together would not fit into memory. The backward pass recomputes them
(activation checkpointing: Chen et al. 2016, arXiv:1604.06174), so memory in addition to inputs and
outputs does not grow with T, forward or backward.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim, A hidden units.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minigpt.config import ModelConfig
from minigpt.model.scores import causal_softmax, in_float32, weighted_sum
from minigpt.model.variants.products import LearnedScore

_MAX_HIDDEN = 2**22
"""The fastest of 2**18 to 2**24 on a CPU."""
_MAX_HIDDEN_ON_GPU = 2**26
"""A quarter of a GiB, so that kernels are few and large."""


def max_hidden(device_type: str) -> int:
    """Return the maximum number of hidden values that are computed together."""
    return _MAX_HIDDEN if device_type == "cpu" else _MAX_HIDDEN_ON_GPU


class TanhScore(LearnedScore):
    """A score v . tanh(W q + U k), with separate W, U and v for each head."""

    is_dot_product = False
    flops_per_weight = 18  # a sum and a tanh in addition for each hidden value

    v: nn.Parameter

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw normal weights: hidden values of variance 1 before the tanh, scores like scaled dot.

        Near 0, as in the sources, each matrix has almost no gradient until the others grow.
        """
        for name, parameter in self.named_parameters():
            fan_in = self.d_head if name == "v" else 2 * self.d_head
            nn.init.normal_(parameter, std=fan_in**-0.5, generator=generator)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return W and U, each (H, A, D)."""
        raise NotImplementedError

    def score(self, q_BHTD: Tensor, k_BGSD: Tensor) -> Tensor:
        q_HBTA, k_HBSA, v_HA = self._project(q_BHTD, k_BGSD)
        return _score(q_HBTA, k_HBSA, v_HA)

    def weights(self, q_BHTD: Tensor, k_BGSD: Tensor, visible_BS: Tensor | None = None) -> Tensor:
        n_key = k_BGSD.shape[2]
        with torch.autocast(q_BHTD.device.type, enabled=False):
            q_HBTA, k_HBSA, v_HA = self._project(q_BHTD, k_BGSD)
            chunks = [
                F.pad(_weights(q, k, v_HA, visible_BS), (0, n_key - k.shape[2]))
                for q, k in _chunks(q_HBTA, k_HBSA)
            ]
        return torch.cat(chunks, dim=2)

    def attend(
        self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, visible_BS: Tensor | None = None
    ) -> Tensor:
        run = _attend
        if torch.is_grad_enabled():
            run = partial(checkpoint, _attend, use_reentrant=False, preserve_rng_state=False)
        with torch.autocast(q_BHTD.device.type, enabled=False):
            q_HBTA, k_HBSA, v_HA = self._project(q_BHTD, k_BGSD)
            contexts = [
                run(q, k, v_HA, v_BGSD[:, :, : k.shape[2]], visible_BS)
                for q, k in _chunks(q_HBTA, k_HBSA)
            ]
        return torch.cat(contexts, dim=2)

    def _project(self, q_BHTD: Tensor, k_BGSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w_q, w_k = self.matrices()
        return _project(q_BHTD, w_q), _project(k_BGSD, w_k), in_float32(self.by_head(self.v))


class AdditiveScore(TanhScore):
    """v . tanh(W q + U k), with parameters ``w_q`` (W), ``w_k`` (U) and ``v``.

    Source: Bahdanau et al. 2014, arXiv:1409.0473, appendix A.1.2.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.w_q, self.w_k = self.parameter(self.d_head), self.parameter(self.d_head)
        self.v = self.parameter()
        self.init_weights()

    def matrices(self) -> tuple[Tensor, Tensor]:
        return self.by_head(self.w_q), self.by_head(self.w_k)


class ConcatScore(TanhScore):
    """v . tanh(W [q; k]), with parameters ``w`` (A, 2 D) and ``v``.

    The product of W and two concatenated vectors is the sum of two products.

    Source: Luong et al. 2015, arXiv:1508.04025, section 3.1.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.w = self.parameter(2 * self.d_head)
        self.v = self.parameter()
        self.init_weights()

    def matrices(self) -> tuple[Tensor, Tensor]:
        w_q, w_k = self.by_head(self.w).chunk(2, dim=-1)
        return w_q, w_k


def _project(x_BGTD: Tensor, w_HAD: Tensor) -> Tensor:
    """Multiply queries or keys by each query head's matrix: (H, B, T, A), float32."""
    x_GBTD = in_float32(x_BGTD).transpose(0, 1)
    w_GRAD = in_float32(w_HAD).unflatten(0, (len(x_GBTD), -1))
    return (x_GBTD[:, None] @ w_GRAD.mT[:, :, None]).flatten(0, 1)


def _chunks(q_HBTA: Tensor, k_HBSA: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield some queries at a time, and the keys up to the last of them."""
    n_query, n_key = q_HBTA.shape[2], k_HBSA.shape[2]
    n_together = max(1, max_hidden(q_HBTA.device.type) // k_HBSA.numel())
    for first in range(0, n_query, n_together):
        last = min(first + n_together, n_query)
        yield q_HBTA[:, :, first:last], k_HBSA[:, :, : n_key - n_query + last]


def _score(q_HBTA: Tensor, k_HBSA: Tensor, v_HA: Tensor) -> Tensor:
    # Heads first, so that the product with v needs no second copy of the hidden values.
    hidden_HBTSA = (q_HBTA[:, :, :, None] + k_HBSA[:, :, None]).tanh_()
    score_H = hidden_HBTSA.flatten(1, 3) @ v_HA[:, :, None]  # (H, B T S, 1)
    return score_H.view(hidden_HBTSA.shape[:4]).transpose(0, 1)


def _weights(q_HBTA: Tensor, k_HBSA: Tensor, v_HA: Tensor, visible_BS: Tensor | None) -> Tensor:
    visible = None if visible_BS is None else visible_BS[..., : k_HBSA.shape[2]]
    return causal_softmax(_score(q_HBTA, k_HBSA, v_HA), visible)


def _attend(
    q_HBTA: Tensor, k_HBSA: Tensor, v_HA: Tensor, v_BGSD: Tensor, visible_BS: Tensor | None
) -> Tensor:
    return weighted_sum(_weights(q_HBTA, k_HBSA, v_HA, visible_BS), v_BGSD)
