"""Direct logit attribution: what each head brought from each position to the token's logit.

For the token y, head h and position j: a_hj (v_j W_O,h) . (w_U[y] o gamma) / rms, with the scale of
the final norm frozen.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; nostalgebraist 2020
(logit lens); ``logit_attrs`` of TransformerLens (Nanda & Bloom 2022).

Shapes: L layers, N = 2 L + 1 states of the residual stream, H query heads, G key/value heads,
R = H / G, S positions in view, D head dim, C model dim, X all heads' outputs side by side.
"""

from functools import lru_cache

import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.model.attention import AttentionPass
from minigpt.model.gpt import GPT
from minigpt.model.language_model import LanguageModel
from minigpt.tracing.analysis.frozen import (
    HeadDirections,
    frozen_norm,
    logit_weights,
    why_not_linear,
)
from minigpt.tracing.analysis.measures import Measured, Prediction, Rows, register
from minigpt.tracing.analysis_config import AnalysisConfig


@register(
    about="what the heads brought from a source directly to the logit of the token, with the scale "
    "of the final norm frozen (Elhage et al. 2021)",
    unit="logits",
    is_signed=True,
    sums_to="the token's logit",
    needs=("residual", "token"),
    caveat="Only what heads brought directly counts, not what later layers made of it.",
)
def logit(model: LanguageModel, config: AnalysisConfig) -> Rows:
    """Attribute the token's logit to what each head brought from each position."""
    if why := why_not_linear(model):
        raise ConfigError(
            f"measure logit is not possible with this model ({type(model).__name__}): {why}. "
            "Use measure gradient."
        )
    assert isinstance(model, GPT)
    directions, n_group = HeadDirections(model), model.config.n_kv_head
    # An id that is made for each token would be copied to a GPU, which waits for it.
    ids_V = torch.arange(model.config.vocab_size, device=model.device)

    def rows(prediction: Prediction) -> Measured:
        attention = prediction.attention
        assert attention.residual_NBC is not None
        x_NC = attention.residual_NBC[:, 0].float()
        w_C = logit_weights(model, ids_V[prediction.target])
        if prediction.against is not None:
            w_C = w_C - logit_weights(model, ids_V[prediction.against])
        u_C, bias = frozen_norm(model.final_norm, x_NC[-1], w_C)
        given_LX = _given_to_outputs(attention)
        u_LX, bias_L = directions(u_C, given_LX.unbind())
        u_LGRD = u_LX.unflatten(1, (n_group, -1, model.config.d_head))
        brought_LGRS = u_LGRD @ attention.values_LBGSD[:, 0].float().mT
        rows_LHS = attention.weights_LBHS[:, 0] * brought_LGRS.flatten(1, 2)
        states_N = x_NC @ u_C
        whole, parts = states_N[-1] + bias, {"embedding": states_N[0]}
        of_heads = 0.0  # what other values than those of the positions brought
        if attention.replaced or attention.first_state:
            n_gone = attention.first_state // 2  # layers whose outputs are no longer in the stream
            rows_LHS[:n_gone] = 0
            bias_L[:n_gone] = 0
            by_head_LH = (u_LX * given_LX.float()).unflatten(1, (-1, model.config.d_head)).sum(2)
            for layer, (are_replaced_H1, _) in attention.replaced.items():
                rows_LHS[layer].masked_fill_(are_replaced_H1, 0)
                if layer >= n_gone:
                    of_heads = of_heads + (by_head_LH[layer] * are_replaced_H1[:, 0]).sum()
            put_in = states_N.new_zeros(()) + of_heads
            if n_gone:
                states_N = states_N[attention.first_state :]
                put_in = put_in + states_N[0]
                parts["embedding"] = states_N.new_zeros(())
            parts["intervention"] = put_in
        of_mlps, of_attention = _branch_sums(len(states_N), states_N.device) @ states_N
        of_biases = bias_L.sum()
        parts |= {
            "mlp": of_mlps,
            "bias": of_biases + bias,
            # What kernels of a low precision lost.
            "rounding": of_attention - rows_LHS.sum() - of_biases - of_heads,
        }
        return Measured(rows_LHS, parts, whole=whole)

    return rows


@lru_cache(maxsize=8)
def _branch_sums(n_states: int, device: torch.device) -> Tensor:
    """Return (2, N), which times the states gives what all MLPs and all attentions added."""
    sums_2N = torch.zeros(2, n_states)
    sums_2N[0, 2::2] = sums_2N[1, 1::2] = 1
    sums_2N[0, 1::2] = sums_2N[1, :-1:2] = -1
    return sums_2N.to(device)


def _given_to_outputs(attention: AttentionPass) -> Tensor:
    """Return what each layer's W_O was given at the last position: (L, X)."""
    contexts_LX = attention.context_LBHD[:, 0].flatten(1)
    if attention.replaced:
        contexts_LX = contexts_LX.clone()
        for layer, (_, given_BHD) in attention.replaced.items():
            contexts_LX[layer] = given_BHD[0].flatten()
    return contexts_LX
