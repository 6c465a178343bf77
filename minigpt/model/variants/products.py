"""Attention scores that are dot products of keys and transformed queries; base of learned scores.

Shapes: B batch, H query heads, T queries, D head dim.
"""

import torch
from torch import Tensor, nn

from minigpt.config import ModelConfig
from minigpt.model.scores import Score


class DotScore(Score):
    """The dot product, q . k.

    Source: Luong et al. 2015, arXiv:1508.04025, section 3.1.
    """

    changes_queries = True

    def fold(self, q_BHTD: Tensor) -> Tensor:
        return q_BHTD * self.d_head**0.5


class LearnedScore(Score):
    """A score with parameters for each head."""

    def parameter(self, *inputs: int) -> nn.Parameter:
        """Return a parameter with D outputs for each head, stacked as in a projection: (H D, ...).

        Muon treats matrices of this shape like the query projection.
        """
        return nn.Parameter(torch.zeros(self.n_head * self.d_head, *inputs))

    def by_head(self, parameter: Tensor) -> Tensor:
        """Return a parameter as (H, D, ...)."""
        return parameter.unflatten(0, (self.n_head, -1))


class GeneralScore(LearnedScore):
    """A learned bilinear form, q^T W k, with a matrix W for each head.

    Source: Luong et al. 2015, arXiv:1508.04025, section 3.1.
    """

    changes_queries = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.w = self.parameter(self.d_head)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set W to I / sqrt(D), so that the score begins as the scaled dot product."""
        identity = torch.eye(self.d_head) * self.d_head**-0.5
        self.w.copy_(identity.repeat(self.n_head, 1))

    def fold(self, q_BHTD: Tensor) -> Tensor:
        return q_BHTD @ (self.by_head(self.w) * self.d_head**0.5).to(q_BHTD.dtype)
