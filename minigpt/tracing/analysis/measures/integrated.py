"""Integrated gradients: attribution to each earlier token along a path from a baseline.

For the token y, the embeddings e and the baseline b: (e_j - b) . the mean, for a from 0 to 1, of
the gradient of logit(y) at b + a (e - b), by Gauss-Legendre quadrature. Up to the quadrature error,
the row sums to logit(y) minus the logit with b at every position (completeness).

The baseline is the mean embedding of the vocabulary. The usual zero baseline does not work: RMSNorm
ignores the scale of the embeddings, so nearly all change would happen close to zero.

Source: Sundararajan et al. 2017, arXiv:1703.01365.

Shapes: A steps, S positions in view, C model dim.
"""

import numpy as np
import torch

from minigpt.model.language_model import LanguageModel
from minigpt.tracing.analysis.input_gradients import embeddings, gradients, logit_at
from minigpt.tracing.analysis.measures import Measured, Prediction, Rows, register
from minigpt.tracing.analysis_config import AnalysisConfig

_MAX_POSITIONS = 2**12
"""Maximum number of positions in a batch, over all its sequences."""


@register(
    description="integrated gradients of the token's logit, from the mean embedding to that of a "
    "source (Sundararajan et al. 2017)",
    unit="logits",
    is_signed=True,
    has_heads=False,
    sums_to="the token's logit minus that of the baseline",
    other_parts="logit of the baseline, error",
    needs_token=True,
    caveat="A path from the mean embedding passes inputs that the model never saw in training.",
)
def integrated(model: LanguageModel, config: AnalysisConfig) -> Rows:
    """Integrate the gradient of the token's logit from the mean to the tokens' embeddings."""
    baseline_C = embeddings(model, range(model.config.vocab_size)).float().mean(dim=0)
    nodes, weights = np.polynomial.legendre.leggauss(config.n_steps)
    steps_A = torch.tensor((nodes + 1) / 2, dtype=torch.float32, device=model.device)
    weights_A = torch.tensor(weights / 2, dtype=torch.float32, device=model.device)

    def rows(prediction: Prediction) -> Measured:
        x_SC = embeddings(model, prediction.tokens)
        from_SC = baseline_C.to(x_SC.dtype).expand_as(x_SC)
        per_batch = max(1, _MAX_POSITIONS // len(x_SC))
        mean_SC = torch.zeros_like(x_SC, dtype=torch.float32)
        for steps, shares in zip(steps_A.split(per_batch), weights_A.split(per_batch), strict=True):
            gradient_ASC = gradients(
                model, torch.lerp(from_SC, x_SC, steps[:, None, None].to(x_SC.dtype)), prediction
            )
            mean_SC += (shares[:, None, None] * gradient_ASC.float()).sum(dim=0)
        row_S = ((x_SC - from_SC).float() * mean_SC).sum(dim=1)
        whole, baseline = logit_at(model, torch.stack((x_SC, from_SC)), prediction)
        return Measured(
            row_S, {"baseline": baseline, "error": whole - baseline - row_S.sum()}, whole
        )

    return rows
