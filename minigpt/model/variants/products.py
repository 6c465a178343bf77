"""Attention scores that are the dot product of the keys with changed queries.

Shapes: B batch, H query heads, T queries, D head dim.
"""

import torch
from torch import Tensor

from minigpt.config import ModelConfig
from minigpt.model.scores import ScaledScore, Score


class DotScore(ScaledScore):
    """The dot product, q . k.

    Source: Luong et al. 2015, arXiv:1508.04025, section 3.1.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, 1.0)


class GeneralScore(Score):
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
