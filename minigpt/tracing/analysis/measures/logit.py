"""Direct logit attribution: each head's contribution from each position to the token's logit.

For the token y, head h and position j: a_hj (v_j W_O,h) . (w_U[y] o gamma) / rms, with the scale of
the final norm frozen.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; nostalgebraist 2020
(logit lens); ``logit_attrs`` of TransformerLens (Nanda & Bloom 2022).

Shapes: L layers, N = 2 L + 1 states of the residual stream, H query heads, G key/value heads,
R = H / G, S positions in view, D head dim, C model dim, X all heads' outputs concatenated.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.model.attention import AttentionPass
from minigpt.model.gpt import GPT
from minigpt.model.language_model import LanguageModel
from minigpt.tracing.analysis.linear_logits import (
    HeadDirections,
    frozen_norm,
    logit_weights,
    why_not_linear,
)
from minigpt.tracing.analysis.measures import Measured, Prediction, Rows, register
from minigpt.tracing.analysis_config import AnalysisConfig


@register(
    description="direct contribution of the heads, from a source, to the logit of the token, with "
    "the scale of the final norm frozen (Elhage et al. 2021)",
    unit="logits",
    is_signed=True,
    sums_to="the token's logit",
    other_parts="MLPs, embedding, biases",
    needs_residual=True,
    needs_token=True,
    is_batched=True,
    caveat="It counts what heads add to the logit directly, not through later layers.",
)
def logit(model: LanguageModel, config: AnalysisConfig) -> Rows:
    """Attribute the token's logit to each head's contribution from each position."""
    if why := why_not_linear(model):
        raise ConfigError(
            f"measure logit is not possible with this model ({type(model).__name__}): {why}. "
            "Use measure gradient."
        )
    assert isinstance(model, GPT)
    return _LogitRows(model)


class _LogitRows:
    """Attributes the logits of predictions to heads and positions."""

    def __init__(self, model: GPT) -> None:
        self._model, self._head_directions = model, HeadDirections(model)
        # On the device once: copying each token's id to a GPU would block it.
        self._ids_V = torch.arange(model.config.vocab_size, device=model.device)

    def __call__(self, predictions: Sequence[Prediction]) -> list[Measured]:
        contexts = [_output_inputs(prediction.attention) for prediction in predictions]
        us_C, biases = self._logit_directions(predictions)
        at_heads = self._head_directions(us_C, [contexts_LX.unbind() for contexts_LX in contexts])
        return [
            self._attributed(prediction, contexts_LX, u_C, bias, *of_heads)
            for prediction, contexts_LX, u_C, bias, of_heads in zip(
                predictions, contexts, us_C, biases, at_heads, strict=True
            )
        ]

    def _logit_directions(
        self, predictions: Sequence[Prediction]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return u_y and the contribution of the final norm's bias, for each prediction."""
        targets_T = torch.stack([self._ids_V[one.target] for one in predictions])
        w_TC = logit_weights(self._model, targets_T)
        if (against := predictions[0].against) is not None:
            w_TC = w_TC - logit_weights(self._model, self._ids_V[against])
        last_TC = torch.stack([one.residual_NC[-1] for one in predictions]).float()
        u_TC, bias_T = frozen_norm(self._model.final_norm, last_TC, w_TC)
        # Copies: the bits of a product may depend on the memory alignment of a vector.
        return [u_C.clone() for u_C in u_TC], bias_T.unbind()

    def _attributed(
        self,
        prediction: Prediction,
        contexts_LX: Tensor,
        u_C: Tensor,
        bias: Tensor,
        u_LX: Tensor,
        bias_L: Tensor,
    ) -> Measured:
        attention, config = prediction.attention, self._model.config
        u_LGRD = u_LX.unflatten(1, (config.n_kv_head, -1, config.d_head))
        logits_LGRS = u_LGRD @ attention.values_LBGSD[:, 0].float().mT
        rows_LHS = attention.weights_LBHS[:, 0] * logits_LGRS.flatten(1, 2)
        # A patched layer replaces the stream, so the states before it do not contribute.
        states_N = prediction.residual_NC[attention.first_state :].float() @ u_C
        n_replaced = attention.first_state // 2  # layers
        whole, first, of_mlps, of_attention = (_sums(len(states_N), u_C.device) @ states_N).unbind()
        parts = {"embedding": first}
        if attention.replaced or n_replaced:
            replaced = first if n_replaced else torch.zeros_like(first)
            parts = {"embedding": torch.zeros_like(first) if n_replaced else first}
            rows_LHS[:n_replaced] = 0
            bias_L[:n_replaced] = 0
            by_head_LH = (u_LX * contexts_LX.float()).unflatten(1, (-1, config.d_head)).sum(2)
            for layer, (are_replaced_H1, _) in attention.replaced.items():
                rows_LHS[layer].masked_fill_(are_replaced_H1, 0)
                if layer >= n_replaced:
                    of_heads = (by_head_LH[layer] * are_replaced_H1[:, 0]).sum()
                    replaced, of_attention = replaced + of_heads, of_attention - of_heads
            parts["intervention"] = replaced
        of_biases = bias_L.sum()
        parts |= {
            "mlp": of_mlps,
            "bias": of_biases + bias,
            # Error of low-precision kernels.
            "rounding": of_attention - rows_LHS.sum() - of_biases,
        }
        return Measured(rows_LHS, parts, whole=whole + bias)


@lru_cache(maxsize=8)
def _sums(n_states: int, device: torch.device) -> Tensor:
    """Return a matrix (4, N) that maps the states to the last state, the first state, and the sums
    of the MLPs' and of the attentions' additions.
    """
    sums_4N = torch.zeros(4, n_states)
    sums_4N[0, -1] = sums_4N[1, 0] = sums_4N[2, 2::2] = sums_4N[3, 1::2] = 1
    sums_4N[2, 1::2] = sums_4N[3, :-1:2] = -1
    return sums_4N.to(device)


def _output_inputs(attention: AttentionPass) -> Tensor:
    """Return the input of each layer's W_O at the last position: (L, X)."""
    contexts_LX = attention.context_LBHD[:, 0].flatten(1)
    if attention.replaced:
        contexts_LX = contexts_LX.clone()
        for layer, (_, given_BHD) in attention.replaced.items():
            contexts_LX[layer] = given_BHD[0].flatten()
    return contexts_LX
