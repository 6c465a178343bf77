"""Direct logit attribution: what each head brought from each position to the token's logit.

For the token y, head h and position j: a_hj (v_j W_O,h) . (w_U[y] o gamma) / rms, with the scale of
the final norm frozen.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; nostalgebraist 2020
(logit lens); ``logit_attrs`` of TransformerLens (Nanda & Bloom 2022).

Shapes: L layers, N = 2 L + 1 states of the residual stream, H query heads, G key/value heads,
R = H / G, S positions in view, D head dim, C model dim, X all heads' outputs side by side.
"""

import torch

from minigpt.errors import ConfigError
from minigpt.model.gpt import GPT
from minigpt.model.language_model import LanguageModel
from minigpt.tracing.analysis.frozen import (
    HeadDirections,
    frozen_norm,
    logit_weights,
    why_not_linear,
)
from minigpt.tracing.analysis.measures import Measured, Prediction, Rows, register
from minigpt.tracing.config import TraceConfig


@register(
    about="what the heads brought from a source directly to the logit of the token, with the scale "
    "of the final norm frozen (Elhage et al. 2021)",
    unit="logits",
    is_signed=True,
    sums_to="the token's logit",
    needs=("residual", "token"),
)
def logit(model: LanguageModel, config: TraceConfig) -> Rows:
    """Attribute the token's logit to what each head brought from each position."""
    if why := why_not_linear(model):
        raise ConfigError(
            f"--measure logit is not possible with this model ({type(model).__name__}): {why}. "
            "Use --measure gradient."
        )
    assert isinstance(model, GPT)
    directions, n_group = HeadDirections(model), model.config.n_kv_head

    def rows(prediction: Prediction) -> Measured:
        attention = prediction.attention
        assert attention.residual_NBC is not None
        x_NC = attention.residual_NBC[:, 0].float()
        ids = [id_ for id_ in (prediction.target, prediction.against) if id_ is not None]
        w_NC = logit_weights(model, torch.tensor(ids, device=model.device))
        w_C = w_NC[0] if prediction.against is None else w_NC[0] - w_NC[1]
        u_C, bias = frozen_norm(model.final_norm, x_NC[-1], w_C)
        contexts_LX = attention.context_LBHD[:, 0].flatten(1)
        u_LX, branch_bias = directions(u_C, contexts_LX.unbind())
        u_LGRD = u_LX.unflatten(1, (n_group, -1, model.config.d_head))
        brought_LGRS = u_LGRD @ attention.values_LBGSD[:, 0].float().mT
        rows_LHS = attention.weights_LBHS[:, 0] * brought_LGRS.flatten(1, 2)
        states_N = x_NC @ u_C
        by_branch = states_N.diff()
        parts = {
            "embedding": states_N[0],
            "mlp": by_branch[1::2].sum(),
            "bias": branch_bias + bias,
            # What kernels of a low precision lost.
            "rounding": by_branch[0::2].sum() - rows_LHS.sum() - branch_bias,
        }
        return Measured(rows_LHS, parts, whole=states_N[-1] + bias)

    return rows
