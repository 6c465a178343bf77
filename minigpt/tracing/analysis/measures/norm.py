"""Norms of the weighted value vectors: weight x ||v W_O||.

Source: Kobayashi et al. 2020, arXiv:2004.10102, equation 4.

Shapes: L layers, B batch, H query heads, G key/value heads, R query heads per key/value head,
T new positions, S positions in view, P positions for which memory is allocated, D head dim,
C model dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.model.language_model import LanguageModel
from minigpt.tracing.analysis.linear_logits import dense_weight
from minigpt.tracing.analysis.measures import Prediction, Rows, register
from minigpt.tracing.analysis_config import AnalysisConfig


@register(
    description="the norm of the heads' addition to the residual stream from a source, weight x "
    "||v W_O|| (Kobayashi et al. 2020), as a share of the row",
    sums_to="1",
    caveat="A norm shows how much a source contributed, not why a token was generated.",
)
def norm(model: LanguageModel, config: AnalysisConfig) -> Rows:
    """Weight each source by the norm of the vector that a head adds from it."""
    norms = _ValueNorms(model)

    def rows_LHS(prediction: Prediction) -> Tensor:
        attention = prediction.attention
        values_LGSD = attention.values_LBGSD[:, 0]
        n_key = values_LGSD.shape[2]
        norms.extend(values_LGSD[:, :, n_key - attention.n_new :], n_key)
        return attention.weights_LBHS[:, 0] * norms.norms_LHP[:, :, :n_key]

    return rows_LHS


class _ValueNorms:
    """||v_j W_O,h|| of every layer, head and position: one scalar each, computed once.

    The norm of v_j W_O,h, where W_O,h is a head's (C, D) part of W_O, only needs R of its QR
    decomposition: D x D numbers, independent of the model dim.
    """

    def __init__(self, model: LanguageModel) -> None:
        factors = []
        for attention in model.attentions:
            weight = dense_weight(attention.output).detach()
            heads_HCD = weight.unflatten(1, (model.config.n_head, -1)).transpose(0, 1)
            factors.append(torch.linalg.qr(heads_HCD, mode="r").R)
        factors_LHCD = torch.stack(factors)
        # (L, G, R, D, C or D), to broadcast with the values of each group
        self._factors = factors_LHCD.unflatten(1, (model.config.n_kv_head, -1)).mT.contiguous()
        self.norms_LHP = torch.empty(*factors_LHCD.shape[:2], 0, device=weight.device)

    def extend(self, new_values_LGTD: Tensor, end: int) -> None:
        """Append the norms of the new positions, which end at ``end - 1``."""
        n_new = new_values_LGTD.shape[2]
        if end > self.norms_LHP.shape[2]:
            self.norms_LHP = F.pad(self.norms_LHP, (0, 2 * end - self.norms_LHP.shape[2]))
        added_LGRTD = new_values_LGTD.float()[:, :, None] @ self._factors
        lengths_LGRT = torch.linalg.vector_norm(added_LGRTD, dim=-1)
        self.norms_LHP[:, :, end - n_new : end] = lengths_LGRT.flatten(1, 2)
