"""A recorder that keeps every attention pass, for tests."""

from dataclasses import replace

import torch
from torch import Tensor

from minigpt.model.attention import AttentionPass
from minigpt.model.language_model import LanguageModel


class KeptAttention:
    """Records a copy of every attention pass."""

    needs_queries = True

    def __init__(self, *, needs_residual: bool = False) -> None:
        self.needs_residual = needs_residual
        self.passes: list[AttentionPass] = []

    def record(self, attention: AttentionPass) -> None:
        self.passes.append(
            replace(
                attention,
                weights_LBHS=attention.weights_LBHS.clone(),
                context_LBHD=attention.context_LBHD.clone(),
                values_LBGSD=attention.values_LBGSD.clone(),
            )
        )

    @property
    def last(self) -> AttentionPass:
        return self.passes[-1]

    def weights(self, model: LanguageModel) -> Tensor:
        """Return the full attention matrices of the last pass: (L, B, H, T, S)."""
        if self.last.n_new == 1:
            return self.last.weights_LBHS[:, :, :, None]
        assert self.last.queries is not None
        assert self.last.keys is not None
        layers = zip(model.attentions, self.last.queries, self.last.keys, strict=True)
        return torch.stack([layer.score.weights(q, k) for layer, q, k in layers])


def full_weights(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Return the attention matrices (L, B, H, T, S) of a forward pass without a cache."""
    kept = KeptAttention()
    model(tokens, recorder=kept)
    return kept.weights(model)
