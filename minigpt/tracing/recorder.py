"""Recording of attention: the last query's row of every head.

Shapes: L layers, B batch, H query heads, G key/value heads, S keys, D head dim.
"""

import math

import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.model.attention import AttentionPass
from minigpt.model.language_model import LanguageModel


def require_attention(model: LanguageModel) -> None:
    """Raise ConfigError if a model has no attention."""
    if not model.attentions:
        raise ConfigError(
            f"a model of arch {model.config.arch} has no attention to show. Choose another one."
        )


class RowRecorder:
    """Keeps each head's attention row of the last query of the last forward pass.

    In a decode step these are the weights that the model used; in a prefill, which uses a fused
    kernel, they are the softmax of the model's own score, in float32.
    """

    needs_queries = False
    """Whether the model passes the queries and keys of all new positions."""
    needs_residual = False
    """Whether the model passes the residual stream."""

    def __init__(self, model: LanguageModel) -> None:
        """Raises: ConfigError if the model has no attention."""
        require_attention(model)
        self._n_layer = len(model.attentions)
        self._n_passes = 0
        self._last: AttentionPass | None = None
        self.product_error: Tensor | None = None
        """Largest difference between a row times the values and the head's output, relative to the
        largest output; of the last pass, in one layer (each pass checks the next layer)."""

    @torch.no_grad()
    def record(self, attention: AttentionPass) -> None:
        """Take the rows of the first sequence of the batch."""
        self._last = attention
        layer = self._n_passes % self._n_layer
        self._n_passes += 1
        v_GSD = attention.values_LBGSD[layer, 0].float()
        rows_GRS = attention.weights_LBHS[layer, 0].view(len(v_GSD), -1, v_GSD.shape[1])
        product_GRD = torch.bmm(rows_GRS, v_GSD)
        context_GRD = attention.context_LBHD[layer, 0].float().view(product_GRD.shape)
        largest = torch.linalg.vector_norm(context_GRD, ord=math.inf)
        error = torch.dist(product_GRD, context_GRD, p=math.inf)
        self.product_error = error / largest.clamp(min=1e-30)

    @property
    def attention(self) -> AttentionPass:
        """The last forward pass."""
        assert self._last is not None, "no forward pass was recorded"
        return self._last

    @property
    def weights_LHS(self) -> Tensor:
        """Attention weights of the last pass, float32, on the model's device; rows sum to 1."""
        return self.attention.weights_LBHS[:, 0]
